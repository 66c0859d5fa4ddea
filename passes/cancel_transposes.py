"""Run what lies between Transposes on the data before them, where fewer Transposes are left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from onnx import NodeProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.rewriting.node_pairs import cancelled
from onnxslim_lab.rewriting.removal import label, release, remove_unused
from onnxslim_lab.rewriting.transposable import Move, composed, inverse, move

MOST_LAYOUTS = 6  # different Transposes tried in one graph

Perm = tuple[int, ...]


class CancelTransposes(Pass):
    """Run the nodes between Transposes on the data before them, where that leaves fewer nodes.

    before: Conv -> Transpose -> Add(c) -> Relu -> Transpose back -> Conv
    after:  Conv -> Add(c turned) -> Relu -> Conv

    Taken along: elementwise operators with constants or values of the same layout, Concat, Split, Slice,
    Pad, Softmax, reductions and ArgMax, with their axes renamed. A group of connected nodes moves as a whole
    or not at all; Transposes are added where other values enter or leave it, and counted.

    refuses: groups that would not lose a node; values of unknown rank; constants over 4 kB that have other
    readers; models below opset 11.

    >>> CancelTransposes.pass_name()
    'cancel-transposes'
    """

    exact: ClassVar[bool] = True

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Move groups until none is worth it; every move lowers the number of nodes."""
        outcome = Outcome()
        if not any(_perm(node) for node in graph.nodes):
            return outcome
        graph.infer()
        while _improve(graph, outcome):
            graph.infer()
        return outcome


def _perm(node: NodeProto | None) -> Perm | None:
    """Return a Transpose's axes, None for other nodes and for axes not written down."""
    if node is None or not is_op(node, "Transpose") or any(item.ref_attr_name for item in node.attribute):
        return None
    axes = attribute(node, "perm")
    return None if axes is None else tuple(axes)


def _improve(graph: Graph, outcome: Outcome) -> bool:
    """Try the layouts that occur, commonest first; with all movable nodes, then those all of whose data is turned."""
    for node in graph.nodes:
        source = cancelled(graph, node) if is_op(node, "Transpose") else None
        if source is not None and graph.replace_value(node.output[0], source):
            remove_unused(graph, node)
            outcome.change(label(node), "removed a Transpose that undoes another")
    counts = Counter(perm for node in graph.nodes if (perm := _perm(node)) is not None)
    for perm, _ in counts.most_common(MOST_LAYOUTS):
        if perm == tuple(sorted(perm)):
            continue
        moves = {
            id(node): (node, found) for node in graph.nodes if (found := move(graph, node, perm)) is not None
        }
        moved: set[int] = set()
        for group in (*_groups(graph, moves), *_groups(graph, _turned_only(graph, moves, perm))):
            if moved.isdisjoint(group):
                region = Region(graph, perm, group)
                gain = region.gain()
                if gain > 0:
                    first = next(iter(group.values()))[0]
                    region.apply()
                    moved |= group.keys()
                    outcome.change(
                        label(first), f"moved {len(group)} nodes before Transposes, {gain} nodes fewer"
                    )
        if moved:
            return True
    return False


Moves = dict[int, tuple[NodeProto, Move]]


def _turned_only(graph: Graph, moves: Moves, perm: Perm) -> Moves:
    """Keep the nodes whose data comes from Transposes by `perm` and from such nodes only."""
    turned: Moves = {}
    for node in graph.nodes:
        if id(node) not in moves:
            continue
        makers = [graph.producer(node.input[slot]) for slot in moves[id(node)][1].data]
        if all(maker is not None and (_perm(maker) == perm or _passes_on(turned, maker)) for maker in makers):
            turned[id(node)] = moves[id(node)]
    return turned


def _passes_on(moves: Moves, node: NodeProto) -> bool:
    return id(node) in moves and not moves[id(node)][1].absorbs


def _groups(graph: Graph, moves: Moves) -> Iterator[Moves]:
    """Yield the nodes that hang together through the values they read or hand on."""
    left = dict(moves)
    seen: set[str] = set()
    while left:
        key = next(iter(left))
        group: Moves = {}
        stack = [left.pop(key)]
        while stack:
            node, how = stack.pop()
            group[id(node)] = (node, how)
            values = [node.input[slot] for slot in how.data] + (
                [] if how.absorbs else list(filter(None, node.output))
            )
            for value in values:
                if value in seen:
                    continue
                seen.add(value)
                maker = graph.producer(value)
                near = [other for other in graph.consumers(value) if _takes(moves, other, value)]
                if maker is not None and _passes_on(moves, maker):
                    near.append(maker)
                stack += [found for other in near if (found := left.pop(id(other), None)) is not None]
        yield group


