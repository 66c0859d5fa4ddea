"""Conversions between element types."""

from __future__ import annotations

import math

import numpy as np

from onnxslim_lab.kernels.dtypes import (
    DTYPES,
    FLOAT8,
    FLOAT8E8M0,
    HALF,
    STRING,
    dtype_of_number,
    is_float,
    is_integer,
)
from onnxslim_lab.kernels.registry import Array, kernel

_E8M0_BIAS = 127
_E8M0_NAN = 255
_GREATEST = {DTYPES[17]: 448.0, DTYPES[18]: 240.0, DTYPES[19]: 57344.0, DTYPES[20]: 57344.0}
_NARROW = frozenset(DTYPES[number] for number in (2, 3, 4, 5))


def to_float8(x: Array, dtype: np.dtype[np.generic], saturate: bool) -> Array:
    """Round to a float8 type, ties to even.

    Args:
        x: Real numbers.
        dtype: E4M3FN, E4M3FNUZ, E5M2 or E5M2FNUZ.
        saturate: Keep what is out of range, infinities included, at the greatest finite value; else it
            becomes an infinity where the type has one and NaN where it has none.
    """
    source = x if x.dtype in HALF else x.astype(np.float32)
    rounded = source.astype(dtype)
    if not saturate:
        return rounded
    greatest = _GREATEST[dtype]
    real = rounded.astype(np.float32)
    outside = ~np.isfinite(real) & ~np.isnan(source)
    signs = np.copysign(np.float32(greatest), source.astype(np.float32))
    return np.where(outside, signs, real).astype(dtype)


def to_float8e8m0(x: Array, saturate: bool, round_mode: str) -> Array:
    """Round to a power of two, "up", "down" or to the "nearest" (ties up).

    Raises:
        ValueError: The rounding mode is none of these.
    """
    if round_mode not in {"up", "down", "nearest"}:
        raise ValueError(f"Cast: round_mode {round_mode!r} is not up, down or nearest")
    mantissa, exponent = np.frexp(x.astype(np.float32))
    raised = {"up": mantissa > 0.5, "down": mantissa >= 1, "nearest": mantissa >= 0.75}[round_mode]
    code = exponent.astype(np.int64) - 1 + raised + _E8M0_BIAS
    code = np.where(mantissa == 0, -1, code)
    code = np.where(np.isinf(x.astype(np.float32)), _E8M0_NAN, code)
    outside = (code < 0) | (code >= _E8M0_NAN)
    code = np.clip(code, 0, _E8M0_NAN - 1) if saturate else np.where(outside, _E8M0_NAN, code)
    code = np.where(np.isnan(x.astype(np.float32)), _E8M0_NAN, code)
    return np.asarray(code).astype(np.uint8).view(DTYPES[FLOAT8E8M0])


def format_number(value: object) -> str:
    """Return a number as onnxruntime prints it: with 8 significant digits.

    >>> format_number(np.float32(0.1)), format_number(np.float64("-inf")), format_number(np.int64(3))
    ('0.1', '-INF', '3')
    """
    if isinstance(value, np.integer | np.bool_ | bool | int):
        return str(int(value))
    number = float(value)  # type: ignore[arg-type]
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "INF" if number > 0 else "-INF"
    return f"{number:.8g}"


def parse(text: str, dtype: np.dtype[np.generic]) -> object:
    """Return the number a string spells; decimals are cut off for integer types.

    Raises:
        ValueError: The string spells no number.
    """
    if not is_integer(dtype):
        return float(text) != 0 if dtype == np.bool_ else float(text)
    try:
        return int(text)
    except ValueError:
        return int(float(text))


def cast(x: Array, dtype: np.dtype[np.generic], *, saturate: bool = True, round_mode: str = "up") -> Array:
    """Convert to a dtype as operator Cast does.

    Raises:
        ValueError: A string spells no number.
    """
    if x.dtype == dtype:
        return x
    if x.dtype == DTYPES[STRING]:
        flat = [parse(str(text), dtype) for text in x.reshape(-1)]
        numbers = np.array(flat, np.float64 if is_float(dtype) else None).reshape(x.shape)
        return cast(numbers.astype(np.float32) if dtype in FLOAT8 else numbers, dtype, saturate=saturate)
    if dtype == DTYPES[STRING]:
        texts = np.empty(x.size, object)
        texts[:] = [format_number(value) for value in x.reshape(-1)]
        return texts.reshape(x.shape)
    if dtype in FLOAT8:
        return to_float8(x, dtype, saturate)
    if dtype == DTYPES[FLOAT8E8M0]:
        return to_float8e8m0(x, saturate, round_mode)
    if is_float(x.dtype) and dtype in _NARROW:
        return x.astype(np.int32).astype(dtype)
    if is_float(x.dtype) and dtype == np.uint32:
        return x.astype(np.int64).astype(dtype)
    if dtype == np.bool_ and is_float(x.dtype):
        return np.asarray(x.astype(np.float64) != 0)
    return x.astype(dtype)


@kernel("Cast", since=6)
def Cast(input: Array, *, to: int) -> Array:
    """Return the input as the element type `to` (TensorProto.DataType)."""
    return cast(input, dtype_of_number(to))


@kernel("Cast", since=19)
def Cast_19(input: Array, *, to: int, saturate: int = 1) -> Array:
    """Return the input as the element type `to`; `saturate` is about float8."""
    return cast(input, dtype_of_number(to), saturate=bool(saturate))


@kernel("Cast", since=24)
def Cast_24(input: Array, *, to: int, saturate: int = 1, round_mode: str = "up") -> Array:
    """Return the input as the element type `to`; `round_mode` is about float8e8m0."""
    return cast(input, dtype_of_number(to), saturate=bool(saturate), round_mode=round_mode)


@kernel("CastLike", since=15)
def CastLike(input: Array, target_type: Array) -> Array:
    """Return the input in the element type of the second input."""
    return cast(input, target_type.dtype)


@kernel("CastLike", since=19)
def CastLike_19(input: Array, target_type: Array, *, saturate: int = 1) -> Array:
    """Return the input in the element type of the second input; `saturate` is about float8."""
    return cast(input, target_type.dtype, saturate=bool(saturate))


@kernel("CastLike", since=24)
def CastLike_24(input: Array, target_type: Array, *, saturate: int = 1, round_mode: str = "up") -> Array:
    """Return the input in the element type of the second input; `round_mode` is about float8e8m0."""
    return cast(input, target_type.dtype, saturate=bool(saturate), round_mode=round_mode)


@kernel("BitCast", since=26)
def BitCast(input: Array, *, to: int) -> Array:
    """Return the input's bits read as another element type of the same width.

    Raises:
        ValueError: The widths differ.
    """
    dtype = dtype_of_number(to)
    if dtype.itemsize != input.dtype.itemsize:
        raise ValueError(f"BitCast: {input.dtype} and {dtype} differ in width")
    return np.ascontiguousarray(input).reshape(input.shape).view(dtype)
