"""Compute what does not depend on the model's inputs, where that does not make the file larger."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from onnx import NodeProto, SparseTensorProto, TensorProto
from pydantic import Field

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.errors import quote
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.kernels import sizes
from onnxslim_lab.rewriting.constant_steps import WRONG, ConstantSteps, Step, label
from onnxslim_lab.weights import Array, from_array, stub_location, to_array

GROWTH_FACTOR = 4  # with allow_growth, results may be this many times the working memory
FEW_BYTES = 64  # that a single fold may add where others have freed as many
NODE_FRAME = 4  # bytes around a node in its graph
CONSTANT_FRAME = 44  # bytes of a Constant node around its tensor
TENSOR_FRAME = 14  # bytes around an initializer's name, dimensions and data


class FoldConstants(Pass):
    """Replace nodes whose inputs are all constants by their results, and Shape of a static shape likewise.

    Constant nodes become initializers. A fold is done only where the file does not grow: the results that
    others still need take no more bytes than the nodes and constants that go. So weights made by
    ConstantOfShape, stored as float16 or int8 and cast, or shared through a Transpose stay as they are.

    before: shape = Concat(Gather(Shape(x), 0), [768])      after: shape = [1, 768]
    refuses: results larger than what goes (unless `allow_growth`) or than the memory allowed; random
        numbers; DequantizeLinear, whose folding would undo the quantization; operators without a kernel

    >>> from onnxslim_lab.graph import Graph
    >>> model = Graph.parse('''<ir_version: 8, opset_import: ["": 17]>
    ... g (float[2, 3] x) => (float[3, 2] y) {
    ...     s = Shape (x)   i = Constant <value_ints = [1, 0]> ()   t = Gather (s, i)   y = Reshape (x, t) }''')
    >>> _ = FoldConstants().run(model)
    >>> [node.op_type for node in model.nodes], model.constant("t").tolist()
    (['Reshape'], [3, 2])
    """

    exact: ClassVar[bool] = True

    allow_growth: bool = Field(
        False, description="also fold where the result is larger than what it replaces"
    )

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Fold what can be folded in one graph; see the class."""
        limit = context.memory * (GROWTH_FACTOR if self.allow_growth else 1)
        outcome = Outcome()
        _move_constants(graph, limit, outcome, allow_growth=self.allow_growth)
        folding = _Folding(graph, ConstantSteps(graph, limit), outcome)
        folding.choose(allow_growth=self.allow_growth)
        folding.commit()
        return outcome


def _move_constants(graph: Graph, limit: int, outcome: Outcome, *, allow_growth: bool) -> None:
    """Turn Constant nodes into initializers where the graph may have more of them."""
    if graph.is_function or _lists_inputs(graph):
        return
    for node in graph.nodes:
        if not is_op(node, "Constant") or not node.output or graph.is_output(node.output[0]):
            continue
        try:
            sparse = attribute(node, "sparse_value")
            if isinstance(sparse, SparseTensorProto):
                most = limit if allow_growth else node.ByteSize() + NODE_FRAME
                _move_sparse(graph, node, sparse, most, outcome)
            else:
                _move_dense(graph, node, outcome)
        except WRONG as error:
            outcome.refuse(label(node), f"its value cannot be read: {error}")


def _move_dense(graph: Graph, node: NodeProto, outcome: Outcome) -> None:
    """Turn a Constant node into an initializer unless that takes more bytes."""
    name = node.output[0]
    known, array = graph.constant_type(name), graph.constant(name)
    if known is None or array is None:  # its value is an attribute of a call
        return
    if not _is_stub(node) and known[2] + _frame(name, len(known[1])) > _node_bytes(node):
        outcome.refuse(label(node), "the Constant node takes fewer bytes than an initializer")
        return
    graph.set_constant(name, array, known[0])
    outcome.change(label(node), "Constant node became an initializer")


def _is_stub(node: NodeProto) -> bool:
    """Whether a Constant node's data is in the store and not in the node."""
    value = attribute(node, "value")
    return isinstance(value, TensorProto) and stub_location(value) != ""


