"""Running models whose inputs or outputs have types that onnxruntime cannot convert from or to numpy.

bfloat16, float8 and the types below a byte are bound by address; onnxruntime packs the latter, the first
value in the lowest bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxslim_lab.worker.messages import Array, Value, dtype_named

_TYPES = {  # onnxruntime's name: (ml_dtypes' name, TensorProto data type, bits); onnx is not imported in the child
    "tensor(bfloat16)": ("bfloat16", 16, 16),
    "tensor(float8e4m3fn)": ("float8_e4m3fn", 17, 8),
    "tensor(float8e4m3fnuz)": ("float8_e4m3fnuz", 18, 8),
    "tensor(float8e5m2)": ("float8_e5m2", 19, 8),
    "tensor(float8e5m2fnuz)": ("float8_e5m2fnuz", 20, 8),
    "tensor(float8e8m0)": ("float8_e8m0fnu", 24, 8),
    "tensor(uint4)": ("uint4", 21, 4),
    "tensor(int4)": ("int4", 22, 4),
    "tensor(float4e2m1)": ("float4_e2m1fn", 23, 4),
    "tensor(uint2)": ("uint2", 25, 2),
    "tensor(int2)": ("int2", 26, 2),
}


def _input_kinds(session: Any) -> dict[str, str]:
    return {a.name: a.type for a in (*session.get_inputs(), *session.get_overridable_initializers())}


def needs_binding(session: Any, feed: dict[str, Value], outputs: Sequence[str]) -> bool:
    """Whether a feed or a wanted output has one of the types above."""
    kinds = _input_kinds(session)
    made = {a.name: a.type for a in session.get_outputs()}
    return any(kinds[name] in _TYPES for name in feed) or any(made[name] in _TYPES for name in outputs)


def pack(array: Array, bits: int) -> Array:
    """Return the bytes of an array, values below a byte packed.

    >>> pack(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    if bits >= 8:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    each = 8 // bits
    codes = np.ascontiguousarray(array).reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    codes = np.concatenate([codes, np.zeros(-len(codes) % each, np.uint8)]).reshape(-1, each)
    packed: Array = np.bitwise_or.reduce(codes << (np.arange(each, dtype=np.uint8) * bits), axis=1)
    return packed


def unpack(data: bytes, name: str, bits: int, shape: Sequence[int]) -> Array:
    """Return the array of a dtype called `name` that packed bytes hold.

    >>> unpack(bytes([33, 15]), "int4", 4, [3]).tolist()
    [1, 2, -1]
    """
    dtype = dtype_named(name)
    if bits >= 8:
        return np.frombuffer(bytearray(data), dtype).reshape(shape)
    places = np.arange(8 // bits, dtype=np.uint8) * bits
    codes = (np.frombuffer(data, np.uint8)[:, None] >> places) & ((1 << bits) - 1)
    codes = codes.reshape(-1)[: math.prod(shape)]
    if name.startswith("int"):  # ml_dtypes keeps the sign in the whole byte
        half = 1 << (bits - 1)
        return ((codes.astype(np.int8) ^ half) - half).astype(dtype).reshape(shape)
    return np.ascontiguousarray(codes).view(dtype).reshape(shape)


def run_bound(session: Any, feed: dict[str, Value], outputs: Sequence[str]) -> dict[str, Array]:
    """Run one feed of tensors and return the named outputs.

    Raises:
        TypeError: An input is not a tensor.
    """
    kinds = _input_kinds(session)
    made = {a.name: a.type for a in session.get_outputs()}
    binding = session.io_binding()
    kept = []  # alive until the run is over
    for name, value in feed.items():
        if not isinstance(value, np.ndarray):
            raise TypeError(f"input '{name}': only tensors can be fed together with {', '.join(_TYPES)}")
        if kinds[name] in _TYPES:
            _, element, bits = _TYPES[kinds[name]]
            data = pack(value, bits)
            kept.append(data)
            binding.bind_input(name, "cpu", 0, element, list(value.shape), data.ctypes.data)
        else:
            binding.bind_cpu_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    return {
        name: _array(value, made[name]) for name, value in zip(outputs, binding.get_outputs(), strict=True)
    }


def _array(value: Any, kind: str) -> Array:
    """Return an output as an array."""
    if kind not in _TYPES:
        array: Array = value.numpy()
        return array
    name, _, bits = _TYPES[kind]
    shape = value.shape()
    size = (math.prod(shape) * bits + 7) // 8
    return unpack(ctypes.string_at(value.data_ptr(), size) if size else b"", name, bits, shape)
