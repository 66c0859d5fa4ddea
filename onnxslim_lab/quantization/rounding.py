"""Rounding of a layer's weights to a grid: to nearest, and so that the layer's output changes least.

A linear layer with weights W (out, in) and input rows X gives X W^T; rounding W to Q changes the output by
|X (W - Q)^T|^2 = tr((W - Q) G (W - Q)^T) with the Gram matrix G = X^T X. Methods and papers: compensation.py.
"""

from __future__ import annotations

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.columns import Columns
from onnxslim_lab.quantization.compensation import DAMPING, check_gram, compensate, improve, output_error
from onnxslim_lab.quantization.numerics import Grid, dequantize, quantize

__all__ = ["DAMPING", "better", "descend", "output_error", "round_gptq", "round_nearest"]


def round_nearest(matrix: Array, grid: Grid) -> Array:
    """Return the codes of the nearest values, as QuantizeLinear gives them; raises as `quantize`."""
    return quantize(matrix, grid)


def round_gptq(
    matrix: Array,
    grid: Grid,
    gram: Array,
    *,
    block: int = 32,
    activation_order: bool = True,
    damping: float = DAMPING,
) -> Array:
    """Return codes by GPTQ; a row that rounding to nearest leaves with less error is rounded to nearest.

    The grid is fixed beforehand ("static groups"), so that blocks of neighbouring columns share a scale
    whatever the order of the columns. Columns whose input is always zero are rounded to nearest.

    Args:
        matrix: Weights (out, in), finite.
        grid: Of the matrix: one scale, one per row (axis 0), or blocks along axis 1.
        gram: X^T X, float (in, in); with a diagonal (in,) nothing can be compensated: nearest.
        block: Columns whose compensation of the columns after them is put off and done at once; it has
            to do with speed only.
        activation_order: Columns of greatest input energy first.
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.

    Returns:
        Codes (out, in), dtype `grid.kind.dtype`.

    Raises:
        ValueError: A weight is NaN, the Gram matrix is not finite, or shapes do not fit.
    """
    nearest = round_nearest(matrix, grid)
    check_gram(matrix, gram)
    if gram.ndim == 1 or matrix.size == 0:
        return nearest
    columns = Columns(grid, matrix.shape)
    codes = compensate(matrix, columns, gram, block=block, activation_order=activation_order, damping=damping)
    return better(matrix, grid, gram, columns.stored(codes), nearest)


def descend(
    matrix: Array, grid: Grid, codes: Array, gram: Array, *, sweeps: int = 4, damping: float = DAMPING
) -> Array:
    """Return codes of less error, found by coordinate descent; rows without any keep their codes.

    Args:
        matrix: Weights (out, in), finite.
        grid: Of the matrix.
        codes: Where to start, (out, in).
        gram: X^T X, (in, in), or its diagonal (in,).
        sweeps: Times through the columns, at most; it ends when nothing changes.
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.

    Raises:
        ValueError: The Gram matrix is not finite, or shapes do not fit.
    """
    check_gram(matrix, gram)
    if gram.ndim == 1 or matrix.size == 0:
        return better(matrix, grid, gram, codes, round_nearest(matrix, grid))
    columns = Columns(grid, matrix.shape)
    found = improve(matrix, columns, codes.T, dequantize(codes, grid).T, gram, sweeps=sweeps, damping=damping)
    return better(matrix, grid, gram, codes, columns.stored(found))


def better(matrix: Array, grid: Grid, gram: Array, first: Array, second: Array) -> Array:
    """Return, row by row, those codes of the two that change the layer's output less; ties: the first."""
    losses = [output_error(matrix, dequantize(codes, grid), gram) for codes in (first, second)]
    return np.where((losses[0] <= losses[1])[:, None], first, second)
