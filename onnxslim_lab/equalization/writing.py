"""Writing scales into a model: weights, biases, normalizations, and copies of these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.equalization.balance import Plan
from onnxslim_lab.equalization.ends import on_matrix, scaled_constant, scaled_weight, write_constant
from onnxslim_lab.equalization.indexing import Array
from onnxslim_lab.equalization.region import ConstantEnd, LayerEnd
from onnxslim_lab.layers import Layer
from onnxslim_lab.rewriting.patterns import twin

_Factors = dict[tuple[int, str], tuple[Layer, list[tuple[Plan, LayerEnd]]]]


def write(plans: Sequence[Plan]) -> list[Plan]:
    """Scale every constant of the plans; returns those that would leave the range of a type, left out.

    Memory: one weight and its scaled copy at a time.
    """
    chosen = [plan for plan in plans if plan.logs.any()]
    dropped: list[Plan] = []
    while True:
        bad = next(filter(None, (_unfit(item) for item in _items(chosen))), None)
        if bad is None:
            break
        dropped += bad
        chosen = [plan for plan in chosen if plan not in bad]
    for layer, ends in _weights(chosen).values():
        array = scaled_weight(layer, _factor(layer, ends))
        assert array is not None
        layer.set(array)
    for plan in chosen:
        graph = plan.region.graph
        constants = plan.region.constants
        if plan.region.copies:
            constants = _copy(plan)
        for end in constants:
            values = scaled_constant(graph, end.node.input[end.slot], _divisor(plan, end))
            assert values is not None
            if plan.region.copies or (values != graph.constant(end.node.input[end.slot])).any():
                write_constant(graph, end.node, end.slot, values)
    return dropped


def _weights(plans: Sequence[Plan]) -> _Factors:
    """Return each weight to edit with the ends that give its factor, one for each side."""
    found: _Factors = {}
    for plan in plans:
        for end in plan.region.layers:
            key = (id(end.layer.weight_graph), end.layer.weight)
            _, ends = found.setdefault(key, (end.layer, []))
            if all(held.side != end.side for _, held in ends):  # others that share the weight agree
                ends.append((plan, end))
    return found


def _factor(layer: Layer, ends: Sequence[tuple[Plan, LayerEnd]]) -> Array:
    factor: Array = np.ones((1, 1, 1))
    for plan, end in ends:
        factor = factor * on_matrix(layer, end.side, plan.vector(end))
    return factor


def _divisor(plan: Plan, end: ConstantEnd) -> Array:
    return np.asarray(np.exp2(plan.logs[plan.region.scales_of(end.index)]))


_Item = tuple[Layer, list[tuple[Plan, LayerEnd]]] | tuple[Plan, ConstantEnd]


def _items(plans: Sequence[Plan]) -> list[_Item]:
    items: list[_Item] = list(_weights(plans).values())
    items += [(plan, end) for plan in plans for end in plan.region.constants]
    return items


def _unfit(item: _Item) -> list[Plan] | None:
    """Return the plans to drop when a constant cannot be scaled."""
    first, second = item
    if isinstance(first, Layer) and isinstance(second, list):
        return None if scaled_weight(first, _factor(first, second)) is not None else [p for p, _ in second]
    assert isinstance(first, Plan) and isinstance(second, ConstantEnd)  # noqa: PT018
    name = second.node.input[second.slot]
    return None if scaled_constant(first.region.graph, name, _divisor(first, second)) is not None else [first]


def _copy(plan: Plan) -> list[ConstantEnd]:
    """Give the region's layers a copy of the nodes that make their input; returns the copies' constants."""
    graph, region = plan.region.graph, plan.region
    value = region.copies[-1].output[0]
    made: dict[str, str] = {}
    ends = []
    for node in region.copies:
        inputs = [made.get(name, name) for name in node.input]
        own = twin(graph, node, inputs, "scaled")
        made[node.output[0]] = own.output[0]
        ends += [ConstantEnd(own, end.slot, end.index) for end in region.constants if end.node is node]
    for end in region.layers:
        reader = end.layer.node
        graph.set_inputs(reader, [made[value] if name == value else name for name in reader.input])
    return ends
