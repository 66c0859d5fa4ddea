"""What settings of a node, constants and shapes say for certain."""

from __future__ import annotations

import math

from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.shapes import Dim


def all_equal(graph: Graph, value: str, number: float) -> bool:
    """Whether every element of a constant is this number; False for empty and for unknown values."""
    found = graph.constant_type(value) if value else None
    if found is None or 0 in found[1]:
        return False
    values = graph.constant(value)
    assert values is not None
    flat = values.reshape(-1)
    return bool(flat[0] == number) and bool((flat == number).all())


def integers(graph: Graph, node: NodeProto, name: str, index: int | None) -> list[int] | None:
    """Return a setting that is an attribute in some versions of an operator and an input in others.

    An absent setting is []; None when it is not known before the model runs.
    """
    listed = attribute(node, name)
    if listed is not None:
        return list(listed) if isinstance(listed, list) else [listed]
    if index is None or len(node.input) <= index or not node.input[index]:
        return []
    values = graph.constant(node.input[index])
    return None if values is None else [int(number) for number in values.reshape(-1)]


def trusted_shape(graph: Graph, value: str) -> tuple[Dim, ...] | None:
    """Return a value's shape, None where the model only declares it: that of an output may not be what it is."""
    scope = graph.scope_of(value)
    if scope is None or (scope.is_output(value) and scope.producer(value) is not None):
        return None
    return graph.shape_of(value)


def broadcasts_into(other: tuple[Dim, ...] | None, target: tuple[Dim, ...] | None) -> bool:
    """Whether broadcasting with `other` leaves the shape `target` as it is.

    >>> broadcasts_into((1, "N"), (2, 3, "N")), broadcasts_into((3,), (1,)), broadcasts_into((), None)
    (True, False, True)
    """
    if other is not None and not other:
        return True
    if other is None or target is None or len(other) > len(target):
        return False
    ends = target[len(target) - len(other) :]
    return all(a == 1 or (a is not None and a == b) for a, b in zip(other, ends, strict=True))


def same_shape(first: tuple[Dim, ...] | None, second: tuple[Dim, ...] | None, *, slack: int = 0) -> bool:
    """Whether two shapes are certainly equal.

    Args:
        first: A shape.
        second: Another. A size known here and not in `first` is not taken as equal: it says more.
        slack: Axes that may be unknown: one, where the number of elements is known to be equal.
    """
    if first is None or second is None or len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a is None or a != b:
            if isinstance(b, int) or slack == 0:
                return False
            slack -= 1
        elif a == 0:
            return False  # with no elements their number says nothing
    return True


def clip_bounds(graph: Graph, node: NodeProto) -> tuple[float | None, float | None]:
    """Return Clip's least and greatest value; infinite when absent, None when not known beforehand."""
    if graph.opset() < 11:
        return attribute(node, "min", -math.inf), attribute(node, "max", math.inf)
    return _bound(graph, node, 1, -math.inf), _bound(graph, node, 2, math.inf)


def _bound(graph: Graph, node: NodeProto, index: int, absent: float) -> float | None:
    name = node.input[index] if len(node.input) > index else ""
    values = graph.constant(name) if name else None
    if not name:
        return absent
    return None if values is None or values.size != 1 else float(values.reshape(-1)[0])
