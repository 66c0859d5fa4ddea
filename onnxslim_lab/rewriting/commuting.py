"""Scales that reach a layer by changing places with the nodes between."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.rewriting.affine import Affine, drop_unused, rounded, stored_bytes_freed
from onnxslim_lab.rewriting.folding import fold_before, fold_number
from onnxslim_lab.rewriting.sinks import Sink, find_sink

# f(s x) = s f(x) in the first input, for every number s
_LINEAR = {
    "Identity",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Expand",
    "DepthToSpace",
    "SpaceToDepth",
    "AveragePool",
    "GlobalAveragePool",
}
_LINEAR_IF_POSITIVE = {"Relu", "MaxPool", "GlobalMaxPool"}
_FARTHEST = 12  # nodes between a scale and the layer that takes it


def scale_further_up(graph: Graph, affine: Affine) -> Sink | None:
    """Move a scalar factor back through linear nodes into the layer before them; return that, None for no change.

    before: y = Div(MatMul(Transpose(Reshape(MatMul(x, W))), k), s)
    after:  y = MatMul(Transpose(Reshape(MatMul(x, W / s))), k)
    """
    if affine.shift is not None or affine.scale is None or affine.scale.size != 1:
        return None
    rank = len(graph.shape_of(affine.x) or ())
    number = float(affine.scale.reshape(()))
    if affine.scale.ndim > rank or not number or graph.producer(affine.x) is None:
        return None
    waiting = [(affine.x, 0)]
    while waiting:
        value, distance = waiting.pop()
        node = graph.producer(value)
        if node is None or graph.use_count(value) != 1 or distance > _FARTHEST:
            continue
        sink = find_sink(graph, value)
        if isinstance(sink, Sink):
            if distance and not fold_number(affine, sink, number):
                _bypass(graph, affine)
                return sink
        elif not domain_of(node.domain):
            waiting += [(name, distance + 1) for name in _passed(node, number)]
    return None


def _passed(node: NodeProto, number: float) -> list[str]:
    """Return the inputs of which any one may be scaled instead of the node's result."""
    if node.op_type == "MatMul":
        return [node.input[1], node.input[0]]
    if node.op_type in _LINEAR or (node.op_type in _LINEAR_IF_POSITIVE and number > 0):
        return [node.input[0]] if not any(node.output[1:]) else []
    return []


def _bypass(graph: Graph, affine: Affine) -> None:
    """Remove the affine node; what it read takes the name of what it made."""
    before = graph.producer(affine.x)
    assert before is not None
    graph.remove(affine.node)
    graph.set_outputs(before, [affine.y if name == affine.x else name for name in before.output])
    drop_unused(graph, affine.constants)


def scale_past_shift(graph: Graph, first: Affine, second: Affine, sink: Sink) -> bool:
    """Fold a scale into the layer after it although a shift stands between; return whether it was done.

    before: y = Conv<pads>(Add(Mul(x, s), t), W)
    after:  y = Conv<pads>(Add(x, t / s), W s)
    """
    if first.scale is None or first.shift is not None or second.shift is None or second.scale is not None:
        return False
    if graph.use_count(first.y) != 1 or not first.scale.all() or not second.constants:
        return False
    shift = second.shift / first.scale
    kind = (graph.constant_type(second.constants[0]) or (0,))[0]
    values = rounded(shift, kind)
    freed = stored_bytes_freed(graph, (*first.constants, *second.constants))
    if values is None or values.nbytes > freed + first.node.ByteSize():
        return False
    if np.abs(first.scale).min() < 1e-3 * np.abs(first.scale).max():
        return False  # the shift would drown the data of the weakest channel
    scale_only = Affine(second.node, first.x, first.scale, None, ())
    if fold_before(scale_only, sink):
        return False
    name = graph.fresh_name(second.constants[0])
    graph.set_constant(name, values, kind)
    added = graph.emit("Add", [first.x, name], name=second.node.name or None)
    layer = sink.layer.node
    graph.set_input(layer, 0, added.output[0])
    graph.set_type(added.output[0], kind, graph.shape_of(first.x))
    graph.remove(first.node)
    drop_unused(graph, (*first.constants, *second.constants))
    return True
