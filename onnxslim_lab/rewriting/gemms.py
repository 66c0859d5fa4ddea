"""Forming Gemm: MatMul + Add, transposed operands, a transposed result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import NodeProto, helper

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.rewriting.affine import is_float
from onnxslim_lab.shapes import Dim

Shape = tuple[Dim, ...]


def replace_node(
    graph: Graph,
    removed: Sequence[NodeProto],
    op_type: str,
    inputs: Sequence[str],
    output: str,
    like: NodeProto,
    **attributes: Any,
) -> NodeProto:
    """Remove nodes and add one that makes `output`, under the name and doc string of `like`."""
    node = helper.make_node(op_type, inputs, [output], like.name, like.doc_string or None, **attributes)
    graph.remove(*removed)
    return graph.adopt(node)


def add_to_gemm(graph: Graph, node: NodeProto) -> str:
    """Turn Add or Sum of a 2-D product and something that broadcasts to it into the product's C.

    before: y = Add(MatMul(A, B), C)     after: y = Gemm(A, B, C)

    Returns:
        "" when done, else the reason why not.
    """
    if len(node.input) != 2 or graph.opset() < 7:
        return "not a sum of two values"
    reason = "no product to add to"
    for position, value in enumerate(node.input):
        product = graph.producer(value)
        if product is None or not (is_op(product, "MatMul") or is_op(product, "Gemm")):
            continue
        if is_op(product, "Gemm") and len(product.input) > 2 and product.input[2]:
            continue
        if graph.use_count(value) != 1:
            reason = "the product has other readers"
            continue
        other = node.input[1 - position]
        result = product_shape(graph, product)
        if result is None or not is_float(graph.dtype_of(product.input[0])):
            reason = "not a product of two matrices of real values"
            continue
        if not broadcasts(_shape(graph, other), result):
            reason = "the addend does not broadcast to the product"
            continue
        options = _attributes(product)
        inputs = [*product.input[:2], other]
        replace_node(graph, [product, node], "Gemm", inputs, node.output[0], product, **options)
        return ""
    return reason


def absorb_transposes(graph: Graph, node: NodeProto) -> str:
    """Read a transposed operand of a 2-D MatMul or Gemm untransposed, by transA and transB.

    before: y = MatMul(A, Transpose(B))     after: y = Gemm<transB = 1>(A, B)

    Returns:
        "" when done, else the reason why not.
    """
    if product_shape(graph, node) is None or not is_float(graph.dtype_of(node.input[0])):
        return "not a product of two matrices of real values"
    if is_op(node, "MatMul") and graph.opset() < 11:
        return "Gemm without C needs opset 11"
    inputs, options, absorbed = list(node.input), _attributes(node), []
    for position, option in enumerate(("transA", "transB")):
        before = graph.producer(inputs[position])
        if before is None or not _swaps(before) or inputs[0] == inputs[1]:
            continue
        if is_op(node, "MatMul") and graph.use_count(inputs[position]) != 1:
            continue
        absorbed.append(before)
        inputs[position] = before.input[0]
        options[option] = 1 - options.get(option, 0)
    if not absorbed:
        return "no operand is transposed"
    options = {name: value for name, value in options.items() if value}
    replace_node(graph, [node], "Gemm", inputs, node.output[0], node, **options)
    for before in absorbed:
        if before in graph and not graph.use_count(before.output[0]):
            graph.remove(before)
    return ""


def absorb_result_transpose(graph: Graph, node: NodeProto) -> str:
    """Make the transpose of a product directly: (A B)' = B' A'.

    before: y = Transpose(Gemm(A, B))     after: y = Gemm<transA = 1, transB = 1>(B, A)

    Returns:
        "" when done, else the reason why not.
    """
    if not _swaps(node):
        return "not a transposition of a matrix"
    product = graph.producer(node.input[0])
    if product is None or not (is_op(product, "Gemm") or is_op(product, "MatMul")):
        return "no product before it"
    if graph.use_count(node.input[0]) != 1 or product_shape(graph, product) is None:
        return "the product has other readers or is not 2-D"
    if graph.opset() < 11 or not is_float(graph.dtype_of(product.input[0])):
        return "Gemm without C needs opset 11 and real values"
    addend = product.input[2] if len(product.input) > 2 else ""
    if addend and any(size != 1 for size in _shape(graph, addend) or (None,)):
        return "the product's C would have to be transposed"
    options = _attributes(product)
    sides = {"transA": 1 - options.pop("transB", 0), "transB": 1 - options.pop("transA", 0)}
    options |= {name: value for name, value in sides.items() if value}
    inputs = [product.input[1], product.input[0], *([addend] if addend else [])]
    replace_node(graph, [product, node], "Gemm", inputs, node.output[0], product, **options)
    return ""


def product_shape(graph: Graph, node: NodeProto) -> tuple[Dim, Dim] | None:
    """Return the shape of a MatMul or Gemm of two matrices, None when an operand is not known to be one."""
    if not (is_op(node, "MatMul") or is_op(node, "Gemm")) or len(node.input) < 2 or set_by_caller(node):
        return None
    first, second = (_shape(graph, name) for name in node.input[:2])
    if first is None or second is None or len(first) != 2 or len(second) != 2:
        return None
    return first[1 if attribute(node, "transA", 0) else 0], second[0 if attribute(node, "transB", 0) else 1]


def broadcasts(shape: Shape | None, target: tuple[Dim, Dim]) -> bool:
    """Whether a shape surely broadcasts to the target without enlarging it.

    >>> broadcasts((3,), ("n", 3)), broadcasts((2, 3), ("n", 3)), broadcasts((1, 1, 3), ("n", 3))
    (True, False, False)
    """
    if shape is None or len(shape) > 2:
        return False
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return all(size == 1 or (size is not None and size == whole) for size, whole in pairs)


def _shape(graph: Graph, value: str) -> Shape | None:
    known = graph.constant_type(value)
    return known[1] if known else graph.shape_of(value)


def _swaps(node: NodeProto) -> bool:
    """Whether a node is Transpose with perm [1, 0]."""
    return is_op(node, "Transpose") and list(attribute(node, "perm", ())) == [1, 0]


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {item.name: attribute(node, item.name) for item in node.attribute} if is_op(node, "Gemm") else {}
