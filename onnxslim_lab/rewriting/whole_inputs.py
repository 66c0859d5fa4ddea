"""Convolutions along one axis that see all of their input at once, as Gemm."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.rewriting.certain import integers, trusted_shape
from onnxslim_lab.rewriting.kernel_axes import kernel_axes
from onnxslim_lab.rewriting.removal import release
from onnxslim_lab.rewriting.taps import own_weight

_UNARY = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Softplus"})
_PLACES = 2  # the axis


def write_gemms(graph: Graph) -> int:
    """Write every Conv of one axis whose only window is its whole input as Gemm, in place.

    before: y[n, out, 1] = Conv(x[n, c, k], W[out, c, k], b)
    after:  y = Unsqueeze(Gemm<transB = 1>(Flatten(x), W[out, c k], b))

    What is one place long goes through activations into the next such Conv without the axis. onnxruntime's
    Conv takes one image after the other, its Gemm all at once, and that of codes adds the bias as well.

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
    read, output, name = node.input[0], node.output[0], node.name
    graph.set_constant(constants[0], np.ascontiguousarray(weight.reshape(len(weight), -1)))
    graph.remove(node)
    flat = read if _leave_axis_out(graph, read) else graph.emit("Flatten", [read], name="f").output[0]
    made = graph.emit("Gemm", [flat, *constants], transB=1)
    graph.name_node(made, name)
    axis = graph.fresh_name(f"{output}_axis")
    graph.set_constant(axis, np.array([_PLACES]))
    graph.emit("Unsqueeze", [made.output[0], axis], [output], name="u")
    return True


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
        shape, data_type = graph.shape_of(name), graph.dtype_of(name)
        graph.undeclare(name)
        graph.set_type(name, data_type, None if shape is None else shape[:_PLACES])
    return True
