"""The types a tensor can be quantized to, with what ONNX says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from onnxslim_lab.errors import ParameterError, quote, suggest


@dataclass(frozen=True)
class QuantType:
    """A quantized element type.

    Attributes:
        name: Its name in options and reports.
        data_type: TensorProto.DataType.
        dtype: NumPy dtype that holds it (ml_dtypes for those NumPy lacks).
        low: Least code; for float8 the least finite value.
        high: Greatest code or finite value.
        bits: Bits per element as stored.
        signed: Whether codes may be negative.
        floating: Whether codes are floating point numbers.
        opset: Least opset whose QuantizeLinear and DequantizeLinear know it (int32: DequantizeLinear only).
    """

    name: str
    data_type: int
    dtype: np.dtype[Any]
    low: int
    high: int
    bits: int
    signed: bool
    floating: bool
    opset: int

    def __str__(self) -> str:
        return self.name


def _integer(name: str, dtype: Any, opset: int) -> QuantType:
    signed = not name.startswith("u")
    bits = int(name.removeprefix("u").removeprefix("int"))
    low = -(1 << bits - 1) if signed else 0
    high = low + (1 << bits) - 1
    number = TensorProto.DataType.Value(name.upper())
    return QuantType(name, number, np.dtype(dtype), low, high, bits, signed, floating=False, opset=opset)


def _float8(name: str, dtype: Any, high: int) -> QuantType:
    number = TensorProto.DataType.Value(name.upper())
    return QuantType(name, number, np.dtype(dtype), -high, high, 8, signed=True, floating=True, opset=19)


QUANT_TYPES: dict[str, QuantType] = {
    kind.name: kind
    for kind in (
        _integer("int8", np.int8, 10),
        _integer("uint8", np.uint8, 10),
        _integer("int4", ml_dtypes.int4, 21),
        _integer("uint4", ml_dtypes.uint4, 21),
        _integer("int2", ml_dtypes.int2, 25),
        _integer("uint2", ml_dtypes.uint2, 25),
        _integer("int16", np.int16, 21),
        _integer("uint16", np.uint16, 21),
        _float8("float8e4m3fn", ml_dtypes.float8_e4m3fn, 448),
        _float8("float8e5m2", ml_dtypes.float8_e5m2, 57344),
        _integer("int32", np.int32, 10),
    )
}
"""Every quantized type by name."""


def find_type(name: str) -> QuantType:
    """Return the type called `name`.

    Raises:
        ParameterError: There is none.

    >>> find_type("int4").low
    -8
    """
    if name not in QUANT_TYPES:
        raise ParameterError(f"{quote(name)} is not a type to quantize to{suggest(name, QUANT_TYPES)}")
    return QUANT_TYPES[name]
