"""Operators that pick or order elements by value: TopK, NonZero, Compress, OneHot, Trilu, Unique."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel

FEW_OF = 8
"""Partitioning pays where at most one of this many is wanted."""


def distinct_top(x: Array, k: int, *, largest: bool) -> Array | None:
    """Return positions as `top` does along the last axis, by partitioning.

    None where that leaves open which are meant: equal values at the border, or NaN.
    """
    keys = -x if largest else x
    chosen = np.sort(np.argpartition(keys, k - 1, axis=-1)[..., :k], axis=-1)
    values = np.take_along_axis(keys, chosen, -1)
    last = values.max(axis=-1, keepdims=True)
    if np.count_nonzero(keys <= last) != chosen.size or np.isnan(keys).any():
        return None
    return np.take_along_axis(chosen, np.argsort(values, axis=-1, kind="stable"), -1)


def top(x: Array, k: int, axis: int, *, largest: bool) -> tuple[Array, Array]:
    """Return the k greatest or smallest values along an axis in order, and their int64 positions.

    Of equal values the one with the lower index comes first.

    Raises:
        ValueError: There are fewer than k.
    """
    if k > x.shape[axis]:
        raise ValueError(f"TopK: k is {k}, axis {axis} has {x.shape[axis]} elements")
    if 0 < k * FEW_OF <= x.shape[axis] and x.dtype.kind == "f":
        places = distinct_top(np.moveaxis(x, axis, -1), k, largest=largest)
        if places is not None:
            order = np.moveaxis(places, -1, axis)
            return np.take_along_axis(x, order, axis), order.astype(np.int64)
    if largest:
        order = x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis, kind="stable")
    order = np.take(order, np.arange(k), axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


@kernel("TopK", since=1)
def TopK_1(X: Array, *, k: int, axis: int = -1) -> tuple[Array, Array]:
    """Return the k greatest values along `axis` and their positions."""
    return top(X, k, axis, largest=True)


@kernel("TopK", since=10)
def TopK_10(X: Array, K: Array, *, axis: int = -1) -> tuple[Array, Array]:
    """Return the K greatest values along `axis` and their positions."""
    return top(X, int(K.reshape(())), axis, largest=True)


@kernel("TopK", since=11)
def TopK_11(X: Array, K: Array, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Array, Array]:
    """Return the K greatest or smallest values along `axis` and their positions, always sorted."""
    return top(X, int(K.reshape(())), axis, largest=bool(largest))


@kernel("NonZero", since=9)
def NonZero(X: Array) -> Array:
    """Return the coordinates of what is not zero: int64, (rank, count), in row-major order."""
    if X.ndim == 0:
        return np.zeros((1, 1 if X else 0), np.int64)
    return np.array(np.nonzero(X), np.int64)


@kernel("Compress", since=9)
def Compress(input: Array, condition: Array, *, axis: int | None = None) -> Array:
    """Return the entries of `axis`, or of the flattened input, where the condition holds."""
    return np.compress(condition, input, axis)


@kernel("OneHot", since=9)
def OneHot(indices: Array, depth: Array, values: Array, *, axis: int = -1) -> Array:
    """Return values[1] where the new axis equals the index and values[0] elsewhere.

    Negative indices count from the end; indices out of range give values[0] only.
    """
    count = int(depth.reshape(-1)[0])
    places = indices.astype(np.int64)
    places = np.where(places < 0, places + count, places)
    axis += indices.ndim + 1 if axis < 0 else 0
    line = np.arange(count).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    hit = np.expand_dims(places, axis) == line
    return np.asarray(np.where(hit, values[1], values[0]), values.dtype)


@kernel("Trilu", since=14)
def Trilu(input: Array, k: Array | None = None, *, upper: int = 1) -> Array:
    """Return the upper or lower triangle of the last two axes, zero elsewhere."""
    diagonal = 0 if k is None else int(k.reshape(()))
    rows = np.arange(input.shape[-2])[:, None]
    columns = np.arange(input.shape[-1])
    kept = columns - rows >= diagonal if upper else columns - rows <= diagonal
    return np.where(kept, input, np.zeros((), input.dtype))


@kernel("Unique", since=11)
def Unique(X: Array, *, axis: int | None = None, sorted: int = 1) -> tuple[Array, Array, Array, Array]:
    """Return the distinct values (or slices), first positions, inverse positions and counts."""
    values, first, inverse, counts = np.unique(
        X, return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    inverse = inverse.reshape(-1)
    if not sorted:
        order = np.argsort(first, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        values = np.take(values, order, 0 if axis is None else axis)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return values, first.astype(np.int64), inverse.astype(np.int64), counts.astype(np.int64)
