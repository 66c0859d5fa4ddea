"""Writing the conversion: which values carry 16 bits, the Casts between them, and the constants."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxslim_lab.base import Change
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.precision.half import to_half
from onnxslim_lab.precision.model import Anatomy, Item, Value

LONGEST = 60  # letters of a name that a new one keeps
STORE_ABOVE = 512  # bytes; a smaller constant of a float32 node is not worth the Cast it needs

Inputs = Literal["keep", "convert"]
FLOAT = TensorProto.FLOAT


@dataclass(frozen=True)
class Plan:
    """What to write: numbers of nodes in an Anatomy.

    Attributes:
        low: The nodes that become 16-bit.
        whole: Nodes whose weights stay float32 too.
        io: Whether inputs and outputs of the model keep float32.
    """

    low: frozenset[int]
    whole: frozenset[int]
    io: Inputs = "keep"


def plan_of(
    anatomy: Anatomy, *, io: Inputs = "keep", kept: Collection[int] = (), whole: Collection[int] = ()
) -> Plan:
    """Return the plan that the reasons in an anatomy make.

    Args:
        anatomy: The model.
        io: Whether inputs and outputs keep float32.
        kept: More nodes to keep.
        whole: Nodes whose weights stay float32 too.
    """
    low = frozenset(item.number for item in anatomy.items if item.low and item.number not in kept)
    return Plan(low, frozenset({item.number for item in anatomy.items if item.whole} | set(whole)), io)


@dataclass
class _Use:
    """Who reads a float32 constant."""

    wants: list[tuple[int, NodeProto, int]] = field(default_factory=list)  # 16-bit: graph, node, input
    keeps: list[tuple[int, NodeProto, int]] = field(default_factory=list)  # float32
    whole: bool = False


def write(model: Graph, anatomy: Anatomy, plan: Plan) -> list[Change]:
    """Convert a model, which is the one taken apart or a copy of it; return a change for every weight.

    Args:
        model: The main graph.
        anatomy: Its nodes; numbers in the plan refer to it.
        plan: What to convert.
    """
    return _Writer(model, anatomy, plan).run()


class _Writer:
    def __init__(self, model: Graph, anatomy: Anatomy, plan: Plan) -> None:
        self.graphs = list(model.walk())
        self.anatomy, self.plan = anatomy, plan
        self.half = anatomy.half
        self.nodes = [node for graph in self.graphs for node in graph.nodes if not is_op(node, "Constant")]
        self.stored: set[Value] = set()  # values that carry 16 bits
        self.casts: dict[tuple[int, Value, int], str] = {}
        self.uses: dict[Value, _Use] = {}
        self.renamed: dict[Value, str] = {}  # outputs, to the value that their Cast reads
        self.changes: list[Change] = []

    def run(self) -> list[Change]:
        for item in self.anatomy.items:
            if item.number in self.plan.low:
                made = zip(item.node.output, item.slots.outputs, strict=True)
                self.stored.update((item.place, name) for name, becomes in made if name and becomes)
        if self.plan.io == "convert":
            self._convert_inputs()
        for place, name in self.stored:
            self.graphs[place].declare(name, self.half.data_type)
        for place in range(len(self.graphs)):
            self._outputs(place)
        for item, node in zip(self.anatomy.items, self.nodes, strict=True):
            self._inputs(item, node)
        for value, use in self.uses.items():
            self._constant(value, use)
        for item, node in zip(self.anatomy.items, self.nodes, strict=True):
            if item.number in self.plan.low:
                self._attributes(item, node)
            if is_op(node, "Cast"):
                self._bypass(item, node)
        return self.changes

    def _value(self, place: int, name: str) -> Value:
        place, name = self.anatomy.value(place, name)
        return place, self.renamed.get((place, name), name)

    def _convert_inputs(self) -> None:
        graph = self.graphs[0]
        for name in graph.input_types():
            if self.anatomy.is_float((0, name)) and name not in graph.initializers:
                self.stored.add((0, name))

    def _wanted(self, place: int) -> list[bool]:
        """Return for each output of a graph whether it is to be 16-bit."""
        graph = self.graphs[place]
        owner = self.anatomy.owners.get(place)
        if owner is not None:
            low = owner.number in self.plan.low
            flags = owner.slots.outputs if low and owner.node.op_type == "If" else ()
            return [*flags, *[False] * (len(graph.outputs) - len(flags))]
        convert = self.plan.io == "convert" and not graph.is_function
        return [
            convert and self.anatomy.is_float((place, name)) and name not in graph.initializers
            for name in graph.outputs
        ]

    def _outputs(self, place: int) -> None:
        graph = self.graphs[place]
        names = self.anatomy.graphs[place].outputs  # as they were before any was renamed
        for index, (name, wanted) in enumerate(zip(names, self._wanted(place), strict=True)):
            value = self.anatomy.value(place, name)
            value = value[0], self.renamed.get(value, name)
            if wanted:
                graph.declare(name, self.half.data_type)
            if (value in self.stored) == wanted or (name, wanted) in self._settled(place):
                continue
            target = self.half.data_type if wanted else FLOAT
            producer = graph.producer(name)
            if producer is None:
                if graph.parent is not None:
                    graph.set_output(index, self._cast(place, value, target))
                continue
            inner = graph.fresh_name(f"{name}_{self.half.name if not wanted else 'float'}")
            graph.set_outputs(producer, [inner if one == name else one for one in producer.output])
            graph.replace_uses(name, inner)
            graph.emit("Cast", [inner], [name], name=f"{name}_cast", to=target)
            graph.declare(name, target)
            self.renamed[place, name] = inner
            if not wanted:
                self.stored.discard((place, name))
                self.stored.add((place, inner))
            self.casts[place, (place, inner), target] = name

    def _settled(self, place: int) -> set[tuple[str, bool]]:
        """Return the outputs that have their Cast already: an output can be listed twice."""
        return {
            (name, target != FLOAT)
            for (graph, _, target), name in self.casts.items()
            if graph == place and self.graphs[place].is_output(name)
        }

    def _inputs(self, item: Item, node: NodeProto) -> None:
        low = item.number in self.plan.low
        for index, (name, wants) in enumerate(zip(item.node.input, item.slots.inputs, strict=True)):
            if not name:
                continue
            origin = self.anatomy.value(item.place, name)
            value = self._value(item.place, name)
            wanted = low and wants is True
            free = wants is None
            if not self.anatomy.is_float(origin):
                continue
            if self._replaceable(origin):
                use = self.uses.setdefault(origin, _Use())
                rounds = is_op(node, "Cast") and attribute(node, "to") == self.half.data_type
                (use.wants if wanted or rounds else use.keeps).append((item.place, node, index))
                use.whole = use.whole or (not wanted and item.number in self.plan.whole)
            elif not free and (value in self.stored) != wanted:
                target = self.half.data_type if wanted else FLOAT
                self.graphs[item.place].set_input(node, index, self._cast(item.place, value, target))

    def _replaceable(self, value: Value) -> bool:
        """Whether a value is a constant that is no output."""
        graph = self.graphs[value[0]]
        return graph.is_constant(value[1]) and not graph.is_output(value[1])

    def _cast(self, place: int, value: Value, target: int) -> str:
        """Return the value in another type: one Cast in each graph that needs it."""
        key = place, value, target
        if key not in self.casts:
            graph = self.graphs[place]
            suffix = "float" if target == FLOAT else self.half.name
            name = graph.fresh_name(f"{value[1][:LONGEST]}_{suffix}")
            graph.emit("Cast", [value[1]], [name], name=f"{name}_cast", to=target)
            self.casts[key] = name
        return self.casts[key]

    def _constant(self, value: Value, use: _Use) -> None:
        place, name = value
        graph, half = self.graphs[place], self.half
        large = self.anatomy.size(value) >= STORE_ABOVE and not use.whole
        stores = large and bool(use.wants or use.keeps) and not self.anatomy.loss(value, "factor")
        if stores or (use.wants and not use.keeps):
            self._store(value)
            for where, node, index in use.keeps:
                self.graphs[where].set_input(node, index, self._cast(where, value, FLOAT))
        elif use.wants and self.anatomy.size(value) < STORE_ABOVE:
            copy = graph.fresh_name(f"{name}_{half.name}")
            graph.emit("Constant", [], [copy], value=self.anatomy.stored(value).tensor)
            for where, node, index in use.wants:
                self.graphs[where].set_input(node, index, copy)
        else:
            for where, node, index in use.wants:
                self.graphs[where].set_input(node, index, self._cast(where, value, half.data_type))

    def _store(self, value: Value) -> None:
        """Replace a constant by the same values in 16 bits, where and as it stands."""
        place, name = value
        graph = self.graphs[place]
        before, stored = self.anatomy.size(value), self.anatomy.stored(value)
        node = graph.producer(name)
        if node is None:
            graph.set_constant(name, stored.tensor)
        else:
            for item in list(node.attribute):
                graph.remove_attribute(node, item.name)
            graph.set_attribute(node, "value", stored.tensor)
        graph.declare(name, self.half.data_type)
        self.changes.append(
            Change(
                *(name, f"stored as {self.half.name}", (name,), before, stored.bytes),
                detail={"largest error": stored.error},
            )
        )

    def _attributes(self, item: Item, node: NodeProto) -> None:
        """Let a node say that it makes 16-bit values where an attribute says what it makes."""
        graph = self.graphs[item.place]
        if node.op_type == "Cast":
            graph.set_attribute(node, "to", self.half.data_type)
        elif node.op_type == "ConstantOfShape":
            filled = next((one.t for one in node.attribute if one.name == "value"), None)
            value = np.zeros(1, np.float32) if filled is None else numpy_helper.to_array(filled)
            tensor = helper.make_tensor(
                "", self.half.data_type, value.shape, to_half(value, self.half).tobytes(), raw=True
            )
            graph.set_attribute(node, "value", tensor)

    def _bypass(self, item: Item, node: NodeProto) -> None:
        """Remove a Cast whose input has come to be what it makes."""
        graph, read, half = self.graphs[item.place], node.input[0], self.half.data_type
        if attribute(node, "to") != half:
            return
        source = self.anatomy.value(item.place, item.node.input[0])
        known = self.anatomy.graphs[source[0]].dtype_of(source[1])
        made = {
            name for (place, _, target), name in self.casts.items() if place == item.place and target == half
        }
        constant = graph.constant_type(read)
        if constant is not None:
            carries = constant[0] == half
        else:
            carries = (source[0], read) in self.stored or read in made or known == half
        changed = known != half or item.number in self.plan.low
        if carries and changed and graph.replace_value(node.output[0], read):
            graph.remove(node)
