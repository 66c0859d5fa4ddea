"""BatchNormalization in all its versions: one factor and one summand per channel."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.kept import kept, lasting
from onnxslim_lab.kernels.normalization import expect, moments, per_channel, scaled
from onnxslim_lab.kernels.registry import Array, kernel


def line(
    scale: Array, B: Array, mean: Array, var: Array, epsilon: float, precise: type[np.floating[Any]]
) -> tuple[Array, Array]:
    """Return what a channel is multiplied by and what is added then, to normalize it.

    Raises:
        ValueError: The parameters do not have one value per channel each.
    """
    for name, values in {"B": B, "mean": mean, "var": var}.items():
        expect("BatchNormalization", name, values, (scale.size,))
    factor = scale.astype(precise) / np.sqrt(var.astype(precise) + np.asarray(epsilon, precise))
    return factor, B.astype(precise) - mean.astype(precise) * factor


kept_line = kept(line)


def normalized_channels(X: Array, scale: Array, B: Array, mean: Array, var: Array, epsilon: float) -> Array:
    """Return X times one factor and plus one summand per channel.

    Raises:
        ValueError: A parameter does not have one value per channel.
    """
    channels = X.shape[1] if X.ndim > 1 else 1
    expect("BatchNormalization", "scale", scale, (channels,))
    x = wide(X)
    make = kept_line if lasting(scale, B, mean, var) else line
    factor, summand = make(scale, B, mean, var, epsilon, np.float64 if x.dtype == np.float64 else np.float32)
    if X.ndim < 2:
        return np.asarray(x * factor + summand, X.dtype)
    result = x * per_channel(factor, x)
    result += per_channel(summand, x)
    return result.astype(X.dtype, copy=False)


def trained(
    X: Array, scale: Array, B: Array, mean: Array, var: Array, epsilon: float, momentum: float
) -> tuple[Array, Array, Array, Array, Array]:
    """Normalize by the batch's own moments.

    Returns:
        Y, the running mean and variance, the batch's mean and variance.
    """
    x = wide(X).astype(np.float64) if X.dtype == np.float64 else X.astype(np.float32)
    axes = (0, *range(2, X.ndim))
    batch_mean, batch_var = (value.reshape(-1) for value in moments(x, axes))
    y = normalized_channels(X, scale, B, batch_mean, batch_var, epsilon)
    kept: Array = np.asarray(momentum, x.dtype)
    fresh: Array = np.asarray(1 - momentum, x.dtype)
    running_mean, running_var = (
        np.asarray(np.multiply(before, kept) + now * fresh, before.dtype)
        for before, now in ((mean, batch_mean), (var, batch_var))
    )
    return y, running_mean, running_var, batch_mean.astype(mean.dtype), batch_var.astype(var.dtype)


@kernel("BatchNormalization", since=1)
def BatchNormalization_1(
    X: Array,
    scale: Array,
    B: Array,
    mean: Array,
    var: Array,
    *,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
    output_count: int = 1,
) -> tuple[Array, ...]:
    """Return X normalized per channel: by mean and var in test mode, else by the batch's moments."""
    if is_test:
        return BatchNormalization_7(X, scale, B, mean, var, epsilon=epsilon, spatial=spatial)
    if not spatial:
        raise NotImplementedError(
            "BatchNormalization: training with spatial 0 is not defined for one batch axis"
        )
    return trained(X, scale, B, mean, var, epsilon, momentum)


@kernel("BatchNormalization", since=7)
def BatchNormalization_7(
    X: Array,
    scale: Array,
    B: Array,
    mean: Array,
    var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    output_count: int = 1,
) -> tuple[Array, ...]:
    """Return X normalized per channel, or per element of (C, ...) with spatial 0.

    More than one output asks for training: then by the batch's moments, and those are returned too.
    """
    if spatial:
        return BatchNormalization_9(
            X, scale, B, mean, var, epsilon=epsilon, momentum=momentum, output_count=output_count
        )
    if output_count > 1:
        raise NotImplementedError("BatchNormalization: training with spatial 0 has no kernel")
    for name, values in {"scale": scale, "B": B, "mean": mean, "var": var}.items():
        expect("BatchNormalization", name, values, X.shape[1:])
    x = wide(X)
    inverse = 1 / np.sqrt(wide(var) + np.asarray(epsilon, x.dtype))
    return (scaled(x, wide(mean), inverse, wide(scale), wide(B)).astype(X.dtype, copy=False),)


@kernel("BatchNormalization", since=9)
def BatchNormalization_9(
    X: Array,
    scale: Array,
    B: Array,
    mean: Array,
    var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    output_count: int = 1,
) -> tuple[Array, ...]:
    """Return X normalized per channel by mean and var.

    More than one output asks for training: then by the batch's moments, and those are returned too.
    """
    if output_count > 1:
        return trained(X, scale, B, mean, var, epsilon, momentum)
    return (normalized_channels(X, scale, B, mean, var, epsilon),)


@kernel("BatchNormalization", since=14)
def BatchNormalization_14(
    X: Array,
    scale: Array,
    B: Array,
    input_mean: Array,
    input_var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Array, ...]:
    """Return X normalized per channel; in training mode by the batch's moments, with the running ones."""
    if training_mode:
        return trained(X, scale, B, input_mean, input_var, epsilon, momentum)[:3]
    return (normalized_channels(X, scale, B, input_mean, input_var, epsilon),)
