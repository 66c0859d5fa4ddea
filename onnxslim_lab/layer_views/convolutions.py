"""Conv and ConvTranspose as matrix products over im2col patches; see layer_kinds for what a kind provides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.layer_views.kinds import Kind

Array = NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConvKind(Kind):
    """Conv: rows are im2col patches; columns are (channel, *kernel) as stored."""

    groups: int = 1
    strides: Shape = ()
    dilations: Shape = ()
    pads: Shape = ()
    auto_pad: str = "NOTSET"

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape."""
        out, *rest = self.weight_shape
        return self.groups, out // self.groups, math.prod(rest)

    def matrix(self, weight: Array) -> Array:
        """Return (M, C/g, *k) as (g, M/g, C/g * k)."""
        return weight.reshape(self.shape)

    def weight(self, matrix: Array) -> Array:
        """Return the matrix as (M, C/g, *k)."""
        return matrix.reshape(self.weight_shape)

    def rows(self, x: Array) -> Array:
        """Return the patches of (N, C, *spatial): row n * positions + position."""
        kernel = self.weight_shape[2:]
        pads = conv_pads(x.shape[2:], kernel, self.strides, self.dilations, self.pads, self.auto_pad)
        padded = np.pad(x, [(0, 0), (0, 0), *pads])
        return patches(padded, kernel, self.strides, self.dilations, self.groups)

    def output_rows(self, y: Array) -> Array:
        """Return (N, M, *spatial) as (g, N * positions, M/g)."""
        return channel_rows(y, self.groups)

    def bias_rows(self, bias: Array, _shape: Shape) -> Array:
        """Return (M,) as (g, 1, M/g)."""
        return bias.reshape(self.groups, 1, -1)

    def products(self, _x: Shape, y: Shape) -> int:
        """Return positions of the output times the size of the matrix."""
        return y[0] * math.prod(y[2:]) * math.prod(self.weight_shape)


@dataclass(frozen=True)
class ConvTransposeKind(ConvKind):
    """ConvTranspose: a Conv over the input with zeros between its elements and the kernel turned around."""

    output_padding: Shape = ()
    output_shape: Shape = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape: columns are (channel, *kernel)."""
        channels, out, *kernel = self.weight_shape
        return self.groups, out, channels // self.groups * math.prod(kernel)

    def matrix(self, weight: Array) -> Array:
        """Return (C, M/g, *k) as (g, M/g, C/g * k)."""
        channels, out, *kernel = self.weight_shape
        split = weight.reshape(self.groups, channels // self.groups, out, *kernel)
        return split.swapaxes(1, 2).reshape(self.shape)

    def weight(self, matrix: Array) -> Array:
        """Return the matrix as (C, M/g, *k)."""
        channels, out, *kernel = self.weight_shape
        split = matrix.reshape(self.groups, out, channels // self.groups, *kernel)
        return split.swapaxes(1, 2).reshape(self.weight_shape)

    def rows(self, x: Array) -> Array:
        """Return for each output position the inputs that reach it, in the kernel's stored order."""
        kernel = self.weight_shape[2:]
        found = patches(self.spread(x), kernel, (1,) * len(kernel), self.dilations, self.groups)
        per_channel = found.reshape(*found.shape[:2], -1, *kernel)
        return np.flip(per_channel, tuple(range(3, 3 + len(kernel)))).reshape(found.shape)

    def spread(self, x: Array) -> Array:
        """Return the input with zeros between its elements and around, over which the turned kernel slides."""
        kernel = self.weight_shape[2:]
        extra = self.output_padding or (0,) * len(kernel)
        spread = np.zeros(
            (*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], self.strides, strict=True))),
            x.dtype,
        )
        spread[_every((1, 1, *self.strides))] = x
        pads = self._pads(x.shape[2:])
        for axis, (size, dilation, (begin, end)) in enumerate(
            zip(kernel, self.dilations, pads, strict=True), start=2
        ):
            reach = (size - 1) * dilation
            spread = _resize(spread, axis, reach - begin, reach - end + extra[axis - 2])
        return spread

    def _pads(self, size: Shape) -> list[tuple[int, int]]:
        """Return (begin, end) per axis: declared, or what `output_shape` or `auto_pad` ask for."""
        rank = len(size)
        extra = self.output_padding or (0,) * rank
        kernel = self.weight_shape[2:]
        wanted = self.output_shape[-rank:]
        if not wanted and self.auto_pad.startswith("SAME"):
            wanted = tuple(n * s for n, s in zip(size, self.strides, strict=True))
        if not wanted:
            pads = self.pads if self.auto_pad == "NOTSET" else (0,) * (2 * rank)
            return list(zip(pads[:rank], pads[rank:], strict=True))
        found = []
        for n, s, k, d, e, w in zip(size, self.strides, kernel, self.dilations, extra, wanted, strict=True):
            total = max(0, s * (n - 1) + e + (k - 1) * d + 1 - w)
            small = total // 2
            found.append((total - small, small) if self.auto_pad != "SAME_UPPER" else (small, total - small))
        return found

    def products(self, x: Shape, _y: Shape) -> int:
        """Return positions of the input times the size of the matrix."""
        return x[0] * math.prod(x[2:]) * math.prod(self.weight_shape)


def conv_pads(
    size: Shape, kernel: Shape, strides: Shape, dilations: Shape, pads: Shape, auto_pad: str
) -> list[tuple[int, int]]:
    """Return the padding (begin, end) of each spatial axis, `auto_pad` resolved for this input size."""
    rank = len(kernel)
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    if auto_pad == "NOTSET":
        return list(zip(pads[:rank], pads[rank:], strict=True))
    found = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        small = total // 2
        found.append((total - small, small) if auto_pad == "SAME_LOWER" else (small, total - small))
    return found


def patches(padded: Array, kernel: Shape, strides: Shape, dilations: Shape, groups: int) -> Array:
    """Return im2col of (N, C, *spatial) as (groups, N * positions, C/groups * kernel)."""
    rank = len(kernel)
    window = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    views = np.lib.stride_tricks.sliding_window_view(padded, window, tuple(range(2, 2 + rank)))
    views = views[_every((1, 1, *strides, *dilations))]
    batch, channels, *rest = views.shape
    positions, taps = rest[:rank], rest[rank:]
    split = views.reshape(batch, groups, channels // groups, *positions, *taps)
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    count = batch * math.prod(positions)
    return split.transpose(order).reshape(groups, count, channels // groups * math.prod(taps))


def _every(steps: Shape) -> tuple[slice, ...]:
    """Return the index that takes every step-th element of each axis."""
    return tuple(slice(None, None, step) for step in steps)


def channel_rows(y: Array, groups: int) -> Array:
    """Return (N, M, *spatial) as (groups, N * positions, M/groups)."""
    split = y.reshape(y.shape[0], groups, y.shape[1] // groups, math.prod(y.shape[2:]))
    return split.transpose(1, 0, 3, 2).reshape(groups, -1, y.shape[1] // groups)


def _resize(array: Array, axis: int, begin: int, end: int) -> Array:
    """Pad an axis with zeros, or cut it where the padding is negative."""
    size = array.shape[axis]
    array = array.take(range(max(0, -begin), size - max(0, -end)), axis)
    pads = [(0, 0)] * array.ndim
    pads[axis] = max(0, begin), max(0, end)
    return np.pad(array, pads)
