"""How operators between quantized layers are computed: on their codes, on grids of their own, or in float."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.targets.model import Operator

Kind = Literal["same", "own", "codes", "float"]

_ALL_INPUTS = frozenset(("binary", "variadic"))


def kind_of(graph: Graph, node: NodeProto, operators: Mapping[str, Operator]) -> Kind:
    """Return how a node between quantized values is computed.

    "same": it only moves values, so that on codes input and output share a grid; "own": it has a kernel on
    codes, its output a grid of its own; "codes": the same operator is put between codes, since processors do
    not see the pattern (standard operators on integers; opset 12, Pad 13); "float": on dequantized values.

    Args:
        graph: Its graph.
        node: The node.
        operators: What the target runs in integers (`Profile.operators`).
    """
    op_type = node.op_type
    if domain_of(node.domain) or set_by_caller(node) or graph.bodies(node):
        return "float"
    if op_type == "Relu" or (op_type == "Clip" and clip_bounds(graph, node) is not None):
        return "codes"
    if op_type == "Pad":
        return "codes" if _pads_zero(graph, node) else "float"
    found = operators.get(op_type)
    if found is None or found.avoid or not _fits(node):
        return "float"
    if found.form == "same":
        return "same"
    return "own" if found.form in ("unary", "binary", "variadic", "select") else "float"


def _fits(node: NodeProto) -> bool:
    """Whether the node is in the form that integer kernels take."""
    op_type = node.op_type
    if op_type == "Resize":
        crops = attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
        return bool(attribute(node, "mode", "nearest") == "nearest") and not crops
    if op_type == "MaxPool":
        return len(node.output) < 2
    return op_type != "AveragePool" or not attribute(node, "dilations")


def data_inputs(node: NodeProto, operators: Mapping[str, Operator]) -> list[str]:
    """Return the inputs of such a node that hold values, not shapes, indices or bounds."""
    found = operators.get(node.op_type)
    form = found.form if found else "unary"
    if form == "select":
        return list(node.input[1:])
    return list(node.input) if form in _ALL_INPUTS else list(node.input[:1])


def clip_bounds(graph: Graph, node: NodeProto) -> tuple[float, float] | None:
    """Return the constant bounds of a Relu or Clip, infinite where it has none; None when they vary."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [attribute(node, "min", -np.inf), attribute(node, "max", np.inf)]
    for position, name in enumerate(node.input[1:3]):
        value = graph.constant(name) if name else None
        if name and (value is None or value.size != 1):
            return None
        if value is not None:
            bounds[position] = float(value.reshape(-1)[0])
    return float(bounds[0]), float(bounds[1])


def _pads_zero(graph: Graph, node: NodeProto) -> bool:
    """Whether a Pad adds zeros and nothing else, in the form of opset 11 and later."""
    if attribute(node, "mode", "constant") != "constant" or len(node.input) < 2:
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.constant(node.input[2])
    return value is not None and not value.any()
