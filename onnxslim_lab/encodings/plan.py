"""A decoder as a plan: small tensors and standard nodes that compute one weight from them.

A `Plan` is built before the graph is touched, so that the encodings of a tensor can be compared by the
bytes their protobuf takes and proven by decoding in NumPy. `Plan.size` counts what a file grows by when
the plan is written into it; `Plan.decode` runs its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper

Array = npt.NDArray[Any]

_PIECE = 1 << 20  # indices
STEM = "e"  # what the k-th decoder of a model adds is called e<k>.<word or number>


@dataclass(frozen=True)
class Target:
    """Where a decoder will stand: what it makes and what it may use.

    Attributes:
        name: The value the decoder's last node makes, which is the name of the encoded weight.
        stem: Prefix of every other name of the decoder.
        shared_stem: Prefix of the tensors that it shares with the other decoders of the graph.
        opset, ir_version: Versions of the graph.
        in_function: Local functions have no initializers; their tensors are Constant nodes.
        present: Words of the shared tensors that earlier decoders put into this graph.
    """

    name: str
    stem: str = f"{STEM}1"
    shared_stem: str = STEM
    opset: int = 17
    ir_version: int = 8
    in_function: bool = False
    present: Container[str] = ()


@dataclass(frozen=True)
class Step:
    """One node of a decoder; the names are local to the plan."""

    op_type: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


@dataclass
class Plan:
    """The tensors and nodes that decode to one weight.

    Local names: tensors have a word ("codebook"), values a number, the result is "".
    Shared tensors (shift counts, the number two) are equal for all decoders and stored once per graph.
    """

    target: Target
    encoding: str
    tensors: dict[str, tuple[Array, int]] = field(default_factory=dict)
    shared: dict[str, tuple[Array, int]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def tensor(self, word: str, array: Array, data_type: int | None = None) -> str:
        """Add a tensor of this decoder; `data_type` is needed where packed sub-byte types are meant."""
        self.tensors[word] = (np.asarray(array, order="C"), data_type or onnx_type(array.dtype))
        return word

    def share(self, word: str, array: Array) -> str:
        """Add a tensor that every decoder with the same word and values uses."""
        self.shared[word] = (np.asarray(array, order="C"), onnx_type(array.dtype))
        return word

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the local name of its output."""
        output = str(len(self.steps))
        self.steps.append(Step(op_type, inputs, output, attributes))
        return output

    def finish(self) -> Plan:
        """Let the last node make the result."""
        last = self.steps[-1]
        self.steps[-1] = Step(last.op_type, last.inputs, "", last.attributes)
        return self

    def full_name(self, local: str) -> str:
        """Return the name in the graph of a local name."""
        if local == "":
            return self.target.name
        stem = self.target.shared_stem if local in self.shared else self.target.stem
        return f"{stem}.{local}"

    def node(self, step: Step) -> NodeProto:
        """Return the step as it will stand in the graph."""
        inputs = [self.full_name(name) for name in step.inputs]
        return helper.make_node(step.op_type, inputs, [self.full_name(step.output)], **step.attributes)

    def size(self) -> int:
        """Return the bytes the decoder adds to the file, protobuf framing included."""
        total = sum(message(self.node(step).ByteSize()) for step in self.steps)
        for name, (array, data_type) in self.tensors.items():
            total += tensor_bytes(self.full_name(name), array.shape, data_type, self.target)
        for name, (array, data_type) in self.shared.items():
            if name not in self.target.present:
                total += tensor_bytes(self.full_name(name), array.shape, data_type, self.target)
        return total

    def decode(self) -> Array:
        """Run the nodes in NumPy and return the weight."""
        values = {name: array for name, (array, _) in (self.tensors | self.shared).items()}
        last_use = {name: number for number, step in enumerate(self.steps) for name in step.inputs}
        for number, step in enumerate(self.steps):
            operands = [values[name] for name in step.inputs]
            result = OPERATORS[step.op_type](*operands, **step.attributes)
            values[step.output] = result
            del operands, result
            for name in set(step.inputs):
                if last_use[name] == number:
                    del values[name]
        return values[""]


def onnx_type(dtype: npt.DTypeLike) -> int:
    """Return the TensorProto data type of a NumPy dtype."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def numpy_type(data_type: int) -> np.dtype[Any]:
    """Return the NumPy (or ml_dtypes) dtype of a TensorProto data type."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