def _takes(moves: Moves, node: NodeProto, value: str) -> bool:
    return id(node) in moves and any(node.input[slot] == value for slot in moves[id(node)][1].data)


class Region:
    """A group of nodes that may run on the data before the Transposes."""

    def __init__(self, graph: Graph, perm: Perm, moves: Moves) -> None:
        self.graph = graph
        self.perm = perm
        self.back = inverse(perm)
        self.moves = moves
        made = [(node, name) for node, how in moves.values() if not how.absorbs for name in node.output]
        self.made = {name for _, name in made if name}
        data = [node.input[slot] for node, how in moves.values() for slot in how.data]
        self.entering = [name for name in dict.fromkeys(data) if name not in self.made]

    def gain(self) -> int:
        """Return by how many nodes the graph would shrink."""
        total = 0
        for name in self.entering:
            source = self.graph.producer(name)
            perm = _perm(source)
            alone = not self._others(name) and not self.graph.is_output(name)
            if perm is None:
                total -= 1
            elif perm == self.perm:
                total += alone
            elif not alone:
                total -= 1
        for name in self.made:
            others = self._others(name)
            plain = [node for node in others if _perm(node) is None]
            undone = [self.graph.is_output(node.output[0]) for node in others if _perm(node) == self.back]
            total += undone.count(False) + any(undone)  # one value takes one output's name
            total -= bool(plain) or self.graph.is_output(name)
        return total

    def _others(self, name: str) -> list[NodeProto]:
        """Return the readers of a value outside the group, or that read it as something else than data."""
        return [node for node in self.graph.consumers(name) if not _takes(self.moves, node, name)]

    def apply(self) -> None:
        """Move the group."""
        graph = self.graph
        names = {name: self._before(name) for name in self.entering}
        readers = {name: self._others(name) for name in self.made}
        released: list[str] = []
        turned: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        for node, how in self.moves.values():
            outputs = list(node.output)
            if not how.absorbs:
                for name in filter(None, outputs):
                    names[name] = graph.fresh_name(f"{name}_before")
        for node, how in self.moves.values():
            inputs = list(node.input)
            for slot in how.data:
                inputs[slot] = names[inputs[slot]]
            for slot, values in how.constants.items():
                inputs += [""] * (slot + 1 - len(inputs))
                released.append(inputs[slot])
                key = (inputs[slot], values.shape, values.tobytes())
                if key not in turned:
                    turned[key] = graph.fresh_name(inputs[slot] or f"{label(node)}_axes")
                    graph.set_constant(turned[key], values)
                inputs[slot] = turned[key]
            graph.set_inputs(node, inputs)
            for name, value in how.attributes.items():
                graph.set_attribute(node, name, value)
        kept = {name for name in self.made if graph.is_output(name)}
        for node, how in self.moves.values():
            if not how.absorbs:
                graph.set_outputs(node, [names.get(name, name) for name in node.output])
        for name, others in readers.items():
            self._leave(name, names[name], others, keep=name in kept)
        for name in self.entering:
            source = graph.producer(name)
            if source is not None:
                remove_unused(graph, source)
        release(graph, released)

    def _before(self, name: str) -> str:
        """Return an entering value in the layout before the Transposes."""
        graph = self.graph
        source = graph.producer(name)
        perm = _perm(source)
        if source is not None and perm is not None:
            if perm == self.perm:
                return source.input[0]
            return graph.emit("Transpose", [source.input[0]], perm=composed(perm, self.back)).output[0]
        return graph.emit("Transpose", [name], perm=self.back).output[0]

    def _leave(self, name: str, before: str, others: list[NodeProto], *, keep: bool) -> None:
        """Give the readers outside what they had: Transposes are changed or go, others get a new one."""
        graph = self.graph
        for node in others:
            perm = _perm(node)
            if perm is None:
                keep = True
            elif perm == self.back and graph.replace_value(output := node.output[0], before):
                before = output if graph.is_output(output) else before
                graph.remove(node)
            else:
                graph.set_input(node, 0, before)
                graph.set_attribute(node, "perm", composed(self.perm, perm))
        if keep:
            graph.emit("Transpose", [before], [name], perm=self.perm)
