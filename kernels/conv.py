"""Convolutions as matrix products over columns of window contents, in cache-sized tiles.

Half types accumulate in float32. Two ways to lay out columns: *flat*, where all output positions of a tap
are one run of the padded input (with a few positions between rows that are dropped at the end), and
*exact*, row by row. Flat copies faster, exact multiplies less.
"""

from __future__ import annotations

import math

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, Window, fold, pad_spatial, paddings, slide, spread, volume

TILE = 1 << 17
"""Elements of a tile of columns: what fits the second level cache."""
NARROWEST = 256
"""Positions that a product has at least: below that packing the weights dominates."""
WASTE = 12
"""Multiplications per copied element that the dropped positions may cost before exact is faster."""


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
    if rows * dropped > WASTE:
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


def phases(x: Array, window: Window) -> tuple[Array, list[int], tuple[int, ...]]:
    """Lay out the padded input so that every tap reads one run of positions.

    With strides the input is split into its residues modulo the stride, each a contiguous plane.

    Returns:
        (N, C, planes * positions), the first position of every tap, and the lengths of a plane.
    """
    planes = []
    after = []
    for axis, (length, stride) in enumerate(zip(window.lengths, window.strides, strict=True)):
        span = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        needed = max((window.output[axis] - 1) * stride + span, length + window.begins[axis])
        planes.append(-(-needed // stride))
        after.append(planes[-1] * stride - length - window.begins[axis])
    padded = pad_spatial(x, window.begins, after)
    size = volume(planes)
    if volume(window.strides) > 1:
        split = [n for pair in zip(planes, window.strides, strict=True) for n in pair]
        rank = len(planes)
        order = [0, 1, *range(3, 3 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2)]
        padded = padded.reshape(*x.shape[:2], *split).transpose(order)
    steps = [volume(planes[axis + 1 :]) for axis in range(len(planes))]
    starts = []
    for tap in np.ndindex(*window.kernel):
        plane = position = 0
        for axis, place in enumerate(tap):
            quotient, residue = divmod(place * window.dilations[axis], window.strides[axis])
            plane = plane * window.strides[axis] + residue
            position += quotient * steps[axis]
        starts.append(plane * size + position)
    return padded.reshape(*x.shape[:2], -1), starts, tuple(planes)


def flat(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve over runs of the padded input; see the module."""
    source, starts, planes = phases(x, window)
    steps = [volume(planes[axis + 1 :]) for axis in range(len(planes))]
    length = 1 + sum((count - 1) * step for count, step in zip(window.output, steps, strict=True))
    batch, channels = x.shape[0], x.shape[1] // groups
    rows, taps = w.shape[0] // groups, len(starts)
    depth = channels * taps
    matrix = w.reshape(groups, rows, depth)
    source = source.reshape(batch, groups, channels, -1)
    y = np.empty((batch, groups, rows, window.output[0] * steps[0]), x.dtype)
    wide_tile = min(length, max(NARROWEST, TILE // depth))
    tall_tile = min(groups, max(1, TILE // (depth * wide_tile)))
    buffer = np.empty(tall_tile * depth * wide_tile, x.dtype)
    for n in range(batch):
        for g in range(0, groups, tall_tile):
            taken = min(tall_tile, groups - g)
            for first in range(0, length, wide_tile):
                last = min(first + wide_tile, length)
                columns = buffer[: taken * depth * (last - first)].reshape(taken, channels, taps, -1)
                for tap, start in enumerate(starts):
                    columns[:, :, tap] = source[n, g : g + taken, :, start + first : start + last]
                np.matmul(
                    matrix[g : g + taken],
                    columns.reshape(taken, depth, -1),
                    out=y[n, g : g + taken, :, first:last],
                )
    grid = y.reshape(batch, w.shape[0], window.output[0], *planes[1:])
    kept = grid[(..., *(slice(count) for count in window.output))]
    if bias is not None:
        return np.add(kept, bias.reshape(-1, *[1] * len(window.output)))
    return np.ascontiguousarray(kept)


def exact(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve over exactly the positions of the output, some rows of its first axis at a time."""
    padded = pad_spatial(x, window.begins, window.ends)
    batch, channels = x.shape[0], x.shape[1] // groups
    rows, taps = w.shape[0] // groups, volume(window.kernel)
    depth = channels * taps
    matrix = w.reshape(groups, rows, depth)
    source = padded.reshape(batch, groups, channels, *padded.shape[2:])
    per_row = volume(window.output[1:])
    height = window.output[0]
    tile = min(height, -(-max(NARROWEST, TILE // depth) // per_row))
    y = np.empty((batch, groups, rows, height * per_row), x.dtype)
    buffer = np.empty(depth * tile * per_row, x.dtype)
    for n, g in np.ndindex(batch, groups):
        for first in range(0, height, tile):
            count = min(tile, height - first)
            lengths = (count, *window.output[1:])
            columns = buffer[: depth * count * per_row].reshape(channels, taps, *lengths)
            for number, tap in enumerate(np.ndindex(*window.kernel)):
                places = []
                for axis, length in enumerate(lengths):
                    stride = window.strides[axis]
                    start = tap[axis] * window.dilations[axis] + (first * stride if axis == 0 else 0)
                    places.append(slice(start, start + (length - 1) * stride + 1, stride))
                columns[:, number] = source[(n, g, slice(None), *places)]
            part = slice(first * per_row, (first + count) * per_row)
            np.matmul(matrix[g], columns.reshape(depth, -1), out=y[n, g, :, part])
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
