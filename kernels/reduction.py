"""Reductions over axes, accumulated in the input's dtype (half types in float32)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.dtypes import is_integer, limits
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.shape import positive_axes

Axes = tuple[int, ...]
Reduction = Callable[[Array, Axes], Array]

SHORT = 8
"""Length of a last axis up to which operations on its slices are faster than reductions along it."""


def total(x: Array, axes: Axes) -> Array:
    """Return the sum, kept in x's dtype."""
    return np.asarray(np.sum(x, axis=axes, keepdims=True, dtype=x.dtype))


def mean(x: Array, axes: Axes) -> Array:
    """Return the mean; of integers, cut towards zero; of nothing 0, which the specification leaves open."""
    count = math.prod(x.shape[axis] for axis in axes) or 1
    if is_integer(x.dtype):
        return np.asarray(np.trunc(np.sum(x, axis=axes, keepdims=True, dtype=np.int64) / count))
    return np.asarray(total(x, axes) / np.asarray(count, x.dtype))


def product(x: Array, axes: Axes) -> Array:
    """Return the product, kept in x's dtype."""
    return np.asarray(np.prod(x, axis=axes, keepdims=True, dtype=x.dtype))


def ends(dtype: np.dtype[Any]) -> tuple[object, object]:
    """Return the least and the greatest value of a dtype, infinities where it has them."""
    if dtype == np.bool_:
        return False, True
    if dtype.kind in "iu":
        return limits(dtype)
    return -np.inf, np.inf


def slices(x: Array, axes: Axes) -> list[Array]:
    """Return the slices along a short last axis that is alone reduced: NumPy is slow there; else nothing."""
    length = x.shape[-1] if axes == (x.ndim - 1,) else 0
    return [x[..., i : i + 1] for i in range(length)] if 2 <= length <= SHORT else []


def greatest(x: Array, axes: Axes) -> Array:
    """Return the maximum; of nothing, the least value of the dtype."""
    if parts := slices(x, axes):
        return np.asarray(functools.reduce(np.maximum, parts))
    return np.asarray(np.max(x, axis=axes, keepdims=True, initial=ends(x.dtype)[0]))  # type: ignore[call-overload]


def least(x: Array, axes: Axes) -> Array:
    """Return the minimum; of nothing, the greatest value of the dtype."""
    if parts := slices(x, axes):
        return np.asarray(functools.reduce(np.minimum, parts))
    return np.asarray(np.min(x, axis=axes, keepdims=True, initial=ends(x.dtype)[1]))  # type: ignore[call-overload]


def l1(x: Array, axes: Axes) -> Array:
    """Return the sum of absolute values."""
    return total(np.abs(x), axes)


def square(x: Array, axes: Axes) -> Array:
    """Return the sum of squares."""
    return total(np.square(x), axes)


def l2(x: Array, axes: Axes) -> Array:
    """Return the square root of the sum of squares."""
    return np.sqrt(square(x.astype(np.float64) if is_integer(x.dtype) else x, axes))


def log_sum(x: Array, axes: Axes) -> Array:
    """Return the logarithm of the sum."""
    return np.log(total(x.astype(np.float64) if is_integer(x.dtype) else x, axes))


def log_sum_exp(x: Array, axes: Axes) -> Array:
    """Return the logarithm of the sum of exponentials, without overflow."""
    x = x.astype(np.float64) if is_integer(x.dtype) else x
    peak = greatest(x, axes)
    peak = np.where(np.isfinite(peak), peak, np.zeros((), x.dtype))
    return np.asarray(np.log(total(np.exp(x - peak), axes)) + peak)


def reduced(
    compute: Reduction, data: Array, axes: Sequence[int] | Array | None, keepdims: int, noop: int
) -> Array:
    """Apply a reduction over the axes: over all when there are none, unless `noop` is set."""
    empty = axes is None or len(axes) == 0
    chosen = () if empty else tuple(positive_axes(axes if axes is not None else (), data.ndim))
    if empty and not noop:
        chosen = tuple(range(data.ndim))
    result = compute(wide(data), chosen).astype(data.dtype)
    return result if keepdims else result.reshape([n for i, n in enumerate(data.shape) if i not in chosen])


