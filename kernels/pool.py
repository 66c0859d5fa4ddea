"""Pooling: one pass per kernel tap and axis over strided slices, without a copy for the padding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.dtypes import is_integer, limits
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, Window, region, slide, volume


def lowest(dtype: np.dtype[np.generic]) -> Array:
    """Return the value below all others of a dtype, 0-d."""
    return np.asarray(limits(dtype)[0] if is_integer(dtype) else -np.inf, dtype)


def along(axis: int, places: slice) -> tuple[slice, ...]:
    """Return the index that takes some places of one axis."""
    return (*[slice(None)] * axis, places)


def combined(x: Array, window: Window, combine: Callable[..., Array], start: Array) -> Array:
    """Return x (N, C, ...) combined over every window, one axis after the other.

    Args:
        combine: A ufunc such as np.maximum, which takes `out`.
        start: The value of a window with nothing in it, neutral for `combine`.
    """
    for place, length in enumerate(window.output):
        axis = place + 2
        pairs = [window.reads(place, tap) for tap in range(window.kernel[place])]
        whole = [tap for tap, (written, _) in enumerate(pairs) if written == slice(0, length)]
        result = np.empty((*x.shape[:axis], length, *x.shape[axis + 1 :]), x.dtype)
        result[...] = x[along(axis, pairs.pop(whole[0])[1])] if whole else start
        for written, read in pairs:
            target = result[along(axis, written)]
            combine(target, x[along(axis, read)], out=target)
        x = result
    return x


def spatial(op_type: str, X: Array) -> tuple[int, ...]:
    """Return the spatial lengths of X (N, C, ...).

    Raises:
        ValueError: There is no spatial axis.
    """
    if X.ndim < 3:
        raise ValueError(f"{op_type}: X has shape {X.shape}, expected (N, C, D1, ...)")
    return X.shape[2:]


def greatest_with_places(X: Array, window: Window, storage_order: int) -> tuple[Array, Array]:
    """Return the greatest value of every window and its int64 position in the flattened tensor X."""
    shape = (*X.shape[:2], *window.output)
    best = np.full(shape, lowest(X.dtype), X.dtype)
    found = np.zeros(shape, np.int64)
    rank = len(window.lengths)
    places: Array = np.arange(volume(window.lengths), dtype=np.int64)
    order = window.lengths[::-1] if storage_order else window.lengths
    places = places.reshape(order).T if storage_order else places.reshape(order)
    seen = np.zeros(window.output, np.bool_)
    for tap in np.ndindex(*window.kernel):
        pairs = [window.reads(axis, tap[axis]) for axis in range(rank)]
        target = region(pair[0] for pair in pairs)
        source = region(pair[1] for pair in pairs)
        value = X[source]
        better = (value > best[target]) | np.isnan(value) & ~np.isnan(best[target])
        better |= ~seen[target]
        np.copyto(best[target], value, where=better)
        np.copyto(found[target], np.broadcast_to(places[source], value.shape), where=better)
        seen[target] = True
    images = np.arange(X.shape[0] * X.shape[1], dtype=np.int64) * volume(window.lengths)
    return best, found + images.reshape(*X.shape[:2], *[1] * rank)


def max_pool(X: Array, window: Window) -> Array:
    """Return the greatest value of every window."""
    return combined(X, window, np.maximum, lowest(X.dtype))


@kernel("MaxPool", since=1)
def MaxPool_1(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the greatest value of every window of X (N, C, ...)."""
    lengths = spatial("MaxPool", X)
    return max_pool(X, slide("MaxPool", lengths, kernel_shape, strides, None, pads, auto_pad))


@kernel("MaxPool", since=8)
def MaxPool_8(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    output_count: int = 1,
) -> tuple[Array, ...]:
    """Return the greatest value of every window and, when asked for, its position."""
    return MaxPool_10(
        X,
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        pads=pads,
        storage_order=storage_order,
        strides=strides,
        output_count=output_count,
    )


