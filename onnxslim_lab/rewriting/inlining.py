"""Putting absorbed nodes in the place of the node that stood for them."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from onnxslim_lab.graph import Graph


def replace_node(graph: Graph, node: NodeProto, results: Iterable[str]) -> None:
    """Let the readers of a node's outputs read other values, and remove the node.

    A graph output keeps its name: the value takes it over, or goes through an Identity where it cannot (an
    input, an initializer, a value from a graph around, a value that is another output already).

    Args:
        graph: The graph of the node.
        node: The node.
        results: The value for each output.
    """
    left: list[tuple[str, str]] = []
    renamed: dict[str, str] = {}
    for output, result in zip(list(node.output), results, strict=False):
        value = renamed.get(result, result)
        if not output:
            continue
        is_result = graph.is_output(output)
        if not graph.replace_value(output, value):
            left.append((output, result))
        elif is_result:
            renamed[result] = output
    graph.remove(node)
    for output, result in left:
        graph.emit("Identity", [renamed.get(result, result)], [output])
