"""Variants of a quantized model: one layer quantized, all but one, all; made as often as needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.macs import fed_sizes, model_macs
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.planning import scheme_of
from onnxslim_lab.quantization.static import plan_static
from onnxslim_lab.quantization.weight_codes import decode_codes
from onnxslim_lab.quantization.weight_fill import spread_fills
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

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layers = [Named(layer.name, layer.layer.op_type, layer.macs) for layer in plan.layers]

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
        counts = model_macs(model, fed_sizes(model, feed)).layers
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
    made: PlanVariants | StepVariants | None
    if isinstance(step, Quantize) and step.mode == "static":
        prepared = model.copy()
        spread_fills(prepared)
        decode_codes(prepared)
        planned = plan_static(prepared, step, scheme_of(step), context, Outcome())
        made = None if planned is None else PlanVariants(planned.plan)
    else:
        made = StepVariants(model, step, context, feed)
    if made is None or not made.layers:
        raise ParameterError(f"{step.pass_name()} changes no layer of the model: there is nothing to compare")
    return made
