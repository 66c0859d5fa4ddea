"""The magnitude of a spectrum: a positive scale of channels passes the root of a sum of squares.

real -> Pow 2 or Mul by itself --+
                                 Add -> Sqrt        sqrt((s a)^2 + (s b)^2) = s sqrt(a^2 + b^2)
imaginary -> likewise -----------+
"""

from __future__ import annotations

from onnx import NodeProto

from onnxslim_lab.equalization.region import Region
from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.rewriting.patterns import scalar


def is_square(graph: Graph, node: NodeProto | None) -> bool:
    """Whether a node squares its first input."""
    if node is None:
        return False
    if is_op(node, "Mul"):
        return node.input[0] == node.input[1]
    return is_op(node, "Pow") and scalar(graph, node.input[1]) == 2.0


def magnitude(region: Region, node: NodeProto) -> None:
    """Relate what is squared and the root of its sum, from a square or from the root."""
    found = _parts(region.graph, node)
    values = [*node.input[:1], *node.output]
    if found is None:
        region.freeze_values(values, f"{node.op_type} is not part of a root of a sum of squares")
        return
    known = next(region.indices[value] for value in found if value in region.indices)
    for value in found:
        region.know(value, known)


def _parts(graph: Graph, node: NodeProto) -> list[str] | None:
    """Return the values that are squared and the root, all of one shape; None when there is anything else."""
    root = node if is_op(node, "Sqrt") else _only_reader(graph, _only_reader(graph, node))
    if root is None or not is_op(root, "Sqrt"):
        return None
    total = graph.producer(root.input[0])
    if total is None or not is_op(total, "Add") or _only_reader(graph, total) is not root:
        return None
    values = []
    for term in total.input:
        square = graph.producer(term)
        if square is None or not is_square(graph, square) or _only_reader(graph, square) is not total:
            return None
        values.append(square.input[0])
    shapes = [graph.shape_of(value) for value in (*values, root.output[0])]
    if shapes[0] is None or any(shape is None or len(shape) != len(shapes[0]) for shape in shapes):
        return None
    return [*values, root.output[0]]


def _only_reader(graph: Graph, node: NodeProto | None) -> NodeProto | None:
    """Return the one node that reads what a node gives, None when there are others."""
    if node is None:
        return None
    readers = graph.consumers(node.output[0])
    alone = len(readers) == 1 and not graph.is_output(node.output[0])
    return readers[0] if alone else None
