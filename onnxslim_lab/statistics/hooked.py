"""Measuring with the NumPy interpreter: values of bodies and functions, models too large for a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.worker.messages import Value
from onnxslim_lab.worker.tally import Array

Take = Callable[[Array], None]
Spots = dict[
    int, list[tuple[bool, int, Take]]
]  # id of a node -> whether of an output, its index, who takes it


class Observer:
    """Runs feeds and hands the values of any graph of the model to those who asked for them.

    A value is handed over whenever a node makes it; one that no node makes (an input of a body or a
    function, a constant) whenever the first of its consumers reads it.

    Args:
        model: The main graph.
        memory: Bytes of weights that the interpreter may keep.
    """

    def __init__(self, model: Graph, memory: int) -> None:
        self._model = model
        self._interpreter = Interpreter(model, memory=memory)
        self._spots: Spots = {}
        self._fed: list[tuple[str, Take]] = []
        self._wanted: list[str] = []

    def watch(self, graph: Graph, value: str, take: Take) -> str:
        """Hand the value over to `take` in each run; return why that is not possible, else "".

        A value that a branch not taken would make, or that nothing needs, is simply never handed over.
        """
        producer = graph.producer(value)
        if graph is self._model and graph.is_input(value):
            self._fed.append((value, take))
            return ""
        if producer is not None and not is_op(producer, "Constant") and not _constant(graph, value):
            index = list(producer.output).index(value)
            self._spots.setdefault(id(producer), []).append((True, index, take))
            if graph is self._model and not graph.consumers(value):
                self._wanted.append(value)
            return ""
        if not graph.defines(value):
            return "its graph does not define it"
        reader = _reader(graph, value)
        if reader is None:
            return "no node reads it"
        node, index = reader
        self._spots.setdefault(id(node), []).append((False, index, take))
        return ""

    def run(self, feed: dict[str, Value]) -> dict[str, Value]:
        """Run one feed and return the model's outputs."""
        for value, take in self._fed:
            given = feed.get(value)
            if isinstance(given, np.ndarray):
                take(given)
        outputs = list(dict.fromkeys([*self._model.outputs, *self._wanted]))
        found = self._interpreter.run(feed, outputs, hook=self._hook)
        return {name: found[name] for name in self._model.outputs}

    def _hook(self, node: NodeProto, inputs: Sequence[Value], outputs: Sequence[Value], _: float) -> None:
        for made, index, take in self._spots.get(id(node), ()):
            values = outputs if made else inputs
            value = values[index] if index < len(values) else None
            if isinstance(value, np.ndarray):
                take(value)


def _constant(graph: Graph, value: str) -> bool:
    """Whether nothing that varies goes into a value: the interpreter computes it once, unseen."""
    pending, seen = [value], set[str]()
    while pending:
        name = pending.pop()
        if name in seen or not name:
            continue
        seen.add(name)
        scope = graph.scope_of(name)
        if scope is None or scope.is_constant(name):
            continue
        node = scope.producer(name)
        if node is None or scope.bodies(node) or not node.input:
            return False
        pending += node.input
    return True


def _reader(graph: Graph, value: str) -> tuple[NodeProto, int] | None:
    """Return the first node that reads a value, in bodies too, and the index of the input."""
    for node in graph.nodes:
        if value in node.input:
            return node, list(node.input).index(value)
    for node in graph.nodes:
        for bodies in graph.bodies(node).values():
            for body in bodies:
                found = _reader(body, value) if value in body.captured() else None
                if found:
                    return found
    return None
