"""Variants of a quantized model: one layer quantized, all but one, all; made as often as needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from onnx import TensorProto

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.macs import model_macs
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization import weight_jobs
from onnxslim_lab.quantization.output_loss import Judge, choose_ranges
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.planning import least_opset, make_plan, plan_layers, round_weights, scheme_of
from onnxslim_lab.quantization.prepare import prepare
from onnxslim_lab.quantization.static import select
from onnxslim_lab.quantization.static_layers import key_of
from onnxslim_lab.selection import matches
from onnxslim_lab.worker.messages import Value


@dataclass(frozen=True)
class Named:
    """A layer whose sensitivity is measured."""

    name: str
    op_type: str
    macs: int | None


class Variants(Protocol):
    """Makes the variants of a model under one lossy step."""

    @property
    def layers(self) -> list[Named]:
        """The layers that the step changes."""

    def make(self, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> Graph:
        """Return a new model with the step applied to these layers."""


class PlanVariants:
    """Variants of static quantization: activations are measured once, in the plan."""

    def __init__(self, plan: Plan, feed: Mapping[str, Value]) -> None:
        self.plan = plan
        counted = model_macs(plan.model, sizes_of(plan.model, feed)).layers
        counts = {key_of(layer.graph, layer.node): macs for layer, macs in counted}
        self.layers = [
            Named(layer.name, layer.layer.op_type, counts.get(layer.key, layer.macs)) for layer in plan.layers
        ]

    def make(self, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> Graph:
        """Return a copy of the model with these layers quantized."""
        graph = self.plan.model.copy()
        self.plan.write(graph, only=only, without=without)
        return graph


class StepVariants:
    """Variants of any pass with `include` and `exclude`: run again for each."""

    def __init__(self, model: Graph, step: Any, context: Context, feed: Mapping[str, Value]) -> None:
        if not {"include", "exclude"} <= type(step).model_fields.keys():
            raise ParameterError(
                f"{step.pass_name()} has no include and exclude, so that its layers cannot be told apart"
            )
        self.model, self.step, self.context = model, step, context
        changed = {change.where for change in step.run(model.copy(), context).changes}
        counts = model_macs(model, sizes_of(model, feed)).layers
        self.layers = [
            Named(layer.name, layer.op_type, macs)
            for layer, macs in counts
            if not changed.isdisjoint({layer.name, layer.node.name, layer.weight})
            and not any(matches(pattern, (layer.name, layer.weight)) for pattern in step.exclude)
        ]

    def make(self, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> Graph:
        """Return a copy of the model with the step applied to these layers."""
        update: dict[str, Any] = {"exclude": (*self.step.exclude, *without)}
        if only is not None:
            update["include"] = tuple(only)
        graph = self.model.copy()
        self.step.model_copy(update=update).run(graph, self.context)
        return graph


def sizes_of(model: Graph, feed: Mapping[str, Value]) -> dict[str, int]:
    """Return the sizes that a feed gives to the open dimensions of the model's inputs, by their names.

    Nameless dimensions are called "input:axis".
    """
    sizes: dict[str, int] = {}
    for name in model.inputs:
        value, shape = feed.get(name), model.shape_of(name)
        if isinstance(value, np.ndarray) and shape is not None and len(shape) == value.ndim:
            for axis, (size, given) in enumerate(zip(shape, value.shape, strict=True)):
                if not isinstance(size, int):
                    sizes[size or f"{name}:{axis}"] = given
    return sizes


def variants_of(
    model: Graph, step: Pass, context: Context, feed: Mapping[str, Value]
) -> PlanVariants | StepVariants:
    """Return the variants of a model under a step; the model is not changed.

    Args:
        model: The main graph.
        step: A pass with `include` and `exclude`.
        context: What the pass is run with.
        feed: A feed, for the sizes of open dimensions.

    Raises:
        ParameterError: The step's layers cannot be told apart, or it finds no layer.
    """
    made: PlanVariants | StepVariants
    if isinstance(step, Quantize) and step.mode == "static":
        made = PlanVariants(_static_plan(model.copy(), step, context), feed)
    else:
        made = StepVariants(model, step, context, feed)
    if not made.layers:
        raise ParameterError(f"{step.pass_name()} changes no layer of the model: there is nothing to compare")
    return made


def _static_plan(model: Graph, step: Quantize, context: Context) -> Plan:
    """Return the plan that `quantize` makes of a model, which is prepared in place."""
    scheme = scheme_of(step)
    targets = weight_jobs.select(model, step, Outcome())
    half = any(layer.stored.used_type == TensorProto.FLOAT16 for target in targets for layer in target.layers)
    prepare(model, least_opset(scheme, half=half), context, Outcome())
    layers, _ = plan_layers(model, select(model, step, Outcome()), scheme, {})
    plan, _ = make_plan(model, layers, scheme, context.calibration)
    rounding = "gptq" if step.rounding == "auto" else step.rounding
    if rounding != "nearest" and context.calibration is not None:
        round_weights(plan, context.calibration, rounding, context.progress)
    if step.ranges == "auto" and plan.layers:
        choose_ranges(Judge(plan, context))
    return plan
