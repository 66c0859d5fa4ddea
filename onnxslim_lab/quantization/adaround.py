"""Learned rounding: for every weight, whether it goes down or up, found by gradient descent.

Nagel, Amjad, van Baalen, Louizos & Blankevoort 2020, "Up or down? Adaptive rounding for post-training
quantization": a weight is scale * (floor(w / scale) + h(v)) with the rectified sigmoid h of a free number v,
which a regulariser of rising sharpness draws to 0 or 1. For a linear layer the loss of a set of input rows is
a quadratic form in their Gram matrix, so that no activations are needed, and every step sees all of them.
"""

from __future__ import annotations

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.columns import Columns
from onnxslim_lab.quantization.compensation import DAMPING, check_gram
from onnxslim_lab.quantization.numerics import Grid
from onnxslim_lab.quantization.rounding import better, descend, round_gptq, round_nearest
from onnxslim_lab.second_order.obs import damped

ITERATIONS = 300
RATE = 0.1  # of Adam
PULL = 1.0  # weight of the regulariser; an input of mean energy and a weight half a step off lose 1 / 4
WARM = 0.2  # part of the iterations without regulariser
SHARPNESS = (20.0, 2.0)  # exponent of the regulariser, from first to last
_LOW, _HIGH = -0.1, 1.1  # the sigmoid is stretched to this, then clipped to [0, 1]
_CHUNK = 1 << 17  # weights learned at a time: rows do not depend on each other


def learn_rounding(
    matrix: Array,
    grid: Grid,
    gram: Array,
    *,
    iterations: int = ITERATIONS,
    start: Array | None = None,
    damping: float = DAMPING,
) -> Array:
    """Return codes whose change of the layer's output is at most that of GPTQ and of rounding to nearest.

    What is learned is improved by coordinate descent, and a row for which another way is better takes that.

    Args:
        matrix: Weights (out, in), finite.
        grid: Of the matrix, of an integer type.
        gram: X^T X, (in, in), or its diagonal (in,), with which rounding to nearest is best.
        iterations: Steps of Adam.
        start: Codes known already (out, in), by default those of GPTQ and coordinate descent.
        damping: Part of the mean diagonal of the Gram matrix added to the diagonal.

    Returns:
        Codes (out, in), dtype `grid.kind.dtype`.

    Raises:
        ValueError: The type is float8, a weight is NaN, the Gram matrix is not finite, or shapes do not fit.
    """
    if grid.kind.floating:
        raise ValueError(f"learned rounding is for integer types, not {grid.kind}")
    check_gram(matrix, gram)
    nearest = round_nearest(matrix, grid)
    if gram.ndim == 1 or matrix.size == 0:
        return nearest
    if start is None:
        start = round_gptq(matrix, grid, gram, damping=damping)
        start = descend(matrix, grid, start, gram, damping=damping)
    best = better(matrix, grid, gram, start, nearest)
    columns = Columns(grid, matrix.shape)
    weights = damped(np.asarray(gram, np.float64), damping)
    weights = (weights / np.mean(np.diagonal(weights))).astype(np.float32)
    codes = np.empty(matrix.shape)
    chunk = max(1, _CHUNK // matrix.shape[1])
    for first in range(0, len(matrix), chunk):
        part = slice(first, first + chunk)
        scale, zero = columns.scale.T[part], columns.zero.T[part]
        codes[part] = zero + learn(matrix[part] / scale, scale, weights, grid.limits, zero, iterations)
    learned = columns.stored(codes.T)
    learned = descend(matrix, grid, learned, gram, damping=damping)
    return better(matrix, grid, gram, best, learned)


def learn(
    steps: Array, scale: Array, gram: Array, limits: tuple[int, int], zero: Array, iterations: int
) -> Array:
    """Return whole steps (rows, in), each the one below or above the weight, that were learned.

    Args:
        steps: Weights divided by their scale, (rows, in).
        scale: Scales, (rows, in).
        gram: X^T X of mean diagonal 1, float32 (in, in).
        limits: Least and greatest code.
        zero: Zero points, (rows, in).
        iterations: Steps of Adam.
    """
    bottom, top = (np.asarray(limit - zero, np.float32) for limit in limits)
    floor = np.floor(steps).astype(np.float32)
    rest = (steps - floor).astype(np.float32)
    sizes = (scale / np.sqrt(np.mean(scale**2, axis=1, keepdims=True))).astype(np.float32)
    share = np.clip((rest - _LOW) / (_HIGH - _LOW), 1e-4, 1 - 1e-4)
    free = np.log(share / (1 - share))
    mean, square = np.zeros_like(free), np.zeros_like(free)
    for step in range(1, iterations + 1):
        sigmoid = 1 / (1 + np.exp(-free))
        wide = sigmoid * (_HIGH - _LOW) + _LOW
        up = np.clip(wide, 0, 1)
        chosen = floor + up
        held = np.clip(chosen, bottom, top)
        slope = 2 * (((held - floor - rest) * sizes) @ gram) * sizes
        slope *= chosen == held
        done = step / iterations
        if done > WARM:
            since = (done - WARM) / (1 - WARM)
            power = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 + np.cos(np.pi * since)) / 2
            off = 2 * up - 1
            slope -= PULL * 2 * power * np.sign(off) * np.abs(off) ** np.float32(power - 1)
        slope *= ((wide > 0) & (wide < 1)) * (sigmoid * (1 - sigmoid)) * (_HIGH - _LOW)
        mean += 0.1 * (slope - mean)
        square += 0.001 * (slope * slope - square)
        corrected = np.sqrt(square / np.float32(1 - 0.999**step)) + 1e-8
        free -= np.float32(RATE / (1 - 0.9**step)) * mean / corrected
    return np.asarray(np.clip(floor + (free > 0), bottom, top), np.float64)


def reconstruction_target(matrix: Array, gram: Array, cross: Array, *, damping: float = DAMPING) -> Array:
    """Return the weights that make the layer's output, computed from quantized inputs, that of the float model.

    They minimise |X W^T - X_q V^T|^2 + d |V - W|^2 over V, d being `damping` times the mean diagonal ("asymmetric
    reconstruction" in Nagel et al. 2020, in closed form): V = W (X^T X_q + d) (X_q^T X_q + d)^-1. Rounding V with
    the Gram matrix of X_q then makes good what the layers before have lost.

    Args:
        matrix: Weights W of the float model (out, in).
        gram: X_q^T X_q, of the inputs in the quantized model, (in, in).
        cross: X_q^T X, with the inputs X in the float model, (in, in).
        damping: How much the weights are held where they are.

    Raises:
        ValueError: Something is not finite, or shapes do not fit.
    """
    check_gram(matrix, gram)
    check_gram(matrix, cross)
    if gram.ndim == 1 or cross.ndim == 1:
        raise ValueError("the whole Gram matrix and cross moment are needed, not their diagonals")
    energy = float(np.mean(np.diagonal(gram)))
    hold = damping * energy if energy > 0 else 1.0
    identity = hold * np.eye(len(gram))
    wanted = (np.asarray(cross, np.float64) + identity) @ np.asarray(matrix, np.float64).T
    return np.asarray(np.linalg.solve(gram + identity, wanted).T)
