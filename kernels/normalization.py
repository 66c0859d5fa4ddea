"""Normalizations by mean and variance or by a norm; half types go through float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.dtypes import dtype_of_number
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.shape import positive_axes

Axes = tuple[int, ...]


def per_channel(values: Array, x: Array) -> Array:
    """Return one value per channel shaped to broadcast over x (N, C, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 2))


def expect(op_type: str, name: str, values: Array, shape: Sequence[int]) -> None:
    """Check the shape of a parameter.

    Raises:
        ValueError: It is another.
    """
    if values.shape != tuple(shape):
        raise ValueError(f"{op_type}: {name} has shape {values.shape}, expected {tuple(shape)}")


def scaled(x: Array, mean: Array, inverse: Array, scale: Array | None, bias: Array | None) -> Array:
    """Return (x - mean) * inverse * scale + bias, in one new array."""
    result = np.asarray(x - mean)
    result *= inverse
    if scale is not None:
        result = result * scale
    if bias is not None:
        result = result + bias
    return result


def moments(x: Array, axes: Axes) -> tuple[Array, Array]:
    """Return mean and variance (of the population) over the axes, kept with the length 1."""
    mean = np.mean(x, axis=axes, keepdims=True)
    return mean, np.mean(np.square(x - mean), axis=axes, keepdims=True)


