"""Convolutions as matrix products over columns of window contents, in cache-sized tiles.

Half types accumulate in float32. Two ways to lay out columns: *flat*, where all output positions of a tap
are one run of the padded input (with a few positions between rows that are dropped at the end), and
*exact*, row by row. Flat copies faster, exact multiplies less.
"""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.conv_layout import dropped, layout
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, Window, pad_spatial, region, slide, volume

TILE = 1 << 18
"""Elements of a tile of columns: what fits the second level cache."""
NARROWEST = 256
"""Positions that a product has at least: below that packing the weights dominates."""
WASTE = 12
"""Multiplications per copied element that the dropped positions may cost before exact is faster."""
SMALL = 1 << 15
"""Elements of all columns up to which one copy and one product are fastest."""
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
    if x.shape[0] * x.shape[1] * volume(window.kernel) * volume(window.output) <= SMALL:
        return at_once(x, w, bias, window, groups)
    rows = w.shape[0] // groups
    if rows * dropped(window) > WASTE or volume(window.strides) > PLANES:
        return exact(x, w, bias, window, groups)
    return flat(x, w, bias, window, groups)


def pointwise(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve with a kernel of one point: a plain product."""
    taken = x[region(slice(None, None, stride) for stride in window.strides)]
    columns = taken.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    y: Array = np.matmul(w.reshape(groups, w.shape[0] // groups, -1), columns)
    y = y.reshape(x.shape[0], w.shape[0], -1)
    if bias is not None:
        y += bias[:, None]
    return y.reshape(x.shape[0], w.shape[0], *window.output)


def flat(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve over runs of the padded input; see the module."""
    plan = layout(window)
    batch, channels = x.shape[0], x.shape[1] // groups
    rows, depth = w.shape[0] // groups, channels * volume(window.kernel)
    matrix = w.reshape(groups, rows, depth)
    views = plan.views(plan.arrange(x, window).reshape(batch, groups, channels, -1))
    y = np.empty((batch, groups, rows, window.output[0] * volume(plan.planes[1:])), x.dtype)
    tile = TILE if rows > 1 else TILE // 4  # one row reads its columns only once
    wide_tile = min(plan.length, max(NARROWEST, tile // depth))
    tall_tile = min(groups, max(1, tile // (depth * wide_tile)))
    buffer = np.empty(tall_tile * depth * wide_tile, x.dtype)
    every = (slice(None), slice(None))
    for n in range(batch):
        for g in range(0, groups, tall_tile):
            block = slice(g, min(g + tall_tile, groups))
            for first in range(0, plan.length, wide_tile):
                part = slice(first, min(first + wide_tile, plan.length))
                size = (block.stop - g, channels, *window.kernel, part.stop - first)
                columns = buffer[: volume(size)].reshape(size)
                for taps, view in views:
                    columns[(*every, *taps)] = view[n, block, ..., part]
                product = columns.reshape(block.stop - g, depth, -1)
                np.matmul(matrix[block], product, out=y[n, block, :, part])
    grid = y.reshape(batch, w.shape[0], window.output[0], *plan.planes[1:])
    kept: Array = grid[region(slice(count) for count in window.output)]
    if bias is not None:
        return np.asarray(kept + bias.reshape(-1, *[1] * len(window.output)))
    return np.ascontiguousarray(kept)


def contents(x: Array, window: Window, groups: int) -> Array:
    """Return what the windows hold, (N, groups, C / groups, kernel..., output...): a view of the padded x."""
    padded = np.ascontiguousarray(pad_spatial(x, window.begins, window.ends))
    source = padded.reshape(x.shape[0], groups, x.shape[1] // groups, *padded.shape[2:])
    jumps = source.strides[3:]
    view: Array = np.ndarray(
        (*source.shape[:3], *window.kernel, *window.output),
        source.dtype,
        source,
        0,
        (
            *source.strides[:3],
            *(jump * gap for jump, gap in zip(jumps, window.dilations, strict=True)),
            *(jump * step for jump, step in zip(jumps, window.strides, strict=True)),
        ),
    )
    return view


def at_once(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve with one product per group over all columns."""
    matrix = w.reshape(groups, w.shape[0] // groups, -1)
    columns = contents(x, window, groups).reshape(x.shape[0], groups, matrix.shape[2], -1)
    y: Array = np.matmul(matrix, columns).reshape(x.shape[0], w.shape[0], -1)
    if bias is not None:
        y += bias[:, None]
    return y.reshape(x.shape[0], w.shape[0], *window.output)


def exact(x: Array, w: Array, bias: Array | None, window: Window, groups: int) -> Array:
    """Convolve over exactly the positions of the output, some rows of its first axis at a time."""
    batch, channels = x.shape[0], x.shape[1] // groups
    rows, depth = w.shape[0] // groups, channels * volume(window.kernel)
    matrix = w.reshape(groups, rows, depth)
    view = contents(x, window, groups)
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