def varint_bytes(value: int) -> int:
    """Return how many bytes protobuf takes for a non-negative integer.

    >>> varint_bytes(127), varint_bytes(128)
    (1, 2)
    """
    return max(1, -(-value.bit_length() // 7))


def message(size: int) -> int:
    """Return the bytes of a length-delimited field of `size` bytes with a field number below 16."""
    return 1 + varint_bytes(size) + size


def tensor_bytes(name: str, shape: tuple[int, ...], data_type: int, target: Target) -> int:
    """Return the bytes a dense tensor takes in the file: data, header, and its input entry up to IR 3.

    A Constant node of a function is counted with a name of eleven characters.
    """
    stored = storage_bytes(data_type, int(np.prod(shape, dtype=np.int64)))
    raw = message(stored)
    if target.in_function:
        tensor = TensorProto(dims=shape, data_type=data_type).ByteSize() + raw
        attribute = len(b"\x0a\x05value\xa0\x01\x04") + message(tensor)
        constant = message(len(name.encode())) + message(len(b"Constant")) + message(11)
        return message(constant + message(attribute))
    total = message(TensorProto(name=name, dims=shape, data_type=data_type).ByteSize() + raw)
    if target.ir_version < 4:
        total += message(helper.make_tensor_value_info(name, data_type, shape).ByteSize())
    return total


def storage_bytes(data_type: int, count: int) -> int:
    """Return the raw bytes of `count` elements; sub-byte types are packed."""
    bits = SUB_BYTE.get(data_type) or 8 * int(numpy_type(data_type).itemsize)
    return -(-count * bits // 8)


SUB_BYTE: dict[int, int] = {TensorProto.UINT4: 4, TensorProto.UINT2: 2}


def _cast(x: Array, to: int) -> Array:
    dtype = numpy_type(to)
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def _reshape(x: Array, shape: Array) -> Array:
    return x.reshape([int(size) for size in shape])


def _slice(
    x: Array, starts: Sequence[int] | Array, ends: Sequence[int] | Array, axes: Sequence[int] | Array
) -> Array:
    """Slice one axis; before opset 10 the bounds are attributes, later inputs."""
    return x[(slice(None),) * int(axes[0]) + (slice(int(starts[0]), int(ends[0])),)]


def _gather(x: Array, indices: Array, axis: int = 0) -> Array:
    """Take elements along an axis; from a vector in pieces, because NumPy widens indices to 64 bits."""
    if x.ndim > 1:
        return np.take(x, indices, axis)
    result = np.empty(indices.size, x.dtype)
    flat = indices.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        np.take(x, flat[start : start + _PIECE], out=result[start : start + _PIECE], mode="clip")
    return result.reshape(indices.shape)


def _scatter(data: Array, indices: Array, updates: Array, axis: int = 0) -> Array:
    result = data.copy()
    np.put_along_axis(result, indices.astype(np.int64), updates, axis)
    return result


def _constant_of_shape(shape: Array, value: TensorProto | None = None) -> Array:
    size = [int(item) for item in shape]
    if value is None:
        return np.zeros(size, np.float32)
    fill = np.frombuffer(value.raw_data, numpy_type(value.data_type))
    return np.full(size, fill[0])


def _matmul_integer(a: Array, b: Array) -> Array:
    """Multiply one row with a matrix; row by row, so that no int32 copy of the matrix is made."""
    assert a.shape[0] == 1
    total = np.zeros((1, b.shape[1]), np.int32)
    for weight, row in zip(a[0], b, strict=True):
        if weight:
            total[0] += row * np.int32(weight)
    return total


def _cumsum(x: Array, axis: Array, exclusive: int = 0) -> Array:
    total: Array = np.cumsum(x, int(axis), dtype=x.dtype)
    return total - x if exclusive else total


def _divide(a: Array, b: Array) -> Array:
    return np.floor_divide(a, b) if np.issubdtype(a.dtype, np.integer) else np.divide(a, b)


def _multiply(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.multiply(a, b)


OPERATORS: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "BitShift": lambda x, count, **_: np.right_shift(x, count),
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "Div": _divide,
    "Expand": lambda x, shape: np.broadcast_to(x, tuple(int(size) for size in shape)),
    "Gather": _gather,
    "MatMulInteger": _matmul_integer,
    "Mod": np.mod,
    "Mul": _multiply,
    "Reshape": _reshape,
    "ScatterElements": _scatter,
    "Slice": _slice,
    "Sub": np.subtract,
}


def same_bits(a: Array, b: Array) -> bool:
    """Return whether two arrays agree in dtype, shape and every bit (-0.0 and NaN payloads included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(bit_view(a), bit_view(b)))


def bit_view(array: Array) -> Array:
    """Return the array's elements as unsigned integers of the same width (8, 16, 32 or 64 bits)."""
    return np.asarray(array, order="C").view(np.dtype(f"u{array.dtype.itemsize}")).reshape(array.shape)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
