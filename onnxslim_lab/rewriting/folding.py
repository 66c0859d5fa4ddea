"""Folding a scale and shift into the weight and bias of the layer before or after it.

    after    s * (W x + b) + t = (s W) x + (s b + t)
    before   W (s x + t) + b   = (W s) x + (W t + b)

All arithmetic is in float64 and rounded once. The functions return "" when they edited the graph, else
the reason why they did not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import attribute, is_op
from onnxslim_lab.layer_views.kinds import GemmKind
from onnxslim_lab.layer_views.storage import numpy_dtype
from onnxslim_lab.layers import Layer
from onnxslim_lab.rewriting.affine import Affine, Doubles, along, drop_unused, rounded, stored_bytes_freed
from onnxslim_lab.rewriting.sinks import Sink, sink_bias, trouble

Array = NDArray[Any]

_WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
_INITIALIZER = 48  # bytes that a small initializer takes beside its values


def fold_after(affine: Affine, sink: Sink) -> str:
    """Fold a scale and shift of a layer's result into the layer."""
    graph = sink.graph
    value = sink.last.output[0]
    if graph.use_count(value) != 1:
        return f"{sink.last.op_type} before it has other readers"
    reason = trouble(sink)
    if reason:
        return reason
    vectors = [along(part, sink.rank, sink.axis, sink.channels) for part in affine.parts]
    if any(vector is None for vector in vectors):
        return "it does not scale or shift output channels"
    found = iter(vectors)
    scale = next(found) if affine.scale is not None else None
    shift = next(found) if affine.shift is not None else None
    bias = sink_bias(sink)
    if bias is not None and scale is not None:
        bias = bias * scale
    if shift is not None and (shift.any() or bias is not None):
        bias = shift if bias is None else bias + shift
    weight = None if scale is None else _scaled(sink.layer, _out_scale(sink, scale))
    if isinstance(weight, str):
        return weight
    fresh_add = bias is not None and not sink.bias and sink.layer.op_type == "MatMul"
    if fresh_add and not is_op(affine.node, "BatchNormalization"):
        return "MatMul has no bias to take a shift"
    reason = _bias_trouble(sink, bias, affine)
    if reason:
        return reason
    if weight is not None:
        sink.layer.set(weight)
    old = sink.bias
    graph.remove(affine.node)
    if fresh_add:
        assert bias is not None
        name = _new_constant(sink, bias)
        graph.emit("Add", [value, name], [affine.y], name=affine.node.name or None)
    else:
        if bias is not None:
            write_bias(sink, bias)
        graph.set_outputs(sink.last, [affine.y])
    drop_unused(graph, (*affine.constants, *([old] if old else [])))
    return ""


def fold_number(affine: Affine, sink: Sink, number: float) -> str:
    """Scale a layer's whole result by a number; the affine node, which stands further on, is left to the caller."""
    reason = trouble(sink)
    if reason:
        return reason
    weight = _scaled(sink.layer, np.full((1, 1, 1), number))
    if isinstance(weight, str):
        return weight
    bias = sink_bias(sink)
    if bias is not None:
        bias = bias * number
        reason = _bias_trouble(sink, bias, affine)
        if reason:
            return reason
    old = sink.bias
    sink.layer.set(weight)
    if bias is not None:
        write_bias(sink, bias)
        drop_unused(sink.graph, (old,))
    return ""


def fold_before(affine: Affine, sink: Sink) -> str:
    """Fold a scale and shift of a layer's input into the layer."""
    graph, layer = sink.graph, sink.layer
    if graph.use_count(affine.y) != 1:
        return "it has other readers than the layer"
    reason = trouble(sink)
    if reason:
        return reason
    vectors = [_input_vector(affine, sink, part) for part in affine.parts]
    if any(vector is None for vector in vectors):
        return "it does not scale or shift input channels of a known number"
    found = iter(vectors)
    scale = next(found) if affine.scale is not None else None
    shift = next(found) if affine.shift is not None else None
    bias = sink_bias(sink)
    if shift is not None and shift.any():
        reason = _shift_trouble(sink)
        if reason:
            return reason
        moved = _in_product(sink, shift)
        bias = moved if bias is None else bias + moved
    weight = None if scale is None else _scaled(layer, _in_scale(sink, scale))
    if isinstance(weight, str):
        return weight
    if bias is not None and not sink.bias and layer.op_type == "MatMul":
        return "MatMul has no bias to take a shift"
    moves = shift is not None and bool(shift.any())
    reason = _bias_trouble(sink, bias, affine) if moves else ""
    if reason:
        return reason
    if weight is not None:
        layer.set(weight)
    old = sink.bias
    if bias is not None and moves:
        write_bias(sink, bias)
    graph.set_inputs(layer.node, [affine.x if name == affine.y else name for name in layer.node.input])
    graph.remove(affine.node)
    drop_unused(graph, (*affine.constants, *([old] if old else [])))
    return ""


def _out_scale(sink: Sink, scale: Doubles) -> Doubles:
    groups, out, _ = sink.layer.shape
    return scale.reshape(1, out, 1) if sink.layer.op_type == "MatMul" else scale.reshape(groups, out, 1)


