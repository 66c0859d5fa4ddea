"""Remove nodes that do nothing, and merge pairs of nodes that are one."""

from __future__ import annotations

from typing import ClassVar, Literal

from onnx import NodeProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.rewriting.no_ops import equal_value
from onnxslim_lab.rewriting.node_pairs import cancelled, merge
from onnxslim_lab.rewriting.removal import is_unused, label, remove_unused


class EliminateIdentity(Pass):
    """Remove nodes that do nothing, and merge pairs of nodes that are one or none.

    before: x -> Identity -> Relu -> Relu -> Transpose -> Transpose -> y
    after:  x -> Relu -> y

    Nothing done: Identity; Dropout outside training; Cast and CastLike to the type at hand; Reshape, Expand,
    Slice, Pad, Tile, Flatten, Squeeze, Transpose, Resize, pooling and reductions that leave shape and
    elements; Concat, Sum, Max of one value and Split into one; Add 0, Mul 1 and their like, to the sign of
    zero and only where broadcasting enlarges nothing; Relu after Sigmoid, Floor after Round, and so on.
    Pairs: Transposes, Casts of which the first loses nothing, Clips, Concats along one axis, Split and its
    Concat, and any two of Reshape, Flatten, Squeeze, Unsqueeze.

    Shapes count as known where inference finds them; declared intermediate shapes are not trusted.

    refuses: a node whose input and output are both part of a graph's interface.

    >>> EliminateIdentity.pass_name()
    'eliminate-identity'
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Sweep over all graphs of the model until nothing changes."""
        outcome = Outcome()
        version = -1
        while version != graph.version:
            graph.infer()
            version = graph.version
            outcome.refusals.clear()
            for part in graph.walk():
                _sweep(part, outcome)
        return outcome


def _sweep(graph: Graph, outcome: Outcome) -> None:
    """Go once over the nodes in order, so that chains shorten as they are met."""
    for node in graph.nodes:
        if node not in graph or domain_of(node.domain) or is_unused(graph, node):
            continue
        value = equal_value(graph, node) or cancelled(graph, node)
        if value is not None:
            _bypass(graph, node, value, outcome)
            continue
        where, output = label(node), node.output[0]
        merged = merge(graph, node)
        if merged is not None:
            outcome.change(where, merged)
            left = graph.producer(output)
            value = None if left is None else equal_value(graph, left)
            if left is not None and value is not None:
                _bypass(graph, left, value, outcome)


def _bypass(graph: Graph, node: NodeProto, value: str, outcome: Outcome) -> None:
    """Let everything read the value instead of the node's output, and remove the node."""
    where = label(node)
    if not graph.replace_value(node.output[0], value):
        outcome.refuse(
            where, f"{node.op_type} does nothing, but both sides of it belong to the graph's interface"
        )
        return
    remove_unused(graph, node)
    outcome.change(where, f"removed {node.op_type}, which does nothing")
