"""Orthonormal bases of a layer's outputs, best direction first, and what leaving directions out costs.

A weight W (out, in) of rank r is W' = Q_r (Q_r^T W) with the first r columns of an orthonormal Q. The directions
are orthogonal, so the loss |X (W - W')^T|^2 is exactly the sum of what each left-out direction carries,
q^T W G W^T q with the Gram matrix G = X^T X of the input rows (the identity where nothing was measured).

svd: Q are W's left singular vectors (Eckart & Young 1936). whitened: those of W L with G = L L^T; truncated and
multiplied by L^-1 that is Q_r Q_r^T W, the smallest loss of all (Wang et al., SVD-LLM, 2024). qr: Q of the
column-pivoted QR decomposition (Businger & Golub 1965), the cheapest to compute. Large matrices of which few
directions are wanted: randomized SVD (Halko, Martinsson & Tropp 2011).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Method = Literal["svd", "qr", "whitened"]

LARGE = 512  # smaller side from which a quarter of the directions or fewer are found by randomized SVD
EXTRA = 10  # directions that it finds besides
ROUNDS = 7  # of its iteration
BLOCK = 4 << 20  # bytes of rows at a time


@dataclass(frozen=True, eq=False)
class Metric:
    """What an error of a layer's weight costs at its output.

    Attributes:
        gram: Sum of x x^T over the input rows (groups, in, in), or its diagonal (groups, in).
        ridge: What is added to the diagonal before whitening, (groups,): without it inputs that the data
            never showed would be projected away. It never enters the losses.
    """

    gram: Doubles
    ridge: Doubles

    @classmethod
    def of(cls, gram: Array, *, damping: float = 0.0, counts: float = 0.0) -> Metric:
        """Return the metric of a Gram matrix (groups, in, in) or diagonal (groups, in).

        Args:
            gram: The sums.
            damping: Ridge as part of the mean of the diagonal.
            counts: Ridge as such: how often each entry of a lookup table is taken to have been seen besides.
        """
        sums = np.asarray(gram, np.float64)
        diagonal = np.einsum("gii->gi", sums) if sums.ndim == 3 else sums
        return cls(sums, damping * diagonal.mean(axis=1) + counts)

    def energies(self, rows: Array, group: int) -> Doubles:
        """Return x -> sum of (row . x)^2 over the data, for rows (k, in) of one group: (k,)."""
        gram = self.gram[group]
        met = rows @ gram if gram.ndim == 2 else rows * gram
        return np.asarray(np.maximum(np.einsum("ki,ki->k", met, rows), 0.0))

    def root(self, group: int) -> Doubles:
        """Return L with L L^T the Gram matrix plus ridge of one group; its diagonal where that is all of it."""
        gram = self.gram[group]
        if gram.ndim == 1:
            return np.asarray(np.sqrt(gram + self.ridge[group]))
        whole = gram.copy()
        whole.reshape(-1)[:: len(whole) + 1] += self.ridge[group]
        try:
            return np.asarray(scipy.linalg.cholesky(whole, lower=True, overwrite_a=True, check_finite=False))
        except scipy.linalg.LinAlgError:  # semidefinite to rounding
            values, vectors = scipy.linalg.eigh(gram)
            return np.asarray(vectors * np.sqrt(np.maximum(values, 0) + self.ridge[group]))


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions of a layer's outputs and what each carries.

    Attributes:
        columns: (groups, out, k).
        energy: What each direction carries, summed over the groups, (k,).
        total: What all of W carries: the energy of the layer's output without bias, or |W|^2.
        complete: Whether the columns span all that W maps to.
    """

    columns: Doubles
    energy: Doubles
    total: float
    complete: bool

    def losses(self) -> Doubles:
        """Return the loss at rank 0, 1, ... k: (k + 1,), never increasing."""
        if self.complete:
            return np.append(np.cumsum(self.energy[::-1])[::-1], 0.0)
        return np.maximum(self.total - np.concatenate([[0.0], np.cumsum(self.energy)]), 0.0)


