"""Rounding to a codebook: values shared by a whole matrix, found by k-means weighted by input energy.

Choi, El-Khamy & Lee 2017, "Towards the limit of network quantization": k-means in which a weight counts as
much as the diagonal of the Hessian says, here the Gram matrix of the layer's inputs. With the whole Gram matrix
the weights are then assigned with compensation instead of to the nearest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim_lab.clustering import Init, cluster, midpoints, settle
from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.compensation import (
    DAMPING,
    check_gram,
    compensate,
    improve,
    output_error,
)

_INITS: tuple[Init, ...] = ("density", "linear")  # k-means ends in a local optimum; the better one is taken
_POINTS = 1 << 12  # of the weighted histogram that k-means sees


@dataclass(frozen=True, eq=False)
class Codebook:
    """A matrix of indices into shared values.

    Attributes:
        codes: Indices, uint8 (out, in).
        values: Shared values, ascending, float32 (at most 2**bits,).
    """

    codes: Array
    values: Array

    @property
    def matrix(self) -> Array:
        """The weights that the codes stand for, float32 (out, in)."""
        return np.asarray(self.values[self.codes])


def weighted_codebook(matrix: Array, bits: int, energy: Array | None = None) -> Array:
    """Return at most 2**bits values, ascending float32, that lose least of the weighted squares.

    Args:
        matrix: Weights (out, in), finite.
        bits: 1 to 8.
        energy: Weight of every column, (in,): the diagonal of the Gram matrix; None for all alike. Columns of
            no energy count a little.

    Raises:
        ValueError: A weight is not finite or `bits` is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"a codebook of {bits} bits; 1 to 8 are possible")
    if not np.isfinite(matrix).all():
        raise ValueError("the weight is not finite")
    if matrix.size == 0:
        return np.zeros(1, np.float32)
    share = np.ones(matrix.shape[1])
    if energy is not None and np.any(energy > 0):
        share = np.maximum(energy / np.mean(energy), 1e-3)
    flat = matrix.astype(np.float64).reshape(-1)
    mass = np.broadcast_to(share, matrix.shape).reshape(-1)
    order = np.argsort(flat, kind="stable")
    ascending, mass = flat[order], mass[order]
    if flat.size > _POINTS:
        starts = np.unique(np.searchsorted(ascending, ascending[:: -(-flat.size // _POINTS)]))
    else:
        starts = np.flatnonzero(np.diff(ascending, prepend=-np.inf))
    counts = np.add.reduceat(mass, starts)
    points = np.add.reduceat(mass * ascending, starts) / counts
    size = 1 << bits
    even = np.diff(np.append(starts, flat.size)).astype(np.float64)
    trials = [settle(points, counts, cluster(points, counts, size, init=init)) for init in _INITS]
    trials.append(settle(points, counts, settle(points, even, cluster(points, even, size, init="density"))))
    best = min(trials, key=lambda centres: _loss(points, counts, centres))
    return np.unique(best.astype(np.float32))


def _loss(points: Array, counts: Array, centres: Array) -> float:
    nearest = centres[np.searchsorted(midpoints(centres), points)]
    return float((counts * (points - nearest) ** 2).sum())


def round_codebook(
    matrix: Array, bits: int, gram: Array | None = None, *, damping: float = DAMPING
) -> Codebook:
    """Return a codebook and codes of little output error.

    Args:
        matrix: Weights (out, in), finite.
        bits: 1 to 8.
        gram: X^T X (in, in): codes by GPTQ and coordinate descent, each row at most as bad as with the nearest
            values; its diagonal (in,) or None: the nearest values.
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.

    Raises:
        ValueError: A weight or the Gram matrix is not finite, shapes do not fit, `bits` is out of range.
    """
    if gram is not None:
        check_gram(matrix, gram)
    energy = None if gram is None else gram if gram.ndim == 1 else np.diagonal(gram)
    shared = _Shared(weighted_codebook(matrix, bits, energy))
    codes = shared.snap(0, matrix.astype(np.float64))[0].astype(np.uint8)
    nearest = Codebook(codes, shared.values)
    if gram is None or gram.ndim == 1 or matrix.size == 0:
        return nearest
    found = compensate(matrix, shared, gram, damping=damping)
    values = shared.values[found.astype(np.intp)]
    found = improve(matrix, shared, found, values, gram, damping=damping)
    compensated = Codebook(np.ascontiguousarray(found.T).astype(np.uint8), shared.values)
    losses = [output_error(matrix, part.matrix, gram) for part in (compensated, nearest)]
    pick = (losses[0] <= losses[1])[:, None]
    return Codebook(np.where(pick, compensated.codes, nearest.codes), shared.values)


class _Shared:
    """The same values for every column."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.borders = midpoints(values.astype(np.float64))

    def snap(self, column: int, values: Array) -> tuple[Array, Array]:  # noqa: ARG002 - all columns are alike
        codes = np.searchsorted(self.borders, values)
        return codes.astype(values.dtype), self.values[codes].astype(values.dtype)
