"""Arithmetic, comparison and choice on small integer tensors of symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxslim_lab.symbols import dimensions
from onnxslim_lab.symbols.dimensions import Size, symbol
from onnxslim_lab.symbols.facts import Elements, Step, ValueRule

RULES: dict[str, ValueRule] = {}


def rule(*op_types: str) -> Callable[[ValueRule], ValueRule]:
    """Register a rule for operators of the default domain."""

    def register(function: ValueRule) -> ValueRule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def elementwise(function: Callable[..., Size], *arrays: Elements) -> Elements:
    """Apply a function of sizes to arrays with broadcasting."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)


def truth(item: Size) -> Size:
    """Return 0 for a zero, 1 for anything else."""
    known = dimensions.equal(item, 0)
    return symbol(f"true({item})") if known is None else int(not known)


def _equal(first: Size, second: Size) -> Size:
    known = dimensions.equal(first, second)
    return symbol(f"equal({', '.join(sorted((str(first), str(second))))})") if known is None else int(known)


def _less(first: Size, second: Size) -> Size:
    known = dimensions.less(first, second)
    return symbol(f"less({first}, {second})") if known is None else int(known)


def _not(item: Size) -> Size:
    return dimensions.subtract(1, item)


BINARY: dict[str, Callable[[Size, Size], Size]] = {
    "Add": dimensions.add,
    "Sub": dimensions.subtract,
    "Mul": dimensions.multiply,
    "Equal": _equal,
    "Less": _less,
    "Greater": lambda first, second: _less(second, first),
    "LessOrEqual": lambda first, second: _not(_less(second, first)),
    "GreaterOrEqual": lambda first, second: _not(_less(first, second)),
    "And": dimensions.multiply,
    "Or": lambda first, second: _not(dimensions.multiply(_not(first), _not(second))),
    "Xor": lambda first, second: _not(_equal(first, second)),
}


@rule(*BINARY)
def binary(step: Step) -> list[Elements] | None:
    """Arithmetic and comparison of two tensors."""
    first, second = step.values(0), step.values(1)
    if first is None or second is None or step.attribute("broadcast"):
        return None
    return [elementwise(BINARY[step.node.op_type], first, second)]


@rule("Div", "Mod")
def divide(step: Step) -> list[Elements] | None:
    """Integer division towards zero, and the remainder with the divisor's sign (fmod=0)."""
    first, second = step.values(0), step.values(1)
    if first is None or second is None or step.attribute("fmod") or step.attribute("broadcast"):
        return None
    if any(dimensions.equal(item, 0) for item in second.reshape(-1)):
        return None
    function = dimensions.truncate_divide if step.node.op_type == "Div" else dimensions.modulo
    return [elementwise(function, first, second)]


@rule("Min", "Max")
def extreme(step: Step) -> list[Elements] | None:
    """Elementwise smallest or largest of all inputs."""
    function = dimensions.minimum if step.node.op_type == "Min" else dimensions.maximum
    result = step.values(0)
    for index in range(1, len(step.node.input)):
        other = step.values(index)
        if result is None or other is None:
            return None
        result = elementwise(function, result, other)
    return None if result is None else [result]


@rule("Neg", "Abs", "Not")
def unary(step: Step) -> list[Elements] | None:
    """Sign change, magnitude, negation."""
    values = step.values(0)
    if values is None:
        return None
    if step.node.op_type == "Not":
        return [elementwise(_not, values)]
    negative = elementwise(lambda item: dimensions.multiply(item, -1), values)
    return [negative if step.node.op_type == "Neg" else elementwise(dimensions.maximum, values, negative)]


@rule("Where")
def where(step: Step) -> list[Elements] | None:
    """A choice by a condition; kept as one symbol while the condition is open."""
    condition, first, second = step.values(0), step.values(1), step.values(2)
    if condition is None or first is None or second is None:
        return None
    return [elementwise(_choose, condition, first, second)]


def _choose(condition: Size, first: Size, second: Size) -> Size:
    if isinstance(condition, int):
        return first if condition else second
    if first == second:
        return first
    low = [dimensions.low_of(first), dimensions.low_of(second)]
    known = [bound for bound in low if bound is not None]
    return symbol(f"where({condition}, {first}, {second})", min(known) if len(known) == 2 else None)
