"""A model seen as numbered nodes, so that what is decided once holds for every copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import blocks
from onnxslim_lab.graph import Graph
from onnxslim_lab.precision.half import Half, Role, loss, to_half
from onnxslim_lab.precision.slots import Slots, node_slots
from onnxslim_lab.rewriting.removal import label
from onnxslim_lab.weights import from_array

Value = tuple[int, str]  # number of the graph that defines it, name


@dataclass
class Item:
    """A node of the model.

    Attributes:
        number: Its place in `Anatomy.items`.
        place: The number of its graph.
        node: The node.
        slots: What becomes 16-bit with it.
        bodies: Numbers of the graphs in it.
        reason: Why it stays float32, "" when it can be converted or has no float32 values.
        whole: Whether its weights stay float32 as well.
    """

    number: int
    place: int
    node: NodeProto
    slots: Slots
    bodies: tuple[int, ...]
    reason: str
    whole: bool = False

    @property
    def low(self) -> bool:
        """Whether it becomes 16-bit."""
        return not self.reason and self.slots.any

    @property
    def name(self) -> str:
        """Its name in reports."""
        return label(self.node)

    def keep(self, reason: str, *, whole: bool = False) -> None:
        """Let it stay float32, for the first reason given."""
        self.reason = self.reason or reason
        self.whole = self.whole or whole


@dataclass(frozen=True)
class Stored:
    """A constant in 16 bits: the tensor, its bytes and the largest change of a value."""

    tensor: TensorProto
    bytes: int
    error: float


@dataclass
class Anatomy:
    """All nodes of a model, what they read and make, and its float32 constants."""

    model: Graph
    half: Half
    graphs: list[Graph]
    items: list[Item]
    readers: dict[Value, list[Item]] = field(default_factory=dict)
    makers: dict[Value, Item] = field(default_factory=dict)
    owners: dict[int, Item] = field(default_factory=dict)  # of bodies, by number of the body
    members: dict[int, list[Item]] = field(default_factory=dict)  # the nodes of each graph
    _places: dict[int, int] = field(default_factory=dict)
    halves: dict[Value, Stored] = field(default_factory=dict)  # constants converted so far
    _losses: dict[tuple[Value, Role], str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Graph, half: Half) -> Anatomy:
        """Take a model apart; its types must be inferred."""
        graphs = list(model.walk())
        place = {id(graph): number for number, graph in enumerate(graphs)}
        found = cls(model, half, graphs, [], _places=place)
        for number, graph in enumerate(graphs):
            for node in graph.nodes:
                if node.op_type == "Constant":
                    continue
                slots, reason = node_slots(graph, node, half)
                inner = tuple(place[id(body)] for bodies in graph.bodies(node).values() for body in bodies)
                item = Item(len(found.items), number, node, slots, inner, reason)
                found.items.append(item)
                found.members.setdefault(number, []).append(item)
                found.owners.update(dict.fromkeys(inner, item))
                for name in filter(None, node.output):
                    found.makers[number, name] = item
                for name in dict.fromkeys(filter(None, node.input)):
                    found.readers.setdefault(found.value(number, name), []).append(item)
        return found

    def value(self, place: int, name: str) -> Value:
        """Return the value that a name stands for in a graph."""
        graph = self.graphs[place]
        if graph.defines(name):
            return place, name
        scope = graph.scope_of(name)
        return (place if scope is None else self._places[id(scope)]), name

    def is_float(self, value: Value) -> bool:
        """Whether a value is a float32 tensor."""
        return self.graphs[value[0]].dtype_of(value[1]) == TensorProto.FLOAT

    def is_constant(self, value: Value) -> bool:
        """Whether a value is a constant whose data can be replaced."""
        return self.graphs[value[0]].is_constant(value[1])

    def inputs(self, item: Item) -> Iterator[tuple[Value, bool | None]]:
        """Yield the float32 values a node reads, and whether it wants them in 16 bits."""
        for name, wanted in zip(item.node.input, item.slots.inputs, strict=True):
            if name:
                value = self.value(item.place, name)
                if self.is_float(value):
                    yield value, wanted

    def outputs(self, item: Item) -> Iterator[tuple[Value, bool]]:
        """Yield the float32 values a node makes, and whether they become 16-bit with it."""
        for name, becomes in zip(item.node.output, item.slots.outputs, strict=True):
            if name and self.is_float((item.place, name)):
                yield (item.place, name), becomes

    def floats(self, item: Item) -> Iterator[Value]:
        """Yield the float32 values a node reads and makes that are not constants."""
        for value, _ in (*self.inputs(item), *self.outputs(item)):
            if not self.is_constant(value):
                yield value

    def loss(self, value: Value, role: Role = "bias") -> str:
        """Return why a constant should not be stored in 16 bits, "" when it can be."""
        key = value, role
        if key not in self._losses:
            array = self.graphs[value[0]].constant(value[1])
            self._losses[key] = "" if array is None else loss(array, self.half, role)
        return self._losses[key]

    def stored(self, value: Value) -> Stored:
        """Return a constant in 16 bits; the same tensor for every copy of the model."""
        if value not in self.halves:
            graph = self.graphs[value[0]]
            array = graph.constant(value[1])
            assert array is not None
            rounded = to_half(array, self.half)
            error = 0.0
            with np.errstate(invalid="ignore"):  # infinities stay what they are
                for one, two in zip(blocks(array), blocks(rounded), strict=True):
                    gap = np.abs(two.astype(np.float32) - one)
                    error = max(error, float(gap.max(initial=0.0, where=np.isfinite(one))))
            self.halves[value] = Stored(from_array("", rounded, graph.store), rounded.nbytes, error)
        return self.halves[value]

    def size(self, value: Value) -> int:
        """Return the stored bytes of a constant."""
        known = self.graphs[value[0]].constant_type(value[1])
        return 0 if known is None else known[2]

    def within(self, item: Item) -> Iterator[Item]:
        """Yield the nodes in the bodies of a node."""
        for place in item.bodies:
            for inner in self.members.get(place, ()):
                yield inner
                yield from self.within(inner)
