"""Where the bias of a layer sits, quantized or not, and how something is added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.equalization.ends import write_constant
from onnxslim_lab.equalization.indexing import Array
from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.layer_views.storage import FLOATS, is_static, numpy_dtype, set_by_caller
from onnxslim_lab.quantization.operands import constant_product
from onnxslim_lab.rewriting.patterns import added_to, sole_reader
from onnxslim_lab.statistics.collected import place

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QUANTIZED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")


@dataclass(frozen=True, eq=False)
class BiasSlot:
    """The bias of a layer that reads computed data and a constant weight.

    Attributes:
        graph: The layer's graph.
        node: The layer.
        value: The value whose mean the bias moves: the layer's output, with an Add of a constant after it.
        axis: The axis of its channels.
        kind: "float": a constant; "int32": codes behind DequantizeLinear; "new float", "new int32": there is
            none yet.
        holder, slot: The node that reads the bias, and which of its inputs it is.
    """

    graph: Graph
    node: NodeProto
    value: str
    axis: int
    kind: Literal["float", "int32", "new float", "new int32"]
    holder: NodeProto
    slot: int

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.node.name or self.node.output[0]

    def twins(self) -> list[str]:
        """Return the names that the value may have in the model as it was before it was quantized.

        Behind it may stand a LeakyRelu that lets everything through, and QuantizeLinear with a DequantizeLinear:
        the last has the name then, and the values before it another one.
        """
        names = [self.value]
        readers = self.graph.consumers(self.value)
        if len(readers) == 1 and is_op(readers[0], "Unsqueeze"):  # of a Gemm that was a Conv of one window
            names.append(readers[0].output[0])
        if len(readers) == 1 and is_op(readers[0], "LeakyRelu") and attribute(readers[0], "alpha", 0.01) == 1:
            names.append(readers[0].output[0])
            readers = self.graph.consumers(names[-1])
        for quantizer in (node for node in readers if is_op(node, "QuantizeLinear")):
            made = self.graph.consumers(quantizer.output[0])
            names += [node.output[0] for node in made if is_op(node, "DequantizeLinear")]
        return names

    @property
    def key(self) -> tuple[tuple[str, ...], str]:
        """What the slot of the same layer has in a copy of the model."""
        return place(self.graph), self.node.output[0]


def find_slots(graph: Graph) -> tuple[list[BiasSlot], list[tuple[str, str]]]:
    """Return the bias slots of one graph in order, and (layer, reason) where there is none."""
    slots: list[BiasSlot] = []
    refused: list[tuple[str, str]] = []
    for node in graph.nodes:
        if node.op_type in _QUANTIZED:
            refused.append(
                (node.name or node.output[0], f"{node.op_type} has integer outputs: correct it as QDQ")
            )
        if (node.op_type not in _LAYERS or domain_of(node.domain)) and not _is_nbits(node):
            continue
        found = _slot(graph, node)
        if isinstance(found, BiasSlot):
            slots.append(found)
        elif found:
            refused.append((node.name or node.output[0], found))
    return slots, refused


def _is_nbits(node: NodeProto) -> bool:
    return is_op(node, "MatMulNBits", "com.microsoft")


def _slot(graph: Graph, node: NodeProto) -> BiasSlot | str:
    """Return a layer's bias slot, why it has none, or "" when the node is no layer."""
    if not _static(graph, node.input[1]):
        return "" if node.op_type == "MatMul" else "the weight is computed while the model runs"
    if _static(graph, node.input[0]) or set_by_caller(node):
        return ""
    shape = graph.shape_of(node.output[0])
    if shape is None or len(shape) < 2:
        return "the shape of its output is not known"
    if graph.dtype_of(node.output[0]) not in FLOATS:
        return "its output is not real"
    if node.op_type in ("MatMul", "MatMulNBits"):
        return _after_product(graph, node, len(shape) - 1)
    value = node.output[0]
    if node.op_type == "Gemm" and (graph.opset() < 7 or not attribute(node, "beta", 1.0)):
        return "Gemm ignores or broadcasts its bias by attribute"
    held = node.input[2] if len(node.input) > 2 else ""
    if held:
        kind = _kind(graph, held)
        return BiasSlot(graph, node, value, 1, kind, node, 2) if kind else "the bias is not a constant"
    if is_op(graph.producer(node.input[0]), "DequantizeLinear"):
        known = _product_scale(graph, node) is not None
        return BiasSlot(graph, node, value, 1, "new int32" if known else "new float", node, 2)
    return BiasSlot(graph, node, value, 1, "new float", node, 2)


def _after_product(graph: Graph, node: NodeProto, axis: int) -> BiasSlot:
    """Return the slot in the Add of a constant after a product, or a new one before its readers."""
    value = node.output[0]
    total = sole_reader(graph, value)
    if total is not None and is_op(total, "Sum") and len(total.input) == 2:
        turn, index = sole_reader(graph, total.output[0]), 1 - list(total.input).index(value)
        if turn is not None and _moves_channels(turn, axis) and _kind(graph, total.input[index]) == "float":
            return BiasSlot(graph, node, turn.output[0], 1, "float", total, index)
    for turn in graph.consumers(value):
        add = added_to(graph, turn.output[0]) if _moves_channels(turn, axis) else None
        if add and graph.use_count(value) == 1 and _is_by_channel(graph, add[0].input[add[1]], value):
            return BiasSlot(graph, node, add[0].output[0], 1, "float", *add)
    add = added_to(graph, value)
    kind = _kind(graph, add[0].input[add[1]]) if add else None
    same = graph.shape_of(add[0].output[0]) if add else None
    if add and kind and same is not None and len(same) == axis + 1:
        return BiasSlot(graph, node, add[0].output[0], axis, kind, *add)
    return BiasSlot(graph, node, value, axis, "new float", node, 0)


