"""What to measure, and what was measured, by graph and value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnx import NodeProto

from onnxslim_lab.errors import ParameterError, quote
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.statistics.values import ValueStatistics

Place = tuple[str, ...]
"""Where a graph is in its model: () the main graph; equal for copies of the model."""


class MissingStatistics(ParameterError, KeyError):  # noqa: N818 - named for what is wrong
    """A value was not asked for, or no run computed it."""

    def __str__(self) -> str:
        """Return the message itself, not its repr as KeyError does."""
        return str(self.args[0])


@dataclass(frozen=True, eq=False)
class Want:
    """A value to measure.

    Attributes:
        graph: The main graph, a body of If, Loop or Scan, or a local function.
        value: The value's name there.
        histogram: Whether to count its elements by magnitude.
        axis: Measure each index of this axis too.
        average: Whether the means over the samples of their extremes are wanted. Ranges without them cost
            least: what a Relu or Clip has reached once, or what follows from other ranges, is not measured.
    """

    graph: Graph
    value: str
    histogram: bool = False
    axis: int | None = None
    average: bool = True


def node_place(graph: Graph, node: NodeProto) -> tuple[Place, str]:
    """Return where a node is in its model: the place of its graph and the name of its first output."""
    return place(graph), next(filter(None, node.output), "")


def place(graph: Graph) -> Place:
    """Return where a graph is in its model, as names that a copy of the model shares.

    >>> place(Graph.parse('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) {y = Neg(x)}'))
    ()
    """
    found: list[str] = []
    while graph.parent is not None:
        owner = graph.owner
        assert owner is not None
        for attribute, bodies in graph.parent.bodies(owner).items():
            for number, body in enumerate(bodies):
                if body is graph:
                    found[:0] = [next(filter(None, owner.output), owner.name), attribute, str(number)]
        graph = graph.parent
    if graph.is_function:
        for (domain, name, overload), function in graph.functions.items():
            if function is graph:
                found[:0] = ["function", domain_of(domain), name, overload]
    return tuple(found)


def key(graph: Graph, value: str) -> tuple[Place, str]:
    """Return where the graph is that defines a value, and the value: a body can read those around it."""
    return place(graph.scope_of(value) or graph), value


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of values: `statistics[graph, value]`.

    Graphs are told apart by where they are in the model, so that a copy of the model finds its own.

    Attributes:
        values: By place and name.
        missing: Why a value that was asked for has none.
    """

    values: Mapping[tuple[Place, str], ValueStatistics]
    missing: Mapping[tuple[Place, str], str]

    def __getitem__(self, item: tuple[Graph, str]) -> ValueStatistics:
        """Return the statistics of a value of a graph.

        Raises:
            MissingStatistics: (a KeyError) It was not measured; the text says why.
        """
        graph, value = item
        found = self.get(graph, value)
        if found is None:
            reason = self.missing.get(key(graph, value), "it was not asked for")
            raise MissingStatistics(
                f"no statistics of value {quote(value)} of graph {quote(graph.name)}: {reason}"
            )
        return found

    def get(self, graph: Graph, value: str) -> ValueStatistics | None:
        """Return the statistics of a value, None when it was not measured."""
        return self.values.get(key(graph, value))

    def __contains__(self, item: tuple[Graph, str]) -> bool:
        """Whether the value was measured."""
        return self.get(*item) is not None

    def __len__(self) -> int:
        """Return the number of values measured."""
        return len(self.values)

    def __iter__(self) -> Iterator[tuple[Place, str]]:
        """Yield place and name of each value measured."""
        return iter(self.values)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics over both sets of runs of the same model."""
        values = dict(self.values)
        for at, statistics in other.values.items():
            values[at] = values[at].merge(statistics) if at in values else statistics
        missing = {k: why for k, why in {**self.missing, **other.missing}.items() if k not in values}
        return Statistics(values, missing)
