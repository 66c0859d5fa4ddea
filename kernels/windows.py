"""Sliding windows over the spatial axes: which positions of the input each output reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_lab.kernels.registry import Array

Ints = Sequence[int]


@dataclass(frozen=True)
class Window:
    """A kernel sliding over spatial axes; every field has one entry per axis.

    Attributes:
        lengths: The input's lengths.
        kernel, strides, dilations: As in the attributes.
        begins, ends: Padding before and after.
        output: The output's lengths.
    """

    lengths: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    output: tuple[int, ...]

    @functools.cached_property
    def is_pointwise(self) -> bool:
        """Whether the kernel is one point and nothing is padded."""
        return all(k == 1 for k in self.kernel) and not any(self.begins) and not any(self.ends)

    def reads(self, axis: int, tap: int) -> tuple[slice, slice]:
        """Return which outputs along an axis read inside the input at a tap, and what they read.

        >>> slide("Conv", (5,), (3,), pads=(1, 1)).reads(0, 0)
        (slice(1, 5, None), slice(0, 4, 1))
        """
        stride, length = self.strides[axis], self.lengths[axis]
        offset = tap * self.dilations[axis] - self.begins[axis]
        low = max(0, -(offset // stride))
        high = min(self.output[axis], (length - 1 - offset) // stride + 1)
        if high <= low:
            return slice(0, 0), slice(0, 0)
        first = low * stride + offset
        return slice(low, high), slice(first, first + (high - low - 1) * stride + 1, stride)


def spread(op_type: str, name: str, values: Ints | None, rank: int, default: int) -> tuple[int, ...]:
    """Return one positive integer per spatial axis, the default unless given.

    Raises:
        ValueError: There are more or fewer, or one is not positive.
    """
    if not values:
        return (default,) * rank
    if len(values) != rank:
        raise ValueError(f"{op_type}: {name} has {len(values)} entries for {rank} spatial axes")
    if min(values) < 1:
        raise ValueError(f"{op_type}: {name} is {list(values)}, every entry must be at least 1")
    return tuple(int(value) for value in values)


def paddings(op_type: str, pads: Ints | None, rank: int) -> tuple[list[int], list[int]]:
    """Return the padding before and after every spatial axis, zero unless given.

    Raises:
        ValueError: There are not two per axis, or one is negative.
    """
    if not pads:
        return [0] * rank, [0] * rank
    if len(pads) != 2 * rank:
        raise ValueError(
            f"{op_type}: pads has {len(pads)} entries for {rank} spatial axes, expected {2 * rank}"
        )
    if min(pads) < 0:
        raise ValueError(f"{op_type}: pads is {list(pads)}, every entry must be at least 0")
    return list(pads[:rank]), list(pads[rank:])


def slide(
    op_type: str,
    lengths: Ints,
    kernel: Ints,
    strides: Ints | None = None,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Window:
    """Return the window of a Conv or pooling node over an input with these spatial lengths.

    Raises:
        ValueError: An attribute does not fit the rank, or the kernel is longer than the padded input.

    >>> slide("MaxPool", (5, 5), (2, 2), (2, 2), ceil_mode=1).output
    (3, 3)
    """
    listed = (lengths, kernel, strides or (), dilations or (), pads or ())
    return _slide(op_type, *map(tuple, listed), auto_pad, ceil_mode)


@functools.lru_cache(maxsize=1024)
def _slide(
    op_type: str,
    lengths: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    auto_pad: str,
    ceil_mode: int,
) -> Window:
    rank = len(lengths)
    size = spread(op_type, "kernel_shape", kernel, rank, 1)
    steps = spread(op_type, "strides", strides, rank, 1)
    gaps = spread(op_type, "dilations", dilations, rank, 1)
    spans = [(k - 1) * gap + 1 for k, gap in zip(size, gaps, strict=True)]
    begins, ends = paddings(op_type, None if auto_pad != "NOTSET" else pads, rank)
    output = []
    for axis, (length, span, step) in enumerate(zip(lengths, spans, steps, strict=True)):
        if auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
            count = -(-length // step)
            missing = max((count - 1) * step + span - length, 0)
            begins[axis] = missing // 2 if auto_pad == "SAME_UPPER" else missing - missing // 2
            ends[axis] = missing - begins[axis]
        elif auto_pad not in {"NOTSET", "VALID"}:
            raise ValueError(
                f"{op_type}: auto_pad {auto_pad!r} is not NOTSET, SAME_UPPER, SAME_LOWER or VALID"
            )
        else:
            room = length + begins[axis] + ends[axis] - span
            count = (-(-room // step) if ceil_mode else room // step) + 1
            if ceil_mode and (count - 1) * step >= length + begins[axis]:
                count -= 1
        if count < 0 or (count == 0 and length):
            raise ValueError(
                f"{op_type}: the kernel spans {span} positions of spatial axis {axis}, "
                f"which has {length} and padding {begins[axis]} + {ends[axis]}"
            )
        output.append(count)
    return Window(tuple(lengths), size, steps, gaps, tuple(begins), tuple(ends), tuple(output))


def pad_spatial(x: Array, before: Ints, after: Ints) -> Array:
    """Return x (N, C, ...) with zeros around its spatial axes; x itself where there is nothing to add."""
    if not any(before) and not any(after):
        return x
    shape, inside = _frame(x.shape[2:], tuple(before), tuple(after))
    result = np.zeros(x.shape[:2] + shape, x.dtype)
    result[inside] = x
    return result


@functools.lru_cache(maxsize=1024)
def _frame(lengths: tuple[int, ...], before: Ints, after: Ints) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Return the lengths with the padding, and where the unpadded part is."""
    sides = list(zip(before, lengths, after, strict=True))
    return tuple(map(sum, sides)), region(slice(b, b + length) for b, length, _ in sides)


def fold(columns: Array, window: Window) -> Array:
    """Return (N, C, lengths...): the sum of columns (N, C, kernel..., output...) over the windows.

    The inverse walk of a convolution: what ConvTranspose and Col2Im do.
    """
    rank = len(window.lengths)
    result = np.zeros((*columns.shape[:2], *window.lengths), columns.dtype)
    for tap in np.ndindex(*window.kernel):
        pairs = [window.reads(axis, tap[axis]) for axis in range(rank)]
        result[region(read for _, read in pairs)] += columns[
            (slice(None), slice(None), *tap, *(out for out, _ in pairs))
        ]
    return result


def region(places: Iterable[slice]) -> tuple[Any, ...]:
    """Return the index of a region of the last axes."""
    return (..., *places)


def volume(lengths: Ints) -> int:
    """Return the number of positions."""
    return math.prod(lengths)
