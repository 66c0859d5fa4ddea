"""GraphIndex: a graph's nodes and values, and who makes and reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Self, cast

import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
)

from onnxslim_lab import ordering
from onnxslim_lab.errors import InternalError, ModelError, quote
from onnxslim_lab.modelfile import Source
from onnxslim_lab.nodes import domain_of
from onnxslim_lab.weights import WeightStore

if TYPE_CHECKING:
    from onnxslim_lab.graph import Graph

FunctionKey = tuple[str, str, str]  # domain, name, overload


class ModelState:
    """What all graphs of a model share."""

    def __init__(self, proto: ModelProto, store: WeightStore, source: Source) -> None:
        self.proto = proto  # everything but graph and functions
        self.store = store
        self.source = source
        self.functions: dict[FunctionKey, Graph] = {}
        self.names: set[str] | None = None
        self.counters: dict[str, int] = {}
        self.version = 0  # counts edits
        self.inferred_at: int | None = None
        self.main: Graph | None = None  # set once the main graph is made


class GraphIndex:
    """The nodes, tensors and signature of one graph, with an index of its values.

    Consumers include the nodes whose bodies capture a value; that part of the index is brought up to
    date when it is asked for, since an edit deep in a body can change it.
    """

    def __init__(
        self,
        model: ModelState,
        proto: GraphProto | FunctionProto,
        parent: Self | None = None,
        owner: NodeProto | None = None,
    ) -> None:
        """Take the nodes and tensors out of `proto`, which becomes this graph's own skeleton."""
        self._model = model
        self._proto = proto
        self.parent = parent
        self.owner = owner
        self.is_function = isinstance(proto, FunctionProto)
        self._nodes: dict[int, NodeProto] = {}
        self._bodies: dict[int, dict[str, tuple[Self, ...]]] = {}
        self._producer: dict[str, NodeProto] = {}
        self._uses: dict[str, dict[int, NodeProto]] = {}
        self._slots: dict[tuple[str, int], int] = {}  # how often a node reads a value
        self._totals: dict[str, int] = {}  # the sum of these over the nodes
        self._captures: dict[int, set[str]] = {}
        self._stale: dict[int, NodeProto] = {}  # owners whose captures must be looked at again
        self._types: dict[str, TypeProto] = {}
        self._sorted = True
        self._initializers: dict[str, TensorProto] = {}
        self._sparse: dict[str, onnx.SparseTensorProto] = {}
        self._value_info: dict[str, ValueInfoProto] = {}
        if isinstance(proto, FunctionProto):
            self._inputs, self._outputs = dict.fromkeys(proto.input), list(proto.output)
        else:
            self._inputs = dict.fromkeys(value.name for value in proto.input)
            self._outputs = [value.name for value in proto.output]
            self._take_tensors(proto)
        for original in proto.node:
            node = NodeProto()
            node.CopyFrom(original)
            self._register(node)
        proto.ClearField("node")
        self._sorted = False

    def _take_tensors(self, proto: GraphProto) -> None:
        for tensor in proto.initializer:
            if tensor.name in self._initializers:
                raise ModelError(f"initializer {quote(tensor.name)} is defined twice")
            own = TensorProto()
            own.CopyFrom(tensor)
            self._initializers[tensor.name] = own
        for sparse in proto.sparse_initializer:
            kept = onnx.SparseTensorProto()
            kept.CopyFrom(sparse)
            self._sparse[sparse.values.name] = kept
        for value in proto.value_info:
            info = ValueInfoProto()
            info.CopyFrom(value)
            self._value_info[value.name] = info
        for name in ("initializer", "sparse_initializer", "value_info"):
            proto.ClearField(name)

    @property
    def root(self) -> Self:
        """The main graph of the model (a function's root is the function itself)."""
        graph = self
        while graph.parent is not None:
            graph = graph.parent
        return graph

    @property
    def functions(self) -> dict[FunctionKey, Graph]:
        """The model's local functions by (domain, name, overload)."""
        return self._model.functions

    @property
    def store(self) -> WeightStore:
        """The store of the model's large tensors."""
        return self._model.store

    @property
    def source(self) -> Source:
        """Where the model came from and what it weighed."""
        return self._model.source

    @property
    def name(self) -> str:
        """The graph's name."""
        return self._proto.name

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata_props, as a copy."""
        return {entry.key: entry.value for entry in self._model.proto.metadata_props}

    @property
    def opsets(self) -> dict[str, int]:
        """The model's operator sets: version by domain ("" is ai.onnx)."""
        return {domain_of(entry.domain): entry.version for entry in self._model.proto.opset_import}

    @property
    def producer_name(self) -> tuple[str, str]:
        """Name and version of the tool that exported the model."""
        return self._model.proto.producer_name, self._model.proto.producer_version

    @property
    def ir_version(self) -> int:
        """The model's IR version."""
        return self._model.proto.ir_version

    @property
    def version(self) -> int:
        """A counter of edits to the whole model: equal numbers mean nothing was changed."""
        return self._model.version

    @property
    def nodes(self) -> list[NodeProto]:
        """The nodes in topological order; a snapshot, safe to edit while iterating."""
        if not self._sorted:
            self._sort()
        return list(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: NodeProto) -> bool:
        return id(node) in self._nodes

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return list(self._inputs)

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return list(self._outputs)

    @property
    def initializers(self) -> list[str]:
        """Names of the dense initializers of this graph."""
        return list(self._initializers)

    @property
    def sparse_initializers(self) -> list[str]:
        """Names of the sparse initializers of this graph."""
        return list(self._sparse)

    def input_types(self) -> dict[str, TypeProto]:
        """Return the declared types of the inputs a caller may feed (functions: none)."""
        if isinstance(self._proto, FunctionProto):
            return {}
        fixed = self._initializers if self.ir_version < 4 else {}
        return {value.name: value.type for value in self._proto.input if value.name not in fixed}

    def output_types(self) -> dict[str, TypeProto]:
        """Return the declared types of the outputs (functions: none)."""
        if isinstance(self._proto, FunctionProto):
            return {}
        return {value.name: value.type for value in self._proto.output}

    def attribute_defaults(self) -> dict[str, AttributeProto]:
        """Return the attributes a function declares with a default value."""
        declared = self._proto.attribute_proto if isinstance(self._proto, FunctionProto) else ()
        return {item.name: item for item in declared}

    def referenced(self) -> set[str]:
        """Return names that quantization annotations and training information of the model refer to."""
        if isinstance(self._proto, FunctionProto):
            return set()
        names: set[str] = set()
        for entry in self._proto.quantization_annotation:
            names.update((entry.tensor_name, *(pair.value for pair in entry.quant_parameter_tensor_names)))
        for training in self._model.proto.training_info:
            for pair in (*training.initialization_binding, *training.update_binding):
                names.update((pair.key, pair.value))
            for node in (*training.initialization.node, *training.algorithm.node):
                names.update(node.input)
        return names

    def bodies(self, node: NodeProto) -> dict[str, tuple[Self, ...]]:
        """Return a control-flow node's bodies by attribute name."""
        return dict(self._bodies.get(id(node), {}))

    def walk(self) -> Iterator[Self]:
        """Yield this graph, the bodies below it, and for the main graph every function with its bodies."""
        yield self
        for node in list(self._nodes.values()):
            for bodies in self._bodies.get(id(node), {}).values():
                for body in bodies:
                    yield from body.walk()
        if self.parent is None and not self.is_function:
            for function in list(self._model.functions.values()):
                yield from cast("Self", function).walk()

    def opset(self, domain: str = "") -> int:
        """Return the imported version of an operator domain, 0 when it is not imported."""
        top = self.root
        proto = top._proto if top.is_function else self._model.proto  # noqa: SLF001
        for entry in proto.opset_import:  # type: ignore[union-attr]
            if domain_of(entry.domain) == domain_of(domain):
                return int(entry.version)
        return 0

    def producer(self, value: str) -> NodeProto | None:
        """Return the node of this graph that produces a value."""
        return self._producer.get(value)

    def consumers(self, value: str) -> list[NodeProto]:
        """Return the nodes of this graph that read a value, themselves or in a body of theirs."""
        self._refresh()
        return list(self._uses.get(value, {}).values())

    def use_count(self, value: str) -> int:
        """Count input slots, one for each node whose bodies capture the value, and graph outputs."""
        self._refresh()
        return self._totals.get(value, 0) + self._outputs.count(value)

    def is_output(self, value: str) -> bool:
        """Whether the value is an output of this graph."""
        return value in self._outputs

    def is_input(self, value: str) -> bool:
        """Whether the value is an input of this graph."""
        return value in self._inputs

    def defines(self, value: str) -> bool:
        """Whether this graph defines the value: a node output, an initializer or an input."""
        return (
            value in self._producer
            or value in self._initializers
            or value in self._sparse
            or value in self._inputs
        )

    def scope_of(self, value: str) -> Self | None:
        """Return the graph, this one or one around it, that defines the value."""
        graph: Self | None = self
        while graph is not None and not graph.defines(value):
            graph = graph.parent
        return graph

    def captured_by(self, node: NodeProto) -> set[str]:
        """Return the values that a node's bodies read from this graph and those around it."""
        bodies = self._bodies.get(id(node), {}).values()
        return {name for group in bodies for body in group for name in body.captured()}

    def read_by(self, node: NodeProto) -> set[str]:
        """Return the values that a node and its bodies read, "" where an optional input is not given."""
        return self.captured_by(node).union(node.input)

    def captured(self) -> set[str]:
        """Return the values this graph reads from the graphs around it."""
        self._refresh()
        return {name for name in (*self._uses, *self._outputs) if not self.defines(name)}

    def _main(self) -> Self:
        assert self._model.main is not None
        return cast("Self", self._model.main)

    def _need_root(self, what: str) -> None:
        if self.parent is not None or self.is_function:
            raise InternalError(f"{what} needs the main graph")

    def _changed(self) -> None:
        self._model.version += 1

    def _touch(self) -> None:
        """Note an edit, and that the captures of this graph may have changed for those around it."""
        self._model.version += 1
        graph = self
        while graph.parent is not None and graph.owner is not None:
            graph.parent._stale[id(graph.owner)] = graph.owner  # noqa: SLF001
            graph = graph.parent

    def _refresh(self) -> None:
        while self._stale:
            key, owner = self._stale.popitem()
            if key not in self._nodes:
                continue
            now = self.captured_by(owner)
            before = self._captures.get(key, set())
            for name in before - now:
                self._drop_use(name, key, slots=1)
            for name in now - before:
                self._add_use(name, owner)
            self._captures[key] = now

    def _register(self, node: NodeProto) -> None:
        key = id(node)
        self._nodes[key] = node
        for name in node.input:
            self._add_use(name, node)
        for name in filter(None, node.output):
            self._define(name, node)
        for item in node.attribute:
            if item.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                inner = [item.g] if item.type == AttributeProto.GRAPH else list(item.graphs)
                bodies: list[Self] = []
                for proto in inner:
                    own = GraphProto()
                    own.CopyFrom(proto)
                    bodies.append(cast("Self", type(self)(self._model, own, self, node)))
                self._bodies.setdefault(key, {})[item.name] = tuple(bodies)
                item.g.Clear() if item.type == AttributeProto.GRAPH else item.ClearField("graphs")
                self._stale[key] = node
        if self._model.names is not None:
            self._model.names.update(node.output, (node.name,))

    def _define(self, name: str, node: NodeProto) -> None:
        if name in self._producer or name in self._initializers or name in self._inputs:
            raise ModelError(
                f"value {quote(name)} is defined twice; node {quote(node.name)} defines it again"
            )
        self._producer[name] = node
        self._remember(name)

    def _add_use(self, name: str, node: NodeProto) -> None:
        if name:
            key = id(node)
            self._uses.setdefault(name, {})[key] = node
            self._slots[name, key] = self._slots.get((name, key), 0) + 1
            self._totals[name] = self._totals.get(name, 0) + 1

    def _drop_use(self, name: str, key: int, slots: int | None = None) -> None:
        """Forget that a node reads a value in so many places; None: in all of them."""
        held = self._slots.pop((name, key), 0)
        if not held:
            return
        dropped = held if slots is None else slots
        self._totals[name] -= dropped
        if held > dropped:
            self._slots[name, key] = held - dropped
            return
        readers = self._uses[name]
        del readers[key]
        if not readers:
            del self._uses[name]
            del self._totals[name]

    def _rename_outputs(self, old: str, new: str) -> None:
        if old in self._outputs and isinstance(self._proto, GraphProto):
            self._outputs = [new if name == old else name for name in self._outputs]
            for value in self._proto.output:
                if value.name == old:
                    value.name = new
            self._touch()

    def _remember(self, name: str) -> None:
        if self._model.names is not None:
            self._model.names.add(name)
        self._changed()

    def _names(self) -> set[str]:
        if self._model.names is None:
            names: set[str] = set()
            tops: list[GraphIndex] = [self._main(), *self._model.functions.values()]
            for top in tops:
                for graph in top.walk():
                    names.update(graph._inputs, graph._outputs, graph._initializers, graph._sparse)  # noqa: SLF001
                    names.update(graph._producer, graph._uses)  # noqa: SLF001
                    names.update(node.name for node in graph._nodes.values())  # noqa: SLF001
            self._model.names = names
        return self._model.names

    def _sort(self) -> None:
        self._refresh()
        self._nodes = ordering.topological(self._nodes, self._producer, self._captures)
        self._sorted = True
