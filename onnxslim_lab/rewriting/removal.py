"""Removing a node together with what only it needed."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from onnxslim_lab.graph import Graph


def label(node: NodeProto) -> str:
    """Return what a report calls a node: its name, else the first value it makes."""
    return node.name or next(filter(None, node.output), node.op_type)


def is_unused(graph: Graph, node: NodeProto) -> bool:
    """Whether nothing reads any output of a node."""
    return not any(name and graph.use_count(name) for name in node.output)


def is_spare(graph: Graph, name: str, referenced: set[str] | None = None) -> bool:
    """Whether an initializer of this graph is unused and no part of the interface.

    Args:
        graph: The graph that has it.
        name: A dense or sparse initializer.
        referenced: `graph.referenced()`, where many are asked about.
    """
    overridable = graph.is_input(name) and (graph.ir_version >= 4 or graph.parent is not None)
    if overridable or graph.use_count(name):
        return False
    return name not in (graph.referenced() if referenced is None else referenced)


def remove_unused(graph: Graph, node: NodeProto) -> None:
    """Remove a node that nothing reads, and the nodes and initializers that only it kept in use."""
    if node not in graph or not is_unused(graph, node):
        return
    read = graph.read_by(node)
    graph.remove(node)
    release(graph, read)


def release(graph: Graph, names: Iterable[str]) -> None:
    """Remove what makes these values, unless something reads them, and what only that kept in use."""
    stack = [(graph, name) for name in names if name]
    while stack:
        inner, name = stack.pop()
        scope = inner.scope_of(name)
        if scope is None or scope.use_count(name):
            continue
        producer = scope.producer(name)
        if producer is None:
            if scope.is_constant(name) and is_spare(scope, name):
                scope.remove_constant(name)
        elif is_unused(scope, producer):
            read = scope.read_by(producer)
            scope.remove(producer)
            stack += [(scope, name) for name in read if name]
