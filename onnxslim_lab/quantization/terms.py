"""Layers on codes that read their input as two terms: codes, and codes of what the first ones leave.

    before  Conv(x, W)
    after   Conv(d1, W) + Conv(d2, W)     d1 = dequantized(quantized(x)), d2 likewise of x - d1

The second term has 254 steps in one of the first, so the input has nearly 16 bits, and the same weight codes are
multiplied by 8 bits twice. This is the residual expansion of Yvinec et al., REx: Data-Free Residual Quantization
Error Expansion, 2023, section 3.1, of activations instead of weights. It is for inputs that 8 bits cannot hold: raw
sound, whose quiet passages take up few codes. The results stay float, which 8 bits would round away again: MatMul
and Gemm on codes give them anyway, Conv is written as MatMul or ConvInteger (see sums).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import attribute
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.numerics import Grid, middle
from onnxslim_lab.quantization.writer import GraphWriter
from onnxslim_lab.rewriting.patterns import twin


def why_not_terms(layer: Layer, *, symmetric: bool) -> str:
    """Return why a layer cannot read two terms, "" when it can.

    Args:
        layer: A layer on codes.
        symmetric: Whether its weight has one zero point for all channels.
    """
    if layer.stored.used_type == 10:
        return "it computes in float16, and products on codes in float32"
    if layer.graph.is_constant(layer.node.input[0]):
        return "its input is constant"
    if layer.op_type == "Conv" and attribute(layer.node, "group", 1) != 1:
        return "onnxruntime's ConvInteger is slow with groups"
    if layer.op_type == "Conv" and not symmetric:
        return "the zero points of its weight differ by channel"
    return ""


def rest_of(grid: Grid) -> Grid:
    """Return the grid of what a grid leaves of values in its range: half a step to both sides.

    >>> from onnxslim_lab.quantization.types import QUANT_TYPES
    >>> grid = Grid(QUANT_TYPES["uint8"], np.float32(0.254), np.uint8(3))
    >>> rest = rest_of(grid)
    >>> round(float(rest.scale), 6), int(rest.zero_point)
    (0.001, 128)
    """
    kind = grid.kind
    scale = grid.scale / np.asarray(kind.high - kind.low - 1, grid.scale.dtype)
    return replace(grid, scale=np.asarray(scale), zero_point=np.asarray(middle(kind), kind.dtype))


def write_terms(
    writer: GraphWriter, node: NodeProto, grid: Grid, split: dict[str, tuple[str, str]], bias: str = ""
) -> NodeProto:
    """Let a node whose weight is in codes read two terms of its input; the second product is a node of its own.

    Args:
        writer: Of the node's graph.
        node: The node; a bias that it reads stays with the first term.
        grid: Of the first term.
        split: The two terms of values that other nodes read so, added to.
        bias: Name of a constant that is added to the sum of both, "" for none.

    Returns:
        The node that multiplies the second term.
    """
    graph = writer.graph
    value, output = node.input[0], node.output[0]
    if value not in split:
        first = _rounded(writer, value, grid)
        left = graph.emit("Sub", [value, first], name="r").output[0]
        split[value] = first, _rounded(writer, left, rest_of(grid))
    decode = graph.producer(node.input[1])
    assert decode is not None
    weight = twin(graph, decode, list(decode.input), "rest")  # its own: onnxruntime fuses it with one product
    rest = twin(graph, node, [split[value][1], weight.output[0]], "rest")
    part = graph.fresh_name(f"{output}_first")
    graph.set_input(node, 0, split[value][0])
    graph.set_outputs(node, [part])
    # onnxruntime would make one Gemm, in float, of a MatMul and an Add, and of a Gemm and a Sum
    adds = "Add" if node.op_type == "Gemm" else "Sum"
    graph.emit(adds, [part, rest.output[0], *filter(None, [bias])], [output], name="a")
    return rest


def _rounded(writer: GraphWriter, value: str, grid: Grid) -> str:
    """Emit a pair around a value; return what it makes."""
    names = writer.parameters(grid)
    codes = writer.graph.emit("QuantizeLinear", [value, *names], name="q").output[0]
    return writer.graph.emit("DequantizeLinear", [codes, *names], name="dq").output[0]