def find_basis(
    matrix: Array, method: Method, metric: Metric | None, *, components: int | None = None, seed: int = 0
) -> Basis:
    """Return the basis of a weight (groups, out, in).

    Args:
        matrix: The weight; computed with in float64.
        method: How directions are chosen; "whitened" needs a metric.
        metric: What directions carry is measured in this one; |W|^2 without.
        components: How many directions are needed; None for all.
        seed: Of the randomized SVD.
    """
    smaller = min(matrix.shape[1:])
    wanted = smaller if components is None else min(components, smaller)
    columns, energies, total = [], np.zeros(wanted), 0.0
    for group, stored in enumerate(matrix):
        part = np.asarray(stored, np.float64)
        found = _directions(part, method, metric, group, wanted, seed)
        columns.append(found)
        for rows in _blocks(wanted, part.shape[1]):
            energies[rows] += _carried(found[:, rows].T @ part, metric, group)
        total += sum(
            float(_carried(part[rows], metric, group).sum()) for rows in _blocks(len(part), part.shape[1])
        )
    whole = columns[0][None] if len(columns) == 1 else np.stack(columns)
    return Basis(whole, energies, total, wanted == smaller)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows that hold about BLOCK bytes in float64 each."""
    step = max(1, BLOCK // (8 * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _carried(rows: Doubles, metric: Metric | None, group: int) -> Doubles:
    return np.asarray(np.einsum("ki,ki->k", rows, rows)) if metric is None else metric.energies(rows, group)


def _directions(
    part: Doubles, method: Method, metric: Metric | None, group: int, wanted: int, seed: int
) -> Doubles:
    """Return the first directions of one group, (out, wanted).

    The left singular vectors of W L are the eigenvectors of W G W^T: neither L nor the right ones are made.
    Squares lose what is below 1e-15 of the energy, where no rank ends.
    """
    if method == "qr":
        return np.asarray(
            scipy.linalg.qr(part, mode="economic", pivoting=True, check_finite=False)[0][:, :wanted]
        )
    if method == "svd":
        metric = None
    out, inputs = part.shape
    smaller = min(part.shape)
    if smaller >= LARGE and wanted * 4 <= smaller:
        return _sketched(part, metric, group, wanted, seed)
    if out > inputs:
        turned, part = scipy.linalg.qr(part, mode="economic", check_finite=False)
        return np.asarray(turned @ _largest(_squared(part, part, metric, group), wanted))
    return _largest(_squared(part, part, metric, group), wanted)


def _squared(first: Doubles, second: Doubles, metric: Metric | None, group: int) -> Doubles:
    """Return A G B^T with the metric's matrix and ridge, A B^T without one."""
    if metric is None:
        return np.asarray(first @ second.T)
    gram, ridge = metric.gram[group], float(metric.ridge[group])
    if gram.ndim == 1:
        return np.asarray((first * (gram + ridge)) @ second.T)
    result = np.empty((len(first), len(second)))
    for rows in _blocks(len(first), first.shape[1]):
        result[rows] = (first[rows] @ gram + ridge * first[rows]) @ second.T
    return result


def _largest(square: Doubles, wanted: int) -> Doubles:
    """Return the eigenvectors of a symmetric matrix with the largest values, (n, wanted), largest first.

    Each is turned so that its largest element is positive; the matrix is used up.
    """
    last = len(square) - 1
    subset = None if wanted > last else [last + 1 - wanted, last]
    _, vectors = scipy.linalg.eigh(square.T, subset_by_index=subset, overwrite_a=True, check_finite=False)
    found = np.asarray(vectors[:, ::-1])
    signs = np.sign(found[np.abs(found).argmax(axis=0), np.arange(wanted)])
    found *= np.where(signs == 0, 1.0, signs)
    return found


def _sketched(part: Doubles, metric: Metric | None, group: int, wanted: int, seed: int) -> Doubles:
    """Return the first directions by randomized subspace iteration (Halko, Martinsson & Tropp, 2011)."""
    random = np.random.default_rng(seed)
    found = part @ random.standard_normal((part.shape[1], min(wanted + EXTRA, len(part))))
    for _ in range(ROUNDS):
        basis = scipy.linalg.qr(found, mode="economic", overwrite_a=True, check_finite=False)[0]
        found = _applied(part, basis, metric, group)
    basis = scipy.linalg.qr(found, mode="economic", overwrite_a=True, check_finite=False)[0]
    small = basis.T @ part
    return np.asarray(basis @ _largest(_squared(small, small, metric, group), wanted))


def _applied(part: Doubles, basis: Doubles, metric: Metric | None, group: int) -> Doubles:
    """Return W G W^T Q with the metric's matrix and ridge, W W^T Q without one."""
    inner = part.T @ basis
    if metric is None:
        return np.asarray(part @ inner)
    gram, ridge = metric.gram[group], float(metric.ridge[group])
    met = gram @ inner if gram.ndim == 2 else gram[:, None] * inner
    return np.asarray(part @ (met + ridge * inner))


def shrinkage(rows: int, inputs: int) -> float:
    """Return the damping that suits so many rows: 0.3 (inputs / rows)^2, within 1e-6 and 0.3.

    Few rows show few directions: what they do not show must not count as nothing. Chosen on MiniLM and
    PP-OCR with 32 and 128 feeds, by the error on unseen ones (benchmarks/factorize.py).

    >>> shrinkage(512, 512), round(shrinkage(5120, 512), 6), shrinkage(10**6, 10)
    (0.3, 0.003, 1e-06)
    """
    return max(1e-6, 0.3 * min(1.0, inputs / max(rows, 1)) ** 2)


def balanced(first: Doubles, second: Doubles) -> tuple[Doubles, Doubles]:
    """Return factors (..., r, in) and (..., out, r) of the same product with equal norms for each r.

    Half precision then has the same room in both.
    """
    one, two = np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-2)
    usable = (one > 0) & (two > 0)
    scale = np.sqrt(np.divide(two, one, out=np.ones_like(one), where=usable))
    return first * scale[..., None], second / scale[..., None, :]
