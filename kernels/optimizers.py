"""ai.onnx.preview.training: one step of gradient descent.

The variadic inputs are all tensors X, then all gradients, then all states of one kind after the other; the
outputs are all new tensors, then the new states likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel

TRAINING = "ai.onnx.preview.training"


def grouped(inputs: tuple[Array, ...], kinds: int) -> list[tuple[Array, ...]]:
    """Return one tuple per tensor: X, gradient and states.

    Raises:
        ValueError: The number of inputs is no multiple of `kinds`.
    """
    count, rest = divmod(len(inputs), kinds)
    if rest:
        raise ValueError(f"{len(inputs)} tensors, not {kinds} for each variable")
    return list(zip(*(inputs[place : place + count] for place in range(0, len(inputs), count)), strict=True))


def listed(results: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Return all first results, then all second ones, and so on."""
    return tuple(value for kind in zip(*results, strict=True) for value in kind)


@kernel("Adagrad", since=1, domain=TRAINING)
def Adagrad(
    R: Array,
    T: Array,
    *inputs: Array,
    decay_factor: float = 0.0,
    epsilon: float = 9.999999974752427e-07,
    norm_coefficient: float = 0.0,
) -> tuple[Array, ...]:
    """Return X - r * gradient / (sqrt(squares) + epsilon), and the sums of squared gradients."""
    rate = R / (1 + T * decay_factor)
    results = []
    for x, slope, squares in grouped(inputs, 3):
        gradient = norm_coefficient * x + slope
        total = squares + gradient * gradient
        moved = x - rate * gradient / (np.sqrt(total) + epsilon)
        results.append((moved.astype(x.dtype), total.astype(x.dtype)))
    return listed(results)


@kernel("Adam", since=1, domain=TRAINING)
def Adam(
    R: Array,
    T: Array,
    *inputs: Array,
    alpha: float = 0.8999999761581421,
    beta: float = 0.9990000128746033,
    epsilon: float = 9.999999974752427e-07,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Array, ...]:
    """Return X moved along its mean gradient over the root of its mean square, and both means."""
    step = int(T.reshape(()))
    rate = R * np.sqrt(1 - beta**step) / (1 - alpha**step) if step > 0 else R
    results = []
    for x, slope, mean, square in grouped(inputs, 4):
        gradient = norm_coefficient * x + slope
        new_mean = alpha * mean + (1 - alpha) * gradient
        new_square = beta * square + (1 - beta) * gradient * gradient
        moved = (x - rate * new_mean / (np.sqrt(new_square) + epsilon)) * (1 - norm_coefficient_post)
        results.append(tuple(value.astype(x.dtype) for value in (moved, new_mean, new_square)))
    return listed(results)


@kernel("Momentum", since=1, domain=TRAINING)
def Momentum(
    R: Array, T: Array, *inputs: Array, alpha: float, beta: float, mode: str, norm_coefficient: float
) -> tuple[Array, ...]:
    """Return X moved along its momentum, plainly or in Nesterov's way, and the momentum.

    Raises:
        ValueError: The mode is neither "standard" nor "nesterov".
    """
    if mode not in {"standard", "nesterov"}:
        raise ValueError(f"Momentum: mode {mode!r} is not standard or nesterov")
    factor = beta if int(T.reshape(())) > 0 else 1.0
    results = []
    for x, slope, momentum in grouped(inputs, 3):
        gradient = norm_coefficient * x + slope
        new = alpha * momentum + factor * gradient
        direction = new if mode == "standard" else gradient + alpha * new
        results.append(((x - R * direction).astype(x.dtype), new.astype(x.dtype)))
    return listed(results)