def register(op_type: str, compute: Reduction, since_input: int = 18) -> None:
    """Register a reduction with axes as attribute, and from `since_input` on as input."""

    @kernel(op_type, since=1)
    def Attribute(data: Array, *, axes: Sequence[int] | None = None, keepdims: int = 1) -> Array:
        """Reduce over the axes of the attribute, all unless given."""
        return reduced(compute, data, axes, keepdims, 0)

    @kernel(op_type, since=since_input)
    def Input(
        data: Array, axes: Array | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Array:
        """Reduce over the axes of the second input, all unless given."""
        return reduced(compute, data, axes, keepdims, noop_with_empty_axes)


register("ReduceSum", total, since_input=13)
register("ReduceMean", mean)
register("ReduceProd", product)
register("ReduceMax", greatest)
register("ReduceMin", least)
register("ReduceL1", l1)
register("ReduceL2", l2)
register("ReduceSumSquare", square)
register("ReduceLogSum", log_sum)
register("ReduceLogSumExp", log_sum_exp)


def position(data: Array, axis: int, keepdims: int, *, last: int, largest: bool) -> Array:
    """Return the int64 index of the greatest or smallest element along an axis, the first or last such.

    Raises:
        ValueError: There is none, since the axis is empty.
    """
    if not data.shape[axis]:
        shape = [length for i, length in enumerate(data.shape) if i != axis % data.ndim]
        if math.prod(shape):
            raise ValueError(f"axis {axis} of {data.shape} is empty: it has no greatest or smallest element")
        if keepdims:
            shape.insert(axis % data.ndim, 1)
        return np.empty(shape, np.int64)
    search = np.argmax if largest else np.argmin
    if last:
        result = data.shape[axis] - 1 - search(np.flip(data, axis), axis=axis, keepdims=bool(keepdims))
    else:
        result = search(data, axis=axis, keepdims=bool(keepdims))
    return np.asarray(result, np.int64)


@kernel("ArgMax", since=1)
def ArgMax_1(data: Array, *, axis: int = 0, keepdims: int = 1) -> Array:
    """Return the index of the first maximum along `axis`."""
    return position(data, axis, keepdims, last=0, largest=True)


@kernel("ArgMax", since=12)
def ArgMax_12(data: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
    """Return the index of the first or last maximum along `axis`."""
    return position(data, axis, keepdims, last=select_last_index, largest=True)


@kernel("ArgMin", since=1)
def ArgMin_1(data: Array, *, axis: int = 0, keepdims: int = 1) -> Array:
    """Return the index of the first minimum along `axis`."""
    return position(data, axis, keepdims, last=0, largest=False)


@kernel("ArgMin", since=12)
def ArgMin_12(data: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
    """Return the index of the first or last minimum along `axis`."""
    return position(data, axis, keepdims, last=select_last_index, largest=False)


def cumulated(x: Array, axis: int, exclusive: int, reverse: int, *, add: bool) -> Array:
    """Return running sums (or products) along an axis, from the end when reversed, without the own element when exclusive."""
    line = np.moveaxis(wide(x), axis, 0)
    line = line[::-1] if reverse else line
    running = (np.cumsum if add else np.cumprod)(line, 0, dtype=line.dtype)
    if exclusive:
        first = np.full_like(running[:1], 0 if add else 1)
        running = np.concatenate([first, running[:-1]])
    running = running[::-1] if reverse else running
    return np.moveaxis(running, 0, axis).astype(x.dtype)


@kernel("CumSum", since=11)
def CumSum(x: Array, axis: Array, *, exclusive: int = 0, reverse: int = 0) -> Array:
    """Return running sums along the axis."""
    return cumulated(x, int(axis.reshape(())), exclusive, reverse, add=True)


@kernel("CumProd", since=26)
def CumProd(x: Array, axis: Array, *, exclusive: int = 0, reverse: int = 0) -> Array:
    """Return running products along the axis."""
    return cumulated(x, int(axis.reshape(())), exclusive, reverse, add=False)
