"""Sink: a layer that can take a scale and shift of its result or its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.layer_views.kinds import GemmKind
from onnxslim_lab.layers import Layer, layer_of
from onnxslim_lab.rewriting.affine import Doubles


@dataclass(frozen=True)
class Sink:
    """A layer that can take a scale and shift, with the Add that is its bias if it is a MatMul.

    Attributes:
        graph: The graph of the nodes.
        layer: Conv, ConvTranspose, Gemm or MatMul.
        add: The Add of a constant after a MatMul, None without one.
    """

    graph: Graph
    layer: Layer
    add: NodeProto | None = None

    @property
    def last(self) -> NodeProto:
        """The node that makes the result."""
        return self.add or self.layer.node

    @property
    def bias(self) -> str:
        """Name of the constant bias, "" without one."""
        if self.add is not None:
            return next(name for name in self.add.input if self.graph.is_constant(name))
        return self.layer.bias or ""

    @property
    def rank(self) -> int | None:
        """Rank of the result, None when not known."""
        if self.layer.op_type == "Gemm":
            return 2
        if self.layer.op_type != "MatMul":
            return len(self.layer.kind.weight_shape)
        shape = self.graph.shape_of(self.layer.node.output[0])
        return None if shape is None else len(shape)

    @property
    def axis(self) -> int:
        """The axis of the output channels."""
        return -1 if self.layer.op_type in ("MatMul", "Gemm") else 1

    @property
    def channels(self) -> int:
        """Number of output channels; of one group for a batched MatMul."""
        groups, out, _ = self.layer.shape
        return out if self.layer.op_type == "MatMul" else groups * out

    @property
    def inputs(self) -> int:
        """Number of input channels; of one group for a batched MatMul."""
        groups, _, columns = self.layer.shape
        if self.layer.op_type in ("MatMul", "Gemm"):
            return columns
        return groups * columns // int(np.prod(self.layer.kind.weight_shape[2:]))


def find_sink(graph: Graph, value: str) -> Sink | str:
    """Return the layer whose result a value is, or the reason why there is none."""
    node = graph.producer(value)
    if node is None:
        return "what comes before is no layer"
    if is_op(node, "Add"):
        fixed = [name for name in node.input if graph.is_constant(name)]
        inner = [name for name in node.input if not graph.is_constant(name)]
        before = graph.producer(inner[0]) if len(inner) == len(fixed) == 1 else None
        if not is_op(before, "MatMul") or graph.use_count(inner[0]) != 1:
            return "what comes before is no layer"
        assert before is not None
        found = layer_of(graph, before)
        return found if isinstance(found, str) else Sink(graph, found, node)
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return "what comes before is no layer"
    found = layer_of(graph, node)
    return found if isinstance(found, str) else Sink(graph, found)


def sink_at(graph: Graph, node: NodeProto) -> Sink | str:
    """Return the layer that a node is, with the Add that follows a MatMul, or why it is none."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return f"{node.op_type} after it is no layer"
    if is_op(node, "MatMul") and graph.use_count(node.output[0]) == 1:
        after = graph.consumers(node.output[0])
        if after and is_op(after[0], "Add"):
            found = find_sink(graph, after[0].output[0])
            if isinstance(found, Sink):
                return found
    found_layer = layer_of(graph, node)
    return found_layer if isinstance(found_layer, str) else Sink(graph, found_layer)


def trouble(sink: Sink) -> str:
    """Return why a layer's weight must not be edited, "" when it may."""
    layer = sink.layer
    if layer.op_type in ("MatMul", "Gemm") and layer.slot == 0:
        return "the constant is the left operand"
    if layer.op_type == "Gemm" and sink.graph.opset() < 7:
        return "Gemm before opset 7 broadcasts by attribute"
    if layer.op_type == "MatMul" and len(layer.kind.weight_shape) < 2:
        return "the weight is a vector"
    if layer.sharers:
        return "the weight is used by other nodes too: folding would store the weight twice"
    if layer.stored.used_type != layer.stored.data_type:
        return "the weight is stored in a narrower type than it is used in: folding would round it"
    if sink.bias and not sink.graph.is_constant(sink.bias):
        return "the bias is not constant"
    return ""


def sink_bias(sink: Sink) -> Doubles | None:
    """Return the bias in float64, scaled by Gemm's beta, None without one."""
    values = sink.graph.constant(sink.bias) if sink.bias else None
    if values is None:
        return None
    beta = sink.layer.kind.beta if isinstance(sink.layer.kind, GemmKind) else 1.0
    return np.asarray(values.astype(np.float64) * beta)
