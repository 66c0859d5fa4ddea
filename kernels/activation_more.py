"""Activation functions by exponentials and error functions, computed in float32 for half types."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.activation import Sigmoid, wide
from onnxslim_lab.kernels.arithmetic import aligned
from onnxslim_lab.kernels.elementwise import Erf
from onnxslim_lab.kernels.registry import Array, kernel


def scalar(value: float, x: Array) -> Array:
    """Return a 0-d array in x's dtype."""
    return np.asarray(value, x.dtype)


def negative_exp(x: Array) -> Array:
    """Return exp(x) - 1 where x is negative and zero elsewhere, without overflow."""
    return np.asarray(np.expm1(np.minimum(x, scalar(0, x))))


@kernel("Elu", since=1)
def Elu(X: Array, *, alpha: float = 1.0) -> Array:
    """Return X, or alpha * (exp(X) - 1) where X is negative."""
    x = wide(X)
    return np.where(x < 0, scalar(alpha, x) * negative_exp(x), x).astype(X.dtype, copy=False)


@kernel("Selu", since=1)
def Selu_1(X: Array, *, alpha: float = 1.6732, gamma: float = 1.0507) -> Array:
    """Return gamma * X, or gamma * alpha * (exp(X) - 1) where X is not positive."""
    x = wide(X)
    below = scalar(alpha, x) * negative_exp(x)
    return (scalar(gamma, x) * np.where(x > 0, x, below)).astype(X.dtype, copy=False)


@kernel("Selu", since=6)
def Selu_6(X: Array, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Array:
    """Return gamma * X, or gamma * alpha * (exp(X) - 1) where X is not positive."""
    return Selu_1(X, alpha=alpha, gamma=gamma)


@kernel("Celu", since=12)
def Celu(X: Array, *, alpha: float = 1.0) -> Array:
    """Return max(0, X) + min(0, alpha * (exp(X / alpha) - 1))."""
    x = wide(X)
    factor = scalar(alpha, x)
    below = np.minimum(factor * np.expm1(x / factor), scalar(0, x))
    return np.asarray(np.maximum(x, scalar(0, x)) + below, X.dtype)


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)) without overflow."""
    return np.asarray(np.maximum(x, scalar(0, x)) + np.log1p(np.exp(-np.abs(x))))


@kernel("Softplus", since=1)
def Softplus(X: Array) -> Array:
    """Return log(1 + exp(X))."""
    return softplus(wide(X)).astype(X.dtype, copy=False)


@kernel("Softsign", since=1)
def Softsign(input: Array) -> Array:
    """Return X / (1 + |X|)."""
    x = wide(input)
    return np.asarray(x / (1 + np.abs(x))).astype(input.dtype, copy=False)


@kernel("Mish", since=18)
def Mish(X: Array) -> Array:
    """Return X * tanh(log(1 + exp(X)))."""
    x = wide(X)
    return np.asarray(x * np.tanh(softplus(x))).astype(X.dtype, copy=False)


@kernel("Swish", since=24)
def Swish(X: Array, *, alpha: float = 1.0) -> Array:
    """Return X * sigmoid(alpha * X)."""
    x = wide(X)
    return np.asarray(x * Sigmoid(x * scalar(alpha, x))).astype(X.dtype, copy=False)


@kernel("HardSwish", since=14)
def HardSwish(X: Array) -> Array:
    """Return X * max(0, min(1, X / 6 + 1 / 2))."""
    x = wide(X)
    gate = np.asarray(x * scalar(1 / 6, x))
    gate += scalar(0.5, x)
    np.clip(gate, 0, 1, out=gate)
    gate *= x
    return gate.astype(X.dtype, copy=False)


@kernel("ThresholdedRelu", since=10)
def ThresholdedRelu(X: Array, *, alpha: float = 1.0) -> Array:
    """Return X where it is above alpha and zero elsewhere."""
    return np.where(scalar(alpha, X) < X, X, scalar(0, X))


@kernel("Shrink", since=9)
def Shrink(input: Array, *, bias: float = 0.0, lambd: float = 0.5) -> Array:
    """Return X + bias below -lambd, X - bias above lambd and zero between."""
    x = input
    if x.dtype.kind in "iu":  # the attributes keep their fractions
        return Shrink(x.astype(np.float64), bias=bias, lambd=lambd).astype(x.dtype)
    raised = np.where(x < scalar(-lambd, x), x + scalar(bias, x), scalar(0, x))
    return np.where(x > scalar(lambd, x), x - scalar(bias, x), raised)


@kernel("Gelu", since=20)
def Gelu(X: Array, *, approximate: str = "none") -> Array:
    """Return X times the normal distribution function of X, or its approximation with tanh.

    Raises:
        ValueError: `approximate` is neither "none" nor "tanh".
    """
    x = wide(X)
    if approximate == "none":
        gate = Erf(x * scalar(math.sqrt(0.5), x))
    elif approximate == "tanh":
        cubic = x * x * x * scalar(0.044715, x)
        gate = np.tanh((x + cubic) * scalar(math.sqrt(2 / math.pi), x))
    else:
        raise ValueError(f"Gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return np.asarray(x * scalar(0.5, x) * (1 + gate)).astype(X.dtype, copy=False)


def leaky(X: Array, slope: Array) -> Array:
    """Return X, times the slope where X is negative."""
    return np.where(X < 0, X * slope, X)


@kernel("PRelu", since=1)
def PRelu_1(X: Array, slope: Array) -> Array:
    """Return X, times the slope of its channel where X is negative; one slope may serve all."""
    return leaky(X, slope if slope.size == 1 else aligned(X, slope, 1 if slope.ndim == 1 else None, 1))


@kernel("PRelu", since=7)
def PRelu_7(X: Array, slope: Array) -> Array:
    """Return X, times the slope where X is negative.

    Raises:
        ValueError: The slope does not broadcast to X.
    """
    result = leaky(X, slope)
    if result.shape != X.shape:
        raise ValueError(f"PRelu: the slope {slope.shape} does not broadcast to X {X.shape}")
    return result


def hardmax(x: Array, axis: int) -> Array:
    """Return one at the first greatest value along an axis and zero elsewhere."""
    result = np.zeros(x.shape, x.dtype)
    if x.size:
        np.put_along_axis(result, np.argmax(x, axis, keepdims=True), scalar(1, x), axis)
    return result


@kernel("Hardmax", since=1)
def Hardmax_1(input: Array, *, axis: int = 1) -> Array:
    """Return one at the first greatest value over all axes from `axis` on, zero elsewhere."""
    lengths: Sequence[int] = input.shape[: axis + input.ndim if axis < 0 else axis]
    rows = input.reshape(math.prod(lengths), -1 if input.size else 0)
    return hardmax(rows, 1).reshape(input.shape)


@kernel("Hardmax", since=13)
def Hardmax_13(input: Array, *, axis: int = -1) -> Array:
    """Return one at the first greatest value along `axis`, zero elsewhere."""
    return hardmax(input, axis)


@kernel("SwiGLU", since=28)
def SwiGLU(A: Array, B: Array, *, alpha: float = 1.0) -> Array:
    """Return A * sigmoid(alpha * A) * B.

    Raises:
        ValueError: The shapes differ.
    """
    if A.shape != B.shape:
        raise ValueError(f"SwiGLU: A has shape {A.shape} and B {B.shape}, expected the same")
    a = wide(A)
    return np.asarray(a * Sigmoid(a * scalar(alpha, a)) * wide(B)).astype(A.dtype, copy=False)
