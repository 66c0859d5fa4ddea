"""Grids and codes of a layer's weights fitted to its inputs: scale search, rounding, scales again.

1. The scale (and zero point) of every block is searched for least squared error of its rounded weights, each
   weighted by the energy of its input: the diagonal of the Gram matrix.
2. Codes by GPTQ, improved by coordinate descent (compensation.py).
3. Codes of few bits: scale, zero point and codes of every block again, given the other blocks (block_search.py).
4. Given the codes, the output is linear in the scales: those of a row are the solution of a small
   least-squares problem with the whole Gram matrix. Then codes again, and from 3 until nothing is gained.

Badri & Shaji 2023, "Half-quadratic quantization", and the k-quants of llama.cpp search scales against the
weights alone; step 4 is the alternating least squares of e.g. Xu et al. 2018, "Alternating multi-bit
quantization", under the metric of GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.block_search import search_blocks
from onnxslim_lab.quantization.compensation import DAMPING, check_gram, output_error
from onnxslim_lab.quantization.numerics import (
    Grid,
    code_range,
    dequantize,
    grid_of,
    quantize,
    safe_scale,
    weight_grid,
)
from onnxslim_lab.quantization.rounding import descend, round_gptq
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.second_order.obs import damped

_SHRINKS = np.linspace(1.0, 0.45, 23)  # of a block's range; few codes gain by leaving out the tails
_SHRINKS_WIDE = np.linspace(1.0, 0.8, 11)
_SHARES = (1.0, 0.93, 0.86, 0.79)  # of the range, to start from when there is time
_CACHED = 1 << 16  # weights searched at a time
_FEW_BITS = 4  # of codes whose scales are searched again, block by block
_WIDEST = 256  # columns of a block up to which they are
_MEMORY = 1 << 27  # bytes of normal equations held at a time


@dataclass(frozen=True, eq=False)
class Fitted:
    """Codes of a matrix and the grid they are on.

    Attributes:
        codes: (out, in), dtype `grid.kind.dtype`.
        grid: The grid.
        losses: |X (w - q)|^2 of each row, float64 (out,).
    """

    codes: Array
    grid: Grid
    losses: Array

    @property
    def error(self) -> float:
        """The squared change of the layer's output, summed over the rows of X and W."""
        return float(self.losses.sum())

    @property
    def values(self) -> Array:
        """The weights that the codes stand for, (out, in)."""
        return dequantize(self.codes, self.grid)


def fit(
    matrix: Array,
    kind: QuantType,
    gram: Array | None = None,
    *,
    block: int = 0,
    symmetric: bool = True,
    reduce_range: bool = False,
    rounding: Literal["nearest", "gptq"] = "gptq",
    rounds: int = 2,
    damping: float = DAMPING,
    dtype: Any = np.float32,
    thorough: bool = False,
) -> Fitted:
    """Return codes and scales of little output error, per row or per block of columns.

    The result is never worse than rounding to nearest on the grid that covers all weights.

    Args:
        matrix: Weights (out, in), finite.
        kind: Type of the codes.
        gram: X^T X (in, in), or its diagonal (in,); None counts all inputs alike.
        block: Columns that share a scale; 0 gives one scale per row.
        symmetric: Zero points in the middle of the codes.
        reduce_range: One bit less for 8-bit types, see numerics.code_range.
        rounding: "nearest" searches scales only.
        rounds: Times that scales are fitted to codes and codes to scales.
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.
        dtype: Of the scales.
        thorough: Start from other scales as well and search more of them, for about 4 times the work.

    Raises:
        ValueError: The weights or the Gram matrix are not finite, or shapes do not fit.
    """
    width = block or max(matrix.shape[1], 1)
    weights = np.ones(matrix.shape[1]) if gram is None else gram
    check_gram(matrix, weights)
    whole = weight_grid(
        matrix,
        kind,
        granularity="block",
        axis=1,
        block=width,
        symmetric=symmetric,
        reduce_range=reduce_range,
        dtype=dtype,
    )

    def tried(grid: Grid, codes: Array) -> Fitted:
        return Fitted(codes, grid, output_error(matrix, dequantize(codes, grid), weights))

    def rounded(grid: Grid, start: Array | None) -> Array:
        if weights.ndim == 1 or rounding == "nearest":
            return quantize(matrix, grid)
        codes = round_gptq(matrix, grid, weights, damping=damping) if start is None else start
        return descend(matrix, grid, codes, weights, damping=damping)

    def alternate(here: Fitted, *, search: bool) -> Fitted:
        for number in range(rounds):
            before, grid, codes = here.error, here.grid, here.codes
            if search:
                grid, codes = search_blocks(
                    matrix,
                    grid,
                    codes,
                    weights,
                    symmetric=symmetric,
                    wide=thorough and number == 0,
                    damping=damping,
                )
            grid = refit_scales(matrix, grid, codes, weights, damping=damping)
            here = _least(here, tried(grid, rounded(grid, codes)))
            if here.error > 0.995 * before:
                break
        return here

    best = tried(whole, quantize(matrix, whole))
    if matrix.size == 0:
        return _unblocked(best, block)
    energy = weights if weights.ndim == 1 else np.diagonal(weights)
    starts = [search_grid(matrix, whole, energy, symmetric=symmetric, reduce_range=reduce_range)]
    if thorough:
        starts += [
            replace(whole, scale=safe_scale(whole.scale.astype(np.float64) * s, dtype)) for s in _SHARES
        ]
    for start in starts:
        best = _least(best, alternate(tried(start, rounded(start, None)), search=False))
    few = kind.bits <= _FEW_BITS and not kind.floating and width <= _WIDEST
    if few and weights.ndim == 2 and rounding == "gptq":
        best = alternate(best, search=True)
    return _unblocked(best, block)


