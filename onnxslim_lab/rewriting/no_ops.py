"""Nodes whose first output equals a value there is already: which value that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.rewriting.certain import all_equal, broadcasts_into, clip_bounds, integers, same_shape

Rule = Callable[[Graph, NodeProto], str | None]

SLICE_END = 2**31 - 1  # the specification's "to the end of a dimension of unknown size"
NOT_NEGATIVE = frozenset({"Relu", "Abs", "Exp", "Sigmoid", "HardSigmoid", "Softmax"})
WHOLE = frozenset({"Floor", "Ceil", "Round"})
AFTER = {  # operator -> producers after which it does nothing
    "Relu": NOT_NEGATIVE,
    "Abs": NOT_NEGATIVE,
    "Floor": WHOLE,
    "Ceil": WHOLE,
    "Round": WHOLE,
    "Sign": frozenset({"Sign"}),
}
INVOLUTIONS = frozenset({"Neg", "Not", "BitwiseNot"})
REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")


def equal_value(graph: Graph, node: NodeProto) -> str | None:
    """Return the value that the node's first output always equals, None when it does something.

    Exact up to the sign of zero. Shapes count: a value that broadcasting would enlarge is not equal.
    """
    if domain_of(node.domain) or not node.output or not node.output[0]:
        return None
    if any(item.ref_attr_name for item in node.attribute):
        return None
    if any(name and graph.use_count(name) for name in node.output[1:]):
        return None
    rule = RULES.get(node.op_type)
    return rule(graph, node) if rule is not None and node.input and node.input[0] else None


def neutral_operand(number: float, *, both: bool) -> Rule:
    """Return the rule of a binary operator that does nothing with this constant on the right (or either side)."""

    def rule(graph: Graph, node: NodeProto) -> str | None:
        if len(node.input) != 2:
            return None
        first, second = node.input
        if all_equal(graph, second, number) and (
            graph.opset() < 7 or broadcasts_into(graph.shape_of(second), graph.shape_of(first))
        ):
            return first
        if (
            both
            and graph.opset() >= 7
            and all_equal(graph, first, number)
            and broadcasts_into(graph.shape_of(first), graph.shape_of(second))
        ):
            return second
        return None

    return rule


def _always(_graph: Graph, node: NodeProto) -> str | None:
    return node.input[0]


def _one_input(_graph: Graph, node: NodeProto) -> str | None:
    return node.input[0] if len(node.input) == 1 else None


def _one_output(_graph: Graph, node: NodeProto) -> str | None:
    return node.input[0] if len(node.output) == 1 else None


def _same_as_output(graph: Graph, node: NodeProto) -> str | None:
    """Return the input when inference gives input and output one shape, nothing assumed."""
    return (
        node.input[0] if same_shape(graph.shape_of(node.input[0]), graph.shape_of(node.output[0])) else None
    )


def _dropout(graph: Graph, node: NodeProto) -> str | None:
    if graph.opset() < 7:
        return node.input[0] if attribute(node, "is_test", 0) else None
    training = node.input[2] if len(node.input) > 2 else ""
    return node.input[0] if not training or all_equal(graph, training, 0) else None


def _cast(graph: Graph, node: NodeProto) -> str | None:
    target = attribute(node, "to")
    if node.op_type == "CastLike":
        target = graph.dtype_of(node.input[1])
    return node.input[0] if target and target == graph.dtype_of(node.input[0]) else None


def _reshape(graph: Graph, node: NodeProto) -> str | None:
    shape = graph.shape_of(node.input[0])
    target = integers(graph, node, "shape", 1)
    if shape is None or target is None:
        return node.input[0] if same_shape(shape, graph.shape_of(node.output[0]), slack=1) else None
    if len(target) != len(shape):
        return None
    copies = 0 if not attribute(node, "allowzero", 0) else None
    wanted = [dim if number == copies else number for number, dim in zip(target, shape, strict=True)]
    rest = [a for a, b in zip(wanted, shape, strict=True) if a is None or a != b]
    # Where everything but one axis stays, so does that one, unless there are no elements at all.
    stays = not rest or (rest == [-1] and 0 not in wanted)
    return node.input[0] if stays or (target == [0] * len(shape) and copies == 0) else None


def _transpose(graph: Graph, node: NodeProto) -> str | None:
    shape = graph.shape_of(node.input[0])
    perm = attribute(node, "perm")
    if perm is None:
        return node.input[0] if shape is not None and len(shape) < 2 else None
    return node.input[0] if list(perm) == sorted(perm) else None


def _slice(graph: Graph, node: NodeProto) -> str | None:
    old = graph.opset() < 10
    starts, ends, axes, steps = (
        integers(graph, node, name, None if old else index + 1)
        for index, name in enumerate(("starts", "ends", "axes", "steps"))
    )
    if starts is None or ends is None or axes is None or steps is None or len(starts) != len(ends):
        return None
    if any(step != 1 for step in steps):
        return None
    shape = graph.shape_of(node.input[0])
    for start, end, axis in zip(starts, ends, axes or range(len(starts)), strict=True):
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if start != 0 and not (isinstance(size, int) and start <= -size):
            return None
        if end < SLICE_END and not (isinstance(size, int) and end >= size):
            return None
    return node.input[0]


def _pad(graph: Graph, node: NodeProto) -> str | None:
    opset = graph.opset()
    pads = integers(graph, node, "paddings" if opset < 2 else "pads", 1 if opset >= 11 else None)
    return node.input[0] if pads is not None and not any(pads) else None


def _expand(graph: Graph, node: NodeProto) -> str | None:
    shape = graph.shape_of(node.input[0])
    target = integers(graph, node, "shape", 1)
    if target is not None and broadcasts_into(tuple(target), shape):
        return node.input[0]
    return _same_as_output(graph, node)


def _tile(graph: Graph, node: NodeProto) -> str | None:
    return node.input[0] if len(node.input) > 1 and all_equal(graph, node.input[1], 1) else None


def _flatten(graph: Graph, node: NodeProto) -> str | None:
    shape = graph.shape_of(node.input[0])
    return (
        node.input[0]
        if shape is not None and len(shape) == 2 and attribute(node, "axis", 1) in (1, -1)
        else None
    )


def _squeeze(graph: Graph, node: NodeProto) -> str | None:
    axes = integers(graph, node, "axes", 1)
    shape = graph.shape_of(node.input[0])
    if axes or axes is None or shape is None:
        return None
    return node.input[0] if all(isinstance(dim, int) and dim != 1 for dim in shape) else None


def _unsqueeze(graph: Graph, node: NodeProto) -> str | None:
    return node.input[0] if integers(graph, node, "axes", 1) == [] else None


def _where(graph: Graph, node: NodeProto) -> str | None:
    condition, yes, no = node.input
    for choice, other, wanted in ((yes, no, True), (no, yes, False)):
        if all_equal(graph, condition, wanted):
            shape = graph.shape_of(choice)
            others = (graph.shape_of(condition), graph.shape_of(other))
            return choice if all(broadcasts_into(dims, shape) for dims in others) else None
    return yes if yes == no and broadcasts_into(graph.shape_of(condition), graph.shape_of(yes)) else None


def _pool(_graph: Graph, node: NodeProto) -> str | None:
    sizes = [*attribute(node, "kernel_shape", []), *attribute(node, "strides", [])]
    plain = all(size == 1 for size in sizes) and not any(attribute(node, "pads", []))
    return node.input[0] if plain and attribute(node, "kernel_shape") else None


def _global_pool(graph: Graph, node: NodeProto) -> str | None:
    shape = graph.shape_of(node.input[0])
    return node.input[0] if shape is not None and all(dim == 1 for dim in shape[2:]) else None


def _reduce(graph: Graph, node: NodeProto) -> str | None:
    since = 13 if node.op_type == "ReduceSum" else 18
    axes = integers(graph, node, "axes", 1 if graph.opset() >= since else None)
    if axes is None or not attribute(node, "keepdims", 1):
        return None
    if not axes and attribute(node, "noop_with_empty_axes", 0):
        return node.input[0]
    shape = graph.shape_of(node.input[0])
    if shape is None or any(not -len(shape) <= axis < len(shape) for axis in axes):
        return None
    return node.input[0] if all(shape[axis] == 1 for axis in axes or range(len(shape))) else None


def _resize(graph: Graph, node: NodeProto) -> str | None:
    mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode in ("tf_crop_and_resize", "tf_half_pixel_for_nn"):
        return None  # these move pixels even at scale 1
    scales: Any = attribute(node, "scales")
    if scales is not None:
        return node.input[0] if scales and all(scale == 1 for scale in scales) else None
    index = 2 if node.op_type == "Resize" and graph.opset() >= 11 else 1
    if len(node.input) > index and all_equal(graph, node.input[index], 1):
        return node.input[0]
    sizes = integers(graph, node, "sizes", 3 if index == 2 else None)
    return _same_as_output(graph, node) if sizes else None


def _clip(graph: Graph, node: NodeProto) -> str | None:
    low, high = clip_bounds(graph, node)
    above = low == -math.inf or (
        low is not None and low <= 0 and _made_by(graph, node.input[0], NOT_NEGATIVE)
    )
    return node.input[0] if above and high == math.inf else None


def _made_by(graph: Graph, value: str, operators: frozenset[str]) -> bool:
    node = graph.producer(value)
    return node is not None and not domain_of(node.domain) and node.op_type in operators


def _after(graph: Graph, node: NodeProto) -> str | None:
    return node.input[0] if _made_by(graph, node.input[0], AFTER[node.op_type]) else None


def _involution(graph: Graph, node: NodeProto) -> str | None:
    first = graph.producer(node.input[0])
    return (
        first.input[0]
        if first is not None and _made_by(graph, node.input[0], frozenset({node.op_type}))
        else None
    )


RULES: dict[str, Rule] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Resize": _resize,
    "Upsample": _resize,
    "Clip": _clip,
    "Split": _one_output,
    "Add": neutral_operand(0, both=True),
    "Sub": neutral_operand(0, both=False),
    "Mul": neutral_operand(1, both=True),
    "Div": neutral_operand(1, both=False),
    "Pow": neutral_operand(1, both=False),
    "And": neutral_operand(True, both=True),
    "Or": neutral_operand(False, both=True),
    "Xor": neutral_operand(False, both=True),
    "BitwiseOr": neutral_operand(0, both=True),
    "BitwiseXor": neutral_operand(0, both=True),
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _one_input),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(AFTER, _after),
    **dict.fromkeys(INVOLUTIONS, _involution),
}
