"""How an operator works on transposed data: which inputs follow, and which axes and constants change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.rewriting.certain import integers

UNARY = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitwiseNot",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Cosh",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
    ]
)
ELEMENTWISE = frozenset(
    [
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Mean",
        "Min",
        "Mod",
        "Mul",
        "Or",
        "Pow",
        "Sub",
        "Sum",
        "Where",
        "Xor",
    ]
)
REDUCTIONS = frozenset(
    [
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    ]
)
LARGEST_COPY = 4096  # bytes of a constant that may be kept twice, once for its other readers


@dataclass
class Move:
    """What a node needs to work on data before a Transpose instead of behind it.

    Attributes:
        data: Input slots that take the data; their values have the full rank.
        constants: New values by input slot.
        attributes: New values by attribute name.
        absorbs: Whether the outputs are the same either way (a reduction to fewer axes).
    """

    data: list[int]
    constants: dict[int, NDArray[Any]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    absorbs: bool = False


def inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that undo a Transpose.

    >>> inverse((0, 2, 3, 1))
    (0, 3, 1, 2)
    """
    return tuple(perm.index(axis) for axis in range(len(perm)))


def composed(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of one Transpose followed by another as those of one.

    >>> composed((0, 2, 3, 1), (0, 3, 1, 2))
    (0, 1, 2, 3)
    """
    return tuple(first[axis] for axis in second)


def move(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    """Return how a node works on data of which `perm` gives what it gets now; None when it cannot."""
    if domain_of(node.domain) or graph.opset() < 11 or any(item.ref_attr_name for item in node.attribute):
        return None
    if not node.input or not node.input[0] or graph.bodies(node):
        return None
    if node.op_type in UNARY:
        unused = not any(name and graph.use_count(name) for name in node.output[1:])
        return Move([0]) if unused and _rank(graph, node.input[0]) == len(perm) else None
    if node.op_type in ELEMENTWISE:
        return _elementwise(graph, node, perm)
    if node.op_type in REDUCTIONS:
        return _reduce(graph, node, perm)
    rule = RULES.get(node.op_type)
    return None if rule is None or _rank(graph, node.input[0]) != len(perm) else rule(graph, node, perm)


def _rank(graph: Graph, value: str) -> int | None:
    shape = graph.shape_of(value)
    return None if shape is None else len(shape)


def _turned(graph: Graph, value: str, perm: tuple[int, ...]) -> NDArray[Any] | None:
    """Return a constant as it must be before the Transpose, without leading axes of one; None when too large."""
    found = graph.constant_type(value)
    if found is None or len(found[1]) > len(perm):
        return None
    if found[2] > LARGEST_COPY and graph.use_count(value) != 1:
        return None
    values = graph.constant(value)
    assert values is not None
    full = values.reshape((1,) * (len(perm) - values.ndim) + values.shape).transpose(inverse(perm))
    leading = next((axis for axis, size in enumerate(full.shape) if size != 1), full.ndim)
    return np.ascontiguousarray(full.reshape(full.shape[leading:]))


def _elementwise(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    result = Move([])
    for slot, value in enumerate(node.input):
        found = graph.constant_type(value)
        if found is not None:
            if math.prod(found[1]) == 1 and len(found[1]) <= len(perm):
                continue
            turned = _turned(graph, value, perm)
            if turned is None:
                return None
            result.constants[slot] = turned
        elif _rank(graph, value) == len(perm):
            result.data.append(slot)
        elif _rank(graph, value) != 0:
            return None
    return result if result.data else None


def _axis(node: NodeProto, perm: tuple[int, ...], default: int) -> int:
    return perm[int(attribute(node, "axis", default)) % len(perm)]


def _softmax(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    return Move([0], attributes={"axis": _axis(node, perm, -1)}) if graph.opset() >= 13 else None


def _concat(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    if any(graph.is_constant(value) or _rank(graph, value) != len(perm) for value in node.input):
        return None
    return Move(list(range(len(node.input))), attributes={"axis": _axis(node, perm, 0)})


def _split(_graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    return Move([0], attributes={"axis": _axis(node, perm, 0)})


def _pad(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    pads = integers(graph, node, "pads", 1)
    if not pads or (len(node.input) > 3 and node.input[3]) or len(pads) != 2 * len(perm):
        return None
    both = np.array(pads, np.int64).reshape(2, -1)
    return Move([0], {1: both[:, list(inverse(perm))].reshape(-1)})


def _slice(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    starts = graph.constant_type(node.input[1])
    axes = integers(graph, node, "axes", 3)
    if starts is None or axes is None:
        return None
    wanted = axes or list(range(math.prod(starts[1])))
    kind = graph.constant(node.input[1])
    assert kind is not None
    return Move([0], {3: np.array([perm[axis % len(perm)] for axis in wanted], kind.dtype)})


def _reduce(graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    since = 13 if node.op_type == "ReduceSum" else 18
    axes = integers(graph, node, "axes", 1 if graph.opset() >= since else None)
    if axes is None or _rank(graph, node.input[0]) != len(perm):
        return None
    rank = len(perm)
    kept = [perm[axis] for axis in range(rank) if axes and axis not in {item % rank for item in axes}]
    absorbs = not attribute(node, "keepdims", 1)
    if absorbs and (kept != sorted(kept) or (not axes and attribute(node, "noop_with_empty_axes", 0))):
        return None
    turned = sorted(perm[axis % rank] for axis in axes)
    if not axes:
        return Move([0], absorbs=absorbs)
    if graph.opset() >= since:
        return Move([0], {1: np.array(turned, np.int64)}, absorbs=absorbs)
    return Move([0], attributes={"axes": turned}, absorbs=absorbs)


def _arg(_graph: Graph, node: NodeProto, perm: tuple[int, ...]) -> Move | None:
    axis = _axis(node, perm, 0)
    absorbs = not attribute(node, "keepdims", 1)
    kept = [other for other in perm if other != axis]
    if absorbs and kept != sorted(kept):
        return None
    return Move([0], attributes={"axis": axis}, absorbs=absorbs)


RULES: dict[str, Callable[[Graph, NodeProto, tuple[int, ...]], Move | None]] = {
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _softmax,
    "Concat": _concat,
    "Split": _split,
    "Pad": _pad,
    "Slice": _slice,
    "ArgMax": _arg,
    "ArgMin": _arg,
}
