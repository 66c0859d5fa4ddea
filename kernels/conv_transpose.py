"""ConvTranspose and Col2Im: columns summed over the windows they belong to."""

from __future__ import annotations

import math

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.conv import check
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, Window, fold, paddings, slide, spread, volume


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
