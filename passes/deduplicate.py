"""Keep one of equal constants, one of equal computations, and one of a weight and its transpose."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from pydantic import Field

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.rewriting.removal import label
from onnxslim_lab.rewriting.signature import is_random, node_key

HOIST_FROM = 64  # bytes: moving a smaller constant to an outer graph saves nothing
TRANSPOSE_FROM = 1 << 16  # bytes: a Transpose node is worth less than that
BLOCK = 1 << 20  # elements compared at a time
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

Table = dict[Hashable, tuple[Graph, NodeProto]]


class Deduplicate(Pass):
    """Keep one of equal constants and of equal computations.

    before: a = Conv(x, v); b = Conv(x, w), v and w the same bytes
    after:  a = Conv(x, v), read in the place of b

    Constants are equal in type, shape and every byte; those of several branches move to the graph around
    them. Nodes are equal in operator, attributes, bodies and inputs (in any order where the operator
    commutes), and what a body computes again from outer values is read from outside. A matrix that is the
    transpose of another (TorchScript's exports of tied embeddings) is made from it by a Transpose, which
    onnxruntime folds when it loads the model, or by Gemm's own attribute.

    refuses: constants that callers may override, that are outputs of a graph, or that annotations name;
    random operators, operators of unknown domains, and pairs that are both outputs of a graph.

    >>> Deduplicate().through_transpose
    True
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    through_transpose: bool = Field(
        True, description="replace a matrix of 64 kB or more by the Transpose of an equal one"
    )

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Treat the main graph and each function, bodies included."""
        outcome = Outcome()
        for top in (graph, *graph.functions.values()):
            _share_constants(top, outcome)
            version = -1
            while version != graph.version:
                version = graph.version
                outcome.refusals.clear()
                _share_nodes(top, [], outcome)
        if self.through_transpose:
            _share_transposes(graph, outcome)
        return outcome


def _share_constants(top: Graph, outcome: Outcome) -> None:
    """Let the readers of equal constants read one of them; look at the bytes only where type and shape agree."""
    alike: dict[Hashable, list[tuple[Graph, str]]] = {}
    for graph in top.walk():
        if graph.root is top:
            referenced = graph.referenced()
            for name in _constants(graph):
                if name not in referenced and not graph.is_output(name) and graph.use_count(name):
                    alike.setdefault(graph.constant_type(name), []).append((graph, name))
    for kind, group in alike.items():
        if kind is None or len(group) < 2:
            continue
        equal: dict[Hashable, list[tuple[Graph, str]]] = {}
        for graph, name in group:
            equal.setdefault(graph.constant_key(name), []).append((graph, name))
        for members in equal.values():
            if len(members) > 1:
                _share(members, outcome)


def _constants(graph: Graph) -> Iterator[str]:
    for name in graph.initializers:
        if graph.is_constant(name):
            yield name
    for node in graph.nodes:
        if is_op(node, "Constant") and graph.is_constant(node.output[0]):
            yield node.output[0]


def _share(members: list[tuple[Graph, str]], outcome: Outcome) -> None:
    """Replace equal constants by the one in the outermost graph that sees all their readers."""
    members.sort(key=lambda item: (len(_around(item[0])), item[0].producer(item[1]) is not None))
    kept: list[tuple[Graph, str]] = []
    for graph, name in members:
        around = _around(graph)
        found = next((item for item in kept if any(item[0] is outer for outer in around)), None)
        if found is None:
            kept.append((graph, name))
        else:
            _replace_constant(graph, name, *found, outcome)
    found_type = kept[0][0].constant_type(kept[0][1])
    if len(kept) < 2 or found_type is None or found_type[2] < HOIST_FROM:
        return
    paths = [_around(graph)[::-1] for graph, _ in kept]
    home = [level[0] for level in zip(*paths, strict=False) if all(item is level[0] for item in level)][-1]
    values = kept[0][0].constant(kept[0][1])
    assert values is not None
    shared = home.fresh_name(kept[0][1])
    home.set_constant(shared, values, found_type[0])
    for graph, name in kept:
        _replace_constant(graph, name, home, shared, outcome)


def _around(graph: Graph) -> list[Graph]:
    """Return the graph and those around it, innermost first."""
    graphs = [graph]
    while graphs[-1].parent is not None:
        graphs.append(graphs[-1].parent)
    return graphs


def _replace_constant(graph: Graph, name: str, home: Graph, kept: str, outcome: Outcome) -> None:
    if graph.scope_of(kept) is not home:
        outcome.refuse(name, f"a value of its graph hides the equal constant {kept}")
        return
    found = graph.constant_type(name)
    graph.replace_uses(name, kept)
    graph.remove_constant(name)
    size = 0 if found is None else found[2]
    outcome.changes.append(Change(name, f"the same as {kept}", bytes_before=size))


def _share_nodes(graph: Graph, outer: list[Table], outcome: Outcome) -> None:
    """Let what an equal node computed earlier, here or in a graph around, be read instead."""
    table: Table = {}
    for node in graph.nodes:
        if node not in graph:
            continue
        for bodies in graph.bodies(node).values():
            for body in bodies:
                _share_nodes(body, [*outer, table], outcome)
        if is_op(node, "Constant") or not node.output or is_random(graph, node):
            continue
        key = node_key(graph, node)
        found = next((level[key] for level in (table, *reversed(outer)) if key in level), None)
        if found is None:
            table[key] = (graph, node)
            continue
        home, twin = found
        if _merge(graph, node, home, twin):
            outcome.change(label(node), f"the same as {label(twin)}")
        else:
            outcome.refuse(label(node), f"the same as {label(twin)}, but both are outputs of the graph")


def _merge(graph: Graph, node: NodeProto, home: Graph, twin: NodeProto) -> bool:
    """Replace a node's outputs by those of its twin; False when outputs of the graph prevent it."""
    have = [*twin.output, *[""] * (len(node.output) - len(twin.output))]
    for name, other in zip(node.output, have, strict=False):
        if name and graph.is_output(name) and (graph is not home or (other and graph.is_output(other))):
            return False
    added = [
        other or (name and home.fresh_name(f"{label(twin)}_out"))
        for name, other in zip([*node.output, *[""] * (len(have) - len(node.output))], have, strict=True)
    ]
    if added != list(twin.output):
        home.set_outputs(twin, added)
    for index, name in enumerate(node.output):
        if name:
            graph.replace_value(name, twin.output[index])
    graph.remove(node)
    return True


def _share_transposes(graph: Graph, outcome: Outcome) -> None:
    """Make a large matrix of the main graph from another one of which it is the transpose."""
    seen: dict[Hashable, list[str]] = {}
    referenced = graph.referenced()
    for name in graph.initializers:
        found = graph.constant_type(name)
        if found is None or found[0] not in FLOATS or len(found[1]) != 2 or found[2] < TRANSPOSE_FROM:
            continue
        readers = graph.consumers(name)
        quantized = any(reader.op_type in ("QuantizeLinear", "DequantizeLinear") for reader in readers)
        if not readers or quantized or graph.is_input(name) or graph.is_output(name) or name in referenced:
            continue
        matrix = _bits(graph, name)
        sample = _sample(matrix)
        for other in seen.get((found[0], found[1][::-1], np.ascontiguousarray(sample.T).tobytes()), ()):
            if _is_transpose(matrix, _bits(graph, other)):
                _replace_by_transpose(graph, name, other, found[2], outcome)
                break
        else:
            seen.setdefault((found[0], found[1], sample.tobytes()), []).append(name)


def _bits(graph: Graph, name: str) -> NDArray[Any]:
    values = graph.constant(name)
    assert values is not None
    return values.view(f"u{values.dtype.itemsize}")


def _sample(matrix: NDArray[Any], count: int = 8) -> NDArray[Any]:
    """Return elements on an even grid: those of the transpose are the transpose of these.

    >>> _sample(np.arange(6).reshape(2, 3), 2).tolist()
    [[0, 2], [3, 5]]
    """
    rows, columns = (np.linspace(0, size - 1, count).astype(np.intp) for size in matrix.shape)
    return np.ascontiguousarray(matrix[np.ix_(rows, columns)])


def _is_transpose(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Whether one matrix is the other's transpose, compared block by block."""
    step = max(1, BLOCK // max(1, first.shape[1]))
    return all(
        np.array_equal(first[start : start + step], second[:, start : start + step].T)
        for start in range(0, first.shape[0], step)
    )


def _replace_by_transpose(graph: Graph, name: str, other: str, size: int, outcome: Outcome) -> None:
    """Keep the matrix that a Gather reads, else the first; give the other's readers its transpose."""
    gathers = [any(is_op(node, "Gather") for node in graph.consumers(item)) for item in (name, other)]
    dropped, kept = (other, name) if gathers[0] and not gathers[1] else (name, other)
    readers = graph.consumers(dropped)
    if all(
        is_op(node, "Gemm") and list(node.input).index(dropped) == 1 and node.input[2:3] != [dropped]
        if dropped in node.input
        else False
        for node in readers
    ):
        for node in readers:
            graph.set_attribute(node, "transB", 1 - int(attribute(node, "transB", 0)))
            graph.set_input(node, 1, kept)
        graph.remove_constant(dropped)
    else:
        graph.remove_constant(dropped)
        graph.emit("Transpose", [kept], [dropped], name=f"{dropped}_transpose", perm=[1, 0])
    outcome.changes.append(Change(dropped, f"the transpose of {kept}", bytes_before=size))
