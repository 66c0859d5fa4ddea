"""What of a plan may give float results from codes, and which values may be read as two terms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.static_layers import StaticLayer
from onnxslim_lab.quantization.sums import summable
from onnxslim_lab.quantization.terms import why_not_terms


@dataclass(frozen=True)
class Split:
    """A value that may be read as two terms.

    Attributes:
        value: Its name.
        readers: The layers that read it.
        sums: Names of the convolutions that give float sums then.
    """

    value: str
    readers: tuple[StaticLayer, ...]
    sums: frozenset[str]


def summable_layers(plan: Plan, without: Collection[str]) -> list[StaticLayer]:
    """Return the layers that may give float sums when all but `without` run on codes."""
    if not plan.scheme.by_codes:
        return []
    without = plan.doubled.union(without)
    found = []
    for part in plan.model.walk():
        here = {
            id(planned.layer): planned
            for planned in plan.layers
            if planned.layer.graph is part and planned.name not in without
        }
        layers = [planned.layer for planned in here.values()]
        found += [here[id(one)] for one in summable(part, layers, plan.scheme.profile.operators)]
    return found


def splittable(plan: Plan, without: Collection[str]) -> list[Split]:
    """Return the values that layers may read as two terms when all but `without` run on codes.

    With each value, the layers that read it and the convolutions that give float sums then, because nothing
    takes their result in codes.
    """
    if not plan.scheme.by_codes:
        return []
    readers: dict[tuple[int, str], list[StaticLayer]] = {}
    for planned in plan.layers:
        if planned.name not in plan.doubled.union(without):
            key = id(planned.layer.graph), planned.layer.node.input[0]
            readers.setdefault(key, []).append(planned)
    before = {layer.name for layer in summable_layers(plan, without)}
    found = []
    for (_, value), layers in readers.items():
        reasons = [
            why_not_terms(one.layer, symmetric=plan.scheme.symmetric_weights) or one.macs is None
            for one in layers
        ]
        if not any(reasons):
            names = {layer.name for layer in layers}
            after = {layer.name for layer in summable_layers(plan, names.union(without))}
            found.append(Split(value, tuple(layers), frozenset(after - before)))
    return found
