"""Replace an If whose condition is known by the branch it takes."""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.rewriting.inlining import replace_node
from onnxslim_lab.rewriting.removal import label, release
from onnxslim_lab.rewriting.signature import body_key


class InlineConstantIf(Pass):
    """Replace an If by the branch it always takes.

    before: y = If(True, then: y1 = Relu(x), else: y2 = Exp(x))
    after:  y = Relu(x)

    The branch is known when the condition is a constant, or when both branches are the same. Ifs inside the
    branch follow. An output that is a value from outside the branch becomes an Identity where a graph output
    needs its own node.

    refuses: nothing; an If with a condition computed from inputs is not a case of this pass.

    >>> InlineConstantIf.pass_name()
    'inline-constant-if'
    """

    exact: ClassVar[bool] = True

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Inline the Ifs of one graph, outermost first, until none with a known branch is left."""
        outcome = Outcome()
        waiting = [node for node in graph.nodes if is_op(node, "If")][::-1]
        while waiting:
            node = waiting.pop()
            taken = _taken(graph, node)
            if taken is not None:
                outcome.change(label(node), f"replaced by its {taken.replace('_', ' ')}")
                waiting += _inline(graph, node, taken)[::-1]
        return outcome


def _taken(graph: Graph, node: NodeProto) -> str | None:
    """Return the attribute name of the branch that always runs; None when that depends on the inputs."""
    condition = graph.constant(node.input[0])
    if condition is not None and condition.size == 1:
        return "then_branch" if condition.reshape(-1)[0] else "else_branch"
    bodies = graph.bodies(node)
    same = body_key(bodies["then_branch"][0], {}) == body_key(bodies["else_branch"][0], {})
    return "then_branch" if same else None


def _inline(graph: Graph, node: NodeProto, taken: str) -> list[NodeProto]:
    """Put a branch in the place of its If; return the Ifs that came with it."""
    body = graph.bodies(node)[taken][0]
    inner = [item.output[0] for item in body.nodes if is_op(item, "If")]
    names = graph.absorb(body, {})
    found = [graph.producer(names[name]) for name in inner]
    read = graph.read_by(node)
    replace_node(graph, node, [names[result] for result in body.outputs])
    release(graph, read)
    return [item for item in found if item is not None]
