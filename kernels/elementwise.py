"""Elementwise functions of one input, computed in the input's dtype."""

from __future__ import annotations

import math

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel

_ERF_BLOCK = 1 << 14
_ERF_END = np.float32(3.95)
_ERF_ABOVE = tuple(
    map(np.float32, (2.02590625e-06, 0.000284686776, 0.00380813829, 0.0528753725, 0.191549835, 1.12837914))
)
_ERF_BELOW = tuple(
    map(np.float32, (3.78317322e-05, 0.00117071932, 0.0150550432, 0.114559417, 0.503089297, 1.0))
)


@kernel("Identity", since=1)
def Identity(input: Array) -> Array:
    """Return the input."""
    return input


@kernel("Neg", since=1)
def Neg(X: Array) -> Array:
    """Return -X."""
    return np.negative(X)


@kernel("Abs", since=1)
def Abs(X: Array) -> Array:
    """Return |X|."""
    return np.abs(X)


@kernel("Sign", since=9)
def Sign(input: Array) -> Array:
    """Return -1, 0 or 1."""
    return np.sign(input)


@kernel("Sqrt", since=1)
def Sqrt(X: Array) -> Array:
    """Return the square root, NaN below zero."""
    return np.sqrt(X)


@kernel("Exp", since=1)
def Exp(input: Array) -> Array:
    """Return e to the input."""
    return np.exp(input)


@kernel("Log", since=1)
def Log(input: Array) -> Array:
    """Return the natural logarithm: -inf at zero, NaN below."""
    return np.log(input)


@kernel("Reciprocal", since=1)
def Reciprocal(X: Array) -> Array:
    """Return 1 / X."""
    return np.divide(np.ones((), X.dtype), X)


@kernel("Floor", since=1)
def Floor(X: Array) -> Array:
    """Return the greatest integer not above X, in X's dtype."""
    return np.floor(X)


@kernel("Ceil", since=1)
def Ceil(X: Array) -> Array:
    """Return the smallest integer not below X, in X's dtype."""
    return np.ceil(X)


@kernel("Round", since=11)
def Round(X: Array) -> Array:
    """Return the nearest integer, halves to even, in X's dtype."""
    return np.rint(X)


@kernel("Sin", since=7)
def Sin(input: Array) -> Array:
    """Return the sine."""
    return np.sin(input)


@kernel("Cos", since=7)
def Cos(input: Array) -> Array:
    """Return the cosine."""
    return np.cos(input)


@kernel("Tan", since=7)
def Tan(input: Array) -> Array:
    """Return the tangent."""
    return np.tan(input)


@kernel("Asin", since=7)
def Asin(input: Array) -> Array:
    """Return the arcsine."""
    return np.arcsin(input)


@kernel("Acos", since=7)
def Acos(input: Array) -> Array:
    """Return the arccosine."""
    return np.arccos(input)


@kernel("Atan", since=7)
def Atan(input: Array) -> Array:
    """Return the arctangent."""
    return np.arctan(input)


@kernel("Sinh", since=9)
def Sinh(input: Array) -> Array:
    """Return the hyperbolic sine."""
    return np.sinh(input)


@kernel("Cosh", since=9)
def Cosh(input: Array) -> Array:
    """Return the hyperbolic cosine."""
    return np.cosh(input)


@kernel("Asinh", since=9)
def Asinh(input: Array) -> Array:
    """Return the inverse hyperbolic sine."""
    return np.arcsinh(input)


@kernel("Acosh", since=9)
def Acosh(input: Array) -> Array:
    """Return the inverse hyperbolic cosine."""
    return np.arccosh(input)


@kernel("Atanh", since=9)
def Atanh(input: Array) -> Array:
    """Return the inverse hyperbolic tangent."""
    return np.arctanh(input)


@kernel("Tanh", since=1)
def Tanh(input: Array) -> Array:
    """Return the hyperbolic tangent."""
    return np.tanh(input)


@kernel("Erf", since=9)
def Erf(input: Array) -> Array:
    """Return the error function.

    float64 inputs element by element with `math.erf`; others in float32 as x P(x^2) / Q(x^2), fitted for
    the least largest relative error on [-3.95, 3.95], beyond which float32 has 1: error below 4e-7.
    """
    if input.dtype == np.float64:
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(input), np.float64)
    flat = input.reshape(-1)
    result = np.empty(flat.shape, np.float32)
    for start in range(0, flat.size, _ERF_BLOCK):  # blocks that stay in the cache
        x = np.clip(flat[start : start + _ERF_BLOCK].astype(np.float32), -_ERF_END, _ERF_END)
        square = x * x
        above = _horner(_ERF_ABOVE, square)
        above *= x
        above /= _horner(_ERF_BELOW, square)
        np.clip(above, np.float32(-1), np.float32(1), out=result[start : start + _ERF_BLOCK])
    return result.reshape(input.shape).astype(input.dtype, copy=False)


def _horner(coefficients: tuple[np.float32, ...], x: Array) -> Array:
    """Return a polynomial's values in x's dtype; coefficients from the highest power down."""
    value = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value += coefficient
        value *= x
    value += coefficients[-1]
    return value


@kernel("IsNaN", since=9)
def IsNaN(X: Array) -> Array:
    """Return where X is not a number."""
    return np.isnan(X)


@kernel("IsInf", since=10)
def IsInf(X: Array, *, detect_negative: int = 1, detect_positive: int = 1) -> Array:
    """Return where X is infinite with one of the signs asked for."""
    infinite = np.isinf(X)
    negative = X < 0
    if not detect_negative:
        infinite = infinite & ~negative
    if not detect_positive:
        infinite = infinite & negative
    return np.asarray(infinite)
