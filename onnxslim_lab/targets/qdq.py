"""Reading QuantizeLinear and DequantizeLinear: type, scale, zero point, and what stands around a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, numpy_helper

from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.quantization.types import QUANT_TYPES, QuantType

_DOMAINS = ("", "com.microsoft")  # the latter for 16-bit types below opset 21
_MOVERS = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def is_quantize(node: NodeProto | None) -> bool:
    """Whether a node is QuantizeLinear."""
    return node is not None and node.op_type == "QuantizeLinear" and domain_of(node.domain) in _DOMAINS


def is_dequantize(node: NodeProto | None) -> bool:
    """Whether a node is DequantizeLinear."""
    return node is not None and node.op_type == "DequantizeLinear" and domain_of(node.domain) in _DOMAINS


@dataclass(frozen=True, eq=False)
class Parameters:
    """What a Q or DQ node quantizes with.

    Attributes:
        type_name: Name of the quantized type; "" when it cannot be told.
        scale: The scale, None when it is computed by the model.
        zero_point: The zero point as int64 (float64 for float8); None when it is computed or left out.
        axis: Axis of a scale per channel or block, None for one scale.
        block: Block length, 0 without blocks.
    """

    type_name: str
    scale: npt.NDArray[Any] | None
    zero_point: npt.NDArray[Any] | None
    axis: int | None
    block: int

    @property
    def kind(self) -> QuantType | None:
        """The quantized type, None when it is unknown to us."""
        return QUANT_TYPES.get(self.type_name)

    @property
    def shift(self) -> npt.NDArray[Any]:
        """The zero point; 0 when it is left out."""
        return np.zeros((), np.int64) if self.zero_point is None else self.zero_point

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0, or 128 for uint8 and the like."""
        middle = 0 if self.kind is None or self.kind.signed else (self.kind.high + 1) // 2
        return bool((self.shift == middle).all())

    @property
    def limits(self) -> tuple[float, float] | None:
        """The least and greatest real value of a per-tensor type, None when unknown."""
        if self.kind is None or self.scale is None or self.scale.size != 1 or self.shift.size != 1:
            return None
        scale, shift = float(self.scale.reshape(())), float(self.shift.reshape(()))
        return (self.kind.low - shift) * scale, (self.kind.high - shift) * scale

    def equals(self, other: Parameters) -> bool:
        """Whether both quantize alike; False when either is computed by the model."""
        return (
            self.type_name == other.type_name
            and self.scale is not None
            and other.scale is not None
            and np.array_equal(self.scale.ravel(), other.scale.ravel())
            and np.array_equal(np.ravel(self.shift), np.ravel(other.shift))
        )


def constant_or_fill(graph: Graph, name: str) -> npt.NDArray[Any] | None:
    """Return a constant, or what ConstantOfShape makes of a constant shape; None when it is computed."""
    scope = graph.scope_of(name)
    node = scope.producer(name) if scope else None
    if scope is None or node is None or not is_op(node, "ConstantOfShape"):
        return graph.constant(name)
    shape, value = scope.constant(node.input[0]), attribute(node, "value")
    if shape is None:
        return None
    filler = np.zeros((), np.float32) if value is None else numpy_helper.to_array(value).reshape(())
    return np.full(shape.astype(int).tolist(), filler)


def parameters(graph: Graph, node: NodeProto) -> Parameters:
    """Return what a Q or DQ node of the graph quantizes with."""
    zero_name = node.input[2] if len(node.input) > 2 else ""
    scale = constant_or_fill(graph, node.input[1])
    zero = constant_or_fill(graph, zero_name) if zero_name else None
    sized = scale is not None and scale.ndim > 0 and scale.size > 1
    if zero is not None:
        zero = zero.astype(
            np.float64 if zero.dtype.kind in "fV" and "int" not in zero.dtype.name else np.int64
        )
    return Parameters(
        type_name=_type_name(graph, node, zero_name),
        scale=scale,
        zero_point=zero,
        axis=int(attribute(node, "axis", 1)) if sized else None,
        block=int(attribute(node, "block_size", 0)),
    )


