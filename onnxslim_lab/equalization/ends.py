"""Where scales end: weights, biases and normalizations, and how each takes its factor."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from onnx import NodeProto

from onnxslim_lab.equalization.indexing import Array, Index, along, place
from onnxslim_lab.equalization.region import ConstantEnd, LayerEnd, Region
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.layer_views.convolutions import ConvKind
from onnxslim_lab.layer_views.kinds import GatherKind, GemmKind, RecurrentKind
from onnxslim_lab.layer_views.products import MatMulKind
from onnxslim_lab.layer_views.storage import FLOATS, set_by_caller
from onnxslim_lab.layers import Layer
from onnxslim_lab.rewriting.affine import batchnorm_trouble

Side = Literal["in", "out"]
NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "BatchNormalization": (1, 2),
}


def channel_axis(layer: Layer, side: Side) -> tuple[int, int] | str:
    """Return the axis and number of the channels on one side of a layer, or why it takes no scales there."""
    groups, out, columns = layer.shape
    kind = layer.kind
    if isinstance(kind, ConvKind):
        taps = math.prod(kind.weight_shape[2:])
        return 1, groups * (columns // taps if side == "in" else out)
    if isinstance(kind, GemmKind):
        if kind.left or layer.graph.opset() < 7:
            return "the weight is the left operand, or Gemm broadcasts by attribute"
        return (0 if kind.other_transposed and side == "in" else 1), (columns if side == "in" else out)
    if isinstance(kind, MatMulKind):
        if kind.left or len(kind.weight_shape) < 2:
            return "the weight is the left operand, or a vector"
        return -1, (columns if side == "in" else out)
    if isinstance(kind, RecurrentKind) and not kind.recurrent and side == "in":
        return 2, columns
    if isinstance(kind, GatherKind) and side == "out" and len(kind.weight_shape) == 2 and kind.axis == 0:
        return -1, out
    return f"{layer.op_type} takes no scales of its {side}puts"


def on_matrix(layer: Layer, side: Side, vector: Array) -> Array:
    """Return a vector over channels as it multiplies the layer's matrix (groups, out, in)."""
    groups, out, columns = layer.shape
    if not isinstance(layer.kind, ConvKind):
        return vector.reshape((1, 1, columns) if side == "in" else (1, out, 1))
    if side == "out":
        return vector.reshape(groups, out, 1)
    taps = columns * groups // vector.size
    return np.repeat(vector.reshape(groups, 1, -1), taps, axis=2)


def by_channel(layer: Layer, matrix: Array) -> Array:
    """Return a layer's matrix as (groups, out, input channels of a group, taps)."""
    groups, out, columns = layer.shape
    taps = math.prod(layer.kind.weight_shape[2:]) if isinstance(layer.kind, ConvKind) else 1
    return matrix.reshape(groups, out, columns // taps, taps)


def end_at(region: Region, layer: Layer, side: Side, value: str) -> str:
    """Let a layer take the scales of a value on one side; returns why it does not, "" when it does."""
    index = region.indices[value]
    found = channel_axis(layer, side)
    if isinstance(found, str):
        return found
    axis, size = found
    if not -index.ndim <= axis < index.ndim:
        return "the rank of its data does not fit"
    one = axis % index.ndim
    index = region.collapse(index, [other for other in range(index.ndim) if other != one])
    vector = along(index, axis, size)
    if vector is None:
        return f"the channels are not those of {layer.op_type}"
    weight = layer.weight_graph.constant(layer.weight)
    assert weight is not None
    if not np.isfinite(weight.astype(np.float32, copy=False)).all():
        return "the weight has values that are not finite"
    if side == "out" and layer.op_type != "Gather" and len(layer.node.input) > 2 and layer.node.input[2]:
        if not layer.graph.is_constant(layer.node.input[2]):
            return "the bias is not constant"
        bias = vector if layer.op_type != "Gemm" else place(vector, 2, 1)
        region.constants.append(ConstantEnd(layer.node, 2, bias))
    region.layers.append(LayerEnd(layer, value, side, vector))
    return ""


def norm_at(region: Region, node: NodeProto, value: str) -> str:
    """Let a normalization take the scales of its result in its scale and bias; returns why not, else ""."""
    graph, index = region.graph, region.indices[value]
    if node.output[0] != value or any(node.output[1:]) or set_by_caller(node):
        return f"{node.op_type} has other outputs"
    if node.op_type == "BatchNormalization" and batchnorm_trouble(graph, node):
        return batchnorm_trouble(graph, node)
    if node.op_type == "GroupNormalization" and graph.opset() < 21:
        return "GroupNormalization scales groups before opset 21"
    first = 1
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        first = attribute(node, "axis", -1) % index.ndim
        index = region.collapse(index, range(first))
        form: Index = index.reshape(index.shape[first:])
    elif index.ndim < 2:
        return f"{node.op_type} of a vector"
    else:
        form = region.collapse(index, [axis for axis in range(index.ndim) if axis != 1]).reshape(-1)
    slots = [slot for slot in NORMS[node.op_type] if len(node.input) > slot and node.input[slot]]
    for slot in slots:
        known = graph.constant_type(node.input[slot])
        if known is None or known[0] not in FLOATS or np.broadcast_shapes(known[1], form.shape) != known[1]:
            return f"the scale of {node.op_type} is not a constant of the channels"
    region.constants += [ConstantEnd(node, slot, form) for slot in slots]
    region.norms.append(node)
    return ""


def scaled_weight(layer: Layer, factor: Array) -> Array | None:
    """Return the stored weight with its matrix times a factor, None when it leaves its type's range."""
    matrix = layer.matrix
    with np.errstate(over="ignore", under="ignore"):
        result = (matrix.astype(np.float64) * factor).astype(matrix.dtype)
    return layer.with_matrix(result) if in_range(matrix, result) else None


def scaled_constant(graph: Graph, name: str, divisor: Array) -> Array | None:
    """Return a constant divided by scales it is broadcast against, None when it leaves its type's range."""
    values = graph.constant(name)
    assert values is not None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = (values.astype(np.float64) / divisor).astype(values.dtype)
    while result.ndim > values.ndim and result.shape[0] == 1:
        result = result[0]
    return result if in_range(np.broadcast_to(values, result.shape), result) else None


def in_range(before: Array, after: Array) -> bool:
    """Whether no value became infinite, and none so small that its type holds it with fewer digits."""
    old, new = np.abs(before.astype(np.float64)), np.abs(after.astype(np.float64))
    if not (np.isfinite(new) | ~np.isfinite(old)).all():
        return False
    tiny = {2: 2.0**-14}.get(before.dtype.itemsize, 2.0**-126 if before.dtype.itemsize < 8 else 2.0**-1022)
    largest = float(old.max(initial=0.0, where=np.isfinite(old)))
    return bool(((new >= tiny) | (old < max(tiny, 1e-7 * largest))).all())


def write_constant(graph: Graph, node: NodeProto, slot: int, values: Array) -> None:
    """Let one input of a node be these values, in place where nothing else reads the old ones."""
    name = node.input[slot]
    scope = graph.scope_of(name)
    known = graph.constant_type(name)
    assert known is not None
    own = scope is graph and graph.use_count(name) == 1 and not graph.is_input(name)
    target = name if own else graph.fresh_name(name)
    graph.set_constant(target, values, known[0])
    if not own:
        graph.set_input(node, slot, target)
