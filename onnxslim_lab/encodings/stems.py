"""Prefixes for the names of a decoder's tensors and values that nothing in a model begins with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from onnxslim_lab.graph import Graph


def free_stems(model: Graph, prefix: str) -> Iterator[str]:
    """Yield `prefix`, then `prefix` and 1, 2, ...: those that no name of the model has before its first dot."""
    taken = {name.split(".", 1)[0] for graph in model.walk() for name in _names(graph)}
    for number in count():
        stem = f"{prefix}{number or ''}"
        if stem not in taken:
            yield stem


def _names(graph: Graph) -> Iterator[str]:
    yield from graph.inputs
    yield from graph.initializers
    for node in graph.nodes:
        yield from node.output