def _type_name(graph: Graph, node: NodeProto, zero_name: str) -> str:
    number = 0
    for name in (zero_name, node.input[0] if is_dequantize(node) else ""):
        if name and not number:
            constant = graph.constant_type(name)
            number = constant[0] if constant else graph.dtype_of(name)
    if not number and is_quantize(node):
        number = attribute(node, "output_dtype", 0) or TensorProto.UINT8
    return TensorProto.DataType.Name(number).lower() if number else ""


@dataclass(frozen=True, eq=False)
class Ending:
    """What comes after one output of a node.

    Attributes:
        quantizers: The QuantizeLinear nodes that read it, behind `clip` where there is one.
        others: Whether anything else reads it, the caller of the model included.
        clip: A Relu or Clip that is its only reader.
        moved: Whether nodes that only move values come before the QuantizeLinear.
    """

    quantizers: tuple[NodeProto, ...]
    others: bool
    clip: NodeProto | None
    moved: bool = False

    @property
    def fusable(self) -> bool:
        """Whether exactly one QuantizeLinear and nothing else reads it."""
        return len(self.quantizers) == 1 and not self.others


def ending(graph: Graph, value: str) -> Ending:
    """Return what comes after a value, looking through one Relu or Clip and what moves values."""
    after = _only_reader(graph, value)
    if after is not None and (is_op(after, "Relu") or is_op(after, "Clip")):
        result = after.output[0]
        if _only_reader(graph, result) is not None:
            quantizers, _ = _quantizers(graph, result)
            return Ending(quantizers, not quantizers, after, _moved(quantizers, result))
    quantizers, others = _quantizers(graph, value)
    return Ending(quantizers, others, None, _moved(quantizers, value))


def _moved(quantizers: tuple[NodeProto, ...], value: str) -> bool:
    return any(node.input[0] != value for node in quantizers)


def _only_reader(graph: Graph, value: str) -> NodeProto | None:
    """Return the node that reads a value when nothing else does."""
    readers = graph.consumers(value)
    return readers[0] if len(readers) == 1 and graph.use_count(value) == 1 else None


def _quantizers(graph: Graph, value: str) -> tuple[tuple[NodeProto, ...], bool]:
    """Return the Q nodes that read a value, and whether anything else does.

    A QuantizeLinear is moved in front of nodes that only move values and have no other reader.
    """
    after = _only_reader(graph, value)
    while after is not None and moves(after) and after.input[0] == value:
        value = after.output[0]
        after = _only_reader(graph, value)
    readers = graph.consumers(value)
    found = tuple(node for node in readers if is_quantize(node) and node.input[0] == value)
    return found, graph.use_count(value) > len(found)


def moves(node: NodeProto) -> bool:
    """Whether a node only moves values, so that Q and DQ are moved across it."""
    return node.op_type in _MOVERS and not domain_of(node.domain) and len(node.output) == 1


def dequantizer(graph: Graph, value: str) -> NodeProto | None:
    """Return the DequantizeLinear a value comes from, itself or behind nodes that only move values."""
    node = graph.producer(value)
    direct = True
    while node is not None and moves(node) and not graph.is_output(node.output[0]):
        node = graph.producer(node.input[0])
        direct = False
    if node is None or not is_dequantize(node):
        return None
    return node if direct or parameters(graph, node).limits is not None else None


def is_redundant(graph: Graph, clip: NodeProto, quantizer: NodeProto) -> bool:
    """Whether a Relu or Clip changes nothing that the QuantizeLinear after it does not clamp anyway."""
    limits = parameters(graph, quantizer).limits
    if limits is None:
        return False
    low, high = 0.0, float("inf")
    if clip.op_type == "Clip":
        bounds = [attribute(clip, "min"), attribute(clip, "max")]
        for slot in (1, 2):
            if len(clip.input) > slot and clip.input[slot]:
                bounds[slot - 1] = graph.constant(clip.input[slot])
                if bounds[slot - 1] is None:
                    return False
        low = -float("inf") if bounds[0] is None else float(np.reshape(bounds[0], ()))
        high = float("inf") if bounds[1] is None else float(np.reshape(bounds[1], ()))
    slack = float(np.finfo(np.float32).eps)
    return low - limits[0] < slack and limits[1] - high < slack


def is_float(graph: Graph, value: str) -> bool:
    """Whether a value is floating point, as far as is known."""
    constant = graph.constant_type(value)
    number = constant[0] if constant else graph.dtype_of(value)
    return number in _FLOATS or number == TensorProto.UNDEFINED