def _moves_channels(node: NodeProto, axis: int) -> bool:
    """Whether a node is a Transpose that moves the last of its axes to the second place, and nothing else."""
    return is_op(node, "Transpose") and list(attribute(node, "perm", [])) == [0, axis, *range(1, axis)]


def _is_by_channel(graph: Graph, constant: str, product: str) -> bool:
    """Whether a float constant has a value for each column of a product, along its second axis."""
    known, shape = graph.constant_type(constant), graph.shape_of(product)
    if known is None or known[0] not in FLOATS or shape is None:
        return False
    wanted = (1, shape[-1], *[1] * (len(shape) - 2))
    return (1,) * (len(shape) - len(known[1])) + tuple(known[1]) == wanted


def _static(graph: Graph, value: str) -> bool:
    scope = graph.scope_of(value)
    if scope is None or scope.is_constant(value):
        return scope is not None
    maker = scope.producer(value)
    return maker is not None and is_static(scope, maker)


def _kind(graph: Graph, name: str) -> Literal["float", "int32"] | None:
    """Return how a bias is stored, None when it is neither a float constant nor dequantized int32."""
    known = graph.constant_type(name)
    if known is not None:
        return "float" if known[0] in FLOATS else None
    maker = graph.producer(name)
    if not is_op(maker, "DequantizeLinear") or maker is None or graph.use_count(name) != 1:
        return None
    codes = graph.constant_type(maker.input[0])
    scaled = constant_product(graph, maker.input[1]) is not None
    return "int32" if codes is not None and codes[0] == TensorProto.INT32 and scaled else None


def _product_scale(graph: Graph, node: NodeProto) -> Array | None:
    """Return the scale of data times that of weight by output channel, None when they are not constants."""
    scales = []
    for name in node.input[:2]:
        maker = graph.producer(name)
        values = (
            constant_product(graph, maker.input[1]) if maker and is_op(maker, "DequantizeLinear") else None
        )
        if values is None or (maker is not None and attribute(maker, "block_size", 0)):
            return None
        scales.append(np.asarray(values, np.float32).reshape(-1))
    data, weight = scales
    channels = graph.shape_of(node.output[0])
    count = channels[1] if channels else None
    if data.size != 1 or not isinstance(count, int) or weight.size not in (1, count):
        return None
    return np.broadcast_to(data * weight, (count,)).copy()


def add_to_bias(found: BiasSlot, delta: Array) -> str:
    """Add a vector over channels to a layer's bias; returns why it was not done, "" when it was.

    Args:
        found: The slot.
        delta: float64 (channels,).
    """
    graph, node = found.graph, found.node
    beta = attribute(node, "beta", 1.0) if found.slot == 2 and is_op(node, "Gemm") else 1.0
    delta = delta / beta
    if found.kind in ("float", "int32"):
        name = found.holder.input[found.slot]
        if found.kind == "float":
            values = graph.constant(name)
            assert values is not None
            alike = delta.reshape(values.shape) if values.size == delta.size else delta
            return _store(graph, found.holder, found.slot, values.astype(np.float64) + alike, values.dtype)
        maker = graph.producer(name)
        assert maker is not None
        codes, scale = graph.constant(maker.input[0]), constant_product(graph, maker.input[1])
        assert codes is not None and scale is not None  # noqa: PT018
        moved = codes.astype(np.int64) + np.rint(delta / scale.astype(np.float64)).astype(np.int64)
        if np.abs(moved).max(initial=0) >= 2**31:
            return "the corrected bias does not fit int32"
        write_constant(graph, maker, 0, moved.astype(np.int32))
        return ""
    dtype = numpy_dtype(graph.dtype_of(node.output[0]))
    if found.kind == "new int32":
        scale = _product_scale(graph, node)
        assert scale is not None
        codes = np.rint(delta / scale.astype(np.float64))
        if np.abs(codes).max(initial=0) >= 2**31:
            return "the correction does not fit int32"
        base = f"{node.output[0]}_bias"
        names = [graph.fresh_name(f"{base}_quantized"), graph.fresh_name(f"{base}_scale")]
        graph.set_constant(names[0], codes.astype(np.int32))
        graph.set_constant(names[1], scale)
        graph.set_input(node, 2, graph.emit("DequantizeLinear", names, axis=0).output[0])
        return ""
    name = graph.fresh_name(f"{node.output[0]}_bias")
    graph.set_constant(name, delta.astype(dtype), graph.dtype_of(node.output[0]))
    if found.slot == 2:
        graph.set_input(node, 2, name)
        return ""
    value = node.output[0]
    inner = graph.fresh_name(f"{value}_product")
    known, shape = graph.dtype_of(value), graph.shape_of(value)
    graph.set_outputs(node, [inner])
    graph.set_type(inner, known, shape)
    graph.emit("Add", [inner, name], [value])
    return ""


def _store(graph: Graph, node: NodeProto, slot: int, values: Array, dtype: np.dtype[np.generic]) -> str:
    """Store a bias in its own type; one that has a shape of its own keeps its rank."""
    with np.errstate(over="ignore"):
        narrow = values.astype(dtype)
    if not np.isfinite(narrow.astype(np.float64)).all():
        return "the corrected bias would leave the range of its type"
    write_constant(graph, node, slot, narrow)
    return ""


def channels_of(found: BiasSlot) -> int | None:
    """Return the number of channels, None when it is not known."""
    shape = found.graph.shape_of(found.value)
    size = shape[found.axis] if shape is not None and len(shape) > found.axis else None
    return size if isinstance(size, int) and size > 0 else None
