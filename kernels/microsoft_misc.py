"""com.microsoft: older or freer forms of standard operators, and distances."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.determinant import square
from onnxslim_lab.kernels.generator import Range
from onnxslim_lab.kernels.indexing import GatherND_11
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.pad import Pad_11
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.selection import Trilu, Unique


@kernel("Inverse", since=1, domain=MS)
def Inverse(X: Array) -> Array:
    """Return the inverses of the last two axes.

    Raises:
        ValueError: A matrix is singular.
    """
    try:
        return np.asarray(np.linalg.inv(square(X))).astype(X.dtype)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"Inverse: {error}") from error


@kernel("CDist", since=1, domain=MS)
def CDist(A: Array, B: Array, *, metric: str = "sqeuclidean") -> Array:
    """Return the distance of every row of A (M, N) to every row of B (K, N): (M, K).

    Raises:
        NotImplementedError: The metric is neither "euclidean" nor "sqeuclidean", which onnxruntime has.
    """
    if metric not in {"euclidean", "sqeuclidean"}:
        raise NotImplementedError(f"CDist: metric {metric!r} is not euclidean or sqeuclidean")
    a, b = A.astype(np.float64), B.astype(np.float64)
    squares = np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)
    squares = np.maximum(squares, 0)
    return np.asarray(squares if metric == "sqeuclidean" else np.sqrt(squares)).astype(A.dtype)


@kernel("ExpandDims", since=1, domain=MS)
def ExpandDims(X: Array, axis: Array) -> Array:
    """Return X with an axis of length 1 where the result is to have it."""
    return np.expand_dims(X, int(axis.reshape(())))


@kernel("GatherND", since=1, domain=MS)
def GatherND(data: Array, indices: Array) -> Array:
    """Return the slices of data that the last axis of indices names."""
    return GatherND_11(data, indices)


@kernel("Pad", since=1, domain=MS)
def Pad(data: Array, pads: Array, value: Array | None = None, *, mode: str = "constant") -> Array:
    """Return data padded on every axis; the pads are (2 rank,) or (1, 2 rank)."""
    return Pad_11(data, pads, value, mode=mode)


@kernel("Range", since=1, domain=MS)
def MicrosoftRange(start: Array, limit: Array, delta: Array | None = None) -> Array:
    """Return start, start + delta, ... up to but without limit; delta is 1 unless given."""
    return Range(start, limit, np.ones((), start.dtype) if delta is None else delta)


@kernel("Trilu", since=1, domain=MS)
def MicrosoftTrilu(X: Array, k: Array | None = None, *, upper: int = 1) -> Array:
    """Return the upper or lower triangle of the last two axes, zero elsewhere."""
    return Trilu(X, k, upper=upper)


@kernel("Unique", since=1, domain=MS)
def MicrosoftUnique(x: Array) -> tuple[Array, Array, Array]:
    """Return the distinct values by first occurrence, each value's place among them, and the counts."""
    values, _, inverse, counts = Unique(x, sorted=0)
    return values, inverse, counts


@kernel("TransposeMatMul", since=1, domain=MS)
def TransposeMatMul(A: Array, B: Array, *, alpha: float = 1.0, transA: int = 0, transB: int = 0) -> Array:
    """Return alpha * A' B', the last two axes swapped where asked for."""
    left, right = (wide(side.swapaxes(-1, -2) if turn else side) for side, turn in ((A, transA), (B, transB)))
    product = np.matmul(left, right)
    return np.asarray(product * np.asarray(alpha, product.dtype)).astype(A.dtype)
