"""The layers behind a removal, in the order data flows, each with the same layer of the original model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxslim_lab.channels.cutting import Kept
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, find_layers
from onnxslim_lab.statistics.collected import node_place, place

Key = tuple[Any, ...]


def key_of(layer: Layer) -> Key:
    """Return what the same layer has in a copy of the model: its graph's place, an output's name, its role."""
    return *node_place(layer.graph, layer.node), layer.role


class Kinship:
    """An edited model, what is left of its layers, and the model before.

    Args:
        model: The edited model.
        original: The model before.
        kept: What is left of the layers that shrank.

    Attributes:
        models: The edited model and the original.
        layers: The layers that shrank or read, at however many removes, what shrank.
    """

    def __init__(self, model: Graph, original: Graph, kept: Mapping[Key, Kept]) -> None:
        self.models = (model, original)
        self._kept = kept
        self._twins = {key_of(layer): layer for graph in original.walk() for layer in find_layers(graph)[0]}
        self._own: dict[int, list[Layer]] = {}
        for graph in model.walk():
            for layer in find_layers(graph)[0]:
                self._own.setdefault(id(layer.node), []).append(layer)
        self.layers: list[Layer] = []
        self._called: set[tuple[str, str]] = set()
        self._visit(model, set())
        left = dict(model.functions)
        while due := [key for key in left if key[:2] in self._called or self._shrank(left[key])]:
            for key in due:
                function = left.pop(key)
                self._visit(function, set(function.inputs))

    def beside(self, layer: Layer, role: str) -> Layer | None:
        """Return the layer of the same node with another role."""
        return next((one for one in self._own[id(layer.node)] if one.role == role), None)

    def twin(self, layer: Layer) -> Layer:
        """Return the same layer of the original."""
        return self._twins[key_of(layer)]

    def kept(self, layer: Layer) -> Kept:
        """Return what is left of the original's matrix."""
        found = self._kept.get(key_of(layer))
        return found or Kept(*(np.ones(size, np.bool_) for size in self.twin(layer).shape))

    def _visit(self, graph: Graph, changed: set[str]) -> None:
        """Add the layers of a graph and of its bodies; `changed` gets the values that are not as they were."""
        for node in graph.nodes:
            layers = [layer for layer in self._own.get(id(node), ()) if key_of(layer) in self._twins]
            touched = any(name in changed for name in node.input if name)
            touched = touched or any(key_of(layer) in self._kept for layer in layers)
            if touched:
                self.layers += layers
            for bodies in graph.bodies(node).values():
                for body in bodies:
                    inside = set(changed) | (set(body.inputs) if touched else set())
                    self._visit(body, inside)
                    touched = touched or not inside.isdisjoint(body.outputs)
            if touched:
                changed.update(filter(None, node.output))
                self._called.add((node.domain, node.op_type))

    def _shrank(self, function: Graph) -> bool:
        where = place(function)
        return any(key[0][: len(where)] == where for key in self._kept)
