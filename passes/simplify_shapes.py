"""Compute shapes once, as constants where that is possible, with dynamic sizes as symbols."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from onnx import NodeProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph
from onnxslim_lab.nodes import domain_of
from onnxslim_lab.symbols import propagation as symbolic
from onnxslim_lab.symbols import shape_edits, view_edits
from onnxslim_lab.symbols.size_editor import SizeEditor

MOST_ROUNDS = 8  # what one edit leaves unread makes another one worth its while; two rounds are usual

Edit = Callable[[SizeEditor, NodeProto], bool]  # whether the node is gone

EDITS: dict[str, tuple[Edit, ...]] = {
    "Concat": (view_edits.stack,),
    "ConstantOfShape": (shape_edits.constant_of_shape,),
    "Expand": (shape_edits.expand,),
    "Flatten": (SizeEditor.unchanged, view_edits.view),
    "If": (shape_edits.condition,),
    "Range": (shape_edits.range_,),
    **dict.fromkeys(view_edits.REDUCED, (view_edits.unstacked,)),
    "Reshape": (shape_edits.reshape, view_edits.view),
    "Resize": (shape_edits.resize,),
    "Slice": (shape_edits.slice_, view_edits.slices),
    "Squeeze": (view_edits.view,),
    "Tile": (SizeEditor.unchanged,),
    "Transpose": (view_edits.view,),
    "Unsqueeze": (view_edits.view,),
}


class SimplifyShapes(Pass):
    """Collapse the chains of operators that compute shapes; dynamic axes stay dynamic.

    Sizes of dynamic axes are symbols, and small integer tensors are computed with them: what turns out
    constant becomes a constant, what an earlier value already holds is read from there, and chains such
    as Shape -> Gather -> Unsqueeze -> Concat -> Reshape become a Reshape to a constant with 0 (copy) and
    -1. Conditions that follow from sizes become constants, so that inline-constant-if can decide them;
    so do conditions of which one outcome could only lead to an error.

    before: Reshape(x[n, s, 12, 32], Concat(Unsqueeze(Gather(Shape(x), 0)), [-1, 384]))
    after:  Reshape(x, [0, -1, 384])
    before: Flatten(Relu(Unsqueeze(Gemm(x))))
    after:  Relu(Gemm(x))
    before: ReduceMax<2>(Concat<2>(Unsqueeze<2>(x), Unsqueeze<2>(y)))
    after:  Max(x, y)
    refuses: shapes with two or more sizes that only data or a second tensor gives

    >>> model = Graph.parse('''<ir_version: 8, opset_import: ["": 17]>
    ... g (float[n, 4, 8] x) => (float[n, 32] y)
    ... { shape = Shape<end = 1>(x)  rest = Constant<value = int64[1] {-1}>()
    ...   target = Concat<axis = 0>(shape, rest)  y = Reshape(x, target) }''')
    >>> outcome = SimplifyShapes().run(model)
    >>> model.constant(model.nodes[-1].input[1])
    array([ 0, 32])
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Edit the main graph and, with what is known there, the bodies in it; then the functions."""
        outcome = Outcome()
        for _ in range(MOST_ROUNDS):
            graph.infer()
            before = len(outcome.changes)
            for main in (graph, *graph.functions.values()):
                _edit(SizeEditor(symbolic.propagate(main), outcome))
            if len(outcome.changes) == before:
                break
        return outcome


def _edit(editor: SizeEditor) -> None:
    """Visit every node of a graph once, and after each the bodies it has."""
    for node in editor.graph.nodes:
        if node not in editor.graph:
            continue
        if domain_of(node.domain) == "" and node.op_type != "Constant":
            if any(edit(editor, node) for edit in EDITS.get(node.op_type, ())):
                continue
            for value in node.output:
                editor.shorten(node, value)
            if node.op_type == "Shape":
                editor.remember(node.input[0])
        for bodies in editor.facts.bodies.get(id(node), {}).values():
            for facts in bodies:
                _edit(SizeEditor(facts, editor.outcome, editor))
