"""Scales, zero points and codes of one block of columns after the other, each the best given all other blocks.

The damped output error of a row is a quadratic form of its weights. Given the other blocks, that of block b is
(v - a) G_b (v - a)^T plus a constant, with G_b the block of the Gram matrix and a, its aim, the weights that would
make good what the other blocks do wrong. For every candidate scale and zero point the aim is rounded by GPTQ inside of the
block (Frantar et al. 2022), whose error is known when it ends: the sum of the squares of what each column leaves.

Block coordinate descent as in Behdin et al. 2023, "QuantEase", with blocks that share a scale in place of columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.compensation import DAMPING, inverse_factor
from onnxslim_lab.quantization.numerics import Grid, dequantize, safe_scale
from onnxslim_lab.second_order.obs import damped

_NEAR = (0.92, 0.96, 1.0, 1.04, 1.08)  # of the present scale
_WIDE = tuple(np.linspace(0.55, 1.3, 26))
_GAIN = 1e-4  # part of a block's error that a change has to gain: sums are float32
_MEMORY = 1 << 22  # elements of all candidates of a block held at a time


def search_blocks(
    matrix: Array,
    grid: Grid,
    codes: Array,
    gram: Array,
    *,
    symmetric: bool,
    wide: bool = False,
    damping: float = DAMPING,
) -> tuple[Grid, Array]:
    """Return (grid, codes) of no more damped output error: one pass over the blocks.

    Args:
        matrix: Weights (out, in), finite.
        grid: Blockwise along axis 1, of integer codes.
        codes: Where to start, (out, in).
        gram: X^T X, (in, in).
        symmetric: Keep the zero points.
        wide: Try scales from about half of the present ones to 1.3 times these; else within 8 % of them.
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.
    """
    weights = damped(np.asarray(gram, np.float64), damping)
    weights /= np.mean(np.diagonal(weights))
    value = dequantize(codes, grid).astype(np.float64)
    slope = (value - matrix) @ weights
    scale, zero, found = grid.scale.copy(), grid.zero_point.copy(), codes.copy()
    for number, start in enumerate(range(0, matrix.shape[1], grid.block)):
        part = slice(start, min(start + grid.block, matrix.shape[1]))
        own = weights[part, part]
        aim = value[:, part] - np.linalg.solve(own, slope[:, part].T).T
        change = value[:, part] - aim
        present = np.einsum("ri,ri->r", change @ own, change)
        order = np.argsort(-np.diagonal(own), kind="stable")
        upper = inverse_factor(own[np.ix_(order, order)])
        tries = _candidates(grid, scale[:, number], zero[:, number], _WIDE if wide else _NEAR, symmetric)
        chunk = max(1, _MEMORY // (len(own) * len(tries[0])))
        for first in range(0, len(matrix), chunk):
            some = np.arange(first, min(first + chunk, len(matrix)))
            scales, zeros = tries[0][:, some], tries[1][:, some]
            fresh, loss = _round(aim[some][:, order], scales, zeros, upper, grid.limits)
            best = loss.argmin(axis=0)
            better = np.flatnonzero(loss[best, np.arange(len(some))] < present[some] * (1 - _GAIN))
            rows, best = some[better], best[better]
            chosen = np.empty((len(rows), len(own)))
            chosen[:, order] = fresh[:, best, better].T
            scale[rows, number], zero[rows, number] = scales[best, better], zeros[best, better]
            found[rows, part] = chosen.astype(np.int32)
            steps = chosen - zero[rows, number, None].astype(np.float64)
            move = steps * scale[rows, number, None] - value[rows, part]
            value[rows, part] += move
            slope[rows] += move @ weights[part]
    return replace(grid, scale=scale, zero_point=zero), found


def _candidates(
    grid: Grid, scale: Array, zero: Array, factors: tuple[float, ...], symmetric: bool
) -> tuple[Array, Array]:
    """Return scales and zero points to try, (candidates, rows) each, in their dtypes."""
    shifts = (0,) if symmetric else (-1, 0, 1)
    scales = [safe_scale(scale.astype(np.float64) * factor, scale.dtype) for factor in factors]
    zeros = [np.clip(zero.astype(np.int32) + shift, *grid.limits).astype(zero.dtype) for shift in shifts]
    return np.repeat(scales, len(zeros), axis=0), np.tile(zeros, (len(scales), 1))


def _round(
    aim: Array, scales: Array, zeros: Array, upper: Array, limits: tuple[int, int]
) -> tuple[Array, Array]:
    """Return codes (columns, candidates, rows) and errors (candidates, rows) of GPTQ, float32.

    Args:
        aim: (rows, columns).
        scales: (candidates, rows).
        zeros: Likewise.
        upper: Inverse Cholesky factor of the Gram matrix, see `inverse_factor`.
        limits: Least and greatest code.
    """
    scale, zero, factor = (part.astype(np.float32) for part in (scales, zeros, upper))
    left = np.repeat(aim.T[:, None].astype(np.float32), len(scale), axis=1)
    codes, loss = np.empty_like(left), np.zeros_like(scale)
    for place in range(len(left)):
        np.clip(np.rint(left[place] / scale) + zero, *limits, out=codes[place])
        error = (left[place] - (codes[place] - zero) * scale) / factor[place, place]
        loss += error * error
        left[place + 1 :] -= factor[place, place + 1 :, None, None] * error
    return codes, loss
