"""Which layers can run on codes with both inputs quantized, and why the others cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.layers import Layer
from onnxslim_lab.rewriting.patterns import added_to
from onnxslim_lab.statistics import collected
from onnxslim_lab.targets.model import Profile

Key = tuple[collected.Place, str]
"""Where a node is, equal in copies of the model: its graph's place and its first output."""

_WEIGHT_ONLY = {
    "LSTM": "its gates have no kernel on codes",
    "GRU": "its gates have no kernel on codes",
    "RNN": "it has no kernel on codes",
    "Gather": "it only looks its weight up",
    "Einsum": "it has no kernel on codes",
}


@dataclass(frozen=True, eq=False)
class StaticLayer:
    """A layer to run on codes.

    Attributes:
        name: Unique in the model.
        key: Finds the node in a copy of the model.
        layer: The layer in the prepared model.
        macs: Multiply-accumulates of one run, None when a size is not known.
    """

    name: str
    key: Key
    layer: Layer
    macs: int | None


def why_not_static(layer: Layer, profile: Profile) -> str:
    """Return why a layer cannot run on codes for this target, "" when it can."""
    op_type, node = layer.op_type, layer.node
    operator = profile.operators.get(op_type)
    if operator is None or operator.form != "layer":
        return _WEIGHT_ONLY.get(op_type, f"{profile.name} has no {op_type} on codes")
    if layer.stored.used_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        return f"it computes in {TensorProto.DataType.Name(layer.stored.used_type).lower()}"
    if layer.slot != 1:
        return "its weight is the left operand, whose scales cannot differ by row"
    if len(layer.stored.shape) < 2:
        return "its weight is a vector"
    if op_type == "Gemm":
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            return "alpha or beta is not 1"
        if attribute(node, "transA", 0):
            return "its input is transposed"
        if layer.bias and (vector_bias(layer.graph, layer.bias, layer.shape[1]) is None):
            return "its bias is computed or not one value for each column"
    if op_type == "Conv" and layer.bias and not layer.graph.is_constant(layer.bias):
        return "its bias is computed"
    return why_not_finite(layer)


def why_not_finite(layer: Layer) -> str:
    """Return which constant of a layer has values that no code stands for, "" when none has."""
    added = added_bias(layer)
    bias = added[0].input[added[1]] if added else layer.bias
    for what, graph, name in (("weight", layer.weight_graph, layer.weight), ("bias", layer.graph, bias)):
        values = graph.constant(name) if name else None
        if values is not None and not np.isfinite(values).all():
            return f"its {what} has NaN or infinite values: they have no code"
    return ""


def vector_bias(graph: Graph, name: str, size: int) -> str | None:
    """Return the name when it is a constant that holds one value for each of `size` columns, or one for all."""
    found = graph.constant_type(name) if name else None
    if found is None:
        return None
    _, shape, _ = found
    if shape and any(axis != 1 for axis in shape[:-1]):
        return None
    return name if not shape or shape[-1] in (1, size) else None


def added_bias(layer: Layer) -> tuple[NodeProto, int] | None:
    """Return the Add behind a MatMul that adds a constant vector, and the index of the vector there."""
    if layer.op_type != "MatMul":
        return None
    found = added_to(layer.graph, layer.node.output[0])
    if found is None:
        return None
    add, index = found
    shape = layer.graph.constant_type(add.input[index])
    if shape is None or len(shape[1]) != 1 or shape[1][0] != layer.shape[1]:
        return None
    return found


def weight_axis(layer: Layer) -> int:
    """Return the axis of the output channels of a layer's weight, as the node sees it."""
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "Gemm":
        return 0 if attribute(layer.node, "transB", 0) else 1
    return len(layer.stored.shape) - 1


def weight_of(layer: Layer) -> Array:
    """Return the weight as the node sees it, in the type it computes in."""
    array = layer.weight_graph.constant(layer.weight)
    assert array is not None
    half = layer.stored.used_type == 10
    return layer.stored.forward(array).astype(np.float16 if half else np.float32, copy=False)


def bias_of(layer: Layer) -> Array | None:
    """Return the constant that a layer, or the Add behind a MatMul, adds to each output channel."""
    name = layer.bias
    if not name:
        added = added_bias(layer)
        name = added[0].input[added[1]] if added else None
    values = layer.graph.constant(name) if name else None
    return None if values is None else values.reshape(-1)
