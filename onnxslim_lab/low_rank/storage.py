"""The factors as constants, and the old weight out of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.layer_views.storage import VIEWS, Stored, numpy_dtype
from onnxslim_lab.layers import Layer

Array = NDArray[Any]


class FactorStore:
    """Stores the factors of one weight beside it, each once, whatever arrangement its readers want.

    Args:
        layer: A layer that uses the weight.
    """

    def __init__(self, layer: Layer) -> None:
        self._graph = layer.weight_graph
        self._weight = layer.weight
        self._data_type = layer.stored.data_type
        self._stored: dict[str, tuple[str, bool]] = {}
        self._derived: dict[tuple[str, str], str] = {}
        self.bytes = 0

    def get(self, factor: str, array: Array, used: Stored, *, transposed: bool = False) -> str:
        """Return the name of the value that holds a factor for a reader, in the type it computes with.

        The first reader's arrangement is the stored one; another gets it through a Transpose.

        Args:
            factor: "u", "v" or "core".
            array: The factor; the same for all readers of a factor.
            used: How the reader uses the old weight.
            transposed: Whether the reader wants the last two axes exchanged.
        """
        if factor not in self._stored:
            values = array.swapaxes(-1, -2) if transposed else array
            name = self._graph.fresh_name(f"{self._weight}_{factor}")
            kept = np.ascontiguousarray(values).astype(numpy_dtype(self._data_type))
            self._graph.set_constant(name, kept, self._data_type)
            self.bytes += kept.nbytes
            self._stored[factor] = name, transposed
        name, way = self._stored[factor]
        if way != transposed:
            perm = [*range(array.ndim - 2), array.ndim - 1, array.ndim - 2]
            name = self._derive(name, "transposed", "Transpose", perm=perm)
        if used.used_type != self._data_type:
            name = self._derive(name, f"as_{used.used_type}", "Cast", to=used.used_type)
        return name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the constants made so far."""
        return tuple(name for name, _ in self._stored.values())

    def _derive(self, name: str, how: str, op_type: str, **attributes: Any) -> str:
        if (name, how) not in self._derived:
            made = self._graph.fresh_name(f"{name}_{how}")
            self._graph.emit(op_type, [name], [made], name=made, **attributes)
            self._derived[name, how] = made
        return self._derived[name, how]


def discard(graph: Graph, value: str) -> None:
    """Remove a constant and the views of it that nothing reads, bodies included; keep what is read."""
    for node in graph.consumers(value):
        if node.input and node.input[0] == value and not domain_of(node.domain) and node.op_type in VIEWS:
            discard(graph, node.output[0])
        for bodies in graph.bodies(node).values():
            for body in bodies:
                if not body.defines(value):
                    discard(body, value)
    if not graph.defines(value) or graph.use_count(value) or graph.is_output(value):
        return
    view = graph.producer(value)
    if view is None or view.op_type == "Constant":
        graph.remove_constant(value)
        return
    shapes = list(view.input)[1:]
    graph.remove(view)
    for name in filter(None, shapes):
        if graph.defines(name) and graph.is_constant(name) and not graph.use_count(name):
            graph.remove_constant(name)