@kernel("MaxPool", since=10)
def MaxPool_10(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    output_count: int = 1,
) -> tuple[Array, ...]:
    """Return the greatest value of every window and, when asked for, its position.

    Positions count through the whole tensor; inside an image row by row, or column by column with
    storage_order 1. Padding is never greatest; NaN always is.
    """
    lengths = spatial("MaxPool", X)
    window = slide("MaxPool", lengths, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if output_count > 1:
        return greatest_with_places(X, window, storage_order)
    return (max_pool(X, window),)


def counts(window: Window, *, with_padding: bool) -> Array:
    """Return how many positions each window averages over, at least 1: the output's spatial shape."""
    total = np.ones((), np.float64)
    for axis, length in enumerate(window.lengths):
        first = np.arange(window.output[axis]) * window.strides[axis] - window.begins[axis]
        places = first[:, None] + np.arange(window.kernel[axis]) * window.dilations[axis]
        low, high = (-window.begins[axis], length + window.ends[axis]) if with_padding else (0, length)
        inside = np.count_nonzero((places >= low) & (places < high), axis=1)
        total = total[..., None] * np.maximum(inside, 1)
    return total


def average(X: Array, window: Window, count_include_pad: int) -> Array:
    """Return the mean of every window."""
    x = wide(X)
    total = combined(x, window, np.add, np.zeros((), x.dtype))
    total /= counts(window, with_padding=bool(count_include_pad)).astype(x.dtype)
    return total.astype(X.dtype, copy=False)


@kernel("AveragePool", since=1)
def AveragePool_1(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the mean of every window of X (N, C, ...), padding not counted."""
    lengths = spatial("AveragePool", X)
    return average(X, slide("AveragePool", lengths, kernel_shape, strides, None, pads, auto_pad), 0)


@kernel("AveragePool", since=7)
def AveragePool_7(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    count_include_pad: int = 0,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the mean of every window of X (N, C, ...)."""
    lengths = spatial("AveragePool", X)
    window = slide("AveragePool", lengths, kernel_shape, strides, None, pads, auto_pad)
    return average(X, window, count_include_pad)


@kernel("AveragePool", since=10)
def AveragePool_10(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the mean of every window of X (N, C, ...)."""
    lengths = spatial("AveragePool", X)
    window = slide("AveragePool", lengths, kernel_shape, strides, None, pads, auto_pad, ceil_mode)
    return average(X, window, count_include_pad)


@kernel("AveragePool", since=19)
def AveragePool_19(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the mean of every window of X (N, C, ...).

    With count_include_pad the padding asked for counts, what ceil_mode adds beyond it does not.
    """
    lengths = spatial("AveragePool", X)
    window = slide("AveragePool", lengths, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return average(X, window, count_include_pad)


def norm_of(x: Array, p: float, total: Callable[[Array], Array]) -> Array:
    """Return the p-norm, given how to sum."""
    powers = np.square(x) if p == 2 else np.abs(x) if p == 1 else np.abs(x) ** np.asarray(p, x.dtype)
    summed = total(powers)
    return np.sqrt(summed) if p == 2 else summed if p == 1 else summed ** np.asarray(1 / p, x.dtype)


def lp_pool(X: Array, p: float, window: Window) -> Array:
    """Return the p-norm of every window."""
    x = wide(X)
    zero = np.zeros((), x.dtype)
    result = norm_of(x, p, lambda powers: combined(powers, window, np.add, zero))
    return result.astype(X.dtype, copy=False)


@kernel("LpPool", since=1)
def LpPool_1(
    X: Array,
    *,
    auto_pad: str = "NOTSET",
    kernel_shape: Ints | None = None,
    p: float = 2.0,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the p-norm of every window of X (N, C, ...), the kernel one point unless given."""
    window = slide("LpPool", spatial("LpPool", X), kernel_shape or (), strides, None, pads, auto_pad)
    return lp_pool(X, p, window)


@kernel("LpPool", since=2)
def LpPool_2(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the p-norm of every window of X (N, C, ...)."""
    return lp_pool(X, p, slide("LpPool", spatial("LpPool", X), kernel_shape, strides, None, pads, auto_pad))


@kernel("LpPool", since=18)
def LpPool_18(
    X: Array,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the p-norm of every window of X (N, C, ...)."""
    lengths = spatial("LpPool", X)
    return lp_pool(
        X, p, slide("LpPool", lengths, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    )
