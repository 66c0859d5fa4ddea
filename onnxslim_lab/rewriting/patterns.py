"""Small questions that passes ask when they look for a pattern of nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import FLOATS, set_by_caller
from onnxslim_lab.rewriting.affine import drop_unused
from onnxslim_lab.shapes import Dim


def scalar(graph: Graph, value: str) -> float | None:
    """Return the number a real constant of one element holds, None for anything else."""
    known = graph.constant_type(value)
    if known is None or known[0] not in FLOATS or math.prod(known[1]) != 1:
        return None
    array = graph.constant(value)
    return None if array is None else float(np.asarray(array, np.float64).reshape(()))


def with_scalar(graph: Graph, node: NodeProto | None, *op_types: str) -> tuple[str, float] | None:
    """Return (computed value, number) of a node of one of these types with one scalar constant.

    The scalar of Div is the divisor; the rank of the result is that of the computed value.
    """
    if node is None or not any(is_op(node, op_type) for op_type in op_types) or len(node.input) != 2:
        return None
    for position in (1,) if node.op_type in ("Div", "Sub", "Pow") else (0, 1):
        number = scalar(graph, node.input[position])
        other = node.input[1 - position]
        if number is None or graph.is_constant(other):
            continue
        known = graph.constant_type(node.input[position])
        rank = graph.shape_of(other)
        if known and len(known[1]) > (1 if rank is None else len(rank)):
            return None  # the constant's rank raises that of the result
        return other, number
    return None


def factor(graph: Graph, node: NodeProto | None) -> tuple[str, float] | None:
    """Return (value, number) when a node multiplies a value by a number or divides it by one."""
    found = with_scalar(graph, node, "Mul", "Div")
    if found is None or node is None:
        return None
    value, number = found
    if node.op_type == "Mul":
        return value, number
    return (value, 1 / number) if number else None


def near(number: float | None, wanted: float, relative: float = 1e-6) -> bool:
    """Whether a number is the wanted one up to the rounding of its storage."""
    return number is not None and math.isclose(number, wanted, rel_tol=relative)


def sole_reader(graph: Graph, value: str) -> NodeProto | None:
    """Return the only node that reads a value, None when there are others or it is an output."""
    readers = graph.consumers(value)
    return readers[0] if len(readers) == 1 and not graph.is_output(value) else None


def reshape_value(graph: Graph, value: str, shape: Sequence[Dim] | None) -> None:
    """Record another shape of a value, None where it is not known; what the model declared of it goes."""
    data_type = graph.dtype_of(value)
    graph.undeclare(value)
    graph.set_type(value, data_type, shape)


def added_to(graph: Graph, value: str) -> tuple[NodeProto, int] | None:
    """Return the Add that alone reads a value, and which of its inputs is the other one; None when there is none."""
    node = sole_reader(graph, value)
    if node is None or not is_op(node, "Add") or graph.use_count(value) != 1:
        return None
    return node, 1 - list(node.input).index(value)


def enclosed(graph: Graph, nodes: Sequence[NodeProto], result: str) -> bool:
    """Whether nothing but these nodes reads what they make, the result aside."""
    own = {id(node) for node in nodes}
    return all(
        not graph.is_output(name) and all(id(reader) in own for reader in graph.consumers(name))
        for node in nodes
        for name in node.output
        if name and name != result
    )


def clip_bounds(graph: Graph, node: NodeProto | None) -> tuple[str, float, float] | None:
    """Return (value, low, high) of a Clip with constant bounds or a Relu, None for anything else."""
    if is_op(node, "Relu"):
        assert node is not None
        return node.input[0], 0.0, math.inf
    if node is None or not is_op(node, "Clip") or set_by_caller(node):
        return None
    bounds = [-math.inf, math.inf]
    for position, name in enumerate(("min", "max")):
        if graph.opset() < 11:
            bounds[position] = attribute(node, name, bounds[position])
        elif len(node.input) > position + 1 and node.input[position + 1]:
            found = scalar(graph, node.input[position + 1])
            if found is None:
                return None
            bounds[position] = found
    return node.input[0], bounds[0], bounds[1]


def replace_pattern(
    graph: Graph,
    nodes: Sequence[NodeProto],
    op_type: str,
    inputs: Sequence[str],
    result: str,
    **attributes: Any,
) -> NodeProto:
    """Replace nodes by one that makes `result`, named as the last of them; unused constants go."""
    last = nodes[-1]
    node = helper.make_node(op_type, inputs, [result], last.name, last.doc_string or None, **attributes)
    read = tuple({name for old in nodes for name in old.input if name})
    graph.remove(*nodes)
    made = graph.adopt(node)
    drop_unused(graph, tuple(name for name in read if graph.is_constant(name)))
    return made


def twin(graph: Graph, node: NodeProto, inputs: Sequence[str], suffix: str) -> NodeProto:
    """Add a copy of a node with one output that reads other inputs; returns it.

    Args:
        graph: The node's graph.
        node: The node.
        inputs: What the copy reads.
        suffix: Of the name of what it makes.
    """
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = inputs
    copy.name = graph.fresh_name(node.name or node.op_type)
    copy.output[:] = [graph.fresh_name(f"{node.output[0]}_{suffix}")]
    return graph.adopt(copy)
