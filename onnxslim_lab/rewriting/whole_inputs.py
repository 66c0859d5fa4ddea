"""Convolutions along one axis that see all of their input at once, as Gemm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.rewriting.certain import integers, trusted_shape
from onnxslim_lab.rewriting.constant_integers import put_integers
from onnxslim_lab.rewriting.kernel_axes import kernel_axes
from onnxslim_lab.rewriting.patterns import reshape_value, sole_reader
from onnxslim_lab.rewriting.removal import label, release
from onnxslim_lab.rewriting.taps import own_weight
from onnxslim_lab.shapes import Dim

_UNARY = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Softplus"})
_PLACES = 2  # the axis
_TURN = [0, 2, 1]


def write_gemms(graph: Graph) -> int:
    """Write every Conv of one axis whose only window is its whole input as Gemm, in place.

    before: y[n, out, 1] = Conv(x[n, c, k], W[out, c, k], b)
    after:  y = Unsqueeze(Gemm<transB = 1>(Flatten(Transpose(x)), W[out, k c], b))

    What is one place long goes through activations into the next such Conv without the axis, and gets it where a
    Transpose behind them would move it. onnxruntime's Conv takes one image after the other, its Gemm all at once,
    and that of codes adds the bias as well. What its products give has the channels last, as the Transpose wants it.

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
    whole = axes[0].taps == axes[0].span == shape[_PLACES] and not axes[0].before + axes[0].after
    weight = own_weight(graph, node)
    if not whole or weight is None or weight.dtype != np.float32 or attribute(node, "group", 1) != 1:
        return False
    constants = [name for name in node.input[1:] if name]
    if not all(map(graph.is_constant, constants)):
        return False
    read, output, name = node.input[0], node.output[0], label(node)
    turned = np.ascontiguousarray(weight.swapaxes(1, _PLACES))
    graph.set_constant(constants[0], turned.reshape(len(weight), -1))
    graph.remove(node)
    flat = read if _leave_axis_out(graph, read) else _flattened(graph, read, shape)
    made = graph.emit("Gemm", [flat, *constants], transB=1)
    graph.name_node(made, name)
    axis = graph.fresh_name(f"{output}_axis")
    graph.set_constant(axis, np.array([_PLACES]))
    _move_axis(graph, graph.emit("Unsqueeze", [made.output[0], axis], [output], name="u"))
    return True


def _flattened(graph: Graph, value: str, shape: Sequence[Dim]) -> str:
    """Emit (images, channels, places) as (images, places times channels)."""
    if shape[_PLACES] != 1:
        value = graph.emit("Transpose", [value], name="t", perm=_TURN).output[0]
    return graph.emit("Flatten", [value], name="f").output[0]


def _leave_axis_out(graph: Graph, value: str) -> bool:
    """Remove the Unsqueeze behind a Gemm that activations lead to a value from, which nothing reads; whether done."""
    chain: list[str] = []
    while True:
        if graph.use_count(value) != bool(chain) or graph.is_output(value):
            return False
        chain.append(value)
        node = graph.producer(value)
        if node is None or domain_of(node.domain) or set_by_caller(node):
            return False
        if node.op_type == "Unsqueeze":
            break
        if node.op_type not in _UNARY:
            return False
        value = node.input[0]
    gemm = graph.producer(node.input[0])
    if gemm is None or not is_op(gemm, "Gemm") or graph.use_count(gemm.output[0]) != 1:
        return False
    if integers(graph, node, "axes", 1) != [_PLACES]:
        return False
    view = list(node.input)
    graph.remove(node)
    graph.set_outputs(gemm, [value])
    release(graph, view[1:])
    for name in chain:
        _retype(graph, name, [0, 1])
    return True


def _move_axis(graph: Graph, view: NodeProto) -> None:
    """Let an Unsqueeze put the axis of one place where a Transpose behind activations moves it."""
    value, chain = view.output[0], []
    while True:
        reader = sole_reader(graph, value)
        if reader is None or domain_of(reader.domain) or set_by_caller(reader):
            return
        chain.append(value)
        if reader.op_type == "Transpose":
            break
        if reader.op_type not in _UNARY:
            return
        value = reader.output[0]
    if list(attribute(reader, "perm", [])) != _TURN or not graph.replace_value(reader.output[0], value):
        return
    graph.remove(reader)
    put_integers(graph, view, 1, [1])
    for name in chain:
        _retype(graph, name, _TURN)


def _retype(graph: Graph, value: str, axes: Sequence[int]) -> None:
    """Record that a value has these axes of what it had."""
    shape = graph.shape_of(value)
    reshape_value(graph, value, None if shape is None else [shape[axis] for axis in axes])
