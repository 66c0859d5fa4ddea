"""Operators that make tensors out of attributes and a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.dtypes import HALF, dtype_of_number
from onnxslim_lab.kernels.registry import Array, kernel


@kernel("Constant", since=1)
def Constant_1(*, value: Array) -> Array:
    """Return the value."""
    return value


@kernel("Constant", since=11)
def Constant_11(*, value: Array | None = None, sparse_value: Array | None = None) -> Array:
    """Return the value that is given; the caller passes `sparse_value` as a dense array.

    Raises:
        ValueError: None or both are given.
    """
    return Constant_12(value=value, sparse_value=sparse_value)


@kernel("Constant", since=12)
def Constant_12(
    *,
    value: Array | None = None,
    sparse_value: Array | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    value_string: str | None = None,
    value_strings: Sequence[str] | None = None,
) -> Array:
    """Return the value that is given; the caller passes `sparse_value` as a dense array.

    Raises:
        ValueError: Not exactly one is given.
    """
    spelled = (
        (value_float, np.float32),
        (value_floats, np.float32),
        (value_int, np.int64),
        (value_ints, np.int64),
        (value_string, object),
        (value_strings, object),
    )
    given = [np.asarray(item, dtype) for item, dtype in spelled if item is not None]
    given += [item for item in (value, sparse_value) if item is not None]
    if len(given) != 1:
        raise ValueError(f"Constant: exactly one value is required, {len(given)} are given")
    return given[0]


@kernel("ConstantOfShape", since=9)
def ConstantOfShape(input: Array, *, value: Array | None = None) -> Array:
    """Return a tensor of the shape given, filled with the single value (float32 zero unless given).

    The result is a read-only view of one element: it takes no memory.
    """
    filling = np.zeros((), np.float32) if value is None else value.reshape(())
    return np.broadcast_to(filling, tuple(int(length) for length in input.reshape(-1)))


def count_of_range(start: Array, limit: Array, delta: Array) -> int:
    """Return how many numbers Range yields.

    Raises:
        ValueError: The step is zero or an end is not finite.
    """
    first, last, step = (value.reshape(()).item() for value in (start, limit, delta))
    count: int
    if step == 0:
        raise ValueError("Range: delta is 0")
    if isinstance(first, int):
        count = -((first - last) // step)
        return max(count, 0)
    if not all(math.isfinite(value) for value in (first, last, step)):
        raise ValueError("Range: start, limit and delta must be finite")
    count = math.ceil((last - first) / step)
    return max(count, 0)


@kernel("Range", since=11)
def Range(start: Array, limit: Array, delta: Array) -> Array:
    """Return start, start + delta, ... up to but without limit."""
    count = count_of_range(start, limit, delta)
    dtype = np.float32 if start.dtype in HALF else start.dtype
    steps = np.arange(count).astype(dtype)
    line = start.astype(dtype).reshape(()) + steps * delta.astype(dtype).reshape(())
    return np.asarray(line, start.dtype)


@kernel("Range", since=27)
def Range_27(start: Array, limit: Array, delta: Array, *, stash_type: int = 1) -> Array:
    """Return start, start + delta, ... with half types computed in `stash_type`."""
    if start.dtype not in HALF:
        return Range(start, limit, delta)
    dtype = dtype_of_number(stash_type)
    wide = Range(start.astype(dtype), limit.astype(dtype), delta.astype(dtype))
    return wide.astype(start.dtype)


@kernel("EyeLike", since=9)
def EyeLike(input: Array, *, dtype: int | None = None, k: int = 0) -> Array:
    """Return ones on the k-th diagonal of zeros shaped like the input.

    Raises:
        ValueError: The input is not a matrix.
    """
    if input.ndim != 2:
        raise ValueError(f"EyeLike: the input has {input.ndim} dimensions, 2 are required")
    element = input.dtype if dtype is None else dtype_of_number(dtype)
    rows, columns = input.shape
    return np.asarray(np.eye(rows, columns, k=k), element)
