"""What of a plan may give float results from codes, and which values may be read as two terms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.placement import Placement, fused_output
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.static_layers import StaticLayer
from onnxslim_lab.quantization.terms import why_not_terms
from onnxslim_lab.quantization.unrolling import windows_of
from onnxslim_lab.statistics.following import MOVING

_PASSING = MOVING | {"Clip", "LeakyRelu", "Relu"}


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
    """Return the Conv layers that may give float sums when all but `without` run on codes.

    Those whose results nothing takes in codes; and those that are written as MatMul, if something reads them in float.
    """
    if not plan.scheme.by_codes:
        return []
    able = [
        one
        for one in plan.layers
        if one.name not in plan.doubled.union(without)
        and one.layer.op_type == "Conv"
        and attribute(one.layer.node, "group", 1) == 1
    ]
    trial = replace(plan, summed={one.name for one in able})
    return [
        one
        for placed in trial.placements(without)
        for one in able
        if one.layer.graph is placed.graph and _is_wanted(plan, placed, one.layer)
    ]


def is_product(plan: Plan, layer: Layer) -> bool:
    """Whether a Conv is written as MatMul when its result stays float (see unrolling)."""
    coded = plan.scheme.weights.name == "int8" and plan.scheme.symmetric_weights
    half = layer.stored.used_type == TensorProto.FLOAT16
    return coded and not half and windows_of(layer.node, layer.stored.shape) is not None


def _is_wanted(plan: Plan, placed: Placement, layer: Layer) -> bool:
    """Whether something reads in float what a Conv gives; if something else takes codes, only of a MatMul."""
    value = fused_output(placed.graph, layer.node)
    return value not in placed.roots or (placed.read_in_float(value) and is_product(plan, layer))


def splittable(plan: Plan, without: Collection[str]) -> list[Split]:
    """Return the values that layers may read as two terms when all but `without` run on codes.

    With each value, the layers that read it and the convolutions that give float sums then: those whose result
    nothing takes in codes any more, and the one that makes the value.
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
            after = {layer.name: layer for layer in summable_layers(plan, names.union(without))}
            behind = _made_by(layers[0].layer.graph, value)
            sums = {name for name, one in after.items() if name not in before or one.layer.node is behind}
            found.append(Split(value, tuple(layers), frozenset(sums - plan.summed)))
    return found


def _made_by(graph: Graph, value: str) -> NodeProto | None:
    """Return what makes a value, before it is activated and moved."""
    node = graph.producer(value)
    while node is not None and node.op_type in _PASSING and not domain_of(node.domain):
        node = graph.producer(node.input[0])
    return node