def last_axes(x: Array, axis: int) -> Axes:
    """Return the axes from `axis` to the last.

    Raises:
        ValueError: There is no such axis.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is not within rank {x.ndim}")
    return tuple(range(axis % x.ndim, x.ndim))


@kernel("LayerNormalization", since=17)
def LayerNormalization(
    X: Array,
    Scale: Array,
    B: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[Array, Array, Array]:
    """Return X normalized over the axes from `axis` on, and in `stash_type` its mean and 1 / deviation."""
    stash = dtype_of_number(stash_type)
    x = X.astype(stash, copy=False)
    axes = last_axes(x, axis)
    mean = np.mean(x, axis=axes, keepdims=True)
    centred = np.asarray(x - mean)
    variance = np.mean(np.square(centred), axis=axes, keepdims=True)
    inverse = np.asarray(1 / np.sqrt(variance + np.asarray(epsilon, stash)), stash)
    centred *= inverse
    if X.dtype == stash:
        centred *= np.broadcast_to(Scale, centred.shape)
        y = centred
    else:
        y = np.asarray(centred.astype(X.dtype) * Scale)
    if B is not None:
        y += np.broadcast_to(B, y.shape)
    return y, np.asarray(mean, stash), inverse


@kernel("RMSNormalization", since=23)
def RMSNormalization(
    X: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Array:
    """Return X over its root mean square along the axes from `axis` on, times scale."""
    x = X.astype(dtype_of_number(stash_type), copy=False)
    square = np.mean(np.square(x), axis=last_axes(x, axis), keepdims=True)
    normal = x / np.sqrt(square + np.asarray(epsilon, x.dtype))
    return np.asarray(normal.astype(X.dtype, copy=False) * scale).astype(scale.dtype, copy=False)


@kernel("InstanceNormalization", since=1)
def InstanceNormalization(input: Array, scale: Array, B: Array, *, epsilon: float = 1e-5) -> Array:
    """Return the input (N, C, ...) normalized over the spatial axes of every sample and channel.

    Raises:
        ValueError: There is no spatial axis, or scale or B do not have one value per channel.
    """
    if input.ndim < 3:
        raise ValueError(
            f"InstanceNormalization: the input has shape {input.shape}, expected (N, C, D1, ...)"
        )
    expect("InstanceNormalization", "scale", scale, input.shape[1:2])
    expect("InstanceNormalization", "B", B, input.shape[1:2])
    x = wide(input)
    mean, variance = moments(x, tuple(range(2, x.ndim)))
    inverse = 1 / np.sqrt(variance + np.asarray(epsilon, x.dtype))
    factor = inverse * per_channel(wide(scale), x)
    result = x * factor
    result += per_channel(wide(B), x) - mean * factor
    return np.asarray(result, input.dtype)


def grouped(X: Array, num_groups: int, epsilon: float, stash: np.dtype[np.generic]) -> Array:
    """Return X (N, C, ...) normalized over every group of channels, as (N, groups, C / groups, ...).

    Raises:
        ValueError: The channels do not divide into the groups.
    """
    if X.ndim < 2 or num_groups < 1 or X.shape[1] % num_groups:
        raise ValueError(
            f"GroupNormalization: X {X.shape} has no channels that divide into {num_groups} groups"
        )
    x = X.astype(stash, copy=False)
    x = x.reshape(X.shape[0], num_groups, X.shape[1] // num_groups, *X.shape[2:])
    mean, variance = moments(x, tuple(range(2, x.ndim)))
    return scaled(x, mean, 1 / np.sqrt(variance + np.asarray(epsilon, stash)), None, None)


@kernel("GroupNormalization", since=18)
def GroupNormalization_18(
    X: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5
) -> Array:
    """Return X normalized over groups of channels; scale and bias have one value per group."""
    normal = grouped(X, num_groups, epsilon, wide(X).dtype).astype(X.dtype, copy=False)
    expect("GroupNormalization", "scale", scale, (num_groups,))
    expect("GroupNormalization", "bias", bias, (num_groups,))
    result = normal * per_channel(scale, normal) + per_channel(bias, normal)
    return np.asarray(result).reshape(X.shape)


@kernel("GroupNormalization", since=21)
def GroupNormalization_21(
    X: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Array:
    """Return X normalized over groups of channels; scale and bias have one value per channel."""
    normal = grouped(X, num_groups, epsilon, dtype_of_number(stash_type))
    normal = normal.reshape(X.shape).astype(X.dtype, copy=False)
    expect("GroupNormalization", "scale", scale, X.shape[1:2])
    expect("GroupNormalization", "bias", bias, X.shape[1:2])
    return np.asarray(normal * per_channel(scale, X) + per_channel(bias, X))


@kernel("LpNormalization", since=1)
def LpNormalization(input: Array, *, axis: int = -1, p: int = 2) -> Array:
    """Return the input over its 1-norm or 2-norm along `axis`; zero where the norm is.

    Raises:
        ValueError: p is neither 1 nor 2.
    """
    if p not in {1, 2}:
        raise ValueError(f"LpNormalization: p is {p}, expected 1 or 2")
    x = wide(input)
    norm = np.sum(np.abs(x) if p == 1 else np.square(x), axis=axis, keepdims=True)
    norm = norm if p == 1 else np.sqrt(norm)
    return np.where(norm == 0, np.zeros((), x.dtype), x / norm).astype(input.dtype, copy=False)


@kernel("MeanVarianceNormalization", since=9)
def MeanVarianceNormalization(X: Array, *, axes: Sequence[int] = (0, 2, 3)) -> Array:
    """Return (X - mean) / (deviation + 1e-9) over the axes."""
    x = wide(X)
    chosen = tuple(positive_axes(np.asarray(list(axes), np.int64), x.ndim))
    mean = np.mean(x, axis=chosen, keepdims=True)
    variance = np.mean(np.square(x), axis=chosen, keepdims=True) - np.square(mean)
    return np.asarray((x - mean) / (np.sqrt(variance) + np.asarray(1e-9, x.dtype))).astype(
        X.dtype, copy=False
    )


@kernel("LRN", since=1)
def LRN(X: Array, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Array:
    """Return X over (bias + alpha / size * sum of squares of the `size` channels around) ** beta."""
    x = wide(X)
    if X.ndim < 2 or size < 1:
        raise ValueError(
            f"LRN: X has shape {X.shape} and size is {size}, expected (N, C, ...) and at least 1"
        )
    squares = np.square(x)
    total = np.zeros_like(x)
    for offset in range(-((size - 1) // 2), size // 2 + 1):
        low, high = max(0, -offset), min(x.shape[1], x.shape[1] - offset)
        if high > low:
            total[:, low:high] += squares[:, low + offset : high + offset]
    total *= np.asarray(alpha / size, x.dtype)
    total += np.asarray(bias, x.dtype)
    return np.asarray(x / total ** np.asarray(beta, x.dtype)).astype(X.dtype, copy=False)
