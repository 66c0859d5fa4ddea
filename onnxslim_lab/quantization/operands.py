"""What operators between DequantizeLinear and QuantizeLinear read and make: codes and their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.quantization.operators import clip_bounds
from onnxslim_lab.targets.qdq import constant_or_fill

BYTES = (TensorProto.UINT8, TensorProto.INT8)


@dataclass(frozen=True)
class Operand:
    """Codes with their scale and zero point.

    Attributes:
        codes, scale, zero: Names of values; zero is "" when the node has none, which means 0.
        kind: Element type of the codes, 0 when it is not known.
        axis: Of the channels, where there is more than one scale.
        block: Length of blocks that share a scale, 0 for none.
    """

    codes: str
    scale: str
    zero: str
    kind: int
    axis: int
    block: int


@dataclass(frozen=True, eq=False)
class Result:
    """What quantizes the output of an operator.

    Attributes:
        quantizer: The QuantizeLinear.
        activation: The Relu or Clip in front of it, if any.
        operand: The codes it makes.
    """

    quantizer: NodeProto
    activation: NodeProto | None
    operand: Operand


def read(graph: Graph, value: str) -> Operand | None:
    """Return the codes behind a value that a DequantizeLinear makes, also one of an outer graph."""
    scope = graph.scope_of(value) if value else None
    node = scope.producer(value) if scope else None
    if scope is None or node is None or not is_op(node, "DequantizeLinear"):
        return None
    names = list(node.input)
    zero = names[2] if len(names) > 2 else ""
    known = scope.constant_type(zero) or scope.constant_type(names[0])
    return _operand(node, names[0], known[0] if known else scope.dtype_of(names[0]), zero)


def made(graph: Graph, value: str) -> Result | None:
    """Return what quantizes a value when nothing else reads it, a Relu or Clip between them or not."""
    activation = None
    node = _only_reader(graph, value)
    if node is not None and node.op_type in ("Relu", "Clip") and clip_bounds(graph, node) is not None:
        activation, node = node, _only_reader(graph, node.output[0])
    if node is None or not is_op(node, "QuantizeLinear"):
        return None
    zero = node.input[2] if len(node.input) > 2 else ""
    known = graph.constant_type(zero)
    kind = known[0] if known else 0 if zero else attribute(node, "output_dtype", 0) or TensorProto.UINT8
    return Result(node, activation, _operand(node, node.output[0], kind, zero))


def _operand(node: NodeProto, codes: str, kind: int, zero: str) -> Operand:
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    return Operand(codes, node.input[1], zero, kind, axis, block)


def _only_reader(graph: Graph, value: str) -> NodeProto | None:
    readers = graph.consumers(value)
    alone = len(readers) == 1 and graph.use_count(value) == 1
    return readers[0] if alone and readers[0].input[:1] == [value] and not readers[0].domain else None


def codes_shape(graph: Graph, value: str) -> tuple[int, ...] | None:
    """Return the shape of constant codes, stored as they are or behind a Cast; None when they are computed."""
    found = graph.constant_type(value)
    if found is not None:
        return found[1]
    cast = widening(graph, value)
    return None if cast is None else codes_shape(graph, cast.input[0])


def widening(graph: Graph, value: str) -> NodeProto | None:
    """Return the Cast that makes a value of a constant, None when that is not what makes it."""
    scope = graph.scope_of(value)
    node = scope.producer(value) if scope else None
    if scope is None or node is None or not is_op(node, "Cast") or not scope.is_constant(node.input[0]):
        return None
    return node


def is_single(graph: Graph, operand: Operand) -> bool:
    """Whether there is one float32 scale for all codes, and it and the zero point are constants."""
    found = graph.constant_type(operand.scale)
    if found is None or found[0] != TensorProto.FLOAT or operand.block:
        return False
    return int(np.prod(found[1])) == 1 and (
        not operand.zero or constant_or_fill(graph, operand.zero) is not None
    )


def zero_of(graph: Graph, operand: Operand) -> Array:
    """Return the constant zero points of an operand, 0 when it names none."""
    found = constant_or_fill(graph, operand.zero) if operand.zero else None
    return np.zeros((), np.int32) if found is None else found.astype(np.int32)


def same_grid(graph: Graph, first: Operand, second: Operand) -> bool:
    """Whether equal codes mean equal values in both, which have one scale each."""
    if first.kind != second.kind or not is_single(graph, first) or not is_single(graph, second):
        return False
    scales = [graph.constant(operand.scale) for operand in (first, second)]
    assert scales[0] is not None
    assert scales[1] is not None
    zeros = [zero_of(graph, operand).item() for operand in (first, second)]
    return bool(scales[0].item() == scales[1].item() and zeros[0] == zeros[1])


def misfit(graph: Graph, x: Operand, w: Operand) -> str:
    """Return why integer products cannot take these two operands, "" when they can."""
    for operand in (x, w):
        if operand.kind not in BYTES:
            name = TensorProto.DataType.Name(operand.kind).lower()
            return f"it multiplies {name}, and operators on codes take 8 bits"
        if operand.block:
            return "its scales differ by block"
        found = graph.constant_type(operand.scale)
        if found is None or (operand.zero and constant_or_fill(graph, operand.zero) is None):
            return "its scales or zero points are computed"
        if found[0] != TensorProto.FLOAT:
            return "it computes in float16, and operators on codes in float32"
    if not is_single(graph, x):
        return "its input has scales that differ by channel"
    if x.kind == TensorProto.INT8 and w.kind == TensorProto.UINT8:
        return "onnxruntime multiplies no int8 by uint8"
    return ""


def scales_of(graph: Graph, x: Operand, w: Operand) -> Array:
    """Return the scales of the sums of products, float32: the weight's times the input's."""
    first, second = graph.constant(x.scale), graph.constant(w.scale)
    assert first is not None
    assert second is not None
    return np.asarray(second * first.reshape(()), np.float32)


def bias_codes(graph: Graph, value: str, scale: Array) -> str | None:
    """Return the name of the int32 codes behind a bias when they count the sums' scale, else None."""
    found = read(graph, value)
    if found is None or found.kind != TensorProto.INT32 or zero_of(graph, found).any():
        return None
    own = constant_product(graph, found.scale)
    return found.codes if own is not None and np.allclose(own, scale, rtol=1e-5, atol=0) else None


def bias_values(graph: Graph, value: str) -> Array | None:
    """Return the float32 values of a constant bias, dequantized where it is stored in int32."""
    found = read(graph, value)
    if found is None:
        values = graph.constant(value)
        return values if values is not None and values.dtype == np.float32 else None
    codes, scale = graph.constant(found.codes), constant_product(graph, found.scale)
    if codes is None or scale is None or found.kind != TensorProto.INT32 or zero_of(graph, found).any():
        return None
    return np.asarray(codes.astype(np.float32) * scale, np.float32)


def constant_product(graph: Graph, value: str) -> Array | None:
    """Return a constant, or the product of two constants that a Mul makes."""
    node = graph.producer(value)
    if node is None or not is_op(node, "Mul"):
        return graph.constant(value)
    first, second = (graph.constant(name) for name in node.input)
    return None if first is None or second is None else np.asarray(first * second)