def search_grid(
    matrix: Array, grid: Grid, energy: Array, *, symmetric: bool, reduce_range: bool = False
) -> Grid:
    """Return the grid whose blocks have the least squared error of weights rounded to nearest.

    Args:
        matrix: Weights (out, in).
        grid: Blockwise along axis 1; its type, block and scale dtype are kept.
        energy: Weight of each column, (in,); columns of no energy get a little, as they may have some yet.
        symmetric: Keep the zero points in the middle, and search scales only.
        reduce_range: One bit less for 8-bit types.
    """
    weight = np.maximum(energy, 1e-3 * float(np.mean(energy))) if np.any(energy > 0) else np.ones(len(energy))
    missing = -matrix.shape[1] % grid.block
    weight = np.pad(weight / np.max(weight), (0, missing)).astype(np.float32).reshape(-1, grid.block)
    scale, zero = np.empty_like(grid.scale), np.empty_like(grid.zero_point)
    chunk = max(1, _CACHED // max(1, weight.size))
    for first in range(0, len(matrix), chunk):
        part = slice(first, first + chunk)
        blocks = np.pad(matrix[part].astype(np.float32), ((0, 0), (0, missing))).reshape(-1, *weight.shape)
        scale[part], zero[part] = _search(blocks, weight, grid, symmetric, reduce_range)
    return replace(grid, scale=scale, zero_point=zero)


def _search(
    blocks: Array, weight: Array, grid: Grid, symmetric: bool, reduce_range: bool
) -> tuple[Array, Array]:
    """Return the best (scale, zero_point) of blocks (rows, blocks, length)."""
    kind = grid.kind
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    root, error = np.sqrt(weight), np.empty_like(blocks)
    least, greatest = code_range(kind, symmetric=symmetric, reduce_range=reduce_range)
    shifts = (0,) if symmetric or kind.floating or kind.bits > 4 else (0, -1, 1)
    best_scale, best_zero = np.ones_like(low, grid.scale.dtype), np.zeros_like(low, kind.dtype)
    loss = np.full(low.shape, np.inf, np.float32)
    for shrink in _SHRINKS if kind.bits <= 4 else _SHRINKS_WIDE:
        scale, start = grid_of(
            low * shrink,
            high * shrink,
            kind,
            symmetric=symmetric,
            reduce_range=reduce_range,
            dtype=grid.scale.dtype,
        )
        wide = scale.astype(np.float32)
        ratio = blocks / wide[..., None]
        rounded = None if kind.floating else np.rint(ratio)
        for shift in shifts:
            zero = np.clip(start.astype(np.int32) + shift, least, greatest)
            if rounded is None:
                error[...] = np.clip(ratio, least, greatest).astype(kind.dtype)
            else:
                np.maximum(rounded, (least - zero).astype(np.float32)[..., None], out=error)
                np.minimum(error, (greatest - zero).astype(np.float32)[..., None], out=error)
            np.subtract(ratio, error, out=error)
            np.multiply(error, root, out=error)
            found = np.einsum("rbi,rbi->rb", error, error) * wide**2
            better = found < loss
            loss = np.where(better, found, loss)
            best_scale = np.where(better, scale, best_scale)
            best_zero = np.where(better, zero.astype(kind.dtype), best_zero)
    return best_scale, best_zero


def refit_scales(matrix: Array, grid: Grid, codes: Array, gram: Array, *, damping: float = DAMPING) -> Grid:
    """Return the grid with the scales that suit given codes best; zero points stay.

    With c_b the codes of block b of a row, less the zero point, the row is sum_b s_b c_b and its damped
    output error least where sum_b' (c_b G c_b'^T) s_b' = c_b G w^T. Scales that would come out at less than
    half or more than twice the present ones keep them.

    Args:
        matrix: Weights (out, in).
        grid: Blockwise along axis 1.
        codes: (out, in).
        gram: X^T X, (in, in), or its diagonal (in,).
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.
    """
    starts = np.arange(0, matrix.shape[1], grid.block)
    count = len(starts)
    unit = replace(grid, scale=np.ones_like(grid.scale))
    steps = dequantize(codes, unit).astype(np.float64)
    scale = grid.scale.astype(np.float64)
    if gram.ndim == 1:
        own = np.add.reduceat(steps * steps * gram, starts, axis=1)
        aim = np.add.reduceat(steps * matrix * gram, starts, axis=1)
        fresh = np.divide(aim, own, out=scale.copy(), where=own > 0)
    else:
        weights = damped(np.asarray(gram, np.float64), damping)
        aim = np.add.reduceat(steps * (matrix.astype(np.float64) @ weights), starts, axis=1)
        fresh = np.empty_like(scale)
        chunk = max(1, _MEMORY // (8 * count * (count + matrix.shape[1])))
        for first in range(0, len(steps), chunk):
            part = slice(first, first + chunk)
            normal = _normal_equations(steps[part], weights, starts)
            ridge = 1e-9 * np.trace(normal, axis1=1, axis2=2) / count + 1e-300
            normal[:, np.arange(count), np.arange(count)] += ridge[:, None]
            fresh[part] = np.linalg.solve(normal, aim[part][..., None])[..., 0]
    usable = np.isfinite(fresh) & (fresh > scale / 2) & (fresh < scale * 2)
    return replace(grid, scale=safe_scale(np.where(usable, fresh, scale), grid.scale.dtype))


def _normal_equations(steps: Array, weights: Array, starts: Array) -> Array:
    """Return c_b G c_b'^T of every row, (rows, blocks, blocks)."""
    ends = [*starts[1:], steps.shape[1]]
    result = np.empty((len(steps), len(starts), len(starts)))
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        result[:, index] = np.add.reduceat(steps * (steps[:, start:end] @ weights[start:end]), starts, axis=1)
    return result


def _least(first: Fitted, second: Fitted) -> Fitted:
    """Return, row by row, the one of less error."""
    pick = (first.losses <= second.losses)[:, None]
    grid = replace(
        first.grid,
        scale=np.where(pick, first.grid.scale, second.grid.scale),
        zero_point=np.where(pick, first.grid.zero_point, second.grid.zero_point),
    )
    losses = np.minimum(first.losses, second.losses)
    return Fitted(np.where(pick, first.codes, second.codes), grid, losses)


def _unblocked(found: Fitted, block: int) -> Fitted:
    """Return the result with one scale per row as a grid along axis 0 when there are no blocks."""
    if block:
        return found
    rows, empty = len(found.codes), not found.grid.scale.size
    scale = np.ones(rows, found.grid.scale.dtype) if empty else found.grid.scale[:, 0]
    zero = np.zeros(rows, found.grid.kind.dtype) if empty else found.grid.zero_point[:, 0]
    return replace(found, grid=replace(found.grid, scale=scale, zero_point=zero, axis=0, block=0))
