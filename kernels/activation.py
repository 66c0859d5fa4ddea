"""Activation functions, computed in the input's dtype (half types through float32)."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.dtypes import HALF
from onnxslim_lab.kernels.registry import Array, kernel

FLOAT32_MAX = 3.4028234663852886e38


def wide(x: Array) -> Array:
    """Return the array in a dtype fit for accumulation: half types become float32."""
    if x.dtype.itemsize > 2:  # the set of half types is slower to ask
        return x
    return x.astype(np.float32) if x.dtype in HALF else x


@kernel("Relu", since=1)
def Relu(X: Array) -> Array:
    """Return max(X, 0)."""
    return np.maximum(X, np.zeros((), X.dtype))


@kernel("LeakyRelu", since=1)
def LeakyRelu(X: Array, *, alpha: float = 0.01) -> Array:
    """Return X, times alpha where X is negative."""
    return np.where(X < 0, X * np.asarray(alpha, X.dtype), X)


@kernel("Sigmoid", since=1)
def Sigmoid(X: Array) -> Array:
    """Return 1 / (1 + exp(-X)); exp overflows to infinity, whose reciprocal is the limit."""
    result = np.asarray(np.negative(wide(X)))  # NumPy makes a scalar of an array without axes
    np.exp(result, out=result)
    result += 1
    np.reciprocal(result, out=result)
    return result.astype(X.dtype, copy=False)


@kernel("HardSigmoid", since=1)
def HardSigmoid(X: Array, *, alpha: float = 0.2, beta: float = 0.5) -> Array:
    """Return alpha * X + beta kept in [0, 1]."""
    line = X * np.asarray(alpha, X.dtype) + np.asarray(beta, X.dtype)
    return np.asarray(np.clip(line, np.zeros((), X.dtype), np.ones((), X.dtype)))


def clip(input: Array, low: Array | None, high: Array | None) -> Array:
    """Return the input kept in [low, high]; high wins where the bounds cross."""
    if low is None and high is None:
        return input
    return np.asarray(np.clip(input, low, high))


@kernel("Clip", since=1)
def Clip_1(input: Array, *, max: float | None = None, min: float | None = None) -> Array:
    """Return the input kept in [min, max]."""
    low = None if min is None else np.asarray(min, input.dtype)
    high = None if max is None else np.asarray(max, input.dtype)
    return clip(input, low, high)


@kernel("Clip", since=6)
def Clip_6(input: Array, *, max: float = FLOAT32_MAX, min: float = -FLOAT32_MAX) -> Array:
    """Return the input kept in [min, max]."""
    return Clip_1(input, max=max, min=min)


@kernel("Clip", since=11)
def Clip_11(input: Array, min: Array | None = None, max: Array | None = None) -> Array:
    """Return the input kept in [min, max]; an absent bound does not bound."""
    return clip(input, min, max)


def log_softmax(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Return x minus the logarithm of the sum of exp(x) along the axis, without overflow."""
    shifted = x - np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True)))


def softmax(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Return exp(x) scaled to the sum 1 along the axis, without overflow."""
    powers = np.asarray(x - np.max(x, axis=axis, keepdims=True, initial=-np.inf))
    np.exp(powers, out=powers)
    powers /= np.sum(powers, axis=axis, keepdims=True)
    return powers


def trailing(x: Array, axis: int) -> tuple[int, ...]:
    """Return the axes from `axis` to the last: what opsets before 13 coerce into one."""
    return tuple(range(axis + x.ndim if axis < 0 else axis, x.ndim))


@kernel("Softmax", since=1)
def Softmax_1(input: Array, *, axis: int = 1) -> Array:
    """Return the softmax over all axes from `axis` on."""
    return softmax(wide(input), trailing(input, axis)).astype(input.dtype, copy=False)


@kernel("Softmax", since=13)
def Softmax_13(input: Array, *, axis: int = -1) -> Array:
    """Return the softmax along `axis`."""
    return softmax(wide(input), axis).astype(input.dtype, copy=False)


@kernel("LogSoftmax", since=1)
def LogSoftmax_1(input: Array, *, axis: int = 1) -> Array:
    """Return the logarithm of the softmax over all axes from `axis` on."""
    return log_softmax(wide(input), trailing(input, axis)).astype(input.dtype)


@kernel("LogSoftmax", since=13)
def LogSoftmax_13(input: Array, *, axis: int = -1) -> Array:
    """Return the logarithm of the softmax along `axis`."""
    return log_softmax(wide(input), axis).astype(input.dtype)