def _move_sparse(
    graph: Graph, node: NodeProto, sparse: SparseTensorProto, most: int, outcome: Outcome
) -> None:
    """Turn a sparse Constant node into a dense initializer of at most so many bytes."""
    values = to_array(sparse.values, graph.store)
    size = math.prod(sparse.dims) * values.itemsize
    if size > most:
        outcome.refuse(label(node), f"the sparse constant would take {size} bytes as a dense one")
        return
    dense = np.zeros(math.prod(sparse.dims), values.dtype)
    places = to_array(sparse.indices, graph.store)
    if places.ndim == 2:
        places = np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))
    dense[places] = values
    graph.set_constant(node.output[0], dense.reshape(tuple(sparse.dims)))
    outcome.change(label(node), "sparse Constant node became a dense initializer")


class _Folding:
    """One application to one graph: choose among the steps, then commit the choice."""

    def __init__(self, graph: Graph, found: ConstantSteps, outcome: Outcome) -> None:
        self.graph = graph
        self.found = found
        self.maker = found.maker
        self.steps = found.steps
        self.outcome = outcome
        self.balance = 0  # bytes that what is marked so far frees
        outcome.refusals += found.refusals

    def components(self) -> list[list[Step]]:
        """Return the steps by connection, through values and through constants that may go with them."""
        parent = list(range(len(self.steps)))

        def find(place: int) -> int:
            while parent[place] != place:
                parent[place] = parent[parent[place]]
                place = parent[place]
            return place

        first: dict[str, int] = {}
        for place, step in enumerate(self.steps):
            for name in (*step.outputs, *step.inputs):
                if name in self.maker or self._dying(name):
                    parent[find(place)] = find(first.setdefault(name, place))
        groups: dict[int, list[Step]] = {}
        for place, step in enumerate(self.steps):
            groups.setdefault(find(place), []).append(step)
        return list(groups.values())

    def choose(self, *, allow_growth: bool) -> None:
        """Mark what to fold: whole components where that frees bytes, of others what does not grow."""
        growing = []
        for steps in self.components():
            gain = self._gain(steps)
            if gain < 0 and not allow_growth:
                growing.append(steps)
                continue
            self.balance += gain
            for step in steps:
                step.folded = True
        left = [step for steps in growing for step in steps]
        while left:
            refused = self._choose_steps(left)
            if len(refused) == len(left):
                break
            left = [step for step in refused if not step.absorbed]
        for step in left:
            if any(map(self._outside, step.outputs)):
                reason = (
                    f"its result would make the file {step.excess} bytes larger (allow_growth=true folds it)"
                )
                self.outcome.refuse(label(step.node), reason)

    def _gain(self, steps: list[Step]) -> int:
        """Return the bytes by which the file shrinks when a whole component is folded."""
        constants = {name for step in steps for name in step.inputs if self._dying(name)}
        freed = sum(map(self._constant_bytes, constants)) + sum(_node_bytes(step.node) for step in steps)
        needed = [name for step in steps for name in step.outputs if self._outside(name)]
        return freed - sum(map(self._result_bytes, needed))

    def _choose_steps(self, steps: list[Step]) -> list[Step]:
        """Fold those steps of growing components that do not make the file grow; return the others.

        A step that is only a few bytes over is folded too while earlier folds have freed as many.
        """
        refused = []
        for step in steps:
            step.freed = _node_bytes(step.node) + sum(map(self._freed_with, step.inputs))
            used = [name for name in step.outputs if self.graph.use_count(name)]
            step.excess = sum(map(self._result_bytes, used)) - step.freed
            if step.excess <= min(max(self.balance, 0), FEW_BYTES):
                self.balance -= step.excess
                step.folded = True
                self._absorb(step)
            else:
                refused.append(step)
        return refused

    def _absorb(self, folded: Step) -> None:
        """Mark the steps that only the folded one needs."""
        stack = list(folded.inputs)
        while stack:
            step = self.maker.get(stack.pop())
            if step is not None and not step.folded and not step.absorbed and self._only_reader(step):
                step.absorbed = True
                stack += step.inputs

    def _only_reader(self, step: Step) -> bool:
        """Whether everything that reads the step's results is folded or absorbed."""
        for name in step.outputs:
            if self._outside(name):
                return False
            readers = (self.found.step_of[id(node)] for node in self.graph.consumers(name))
            if not all(reader.folded or reader.absorbed for reader in readers):
                return False
        return True

    def _freed_with(self, name: str) -> int:
        """Return the bytes that go with the last reader of a value."""
        if self._outside(name):
            return 0
        readers = (self.found.step_of[id(node)] for node in self.graph.consumers(name))
        if sum(not (reader.folded or reader.absorbed) for reader in readers) != 1:
            return 0
        step = self.maker.get(name)
        if step is None:
            return self._constant_bytes(name) if self._dying(name) else 0
        if step.folded:
            return self._result_bytes(name)
        return step.freed if len(step.outputs) == 1 else 0

    def _outside(self, name: str) -> bool:
        """Whether something that is no step needs the value."""
        if self.graph.is_output(name):
            return True
        return any(id(node) not in self.found.step_of for node in self.graph.consumers(name))

    def _dying(self, name: str) -> bool:
        """Whether a constant is of this graph and read by steps only."""
        graph = self.graph
        return name not in self.maker and graph.defines(name) and not self._outside(name)

    def _constant_bytes(self, name: str) -> int:
        known = self.graph.constant_type(name)
        assert known is not None
        node = self.graph.producer(name)
        if node is None:
            return known[2] + len(name.encode())
        return _node_bytes(node) + (known[2] if _is_stub(node) else 0)

    def _result_bytes(self, name: str) -> int:
        size = sizes.stored_bytes(self.found.types[name]) + _frame(name, self.found.types[name].ndim)
        return size + (CONSTANT_FRAME if self._as_node(name) else 0)

    def _as_node(self, name: str) -> bool:
        """Whether a result becomes a Constant node: as an output, in functions and where old IR lists inputs."""
        graph = self.graph
        return graph.is_output(name) or graph.is_function or _lists_inputs(graph)

    def commit(self) -> None:
        """Put the results that are needed in the place of the steps; remove what nothing needs."""
        chosen = [step for step in self.steps if step.folded or step.absorbed]
        going = {id(step.node) for step in chosen}
        needed = {
            name
            for step in chosen
            if step.folded
            for name in step.outputs
            if self.graph.is_output(name) or any(id(node) not in going for node in self.graph.consumers(name))
        }
        unused = [name for step in chosen for name in step.inputs if name not in self.maker]
        for done in self.found.compute(sorted(needed)):
            if done.error is not None:
                self.outcome.refuse(label(done.step.node), f"cannot be computed: {done.error}")
            elif needed.intersection(done.results):
                self._replace(done.step, done.results)
                unused += done.results
        for step in reversed(chosen):
            if step.node in self.graph and not any(map(self.graph.use_count, step.outputs)):
                self.graph.remove(step.node)
        for name in dict.fromkeys(unused):
            if self.graph.defines(name) and not self.graph.use_count(name):
                self.graph.remove_constant(name)

    def _replace(self, step: Step, results: dict[str, Array]) -> None:
        """Put a node's results in its place, all that are read: a reader may fail to be computed later."""
        before = _node_bytes(step.node)
        used = [name for name in results if self.graph.use_count(name)]
        self.graph.remove(step.node)
        for name in used:
            self._put(name, results[name])
        what = f"{step.node.op_type} folded into {', '.join(map(quote, used))}"
        after = sum(map(self._result_bytes, used))
        self.outcome.changes.append(Change(label(step.node), what, bytes_before=before, bytes_after=after))

    def _put(self, name: str, value: Array) -> None:
        if self._as_node(name):
            self.graph.emit("Constant", [], [name], value=from_array("", value, self.graph.store))
        else:
            self.graph.set_constant(name, value)


def _lists_inputs(graph: Graph) -> bool:
    """Whether a new initializer would become a graph input, as IR versions below 4 demand."""
    return graph.parent is None and not graph.is_function and graph.ir_version < 4


def _node_bytes(node: NodeProto) -> int:
    return node.ByteSize() + NODE_FRAME


def _frame(name: str, rank: int) -> int:
    """Return an upper bound of the bytes an initializer takes besides its data."""
    return len(name.encode()) + TENSOR_FRAME + 3 * rank
