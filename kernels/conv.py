"""Convolutions as matrix products over columns of window contents, in cache-sized tiles.

Half types accumulate in float32. Two ways to lay out columns: *flat*, where all output positions of a tap
are one run of the padded input (with a few positions between rows that are dropped at the end), and
*exact*, row by row. Flat copies faster, exact multiplies less.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, Window, fold, pad_spatial, paddings, slide, spread, volume

TILE = 1 << 18
"""Elements of a tile of columns: what fits the second level cache."""
NARROWEST = 256
"""Positions that a product has at least: below that packing the weights dominates."""
WASTE = 12
"""Multiplications per copied element that the dropped positions may cost before exact is faster."""


PLANES = 9
"""Planes that the input is split into at most; greater strides take the exact way."""


def check(op_type: str, X: Array, W: Array, B: Array | None, group: int, kernel_shape: Ints | None) -> None:
    """Check the shapes of a convolution.

    Raises:
        ValueError: They do not fit each other.
    """
    if X.ndim < 3 or W.ndim != X.ndim:
        raise ValueError(f"{op_type}: X {X.shape} and W {W.shape} must have the same rank, 3 or more")
    if kernel_shape and tuple(kernel_shape) != W.shape[2:]:
        raise ValueError(f"{op_type}: kernel_shape {list(kernel_shape)} is not that of W {W.shape}")
    transposed = op_type == "ConvTranspose"
    channels = W.shape[0] if transposed else W.shape[1] * group
    outputs = W.shape[1] * group if transposed else W.shape[0]
    if group < 1 or channels != X.shape[1] or W.shape[0] % group:
        raise ValueError(
            f"{op_type}: W {W.shape} with group {group} expects {channels} channels, X {X.shape} has {X.shape[1]}"
        )
    if B is not None and B.shape != (outputs,):
        raise ValueError(f"{op_type}: the bias has shape {B.shape}, expected ({outputs},)")


def convolve(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Return the convolution of x (N, C, lengths...) with w (M, C / groups, kernel...): (N, M, output...).

    All in x's dtype, float32 or float64 for BLAS.
    """
    if volume(window.output) == 0 or x.size == 0 or w.size == 0:
        y = np.zeros((x.shape[0], w.shape[0], *window.output), x.dtype)
        return y if bias is None else y + bias.reshape(-1, *[1] * len(window.output))
    if window.is_pointwise:
        return pointwise(x, w, bias, window, groups)
    rows = w.shape[0] // groups
    inner = [
        -(-(length + begin + end) // stride)
        for length, begin, end, stride in zip(
            window.lengths, window.begins, window.ends, window.strides, strict=True
        )
    ][1:]
    dropped = volume(inner) / volume(window.output[1:]) - 1
    if rows * dropped > WASTE or volume(window.strides) > PLANES:
        return exact(x, w, bias, window, groups)
    return flat(x, w, bias, window, groups)


def pointwise(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve with a kernel of one point: a plain product."""
    taken = x[(..., *(slice(None, None, stride) for stride in window.strides))]
    columns = taken.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    y = np.matmul(w.reshape(groups, w.shape[0] // groups, -1), columns)
    y = y.reshape(x.shape[0], w.shape[0], -1)
    if bias is not None:
        y += bias[:, None]
    return y.reshape(x.shape[0], w.shape[0], *window.output)


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

    >>> taps_of(3, 2, 1)
    [Taps(taps=slice(0, 3, 2), residue=0, first=0, step=1), Taps(taps=slice(1, 3, 2), residue=1, first=0, step=1)]
    """
    period = stride // math.gcd(stride, dilation)
    return [
        Taps(
            slice(tap, size, period),
            tap * dilation % stride,
            tap * dilation // stride,
            dilation * period // stride,
        )
        for tap in range(min(period, size))
    ]


def phases(x: Array, window: Window) -> tuple[Array, tuple[int, ...]]:
    """Lay out the padded input so that every tap reads one run of positions.

    With strides the input is split into its residues modulo the stride, each a contiguous plane.

    Returns:
        (N, C, planes * positions) and the lengths of a plane.
    """
    planes = []
    for axis, (length, stride) in enumerate(zip(window.lengths, window.strides, strict=True)):
        span = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        needed = max((window.output[axis] - 1) * stride + span, length + window.begins[axis])
        planes.append(-(-needed // stride))
    if tuple(planes) == x.shape[2:] and volume(window.strides) == 1:
        return np.ascontiguousarray(x).reshape(*x.shape[:2], -1), tuple(planes)
    result = np.zeros((*x.shape[:2], *window.strides, *planes), x.dtype)
    for residues in np.ndindex(*window.strides):
        target, source = [], []
        for residue, begin, length, stride in zip(
            residues, window.begins, window.lengths, window.strides, strict=True
        ):
            low = max(0, -((residue - begin) // stride))
            first = low * stride + residue - begin
            target.append(slice(low, low + max(0, -((first - length) // stride))))
            source.append(slice(first, None, stride))
        result[(slice(None), slice(None), *residues, *target)] = x[(slice(None), slice(None), *source)]
    return result.reshape(*x.shape[:2], -1), tuple(planes)


def runs(source: Array, window: Window, planes: Ints, length: int) -> list[tuple[tuple[slice, ...], Array]]:
    """Return for groups of taps which they are and, without a copy, all that they read.

    Args:
        source: (N, groups, channels, planes * positions), contiguous.

    Returns:
        Slices of the kernel's axes; views (N, groups, channels, taps of these..., length).
    """
    steps = [volume(planes[axis + 1 :]) for axis in range(len(planes))]
    per_axis = [
        taps_of(*triple) for triple in zip(window.kernel, window.strides, window.dilations, strict=True)
    ]
    result = []
    for group in itertools.product(*per_axis):
        plane = 0
        for stride, axis in zip(window.strides, group, strict=True):
            plane = plane * stride + axis.residue
        start = plane * volume(planes) + sum(a.first * n for a, n in zip(group, steps, strict=True))
        counts = [len(range(size)[a.taps]) for a, size in zip(group, window.kernel, strict=True)]
        strides = [a.step * n * source.itemsize for a, n in zip(group, steps, strict=True)]
        view = as_strided(
            source[..., start:],
            (*source.shape[:3], *counts, length),
            (*source.strides[:3], *strides, source.itemsize),
            writeable=False,
        )
        result.append((tuple(a.taps for a in group), view))
    return result


def flat(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve over runs of the padded input; see the module."""
    source, planes = phases(x, window)
    steps = [volume(planes[axis + 1 :]) for axis in range(len(planes))]
    length = 1 + sum((count - 1) * step for count, step in zip(window.output, steps, strict=True))
    batch, channels = x.shape[0], x.shape[1] // groups
    rows, taps = w.shape[0] // groups, volume(window.kernel)
    depth = channels * taps
    matrix = w.reshape(groups, rows, depth)
    views = runs(source.reshape(batch, groups, channels, -1), window, planes, length)
    y = np.empty((batch, groups, rows, window.output[0] * steps[0]), x.dtype)
    wide_tile = min(length, max(NARROWEST, TILE // depth))
    tall_tile = min(groups, max(1, TILE // (depth * wide_tile)))
    buffer = np.empty(tall_tile * depth * wide_tile, x.dtype)
    for n in range(batch):
        for g in range(0, groups, tall_tile):
            block = slice(g, min(g + tall_tile, groups))
            for first in range(0, length, wide_tile):
                part = slice(first, min(first + wide_tile, length))
                size = (block.stop - g, channels, *window.kernel, part.stop - first)
                columns = buffer[: volume(size)].reshape(size)
                for places, view in views:
                    columns[(slice(None), slice(None), *places)] = view[n, block, ..., part]
                product = columns.reshape(block.stop - g, depth, -1)
                np.matmul(matrix[block], product, out=y[n, block, :, part])
    grid = y.reshape(batch, w.shape[0], window.output[0], *planes[1:])
    kept = grid[(..., *(slice(count) for count in window.output))]
    if bias is not None:
        return np.add(kept, bias.reshape(-1, *[1] * len(window.output)))
    return np.ascontiguousarray(kept)


def exact(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve over exactly the positions of the output, some rows of its first axis at a time."""
    padded = np.ascontiguousarray(pad_spatial(x, window.begins, window.ends))
    batch, channels = x.shape[0], x.shape[1] // groups
    rows, depth = w.shape[0] // groups, channels * volume(window.kernel)
    matrix = w.reshape(groups, rows, depth)
    source = padded.reshape(batch, groups, channels, *padded.shape[2:])
    jumps = source.strides[3:]
    view = as_strided(
        source,
        (*source.shape[:3], *window.kernel, *window.output),
        (
            *source.strides[:3],
            *(jump * gap for jump, gap in zip(jumps, window.dilations, strict=True)),
            *(jump * step for jump, step in zip(jumps, window.strides, strict=True)),
        ),
        writeable=False,
    )
    per_row = volume(window.output[1:])
    height, rank = window.output[0], len(window.output)
    tile = min(height, -(-max(NARROWEST, TILE // depth) // per_row))
    y = np.empty((batch, groups, rows, height * per_row), x.dtype)
    samples = max(1, TILE // (groups * depth * height * per_row))
    for n in range(0, batch, samples):
        block = slice(n, min(n + samples, batch))
        for g in [slice(None)] if samples > 1 else map(slice, range(groups), range(1, groups + 1)):
            for first in range(0, height, tile):
                lines = slice(first, min(first + tile, height))
                part = slice(lines.start * per_row, lines.stop * per_row)
                taken = view[(block, g, slice(None), *[slice(None)] * rank, lines)]
                columns = taken.reshape(*taken.shape[:2], depth, -1)
                np.matmul(matrix[g], columns, out=y[block, g, :, part])
    y = y.reshape(batch, w.shape[0], -1)
    if bias is not None:
        y += bias[:, None]
    return y.reshape(batch, w.shape[0], *window.output)


@kernel("Conv", since=1)
def Conv(
    X: Array,
    W: Array,
    B: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the convolution of X (N, C, ...) with W (M, C / group, ...) plus B (M,).

    Raises:
        ValueError: The shapes or attributes do not fit.
    """
    check("Conv", X, W, B, group, kernel_shape)
    window = slide("Conv", X.shape[2:], W.shape[2:], strides, dilations, pads, auto_pad)
    bias = None if B is None else wide(B)
    return convolve(wide(X), wide(W), bias, window, group).astype(X.dtype, copy=False)


@kernel("ConvTranspose", since=1)
def ConvTranspose(
    X: Array,
    W: Array,
    B: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the transposed convolution of X (N, C, ...) with W (C, M / group, ...) plus B (M,).

    Raises:
        ValueError: The shapes or attributes do not fit.
    """
    check("ConvTranspose", X, W, B, group, kernel_shape)
    rank = X.ndim - 2
    steps = spread("ConvTranspose", "strides", strides, rank, 1)
    gaps = spread("ConvTranspose", "dilations", dilations, rank, 1)
    extra = list(output_padding or [0] * rank)
    begins, ends = paddings("ConvTranspose", None if auto_pad != "NOTSET" else pads, rank)
    if output_shape and len(output_shape) not in {rank, rank + 2}:
        raise ValueError(f"ConvTranspose: output_shape has {len(output_shape)} entries, expected {rank}")
    lengths = []
    for axis in range(rank):
        span = (W.shape[2 + axis] - 1) * gaps[axis] + 1
        full = (X.shape[2 + axis] - 1) * steps[axis] + extra[axis] + span
        same = auto_pad in {"SAME_UPPER", "SAME_LOWER"}
        if output_shape or same:
            length = list(output_shape)[axis - rank] if output_shape else X.shape[2 + axis] * steps[axis]
            missing = max(full - length, 0)
            smaller, greater = missing // 2, missing - missing // 2
            upper = auto_pad == "SAME_UPPER"
            begins[axis], ends[axis] = (smaller, greater) if upper else (greater, smaller)
        else:
            length = full - begins[axis] - ends[axis]
        if length < 0:
            raise ValueError(f"ConvTranspose: spatial axis {axis} would have the length {length}")
        lengths.append(length)
    window = Window(tuple(lengths), W.shape[2:], steps, gaps, tuple(begins), tuple(ends), X.shape[2:])
    batch, outputs = X.shape[0], W.shape[1]
    matrix = wide(W).reshape(group, W.shape[0] // group, math.prod(W.shape[1:])).transpose(0, 2, 1)
    inputs = wide(X).reshape(batch, group, W.shape[0] // group, math.prod(X.shape[2:]))
    columns = np.matmul(matrix, inputs).reshape(batch, group * outputs, *W.shape[2:], *X.shape[2:])
    y = fold(columns, window)
    if B is not None:
        y += wide(B).reshape(-1, *[1] * rank)
    return y.astype(X.dtype, copy=False)


@kernel("Col2Im", since=18)
def Col2Im(
    input: Array,
    image_shape: Array,
    block_shape: Array,
    *,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the images (N, C, ...) whose blocks, columns of input (N, C * block, blocks), are summed.

    Raises:
        ValueError: The number of blocks or of rows does not fit.
    """
    kernel_shape = block_shape.tolist()
    window = slide("Col2Im", image_shape.tolist(), kernel_shape, strides, dilations, pads)
    if input.ndim != 3 or input.shape[1] % volume(kernel_shape) or input.shape[2] != volume(window.output):
        raise ValueError(
            f"Col2Im: the input has shape {input.shape}, expected "
            f"(N, C * {volume(kernel_shape)}, {volume(window.output)})"
        )
    channels = input.shape[1] // volume(kernel_shape)
    blocks = wide(input).reshape(input.shape[0], channels, *window.kernel, *window.output)
    return fold(blocks, window).astype(input.dtype, copy=False)
