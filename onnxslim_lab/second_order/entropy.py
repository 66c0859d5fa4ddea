"""Shared values that cost few bits once they are coded: entropy-constrained scalar quantization.

A weight takes the value c with the least m (w - c)^2 + multiplier * bits(c), where m is what its error counts and
bits(c) = -log2 of how often c is used; values that are seldom used lose their members and fall away. Chou,
Lookabaugh & Gray, Entropy-Constrained Vector Quantization, 1989; for networks: Choi, El-Khamy & Lee, Towards
the Limit of Network Quantization, 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim_lab.clustering import Init
from onnxslim_lab.second_order.obs import Doubles, Integers
from onnxslim_lab.second_order.sharing import weighted_codebook

SEEN = 1 << 13  # weights that the codebook is designed on
ROUNDS = 30  # assignments and new values, at most, for one multiplier
HALVINGS = 10  # of the interval of the multiplier


@dataclass(frozen=True)
class Code:
    """Values and the bits that each takes.

    Attributes:
        values: Ascending.
        bits: Codeword lengths, -log2 of the probabilities.
        multiplier: What a bit counts against squared error.
    """

    values: Doubles
    bits: Doubles
    multiplier: float

    def assign(self, weights: Doubles, masses: Doubles) -> Integers:
        """Return for each weight the index of the value with the least cost; zeros take 0.0 if it is there."""
        best = np.full(weights.shape, np.inf)
        index = np.zeros(weights.shape, np.int64)
        for number, (value, bits) in enumerate(zip(self.values, self.bits, strict=True)):
            cost = masses * (weights - value) ** 2 + self.multiplier * bits
            index = np.where(cost < best, number, index)
            np.minimum(best, cost, out=best)
        if (zero := np.flatnonzero(self.values == 0)).size:
            index[weights == 0] = zero[0]
        return index


def entropy(index: Integers) -> float:
    """Return the bits that each index takes on average when coded by how often it occurs.

    >>> entropy(np.array([0, 0, 1, 2]))
    1.5
    """
    counts = np.bincount(index.reshape(-1))
    chance = counts[counts > 0] / index.size
    return float(-(chance * np.log2(chance)).sum())


def entropy_code(
    weights: Doubles,
    masses: Doubles,
    size: int,
    most: float,
    *,
    zero: bool,
    init: Init = "linear",
    seed: int = 0,
) -> Code:
    """Return the code of at most `size` values that loses least while weights take `most` bits on average.

    It is designed on a regular sample of the weights, so that the bits of all of them can be a little more.

    Args:
        weights: Finite, one-dimensional.
        masses: What their squared errors count, positive.
        size: Values, zero included.
        most: Bits for each weight, above 0.
        zero: Whether 0.0 is a value, which zeros keep.
        init: Start of k-means, which gives the values to begin with.
        seed: Seed of a random start.
    """
    step = -(-weights.size // SEEN)
    seen, mass = weights[::step], masses[::step]
    some = seen != 0 if zero else np.ones(seen.shape, np.bool_)
    start = np.zeros(0)
    if some.any():
        start = weighted_codebook(seen[some], mass[some], size - zero, init=init, seed=seed)
    if zero:
        start = np.unique(np.append(start, 0.0))
    code, bits = _settled(seen, mass, start, 0.0)
    if bits <= most:
        return code
    scale = float((mass * (seen - np.average(seen, weights=mass)) ** 2).mean())
    low, high = 0.0, max(scale, np.finfo(np.float64).tiny)
    good, bits = _settled(seen, mass, start, high)
    while bits > most:
        low, high = high, 4 * high
        good, bits = _settled(seen, mass, start, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        code, bits = _settled(seen, mass, start, middle)
        if bits <= most:
            good, high = code, middle
        else:
            low = middle
    return good


def _settled(weights: Doubles, masses: Doubles, start: Doubles, multiplier: float) -> tuple[Code, float]:
    """Return the code that alternating assignment and averaging ends at, and the bits for each weight."""
    code = Code(start, np.zeros(start.size), multiplier)  # all values alike to begin with
    index = code.assign(weights, masses)
    for _ in range(ROUNDS):
        code = _averaged(code, weights, masses, index)
        again = code.assign(weights, masses)
        if np.array_equal(again, index):
            break
        index = again
    return code, entropy(index)


def _averaged(code: Code, weights: Doubles, masses: Doubles, index: Integers) -> Code:
    """Return a code of the means of the members and of how often they occur; `index` follows in place."""
    counts = np.bincount(index, minlength=code.values.size)
    used = counts > 0
    mass = np.bincount(index, masses, code.values.size)[used]
    values = np.bincount(index, masses * weights, code.values.size)[used] / mass
    values[code.values[used] == 0] = 0.0
    index[...] = (np.cumsum(used) - 1)[index]
    return Code(values, -np.log2(counts[used] / index.size), code.multiplier)
