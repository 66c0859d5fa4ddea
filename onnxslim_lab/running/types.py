"""Types of a node's inputs against what its operator's schema takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxslim_lab.kernels.dtypes import NUMBERS, STRING
from onnxslim_lab.worker.messages import Value

_VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


@functools.cache
def schema_for(op_type: str, domain: str, opset: int) -> Any | None:
    """Return the schema of an operator at an opset, None when onnx does not know it."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def type_name(value: Value) -> str:
    """Return a value's type as schemas write it, "" for what they cannot tell.

    >>> type_name(np.zeros(2, np.float32)), type_name([np.zeros(2)]), type_name(None)
    ('tensor(float)', 'seq(tensor(double))', '')
    """
    if isinstance(value, np.ndarray):
        number = STRING if value.dtype == object else NUMBERS.get(value.dtype)
        return "" if number is None else f"tensor({TensorProto.DataType.Name(number).lower()})"
    inner = type_name(value[0]) if isinstance(value, list) and value else ""
    return f"seq({inner})" if inner else ""


def wrong_type(op_type: str, domain: str, opset: int, arguments: Sequence[Value]) -> str:
    """Return which input has a type that the operator does not take, and which it takes; "" when all fit.

    >>> wrong_type("Add", "", 17, [np.zeros(1, np.float32), np.zeros(1, np.int64)])
    'input B takes tensor(float) as A does, got tensor(int64)'
    """
    schema = schema_for(op_type, domain, opset)
    if schema is None:
        return ""
    bound: dict[str, tuple[str, str]] = {}  # type parameter -> type, the input that decided
    for formal, value in zip(_formals(schema, len(arguments)), arguments, strict=False):
        found = type_name(value)
        if not found:
            continue
        if found not in formal.types and f"optional({found})" not in formal.types:
            taken = sorted(formal.types)
            shown = (
                " or ".join(taken)
                if len(taken) < 4
                else f"{', '.join(taken[:12])}" + ", ..." * (len(taken) > 12)
            )
            return f"input {formal.name} takes {shown}, got {found}"
        if not formal.is_homogeneous:
            continue
        first, name = bound.setdefault(formal.type_str, (found, formal.name))
        if first != found:
            return f"input {formal.name} takes {first} as {name} does, got {found}"
    return ""


def _formals(schema: Any, count: int) -> Iterator[Any]:
    """Yield the formal parameter of each input."""
    inputs = schema.inputs
    for position in range(count):
        if position < len(inputs):
            yield inputs[position]
        elif inputs and inputs[-1].option == _VARIADIC:
            yield inputs[-1]
