"""What onnxruntime does to int8 activations on x86: it rewrites them to uint8, where it can."""

from __future__ import annotations

from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.targets.qdq import is_dequantize, is_quantize, moves, parameters

_TYPED = 21  # opset from which a QuantizeLinear that onnxruntime adds names its type twice


def effective_type(graph: Graph, node: NodeProto, *, rewrites_signed: bool) -> str:
    """Return the type that a Q or DQ node has once the runtime has rewritten int8 to uint8.

    onnxruntime on x86 does so between a QuantizeLinear and a DequantizeLinear that is its only reader;
    DequantizeLinear counts once for each of its readers (qdq_s8_to_u8.cc, ensure_unique_dq_for_node_unit.cc).
    """
    found = parameters(graph, node)
    if not rewrites_signed or found.type_name != "int8":
        return found.type_name
    source = node if is_quantize(node) else graph.producer(node.input[0])
    if source is None or not is_quantize(source) or len(source.input) < 3 or found.limits is None:
        return "int8"
    readers = graph.consumers(source.output[0])
    if graph.is_output(source.output[0]) or not all(is_dequantize(reader) for reader in readers):
        return "int8"
    return "uint8" if sum(max(1, graph.use_count(reader.output[0])) for reader in readers) == 1 else "int8"


def breaks_loading(graph: Graph, node: NodeProto) -> bool:
    """Whether onnxruntime on x86 fails to load the model because of a Q or DQ node of int8.

    From opset 21 a QuantizeLinear may name its type in `output_dtype` as well as by its zero point;
    rewriting to uint8 changes the zero point only. Such nodes are in the model, or are added by onnxruntime
    itself behind nodes that only move values (qdq_propagation.cc).
    """
    if graph.root.opset() < _TYPED or parameters(graph, node).type_name != "int8":
        return False
    if is_quantize(node):
        rewritten = effective_type(graph, node, rewrites_signed=True) == "uint8"
        return rewritten and bool(attribute(node, "output_dtype", 0))
    if graph.is_constant(node.input[0]) or parameters(graph, node).limits is None:
        return False
    return any(_moved_behind(graph, reader, node.output[0]) for reader in graph.consumers(node.output[0]))


def _moved_behind(graph: Graph, mover: NodeProto, value: str) -> bool:
    """Whether onnxruntime adds a Q with one reader, which it then rewrites, behind a node that moves a value."""
    if not moves(mover) or mover.input[0] != value:
        return False
    result = mover.output[0]
    readers = [reader for reader in graph.consumers(result) if not is_quantize(reader)]
    if graph.is_output(result):
        return not graph.consumers(result)
    edges = sum(list(reader.input).count(result) for reader in readers)
    return edges == 1 or any(_moved_behind(graph, reader, result) for reader in readers)
