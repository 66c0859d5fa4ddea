"""Layers that onnxruntime would not run as written: kept float, or kept on codes.

Of layers that stay float between layers on codes:

    before  DequantizeLinear -> Conv (float weight) -> Relu -> QuantizeLinear
    after   DequantizeLinear -> Conv (float weight) -> LeakyRelu (alpha 0) -> QuantizeLinear

onnxruntime quantizes the float weight of a Conv, ConvTranspose or Gemm, with one scale for all of it, when its
input comes from DequantizeLinear and its output, behind a Relu or Clip or neither, goes to one QuantizeLinear
(weight_bias_quantization.cc, since 1.20; seen with 1.31). A LeakyRelu keeps it from that; it computes the
same, alpha 0 instead of Relu and alpha 1 where there was none, and fuses with Conv and Gemm.

Of products on codes whose result goes on in float:

    before  DequantizeLinear, DequantizeLinear -> Gemm, or MatMul -> Add -> Relu
    after   DequantizeLinear, DequantizeLinear -> Gemm, or MatMul -> Add -> LeakyRelu (alpha 0)

onnxruntime fuses Gemm and Relu before it looks for codes, and then decodes the weight at every inference.
"""

from __future__ import annotations

from onnx import NodeProto

from onnxslim_lab.graph import Graph, domain_of, is_op
from onnxslim_lab.layer_views.storage import is_static
from onnxslim_lab.targets.qdq import dequantizer, ending, is_dequantize

_TAKEN = ("Conv", "ConvTranspose", "Gemm")


def keep_float(graph: Graph) -> None:
    """Keep the float layers of one graph float on onnxruntime, in place."""
    for node in graph.nodes:
        if _would_be_quantized(graph, node):
            _shield(graph, node)


def keep_on_codes(graph: Graph) -> None:
    """Keep products on codes from becoming float through the Relu behind them, in place."""
    for relu in graph.nodes:
        if not is_op(relu, "Relu") or graph.use_count(relu.input[0]) != 1:
            continue
        node = graph.producer(relu.input[0])
        if node is not None and is_op(node, "Add"):
            products = [graph.producer(value) for value in node.input]
            node = next((one for one in products if one is not None and is_op(one, "MatMul")), None)
        elif node is None or not is_op(node, "Gemm"):
            continue
        if node is not None and all(dequantizer(graph, value) is not None for value in node.input[:2]):
            _leak(graph, relu)


def _leak(graph: Graph, relu: NodeProto) -> None:
    """Replace a Relu by a LeakyRelu that computes the same."""
    value, result = relu.input[0], relu.output[0]
    known, shape = graph.dtype_of(result), graph.shape_of(result)
    graph.remove(relu)
    graph.emit("LeakyRelu", [value], [result], name=relu.name, alpha=0.0)
    graph.set_type(result, known, shape)


def _would_be_quantized(graph: Graph, node: NodeProto) -> bool:
    if node.op_type not in _TAKEN or domain_of(node.domain) or dequantizer(graph, node.input[0]) is None:
        return False
    maker = graph.producer(node.input[1])
    constant = graph.is_constant(node.input[1]) or (maker is not None and is_static(graph, maker))
    return constant and not is_dequantize(maker) and ending(graph, node.output[0]).fusable


def _shield(graph: Graph, node: NodeProto) -> None:
    value = node.output[0]
    after = graph.consumers(value)[0]
    known, shape = graph.dtype_of(value), graph.shape_of(value)
    if is_op(after, "Relu"):
        _leak(graph, after)
        return
    inner = graph.fresh_name(f"{value}_float")
    graph.set_outputs(node, [inner])
    graph.set_type(inner, known, shape)
    graph.emit("LeakyRelu", [inner], [value], name="keep", alpha=1.0)
