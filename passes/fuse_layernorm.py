"""fuse-layernorm: a spelt-out layer normalization becomes LayerNormalization."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.rewriting.patterns import enclosed, replace_pattern, scalar, sole_reader, with_scalar


class FuseLayernorm(Pass):
    """Replace the nine nodes of a layer normalization by one (opset 17).

    before: d = Sub(x, ReduceMean(x)), y = Add(Mul(Div(d, Sqrt(Add(ReduceMean(Pow(d, 2)), e))), s), b)
    after:  y = LayerNormalization<epsilon = e>(x, s, b)

    The means are over the last axis; Mul(d, d) stands for Pow, and the last Add may be missing.

    refuses: opsets before 17, means over other axes, inner values that something else reads, a scale or
    bias that is not a constant vector of the last axis, types other than float32.
    """

    exact: ClassVar[bool] = True

    def apply(self, graph: Graph, _context: Context) -> Outcome:
        """Replace every layer normalization of the graph."""
        outcome = Outcome()
        for node in graph.nodes:
            if node not in graph or not is_op(node, "Sqrt"):
                continue
            reason = fuse(graph, node)
            where = node.name or node.output[0]
            if reason is None:
                outcome.change(where, "became LayerNormalization")
            elif reason:
                outcome.refuse(where, reason)
        return outcome


def fuse(graph: Graph, sqrt: NodeProto) -> str | None:
    """Replace the layer normalization around its Sqrt; None when done, "" when there is none, else why not."""
    add = graph.producer(sqrt.input[0])
    shifted = with_scalar(graph, add, "Add")
    variance = graph.producer(shifted[0]) if shifted else None
    if variance is None or shifted is None or add is None or not is_op(variance, "ReduceMean"):
        return ""
    square = graph.producer(variance.input[0])
    difference = _squared(graph, square)
    sub = graph.producer(difference) if difference else None
    if sub is None or square is None or not is_op(sub, "Sub"):
        return ""
    x = sub.input[0]
    mean = graph.producer(sub.input[1])
    division = sole_reader(graph, sqrt.output[0])
    if mean is None or not is_op(mean, "ReduceMean") or mean.input[0] != x:
        return ""
    if division is None or not is_op(division, "Div") or list(division.input) != [difference, sqrt.output[0]]:
        return ""
    scaling = sole_reader(graph, division.output[0])
    if scaling is None or not is_op(scaling, "Mul"):
        return "LayerNormalization needs a scale"
    if graph.opset() < 17:
        return "LayerNormalization needs opset 17"
    shape = graph.shape_of(x)
    if not shape or not isinstance(shape[-1], int) or graph.dtype_of(x) != TensorProto.FLOAT:
        return "the last axis or the type is not known, or not float32"
    if not (_over_last_axis(graph, mean, len(shape)) and _over_last_axis(graph, variance, len(shape))):
        return "the means are not over the last axis"
    scale = _vector(graph, scaling, division.output[0], shape[-1])
    if not scale:
        return "the scale is not a constant vector of the last axis"
    nodes = [mean, sub, square, variance, add, sqrt, division, scaling]
    shifting = sole_reader(graph, scaling.output[0])
    bias = ""
    if shifting is not None and is_op(shifting, "Add"):
        bias = _vector(graph, shifting, scaling.output[0], shape[-1])
        nodes += [shifting] if bias else []
    result = nodes[-1].output[0]
    if not enclosed(graph, nodes, result):
        return "its inner values have other readers"
    inputs = [x, *(_flat(graph, name) for name in (scale, bias) if name)]
    replace_pattern(graph, nodes, "LayerNormalization", inputs, result, axis=-1, epsilon=shifted[1])
    return None


def _squared(graph: Graph, node: NodeProto | None) -> str:
    """Return what a node squares, "" when it does not."""
    if node is not None and is_op(node, "Mul") and len(set(node.input)) == 1:
        return node.input[0]
    if node is not None and is_op(node, "Pow") and len(node.input) == 2 and _two(graph, node.input[1]):
        return node.input[0]
    return ""


def _two(graph: Graph, value: str) -> bool:
    known = graph.constant(value)
    return scalar(graph, value) == 2 or (
        known is not None and known.size == 1 and known.dtype.kind in "iu" and (known == 2).all()
    )


def _over_last_axis(graph: Graph, node: NodeProto, rank: int) -> bool:
    if set_by_caller(node):
        return False
    axes = attribute(node, "axes")
    if len(node.input) > 1 and node.input[1]:
        values = graph.constant(node.input[1])
        axes = None if values is None else [int(axis) for axis in values.reshape(-1)]
    return (
        bool(attribute(node, "keepdims", 1))
        and axes is not None
        and [axis % rank for axis in axes] == [rank - 1]
    )


def _vector(graph: Graph, node: NodeProto, value: str, size: int) -> str:
    """Return a node's other operand when it is a constant with `size` values along the last axis."""
    other = node.input[1] if node.input[0] == value else node.input[0]
    known = graph.constant_type(other)
    rank = len(graph.shape_of(value) or ())
    fits = known is not None and known[1] and known[1][-1] == size == int(np.prod(known[1]))
    return other if fits and known is not None and len(known[1]) <= max(rank, 1) else ""


def _flat(graph: Graph, name: str) -> str:
    """Return a constant with these values as a vector: itself, or a new one."""
    values = graph.constant(name)
    assert values is not None
    if values.ndim == 1:
        return name
    flat = graph.fresh_name(name)
    graph.set_constant(flat, values.reshape(-1))
    return flat
