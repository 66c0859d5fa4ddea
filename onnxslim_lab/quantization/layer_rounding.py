"""Rounding the weights of static layers so that what the layers give changes least."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.adaround import learn_rounding
from onnxslim_lab.quantization.compensation import damping_for
from onnxslim_lab.quantization.numerics import Grid, dequantize, quantize
from onnxslim_lab.quantization.rounding import descend, round_gptq
from onnxslim_lab.statistics import Gram

Array = NDArray[Any]

SMALL = 64
"""Most inputs of the groups that are rounded all at once."""


def round_layer(layer: Layer, grid: Grid, gram: Gram, *, learn: bool = False) -> Array:
    """Return the codes of a layer's weight, as its node sees it, by GPTQ and coordinate descent.

    Many small groups (depthwise convolutions) are rounded at once, by coordinate descent alone. Where activations
    are so great that the Gram matrix overflows, to nearest.

    Args:
        layer: A Conv, Gemm or MatMul.
        grid: Of its weight: one scale, or one for each output channel.
        gram: Of its input rows.
        learn: Whether to go on from there by AdaRound.
    """
    matrix = np.asarray(layer.matrix, np.float32)
    groups, out, size = matrix.shape
    if groups > 1 and size <= SMALL and gram.full and np.isfinite(gram.xtx).all():
        return np.ascontiguousarray(layer.kind.weight(round_groups(matrix, grid, gram.xtx)))
    codes = np.empty(matrix.shape, grid.kind.dtype)
    for group in range(groups):
        rows = rows_of(grid, group * out, out)
        energy = gram.matrix[group]
        if not np.isfinite(energy).all():
            codes[group] = quantize(matrix[group], rows)
            continue
        damping = damping_for(size, gram.count)
        first = round_gptq(matrix[group], rows, energy, damping=damping)
        found = descend(matrix[group], rows, first, energy, damping=damping) if energy.ndim == 2 else first
        if learn:
            found = learn_rounding(matrix[group], rows, energy, start=found, damping=damping)
        codes[group] = found
    return np.ascontiguousarray(layer.kind.weight(codes))


def round_groups(matrix: Array, grid: Grid, gram: Array, sweeps: int = 20, damping: float = 0.01) -> Array:
    """Return the codes of many small matrices at once, by coordinate descent from the nearest ones.

    Every column in turn is set to the code that is best given all others (Behdin et al. 2023, "QuantEase"),
    until none changes; no step raises the error |X (W - Q)^T|^2, damped as GPTQ's.

    Args:
        matrix: Weights (groups, out, in).
        grid: One scale, or one for each of groups * out rows.
        gram: X^T X of each group, (groups, in, in).
        sweeps: Times through the columns, at most.
        damping: Part of the mean diagonal added to each diagonal.

    >>> from onnxslim_lab.quantization.types import QUANT_TYPES
    >>> grid = Grid(QUANT_TYPES["int8"], np.float32(1), np.int8(0))
    >>> gram = np.array([[[1.0, 0.9], [0.9, 1.0]]])
    >>> round_groups(np.float32([[[0.45, 0.45]]]), grid, gram).sum()
    np.int64(1)
    """
    groups, out, size = matrix.shape
    shape = (groups, out, 1)
    scale = np.broadcast_to(grid.scale.astype(np.float64).reshape(-1, 1), (groups * out, 1)).reshape(shape)
    zero = np.broadcast_to(grid.zero_point.astype(np.float64).reshape(-1, 1), (groups * out, 1)).reshape(
        shape
    )
    low, high = grid.limits
    weights = np.asarray(matrix, np.float64)
    mean = np.trace(gram, axis1=1, axis2=2)[:, None, None] / size
    energy = gram + damping * np.where(mean > 0, mean, 1.0) * np.eye(size)
    codes = np.clip(np.rint(weights / scale) + zero, low, high)
    slope = ((codes - zero) * scale - weights) @ energy
    for _ in range(sweeps):
        changed = False
        for column in range(size):
            own = energy[:, column, column][:, None]
            value = (codes[..., column] - zero[..., 0]) * scale[..., 0]
            aim = value - slope[..., column] / own
            best = np.clip(np.rint(aim / scale[..., 0]) + zero[..., 0], low, high)
            move = (best - codes[..., column]) * scale[..., 0]
            if move.any():
                changed = True
                codes[..., column] = best
                slope += move[..., None] * energy[:, column, None, :]
        if not changed:
            break
    return np.asarray(codes.astype(np.int32).astype(grid.kind.dtype))


def rows_of(grid: Grid, start: int, count: int) -> Grid:
    """Return the grid of some output channels as rows of a matrix."""
    if grid.axis is None:
        return grid
    stop = start + count if grid.scale.size > count else count
    start = start if grid.scale.size > count else 0
    return replace(grid, scale=grid.scale[start:stop], zero_point=grid.zero_point[start:stop], axis=0)


def output_shift(layer: Layer, codes: Array, grid: Grid, gram: Gram) -> Array:
    """Return the mean that rounding the weight takes from each output channel, float64 (channels,).

    Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction": added to the
    bias, it leaves the mean output as it was.
    """
    lost = np.asarray(layer.matrix, np.float64) - layer.kind.matrix(
        dequantize(codes, grid).astype(np.float64)
    )
    return np.asarray((lost @ gram.mean[:, :, None]).reshape(-1))
