"""Making the plan of a static quantization: which layers, what to measure, which types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_lab.base import Outcome, Progress
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.macs import Macs
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.quantization.layer_rounding import output_shift, round_layer
from onnxslim_lab.quantization.plan import Plan, values_of
from onnxslim_lab.quantization.scheme import Scheme
from onnxslim_lab.quantization.static_layers import StaticLayer, bias_of, why_not_static
from onnxslim_lab.quantization.static_types import check_types
from onnxslim_lab.quantization.types import find_type
from onnxslim_lab.selection import Target
from onnxslim_lab.statistics import Calibration, Statistics, Want
from onnxslim_lab.statistics.collected import node_place

if TYPE_CHECKING:
    from onnxslim_lab.passes.quantize import Quantize


def scheme_of(step: Quantize) -> Scheme:
    """Return the types and options of a step, "auto" decided by its target.

    Raises:
        ParameterError: The target does not run layers of these types.
    """
    profile = find_profile(step.target)
    activations = find_type(profile.activations if step.activations == "auto" else step.activations)
    weights = find_type(profile.weights if step.weights == "auto" else step.weights)
    check_types(activations, weights, profile)
    return Scheme(
        activations=activations,
        weights=weights,
        profile=profile,
        symmetric_activations=profile.symmetric_activations or activations.floating,
        symmetric_weights=step.symmetric,
        per_channel=step.granularity != "tensor" and profile.per_channel,
        reduce_range=profile.reduce_range and not step.activations.startswith("float"),
        ranges=step.ranges,
        percentile=step.percentile,
    )


def least_opset(scheme: Scheme, *, half: bool) -> int:
    """Return the least opset that holds the types."""
    return max(13, scheme.activations.opset, scheme.weights.opset, 19 if half else 0)


def plan_layers(
    targets: list[Target], scheme: Scheme, macs: Macs
) -> tuple[list[StaticLayer], list[tuple[Layer, str]]]:
    """Return the layers that can run on codes, and those that cannot, with the reason."""
    counts = {node_place(layer.graph, layer.node): count for layer, count in macs.layers}
    found: list[StaticLayer] = []
    others: list[tuple[Layer, str]] = []
    names: Counter[str] = Counter()
    for layer in (layer for target in targets for layer in target.layers):
        reason = why_not_static(layer, scheme.profile)
        if reason:
            others.append((layer, reason))
            continue
        key = node_place(layer.graph, layer.node)
        names[layer.name] += 1
        name = layer.name if names[layer.name] == 1 else f"{layer.name}#{names[layer.name]}"
        found.append(StaticLayer(name, key, layer, counts.get(key)))
    return found, others


def make_plan(
    model: Graph,
    layers: list[StaticLayer],
    scheme: Scheme,
    calibration: Calibration | None,
    tables: Sequence[Layer] = (),
) -> tuple[Plan, dict[str, str]]:
    """Measure what the layers need and return the plan.

    Args:
        model: The prepared float model; it is not changed.
        layers: The layers that can run on codes.
        scheme: The types.
        calibration: The data.
        tables: Gather layers whose tables may be stored in codes.

    Returns:
        The plan, and by name the layers that the data says nothing of, with the reason.

    Raises:
        ParameterError: There is no calibration data.
    """
    if calibration is None:
        raise ParameterError("quantize needs calibration data to choose the ranges of activations by")
    values = values_of(model, layers, scheme, tables)
    histogram = scheme.ranges not in ("minmax", "average")
    average = scheme.ranges != "minmax"
    wants = [Want(*value, histogram=histogram, average=average) for value in values]
    statistics = calibration.collect(model, wants)
    sound: list[StaticLayer] = []
    unseen: dict[str, str] = {}
    for planned in layers:
        reason = _unmeasured(values_of(model, [planned], scheme, tables), statistics)
        if reason:
            unseen[planned.name] = reason
        else:
            sound.append(planned)
    return Plan(model, sound, scheme, statistics, tables), unseen


def _unmeasured(values: Sequence[tuple[Graph, str]], statistics: Statistics) -> str:
    """Return why a layer's values have no range, "" when they have."""
    for graph, value in values:
        found = statistics.get(graph, value)
        if found is not None and found.nonfinite:
            return f"{value!r} is not finite on the calibration data"
        if found is None or found.empty:
            return f"the calibration data never computes {value!r}: a branch that is not taken"
    return ""


def round_weights(
    plan: Plan, calibration: Calibration, rounding: str, outcome: Outcome, progress: Progress
) -> None:
    """Round the weights of a plan with their layers' Gram matrices, and find what that takes from the means.

    Weights that several layers share are rounded to nearest: what suits one would not suit the other. So are
    those whose inputs are so great that their Gram matrix overflows; the outcome says which.
    """
    counts = Counter((id(planned.layer.weight_graph), planned.layer.weight) for planned in plan.layers)
    alone = [p for p in plan.layers if counts[id(p.layer.weight_graph), p.layer.weight] == 1]
    grams = calibration.grams(plan.model, [planned.layer for planned in alone])
    for number, (planned, (layer, gram)) in enumerate(zip(alone, grams, strict=True)):
        progress(number + 1, len(alone), f"round {planned.name}")
        if not gram.count:
            continue
        if not np.isfinite(gram.matrix).all():
            outcome.refuse(planned.name, "its weight is rounded to nearest: squares of its inputs overflow")
        codes, grid = plan.weight(planned, layer)
        codes = round_layer(layer, grid, gram, learn=rounding == "adaround")
        plan.rounded[planned.name] = codes, grid
        if bias_of(layer) is not None:
            plan.shifts[planned.name] = output_shift(layer, codes, grid, gram)