def _in_scale(sink: Sink, scale: Doubles) -> Doubles:
    """Return a vector over input channels as it multiplies the matrix's columns (channel, *kernel)."""
    groups, _, columns = sink.layer.shape
    if sink.layer.op_type in ("MatMul", "Gemm"):
        return scale.reshape(1, 1, columns)
    taps = columns * groups // scale.size
    return np.repeat(scale.reshape(groups, 1, -1), taps, axis=2)


def _in_product(sink: Sink, shift: Doubles) -> Doubles:
    """Return what a constant input adds to each output channel."""
    matrix = sink.layer.matrix.astype(np.float64)
    product = np.asarray((matrix * _in_scale(sink, shift)).sum(axis=2)) * sink.layer.kind.scale
    return np.asarray(product.reshape(-1))


def pads_its_input(node: NodeProto) -> bool:
    """Whether a Conv reads zeros around its input; no other layer does."""
    padding = attribute(node, "auto_pad", "NOTSET") if is_op(node, "Conv") else "VALID"
    return bool(padding.startswith("SAME") or (padding == "NOTSET" and any(attribute(node, "pads", ()))))


def _shift_trouble(sink: Sink) -> str:
    node = sink.layer.node
    if sink.layer.op_type == "ConvTranspose":
        return "a shift before ConvTranspose is not constant at the borders"
    if pads_its_input(node):
        return "a shift before padding does not reach the padded border"
    if sink.layer.op_type == "MatMul" and sink.layer.groups > 1:
        return "the batched weight has no bias to take a shift"
    if sink.layer.stored.data_type not in _WIDE:
        return "a shift before a layer is not moved in 16-bit arithmetic"
    return ""


def _input_vector(affine: Affine, sink: Sink, part: Doubles) -> Doubles | None:
    """Return a part of the affine along the layer's input channels, None when it is not along them."""
    node = sink.layer.node
    if node.input[0] != affine.y:
        return None
    shape = sink.graph.shape_of(affine.x)
    if is_op(affine.node, "BatchNormalization"):
        rank: int | None = part.ndim + 1
    elif shape is None:
        return np.broadcast_to(part, (sink.inputs,)) if part.ndim == 0 else None
    else:
        rank = len(shape)
    axis = 1
    if sink.layer.op_type == "MatMul":
        axis = -1
    elif isinstance(sink.layer.kind, GemmKind):
        axis = 0 if sink.layer.kind.other_transposed else 1
    known = shape is not None and len(shape) > axis and shape[axis] == sink.inputs
    if part.size > 1 and not known and not is_op(affine.node, "BatchNormalization"):
        return None
    assert rank is not None
    return along(part, rank, axis, sink.inputs) if rank > axis else None


def _scaled(layer: Layer, factor: Doubles) -> Array | str:
    """Return the weight times a factor of its matrix, in the stored layout, or why it cannot be had."""
    matrix = layer.matrix
    if layer.stored.data_type in _WIDE:
        with np.errstate(over="ignore", under="ignore"):
            result = np.empty(matrix.shape, matrix.dtype)
            np.multiply(matrix, factor, out=result, casting="same_kind")
        if not np.isfinite(result).all() and np.isfinite(matrix).all():
            return "the folded weight would leave the range of its type"
        return layer.with_matrix(result)
    exact = matrix.astype(np.float64) * factor
    narrow = rounded(exact, layer.stored.data_type)
    if narrow is None:
        return "the folded weight would leave the range of its type"
    unit = 2.0 ** -(8 if layer.stored.data_type == TensorProto.BFLOAT16 else 11)
    lost = np.abs(narrow.astype(np.float64) - exact).max(axis=2)
    if (lost > 2 * unit * np.abs(exact).max(axis=2)).any():
        return "the folded weight would lose precision in its 16-bit type"
    return layer.with_matrix(narrow)


def _bias_trouble(sink: Sink, bias: Doubles | None, affine: Affine) -> str:
    """Return why a bias cannot be stored, "" when it can."""
    if bias is None:
        return ""
    if rounded(bias, sink.layer.stored.used_type) is None:
        return "the folded bias would leave the range of its type"
    old = (sink.bias,) if sink.bias else ()
    freed = stored_bytes_freed(sink.graph, affine.constants) + stored_bytes_freed(sink.graph, old)
    added = bias.size * numpy_dtype(sink.layer.stored.used_type).itemsize
    if added > freed + max(0, affine.node.ByteSize() - _INITIALIZER):
        return "folding would store more bytes than it saves"
    return ""


def write_bias(sink: Sink, bias: Doubles) -> None:
    """Give the layer (or its Add) this bias, scaled already."""
    graph, node = sink.graph, sink.last
    old = sink.bias
    if sink.add is not None:
        name = _new_constant(sink, bias)
        graph.set_inputs(node, [name if value == old else value for value in node.input])
        return
    graph.set_input(node, 2, _new_constant(sink, bias))
    if sink.layer.op_type == "Gemm":
        graph.remove_attribute(node, "beta")


def _new_constant(sink: Sink, bias: Doubles) -> str:
    """Store the bias under the old one's name where that is free, else under a new one; return the name."""
    graph = sink.graph
    old = sink.bias
    values = rounded(bias, sink.layer.stored.used_type)
    assert values is not None
    own = bool(old) and graph.scope_of(old) is graph and graph.use_count(old) == 1 and not graph.is_input(old)
    name = old if own else graph.fresh_name(old or f"{sink.layer.weight}_bias")
    graph.set_constant(name, values, sink.layer.stored.used_type)
    return name
