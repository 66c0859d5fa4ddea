"""Topological order of nodes, and the checks that a graph's values are defined once and without cycles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxslim_lab.errors import ModelError, quote

if TYPE_CHECKING:
    from onnxslim_lab.graph import Graph


def topological(
    nodes: dict[int, NodeProto], producer: dict[str, NodeProto], captures: dict[int, set[str]]
) -> dict[int, NodeProto]:
    """Return the nodes, by id, each after those it reads from; otherwise in their present order.

    Raises:
        ModelError: the nodes form a cycle.
    """
    done: dict[int, NodeProto] = {}
    for first in nodes.values():
        if id(first) in done:
            continue
        # Depth first without recursion: chains may be as long as the model.
        stack = [(first, _sources(first, producer, captures))]
        open_nodes = {id(first)}
        while stack:
            node, sources = stack[-1]
            while sources:
                source = sources.pop()
                if id(source) in open_nodes:
                    raise ModelError(
                        f"the graph has a cycle through node {quote(source.name)} ({source.op_type})"
                    )
                if id(source) not in done:
                    stack.append((source, _sources(source, producer, captures)))
                    open_nodes.add(id(source))
                    break
            else:
                stack.pop()
                open_nodes.discard(id(node))
                done[id(node)] = node
    return done


def _sources(
    node: NodeProto, producer: dict[str, NodeProto], captures: dict[int, set[str]]
) -> list[NodeProto]:
    """Return the nodes this one reads from, last input first so that they pop in order."""
    names = [*node.input, *sorted(captures.get(id(node), ()))]
    return [producer[name] for name in reversed(names) if name in producer]


def check(graph: Graph) -> None:
    """Check that everything the graph reads is defined.

    Raises:
        ModelError: a node or output reads a value that nothing defines.
    """
    if graph.parent is not None:
        return
    missing = graph.captured() - {""}
    if not missing:
        return
    name = min(missing)
    reader = next(iter(graph.consumers(name)), None)
    where = "the graph's output list" if reader is None else f"node {quote(reader.name)} ({reader.op_type})"
    kind = "function" if graph.is_function else "graph"
    raise ModelError(
        f"{kind} {quote(graph.name)}: {where} reads value {quote(name)}, which no input, initializer or node defines"
    )
