"""Convolutions along one axis whose windows are rows of a matrix already, as Gemm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.rewriting.certain import trusted_shape
from onnxslim_lab.rewriting.kernel_axes import KernelAxis, kernel_axes
from onnxslim_lab.rewriting.patterns import reshape_value
from onnxslim_lab.rewriting.removal import label, remove_unused
from onnxslim_lab.rewriting.taps import own_weight
from onnxslim_lab.shapes import Dim

_CHANNELS, _PLACES = 1, 2  # the axes
_TURN = [0, 2, 1]
_ONE = KernelAxis(1, 1, 1, 0, 0)


def write_gemms(graph: Graph) -> int:
    """Write every Conv of one axis whose windows are rows of a matrix as Gemm, in place.

    before: y[n, out, 1] = Conv(x[n, c, k], W[out, c, k], b)
    after:  y = Unsqueeze(Gemm<transB = 1>(Flatten(Transpose(x)), W[out, k c], b))

    before: y[n, 1, t] = Conv(Transpose(v[.., c]), W[1, c, 1], b)
    after:  y = Reshape(Gemm<transB = 1>(Reshape(v), W[1, c], b))

    onnxruntime's Conv takes one image after the other, its Gemm all at once, and that of codes adds the bias as
    well. What its products give has the channels last, as the Transposes want it. The views beside the Gemm are
    left to `simplify-shapes`.

    Args:
        graph: A graph of opset 13 or later.

    Returns:
        How many were written.
    """
    return sum(_write(graph, node) for node in graph.nodes if is_op(node, "Conv"))


def _write(graph: Graph, node: NodeProto) -> bool:
    axes, shape = kernel_axes(graph, node), trusted_shape(graph, node.input[0])
    if not axes or len(axes) != 1 or shape is None or len(shape) != _PLACES + 1:
        return False
    weight = own_weight(graph, node)
    if weight is None or weight.dtype != np.float32 or attribute(node, "group", 1) != 1:
        return False
    constants = [name for name in node.input[1:] if name]
    if not all(map(graph.is_constant, constants)):
        return False
    whole = axes[0].taps == axes[0].span == shape[_PLACES] and not axes[0].before + axes[0].after
    turn = None if whole or axes[0] != _ONE or len(weight) > 1 else _from_rows(graph, node.input[0], shape)
    if not whole and turn is None:
        return False
    output, name = node.output[0], label(node)
    rows = np.ascontiguousarray(weight.swapaxes(_CHANNELS, _PLACES)).reshape(len(weight), -1)
    graph.set_constant(constants[0], rows)
    after = _free(graph, output)
    graph.remove(node)
    if turn is None:
        flat, images, view, back = _flattened(graph, node.input[0], shape), shape[0], "Unsqueeze", [_PLACES]
    else:
        wide = _constant(graph, [-1, rows.shape[1]])
        flat = graph.emit("Reshape", [turn.input[0], wide], name="v").output[0]
        images, view, back = None, "Reshape", _sizes(shape)
        remove_unused(graph, turn)
    made = graph.emit("Gemm", [flat, *constants], [output] if after != output else 1, transB=1)
    graph.name_node(made, name)
    reshape_value(graph, made.output[0], [images, len(weight)])
    graph.emit(view, [made.output[0], _constant(graph, back)], [after], name="v")
    return True


def _from_rows(graph: Graph, value: str, shape: Sequence[Dim]) -> NodeProto | None:
    """Return the Transpose that brings channels from behind and leaves the order of the rest, None when there is none."""
    node = graph.producer(value)
    if node is None or not is_op(node, "Transpose") or _sizes(shape).count(-1) > 1:
        return None
    perm = list(attribute(node, "perm", []))
    images, places = shape[0], shape[_PLACES]
    ordered = perm == _TURN or (perm == [1, 2, 0] and 1 in (images, places))
    return node if ordered else None


def _sizes(shape: Sequence[Dim]) -> list[int]:
    """Return what Reshape takes for one channel of a shape."""
    return [dim if isinstance(dim, int) else -1 for dim in (shape[0], 1, shape[_PLACES])]


def _free(graph: Graph, value: str) -> str:
    """Let all that reads a value read another one; return its name. Outputs keep theirs."""
    if graph.is_output(value):
        return value
    name = graph.fresh_name(f"{value}_view")
    graph.set_type(name, graph.dtype_of(value), graph.shape_of(value))
    graph.replace_uses(value, name)
    return name


def _flattened(graph: Graph, value: str, shape: Sequence[Dim]) -> str:
    """Emit (images, channels, places) as (images, places times channels)."""
    if shape[_PLACES] != 1:
        value = graph.emit("Transpose", [value], name="t", perm=_TURN).output[0]
    return graph.emit("Flatten", [value], name="f").output[0]


def _constant(graph: Graph, numbers: Sequence[int]) -> str:
    name = graph.fresh_name("sizes")
    graph.set_constant(name, np.array(numbers))
    return name
