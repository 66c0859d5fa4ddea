"""Arithmetic of two or more inputs with broadcasting, computed in the inputs' dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from onnxslim_lab.kernels.dtypes import HALF, is_integer
from onnxslim_lab.kernels.registry import Array, kernel

Binary = Callable[[Array, Array], Array]


def aligned(A: Array, B: Array, axis: int | None, broadcast: int) -> Array:
    """Return B shaped so that NumPy broadcasts it over A as opsets 1 to 6 mean it.

    Raises:
        ValueError: The shapes differ and `broadcast` is off.
    """
    if not broadcast:
        if A.shape != B.shape:
            raise ValueError(f"shapes {A.shape} and {B.shape} differ and broadcast is 0")
        return B
    if axis is None:
        return B
    axis += A.ndim if axis < 0 else 0
    return B.reshape(B.shape + (1,) * (A.ndim - axis - B.ndim))


def legacy(op_type: str, compute: Binary) -> None:
    """Register the version of opsets 1 to 6, whose broadcasting is limited and asked for."""

    @kernel(op_type, since=1)
    def Legacy(A: Array, B: Array, *, axis: int | None = None, broadcast: int = 0) -> Array:
        """Broadcast B over A from `axis` on, when `broadcast` is 1."""
        return compute(A, aligned(A, B, axis, broadcast))


@kernel("Add", since=7)
def Add(A: Array, B: Array) -> Array:
    """Return A + B; integers wrap."""
    return np.add(A, B)


@kernel("Sub", since=7)
def Sub(A: Array, B: Array) -> Array:
    """Return A - B; integers wrap."""
    return np.subtract(A, B)


@kernel("Mul", since=7)
def Mul(A: Array, B: Array) -> Array:
    """Return A * B; integers wrap."""
    return np.multiply(A, B)


@kernel("Div", since=7)
def Div(A: Array, B: Array) -> Array:
    """Return A / B; integers are truncated towards zero.

    Raises:
        ZeroDivisionError: An integer is divided by zero.
    """
    if not is_integer(A.dtype):
        return np.divide(A, B)
    if not np.all(B):
        raise ZeroDivisionError("Div: an integer is divided by zero")
    quotient = np.floor_divide(A, B)
    inexact = np.multiply(quotient, B) != A
    return np.asarray(quotient + (inexact & ((A < 0) != (B < 0))).astype(A.dtype))


legacy("Add", Add)
legacy("Sub", Sub)
legacy("Mul", Mul)
legacy("Div", Div)


@kernel("Mod", since=10)
def Mod(A: Array, B: Array, *, fmod: int = 0) -> Array:
    """Return the remainder, with the sign of B, or of A when `fmod` is 1.

    Raises:
        ZeroDivisionError: An integer is divided by zero.
    """
    if is_integer(A.dtype) and not np.all(B):
        raise ZeroDivisionError("Mod: an integer is divided by zero")
    return np.fmod(A, B) if fmod else np.mod(A, B)


@kernel("Pow", since=7)
def Pow(X: Array, Y: Array) -> Array:
    """Return X to the power Y in X's dtype; integers of X with other exponents go through float64."""
    if is_integer(X.dtype):
        if is_integer(Y.dtype) and not np.any(Y < 0):
            return np.power(X.astype(np.int64), Y.astype(np.int64)).astype(X.dtype)
        return np.power(X.astype(np.float64), Y.astype(np.float64)).astype(X.dtype)
    if X.dtype in HALF:
        return np.power(X.astype(np.float32), Y.astype(np.float32)).astype(X.dtype)
    if Y.dtype == np.float64 and X.dtype != Y.dtype:
        return np.power(X.astype(np.float64), Y).astype(X.dtype)
    return np.asarray(np.power(X, Y.astype(X.dtype)))


@kernel("Pow", since=1)
def Pow_1(X: Array, Y: Array, *, axis: int | None = None, broadcast: int = 0) -> Array:
    """Return X to the power Y, Y broadcast from `axis` on when `broadcast` is 1."""
    return Pow(X, aligned(X, Y, axis, broadcast))


@kernel("Min", since=1)
def Min(*data_0: Array) -> Array:
    """Return the elementwise minimum; NaN wins."""
    return reduce(np.minimum, data_0)


@kernel("Max", since=1)
def Max(*data_0: Array) -> Array:
    """Return the elementwise maximum; NaN wins."""
    return reduce(np.maximum, data_0)


@kernel("Sum", since=1)
def Sum(*data_0: Array) -> Array:
    """Return the elementwise sum."""
    return reduce(np.add, data_0)


@kernel("Mean", since=1)
def Mean(*data_0: Array) -> Array:
    """Return the elementwise mean."""
    count = np.asarray(len(data_0), data_0[0].dtype)
    return np.asarray(np.divide(reduce(np.add, data_0), count))
