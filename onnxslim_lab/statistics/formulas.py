"""Ranges that follow from other ranges by a formula, so that nothing has to be measured for them.

This holds for the range over all feeds, not for that of each: the formula is worked out once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.statistics.following import MOVING, bounds, source_of

Range = tuple[float, float]
Ends = NDArray[Any]  # the least and the greatest element, in the type of the value

_TYPES = {1: np.float32, 11: np.float64}


@dataclass(frozen=True)
class Formula:
    """How a range follows from those of other values.

    Attributes:
        sources: The other values.
        of: The range for theirs; not sorted.
        same_size: Whether the value has as many elements as its sources together.
    """

    sources: tuple[str, ...]
    of: Callable[[Sequence[Range]], Range]
    same_size: bool = True

    def range(self, sources: Sequence[Range]) -> Range:
        """Return the range for the ranges of the sources; infinite or NaN where that overflows."""
        with np.errstate(all="ignore"):
            low, high = self.of(sources)
        return (low, high) if low <= high else (high, low)


def formula_of(graph: Graph, value: str, measured: Container[str]) -> Formula | None:
    """Return the formula of a value's range from measured ones, None when it has to be measured.

    A value that is monotone in one other, elementwise, takes its extremes where that one does: scalings and
    shifts by a scalar exactly so, in the arithmetic of its type; Sigmoid, Tanh and HardSigmoid to the rounding
    of their last bit.
    """
    node = graph.producer(value)
    if node is None or domain_of(node.domain) or value != node.output[0]:
        return None
    if node.op_type == "Pad":
        return _padding(graph, value, measured)
    if node.op_type == "Concat":
        return (
            Formula(tuple(node.input), _union)
            if all(name in measured for name in node.input) and node.input
            else None
        )
    if node.op_type in MOVING and node.input[0] in measured:
        return Formula((node.input[0],), lambda ranges: ranges[0])
    kind = _TYPES.get(graph.dtype_of(value))
    moving = [name for name in node.input if name in measured]
    if kind is None or len(moving) != 1 or graph.dtype_of(moving[0]) not in _TYPES:
        return None
    function = _elementwise(graph, node, moving[0], kind)
    if function is None:
        return None

    def of(ranges: Sequence[Range]) -> Range:
        low, high = function(np.array(ranges[0], kind)).tolist()
        return low, high

    return Formula((moving[0],), of)


def _union(ranges: Sequence[Range]) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _padding(graph: Graph, value: str, measured: Container[str]) -> Formula | None:
    """Return the formula of a Pad by a constant number of rows of a constant."""
    source = source_of(graph, value, measured)
    if source is None or source.value not in measured:
        return None
    pads: Sequence[int] = source.fixed_pads
    if source.pads:
        constant = graph.constant(source.pads)
        if constant is None:
            return None
        pads = constant.reshape(-1).tolist()
    if min(pads, default=0) < 0:
        return None
    fill = source.fill
    if not any(pads):
        return Formula((source.value,), lambda ranges: ranges[0])
    return Formula((source.value,), lambda ranges: _union([ranges[0], (fill, fill)]), same_size=False)


def _elementwise(graph: Graph, node: NodeProto, moving: str, kind: Any) -> Callable[[Ends], Ends] | None:
    """Return the monotone function of one input that a node computes elementwise, None for any other."""
    clipped = bounds(graph, node)
    if clipped is not None and node.input[0] == moving:
        low, high = clipped
        return lambda ends: np.clip(ends, low, high)
    alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    unary: dict[str, Callable[[Ends], Ends]] = {
        "Neg": np.negative,
        "Tanh": np.tanh,
        "Sigmoid": _sigmoid,
        "HardSigmoid": lambda ends: _hard_sigmoid(ends, alpha, beta),
    }
    if node.op_type in unary:
        return unary[node.op_type]
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.input) != 2:
        return None
    first = node.input[0] == moving
    constant = graph.constant(node.input[1 if first else 0])
    if constant is None or constant.size != 1 or constant.dtype != kind or not np.isfinite(constant).all():
        return None
    scalar = constant.reshape(())
    if node.op_type == "Div" and (not first or not scalar):
        return None
    binary: dict[str, Callable[[Any, Any], Any]] = {
        "Add": np.add,
        "Sub": np.subtract,
        "Mul": np.multiply,
        "Div": np.divide,
    }
    function = binary[node.op_type]
    return (lambda ends: function(ends, scalar)) if first else (lambda ends: function(scalar, ends))


def dip_of(graph: Graph, value: str) -> tuple[str, Callable[[Ends], Ends], float] | None:
    """Return (x, f, m) of a value f(x) that falls with x to its least at m and rises from there on.

    These are HardSwish and Swish, x times a Sigmoid or HardSigmoid of it: their greatest element is at an end
    of the range of x, and nothing is below f(m). None for anything else, and where x is not float32.
    """
    node = graph.producer(value)
    if node is None or domain_of(node.domain) or graph.dtype_of(value) != 1:
        return None
    if node.op_type == "HardSwish":
        return node.input[0], partial(_hard_swish, alpha=1 / 6, beta=0.5), -1.5
    if node.op_type != "Mul":
        return None
    for x, gate in (node.input, node.input[::-1]):
        by = graph.producer(gate)
        if by is None or domain_of(by.domain) or by.input[0] != x:
            continue
        if by.op_type == "Sigmoid":
            return x, lambda x: x * _sigmoid(x), -1.2784645
        if by.op_type == "HardSigmoid":
            slope, at_zero = attribute(by, "alpha", 0.2), attribute(by, "beta", 0.5)
            if slope > 0 and 0 < at_zero < 2:
                gated = partial(_hard_swish, alpha=slope, beta=at_zero)
                return x, gated, -at_zero / (2 * slope)
    return None


def dip_range(x: Range, function: Callable[[Ends], Ends], low: float) -> Range:
    """Return the range of such a value for that of x: its least element is known."""
    ends = function(np.array(x, np.float32)).astype(np.float32)
    return low, float(ends.max())


def _sigmoid(x: Ends) -> Ends:
    one = x.dtype.type(1)
    return np.asarray(one / (one + np.exp(-x)))


def _hard_sigmoid(x: Ends, alpha: float, beta: float) -> Ends:
    return np.asarray(np.clip(x.dtype.type(alpha) * x + x.dtype.type(beta), 0, 1))


def _hard_swish(x: Ends, alpha: float, beta: float) -> Ends:
    return np.asarray(x * _hard_sigmoid(x, alpha, beta))
