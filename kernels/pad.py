"""Pad: constant, reflect, edge and wrap; negative pads crop."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.shape import positive_axes


@functools.lru_cache(maxsize=64)
def places(mode: str, length: int, before: int, after: int) -> Array:
    """Return which positions of an axis stand along the padded one.

    Raises:
        ValueError: The axis is empty.

    >>> places("reflect", 3, 2, 1).tolist(), places("edge", 3, 2, 1).tolist(), places("wrap", 3, 2, 1).tolist()
    ([2, 1, 0, 1, 2, 1], [0, 0, 0, 1, 2, 2], [1, 2, 0, 1, 2, 0])
    """
    if not length:
        raise ValueError(f"Pad: an empty axis cannot be padded in mode {mode!r}")
    position = np.arange(-before, length + after)
    if mode == "edge" or length == 1:
        return position.clip(0, length - 1)
    if mode == "wrap":
        return np.asarray(position % length)
    position %= 2 * (length - 1)
    return np.minimum(position, 2 * (length - 1) - position)


def padded(data: Array, pads: Sequence[int], mode: str, value: Array, axes: Sequence[int]) -> Array:
    """Return data with `pads` (all begins, then all ends, of `axes`) added; negative ones cut off.

    Raises:
        ValueError: The mode is unknown or there are not two pads per axis.
    """
    if mode not in {"constant", "reflect", "edge", "wrap"}:
        raise ValueError(f"Pad: mode {mode!r} is not constant, reflect, edge or wrap")
    if len(pads) != 2 * len(axes):
        raise ValueError(f"Pad: {len(pads)} pads for {len(axes)} axes")
    widths = [(0, 0)] * data.ndim
    kept = [slice(None)] * data.ndim
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        kept[axis] = slice(max(-before, 0), data.shape[axis] - max(-after, 0))
        widths[axis] = (max(before, 0), max(after, 0))
    data = data[tuple(kept)]
    if mode != "constant":
        for axis, width in enumerate(widths):
            if any(width):
                data = data.take(places(mode, data.shape[axis], *width), axis)
        return data
    shape = [length + sum(width) for length, width in zip(data.shape, widths, strict=True)]
    filling = value.reshape(()).astype(data.dtype)
    blank = data.dtype != object and not filling
    result = np.zeros(shape, data.dtype) if blank else np.full(shape, filling, data.dtype)
    inside = tuple(slice(w[0], w[0] + length) for w, length in zip(widths, data.shape, strict=True))
    result[inside] = data
    return result


def zero(data: Array) -> Array:
    """Return the default filling: zero, or the empty string."""
    return np.array("" if data.dtype == object else 0, data.dtype)


@kernel("Pad", since=1)
def Pad_1(data: Array, *, paddings: Sequence[int], mode: str = "constant", value: float = 0.0) -> Array:
    """Return data padded on every axis."""
    return padded(data, list(paddings), mode, np.asarray(value, data.dtype), range(data.ndim))


@kernel("Pad", since=2)
def Pad_2(data: Array, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Array:
    """Return data padded on every axis."""
    return padded(data, list(pads), mode, np.asarray(value, data.dtype), range(data.ndim))


@kernel("Pad", since=11)
def Pad_11(data: Array, pads: Array, constant_value: Array | None = None, *, mode: str = "constant") -> Array:
    """Return data padded on every axis."""
    filling = zero(data) if constant_value is None else constant_value
    return padded(data, pads.reshape(-1).tolist(), mode, filling, range(data.ndim))


@kernel("Pad", since=18)
def Pad_18(
    data: Array,
    pads: Array,
    constant_value: Array | None = None,
    axes: Array | None = None,
    *,
    mode: str = "constant",
) -> Array:
    """Return data padded on the axes, all unless given."""
    filling = zero(data) if constant_value is None else constant_value
    chosen = range(data.ndim) if axes is None else positive_axes(axes, data.ndim)
    return padded(data, pads.reshape(-1).tolist(), mode, filling, chosen)
