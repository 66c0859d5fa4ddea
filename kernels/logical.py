"""Comparisons, boolean logic, bits and selection."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.arithmetic import legacy
from onnxslim_lab.kernels.registry import Array, kernel


@kernel("Equal", since=7)
def Equal(A: Array, B: Array) -> Array:
    """Return where A equals B; strings compare by value."""
    return np.asarray(np.equal(A, B)).astype(np.bool_)


@kernel("Greater", since=7)
def Greater(A: Array, B: Array) -> Array:
    """Return where A > B."""
    return np.greater(A, B)


@kernel("Less", since=7)
def Less(A: Array, B: Array) -> Array:
    """Return where A < B."""
    return np.less(A, B)


@kernel("GreaterOrEqual", since=12)
def GreaterOrEqual(A: Array, B: Array) -> Array:
    """Return where A >= B."""
    return np.greater_equal(A, B)


@kernel("LessOrEqual", since=12)
def LessOrEqual(A: Array, B: Array) -> Array:
    """Return where A <= B."""
    return np.less_equal(A, B)


@kernel("And", since=7)
def And(A: Array, B: Array) -> Array:
    """Return A and B."""
    return np.logical_and(A, B)


@kernel("Or", since=7)
def Or(A: Array, B: Array) -> Array:
    """Return A or B."""
    return np.logical_or(A, B)


@kernel("Xor", since=7)
def Xor(A: Array, B: Array) -> Array:
    """Return A or B, not both."""
    return np.logical_xor(A, B)


legacy("Equal", Equal)
legacy("Greater", Greater)
legacy("Less", Less)
legacy("And", And)
legacy("Or", Or)
legacy("Xor", Xor)


@kernel("Not", since=1)
def Not(X: Array) -> Array:
    """Return not X."""
    return np.logical_not(X)


@kernel("Where", since=9)
def Where(condition: Array, X: Array, Y: Array) -> Array:
    """Return X where the condition holds, else Y."""
    return np.where(condition, X, Y)


@kernel("BitwiseAnd", since=18)
def BitwiseAnd(A: Array, B: Array) -> Array:
    """Return the bits set in both."""
    return np.bitwise_and(A, B)


@kernel("BitwiseOr", since=18)
def BitwiseOr(A: Array, B: Array) -> Array:
    """Return the bits set in either."""
    return np.bitwise_or(A, B)


@kernel("BitwiseXor", since=18)
def BitwiseXor(A: Array, B: Array) -> Array:
    """Return the bits set in one of both."""
    return np.bitwise_xor(A, B)


@kernel("BitwiseNot", since=18)
def BitwiseNot(X: Array) -> Array:
    """Return the bits inverted."""
    return np.bitwise_not(X)


@kernel("BitShift", since=11)
def BitShift(X: Array, Y: Array, *, direction: str) -> Array:
    """Return the bits of X shifted by Y places "LEFT" or "RIGHT".

    Raises:
        ValueError: The direction is neither.
    """
    if direction not in {"LEFT", "RIGHT"}:
        raise ValueError(f"BitShift: direction {direction!r} is neither LEFT nor RIGHT")
    return np.left_shift(X, Y) if direction == "LEFT" else np.right_shift(X, Y)
