"""Merging two nodes in a row that scale or shift: BatchNormalization, Mul by and Add of constants."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import numpy_dtype
from onnxslim_lab.rewriting.affine import (
    Affine,
    Doubles,
    along,
    batchnorm_values,
    drop_unused,
    rounded,
    stored_bytes_freed,
)


def merge(graph: Graph, first: Affine, second: Affine) -> str:
    """Merge two neighbours into one node; return "" when done, else the reason why not.

    A BatchNormalization takes the other node into its scale and B; two Muls become one, and two Adds.
    """
    if graph.use_count(first.y) != 1:
        return f"{first.node.op_type} before it has other readers"
    if is_op(first.node, "BatchNormalization"):
        return _into_first(graph, first, second)
    if is_op(second.node, "BatchNormalization"):
        return _into_second(graph, first, second)
    return _elementwise(graph, first, second)


def _vectors(affine: Affine, rank: int, channels: int) -> tuple[Doubles, Doubles] | None:
    """Return scale and shift as vectors of the channels (axis 1), None when they are not along them."""
    scale = np.ones(()) if affine.scale is None else affine.scale
    shift = np.zeros(()) if affine.shift is None else affine.shift
    found = along(scale, rank, 1, channels), along(shift, rank, 1, channels)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _into_first(graph: Graph, first: Affine, second: Affine) -> str:
    """BatchNormalization then scale and shift: scale' = s * scale, B' = s * B + t."""
    gamma, beta, _, _ = batchnorm_values(graph, first.node)
    assert first.scale is not None
    vectors = _vectors(second, first.scale.ndim + 1, gamma.size)
    if vectors is None:
        return "what follows BatchNormalization is not per channel"
    scale, shift = vectors
    return _write(graph, first.node, second, gamma * scale, beta * scale + shift)


def _into_second(graph: Graph, first: Affine, second: Affine) -> str:
    """Scale and shift, then BatchNormalization: the normalized value stays (x - mean) / deviation."""
    gamma, beta, mean, var = batchnorm_values(graph, second.node)
    assert second.scale is not None
    rank = second.scale.ndim + 1
    shape = graph.shape_of(first.x)
    if shape is None or len(shape) != rank or shape[1] != gamma.size:
        return "the channels before BatchNormalization are not known"
    vectors = _vectors(first, rank, gamma.size)
    if vectors is None:
        return "what comes before BatchNormalization is not per channel"
    scale, shift = vectors
    whole = gamma / np.sqrt(var + attribute(second.node, "epsilon", 1e-5))
    return _write(graph, second.node, first, gamma * scale, beta + whole * (shift - mean + scale * mean))


def _write(graph: Graph, batchnorm: NodeProto, other: Affine, gamma: Doubles, beta: Doubles) -> str:
    """Give BatchNormalization a new scale and B, and remove the other node."""
    names = tuple(batchnorm.input[1:3])
    kind = (graph.constant_type(names[0]) or (0,))[0]
    values = [rounded(vector, kind) for vector in (gamma, beta)]
    if values[0] is None or values[1] is None:
        return "the merged scale or shift would leave the range of its type"
    freed = stored_bytes_freed(graph, (*names, *other.constants))
    if 2 * gamma.size * numpy_dtype(kind).itemsize > freed + other.node.ByteSize():
        return "merging would store more bytes than it saves"
    fresh = []
    for name, value in zip(names, values, strict=True):
        assert value is not None
        own = graph.scope_of(name) is graph and graph.use_count(name) == 1 and not graph.is_input(name)
        fresh.append(name if own else graph.fresh_name(name))
        graph.set_constant(fresh[-1], value, kind)
    graph.set_inputs(batchnorm, [batchnorm.input[0], *fresh, *batchnorm.input[3:]])
    graph.remove(other.node)
    if other.x == batchnorm.output[0]:
        graph.set_outputs(batchnorm, [other.y])
    else:
        graph.set_input(batchnorm, 0, other.x)
    drop_unused(graph, (*names, *other.constants))
    return ""


def _elementwise(graph: Graph, first: Affine, second: Affine) -> str:
    """Two scales or two shifts become one Mul or one Add."""
    if first.shift is None and second.shift is None and first.scale is not None and second.scale is not None:
        op_type, merged = "Mul", first.scale * second.scale
        parts = (first.scale, second.scale)
    elif (
        first.scale is None and second.scale is None and first.shift is not None and second.shift is not None
    ):
        op_type, merged = "Add", first.shift + second.shift
        parts = (first.shift, second.shift)
    else:
        return "a scale and a shift do not merge into one node"
    constants = (*first.constants, *second.constants)
    if not constants:
        return "two negations are not a scale"
    kind = (graph.constant_type(constants[0]) or (0,))[0]
    values = rounded(merged, kind)
    tiny = float(np.finfo(np.float32).tiny) if numpy_dtype(kind).itemsize >= 4 else 6.2e-5
    if values is None or (op_type == "Mul" and (np.abs(merged[(merged != 0)]) < tiny).any()):
        return "the merged constant would leave the range of its type"
    if merged.size > max(part.size for part in parts):
        return "merging would store more bytes than it saves"
    itemsize = numpy_dtype(kind).itemsize
    if values.nbytes > stored_bytes_freed(graph, constants) + first.node.ByteSize() - itemsize:
        return "merging would store more bytes than it saves"
    name = graph.fresh_name(constants[-1])
    graph.remove(first.node, second.node)
    graph.set_constant(name, values, kind)
    graph.emit(op_type, [first.x, name], [second.y], name=second.node.name or None)
    drop_unused(graph, constants)
    return ""
