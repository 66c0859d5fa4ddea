"""How the padded input of a convolution is laid out so that every kernel tap reads one run of positions.

With strides the input is split into its residues modulo the stride, each a contiguous plane.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.kernels.registry import Array
from onnxslim_lab.kernels.windows import Ints, Window, volume

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Taps:
    """Taps of one axis that read the same plane at even distances.

    Attributes:
        taps: Which of the kernel's taps.
        residue: Which plane: the position modulo the stride.
        first, step: Position in the plane of the first of them, and distance of the following.
    """

    taps: slice
    residue: int
    first: int
    step: int


def taps_of(size: int, stride: int, dilation: int) -> list[Taps]:
    """Return the taps of one axis, grouped by the plane they read.

    >>> [(group.taps, group.residue) for group in taps_of(3, 2, 1)]
    [(slice(0, 3, 2), 0), (slice(1, 3, 2), 1)]
    """
    period = stride // math.gcd(stride, dilation)
    step = dilation * period // stride
    starts = range(min(period, size))
    return [
        Taps(slice(tap, size, period), tap * dilation % stride, tap * dilation // stride, step)
        for tap in starts
    ]


@dataclass(frozen=True)
class Runs:
    """The runs that a group of taps reads, in elements from the start of a channel.

    Attributes:
        taps: Slices of the kernel's axes.
        counts: How many taps there are along each.
        start: Where the run of the first tap starts.
        strides: How far the next tap along each axis is.
    """

    taps: Slices
    counts: tuple[int, ...]
    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The layout for a window.

    Attributes:
        planes: Lengths of a plane.
        length: Positions from the first output to the last, along the rows of a plane.
        fills: For every plane with data: where in (strides..., planes...) which part of the input goes.
        runs: What the taps read.
        is_plain: Whether the input can be used as it is.
    """

    planes: tuple[int, ...]
    length: int
    fills: tuple[tuple[tuple[int | slice, ...], Slices], ...]
    runs: tuple[Runs, ...]
    is_plain: bool

    def arrange(self, x: Array, window: Window) -> Array:
        """Return x (N, C, lengths...) as (N, C, planes * positions), contiguous."""
        if self.is_plain:
            return np.ascontiguousarray(x).reshape(*x.shape[:2], -1)
        result = np.zeros((*x.shape[:2], *window.strides, *self.planes), x.dtype)
        every = (slice(None), slice(None))
        for target, source in self.fills:
            result[(*every, *target)] = x[(*every, *source)]
        return result.reshape(*x.shape[:2], -1)

    def views(self, source: Array) -> list[tuple[Slices, Array]]:
        """Return for each group of taps which they are and, without a copy, all that they read.

        Args:
            source: (N, groups, channels, planes * positions), contiguous.

        Returns:
            Slices of the kernel's axes; (N, groups, channels, taps of these..., length).
        """
        size = source.itemsize
        return [
            (
                run.taps,
                np.ndarray(
                    (*source.shape[:3], *run.counts, self.length),
                    source.dtype,
                    source,
                    run.start * size,
                    (*source.strides[:3], *(stride * size for stride in run.strides), size),
                ),
            )
            for run in self.runs
        ]


def dropped(window: Window) -> float:
    """Return how many positions of a flat row are computed in vain, for each that is kept."""
    inner = 1
    for axis in range(1, len(window.output)):
        length = window.lengths[axis] + window.begins[axis] + window.ends[axis]
        inner *= -(-length // window.strides[axis])
    return inner / volume(window.output[1:]) - 1


@functools.lru_cache(maxsize=1024)
def layout(window: Window) -> Layout:
    """Return the layout for a window whose output is not empty."""
    planes = []
    for axis, (length, stride) in enumerate(zip(window.lengths, window.strides, strict=True)):
        span = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        needed = max((window.output[axis] - 1) * stride + span, length + window.begins[axis])
        planes.append(-(-needed // stride))
    steps = [volume(planes[axis + 1 :]) for axis in range(len(planes))]
    return Layout(
        tuple(planes),
        1 + sum((count - 1) * step for count, step in zip(window.output, steps, strict=True)),
        tuple(_fill(window, residues) for residues in np.ndindex(*window.strides)),
        tuple(_runs(window, planes, steps)),
        tuple(planes) == window.lengths and volume(window.strides) == 1,
    )


def _fill(window: Window, residues: Ints) -> tuple[tuple[int | slice, ...], Slices]:
    """Return where in one plane which part of the input goes."""
    target, source = [], []
    for residue, begin, length, stride in zip(
        residues, window.begins, window.lengths, window.strides, strict=True
    ):
        low = max(0, -((residue - begin) // stride))
        first = low * stride + residue - begin
        target.append(slice(low, low + max(0, -((first - length) // stride))))
        source.append(slice(first, None, stride))
    return (*residues, *target), tuple(source)


def _runs(window: Window, planes: Ints, steps: Ints) -> list[Runs]:
    """Return what the taps read, grouped by planes."""
    per_axis = [
        taps_of(*triple) for triple in zip(window.kernel, window.strides, window.dilations, strict=True)
    ]
    result = []
    for group in itertools.product(*per_axis):
        plane = 0
        for stride, taps in zip(window.strides, group, strict=True):
            plane = plane * stride + taps.residue
        start = plane * volume(planes) + sum(t.first * n for t, n in zip(group, steps, strict=True))
        counts = [len(range(size)[taps.taps]) for taps, size in zip(group, window.kernel, strict=True)]
        strides = [taps.step * n for taps, n in zip(group, steps, strict=True)]
        result.append(Runs(tuple(taps.taps for taps in group), tuple(counts), start, tuple(strides)))
    return result
