"""Element types: TensorProto.DataType numbers and the NumPy dtypes that hold them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

STRING = 8
FLOAT8E8M0 = 24

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    4: np.dtype(np.uint16),
    5: np.dtype(np.int16),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    STRING: np.dtype(object),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    12: np.dtype(np.uint32),
    13: np.dtype(np.uint64),
    14: np.dtype(np.complex64),
    15: np.dtype(np.complex128),
    16: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype(ml_dtypes.float8_e4m3fn),
    18: np.dtype(ml_dtypes.float8_e4m3fnuz),
    19: np.dtype(ml_dtypes.float8_e5m2),
    20: np.dtype(ml_dtypes.float8_e5m2fnuz),
    21: np.dtype(ml_dtypes.uint4),
    22: np.dtype(ml_dtypes.int4),
    23: np.dtype(ml_dtypes.float4_e2m1fn),
    FLOAT8E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
    25: np.dtype(ml_dtypes.uint2),
    26: np.dtype(ml_dtypes.int2),
    27: np.dtype(ml_dtypes.float6_e2m3fn),
    28: np.dtype(ml_dtypes.float6_e3m2fn),
}
"""TensorProto.DataType -> NumPy dtype (the numbering of the ONNX specification)."""

NUMBERS: dict[np.dtype[Any], int] = {dtype: number for number, dtype in DTYPES.items()}
"""NumPy dtype -> TensorProto.DataType."""

FLOAT8 = frozenset(DTYPES[number] for number in (17, 18, 19, 20))
HALF = frozenset({DTYPES[10], DTYPES[16]})
SMALL_INTEGERS = frozenset(DTYPES[number] for number in (21, 22, 25, 26))
FLOATS = frozenset(DTYPES[number] for number in (1, 10, 11, 16, 17, 18, 19, 20, 23, 24, 27, 28))


def dtype_of_number(number: int) -> np.dtype[Any]:
    """Return the NumPy dtype of a TensorProto.DataType number.

    Raises:
        ValueError: There is no such element type.

    >>> dtype_of_number(7)
    dtype('int64')
    """
    if number not in DTYPES:
        raise ValueError(f"element type {number} is not known")
    return DTYPES[number]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Say whether a dtype is one of the floating point types of ONNX."""
    return dtype in FLOATS


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Say whether a dtype is a signed or unsigned integer type, the small ones included."""
    return dtype.kind in "iu" or dtype in SMALL_INTEGERS


def limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the smallest and the greatest value of an integer dtype.

    >>> limits(DTYPES[22])
    (-8, 7)
    """
    describe: Any = ml_dtypes.iinfo if dtype in SMALL_INTEGERS else np.iinfo
    info = describe(dtype)
    return int(info.min), int(info.max)
