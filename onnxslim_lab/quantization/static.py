"""Static quantization of a whole model, from choosing layers to writing them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxslim_lab.base import Change, Context, Outcome
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.macs import fed_sizes, model_macs
from onnxslim_lab.quantization import weight_jobs
from onnxslim_lab.quantization.float_layers import choose_float
from onnxslim_lab.quantization.float_weights import (
    Stored,
    store_by_outputs,
    store_float_layers,
    store_weights,
    stored,
)
from onnxslim_lab.quantization.output_loss import Judge, choose_ranges, decibels, loss_at, slower
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.planning import (
    least_opset,
    make_plan,
    plan_layers,
    round_weights,
    scheme_of,
)
from onnxslim_lab.quantization.prepare import prepare
from onnxslim_lab.quantization.qoperator import format_of, write_operators
from onnxslim_lab.quantization.result_choice import float_sums
from onnxslim_lab.quantization.scheme import Scheme
from onnxslim_lab.quantization.static_layers import why_not_finite
from onnxslim_lab.quantization.term_choice import choose_terms
from onnxslim_lab.quantization.weight_prepare import layer_names
from onnxslim_lab.selection import Target, find_targets, matches

if TYPE_CHECKING:
    from onnxslim_lab.passes.quantize import Quantize


def apply_static(model: Graph, step: Quantize, context: Context) -> Outcome:
    """Quantize weights and activations of a model in place.

    Args:
        model: The main graph; bodies and functions are walked.
        step: The quantize pass.
        context: Its calibration measures activations and judges the outputs.

    Raises:
        ParameterError: There is no calibration data, a pattern matches nothing, or the target does not run the
            format.
        ModelError: The model cannot be raised to the opset that the types need; nothing was quantized.
    """
    outcome = Outcome()
    scheme = scheme_of(step)
    written = format_of(step.format, scheme.profile)
    planned = plan_static(model, step, scheme, context, outcome)
    if planned is None:
        return outcome
    plan, others, judge = planned.plan, planned.others, planned.judge
    left: list[str] = []
    expected = 0.0
    if judge is not None and (step.float_macs or step.float_sums):
        left, expected = _stay_float(judge, step, context, outcome)
    if judge is not None and step.terms > 1:
        if scheme.by_codes:
            expected = _two_terms(judge, left, step, context, outcome)
        else:
            outcome.refuse(model.name, "no two terms: they are for onnxruntime and activations in uint8")
    original = model.copy()
    outcome.merge(plan.write(model, without=left))
    if written != "qdq":
        outcome.merge(write_operators(model, microsoft=written == "microsoft"))
    _weights_alone(model, others, judge, step, scheme, context, outcome)
    if judge is not None and left:
        weights = _weights_of(plan, left)
        outcome.merge(store_float_layers(model, weights, judge, step, scheme, context, expected))
    if plan.layers and scheme.profile.is_onnxruntime:
        notice = slower(context, original, model)
        if notice:
            outcome.refuse(model.name or "model", notice)
    return outcome


@dataclass(frozen=True)
class Planned:
    """The plan of a step; the layers it leaves out, with the reason; what judges it, None without layers."""

    plan: Plan
    others: list[tuple[Layer, str]]
    judge: Judge | None


def plan_static(
    model: Graph, step: Quantize, scheme: Scheme, context: Context, outcome: Outcome
) -> Planned | None:
    """Return what a step does to a model, which is prepared for it in place; None when it selects nothing.

    Activations are measured, weights rounded and, where the outputs decide, ranges chosen here; raises as
    `apply_static`. What preparing did, and what is refused, is added to the outcome.
    """
    selected = Outcome()
    targets = weight_jobs.select(model, step, selected)
    if not targets:
        outcome.merge(selected)
        return None
    if context.calibration is None:
        raise ParameterError("quantize needs calibration data to choose the ranges of activations by")
    half = any(layer.stored.used_type == 10 for target in targets for layer in target.layers)
    opset = least_opset(scheme, half=half)
    prepare(model, opset, context, outcome, gemms=scheme.profile.is_onnxruntime)
    targets = select(model, step, outcome)
    dims = fed_sizes(model, next(iter(context.calibration.data.feeds), {}))
    macs = model_macs(model, dims)
    layers, others = plan_layers(targets, scheme, macs)
    tables = [layer for layer, _ in others if layer.op_type == "Gather" and not why_not_finite(layer)]
    plan, unseen = make_plan(model, layers, scheme, context.calibration, tables)
    plan.elements = macs.elements
    others += [(layer.layer, unseen[layer.name]) for layer in layers if layer.name in unseen]
    rounding = "gptq" if step.rounding == "auto" else step.rounding
    if step.ranges == "auto":
        plan.use_ranges("minmax")  # until the outputs decide
    if rounding != "nearest":
        round_weights(plan, context.calibration, rounding, outcome, context.progress)
    if not plan.layers:
        return Planned(plan, others, None)
    judge = Judge(plan, context)
    if step.ranges == "auto":
        outcome.change(plan.model.name, choose_ranges(judge))
    return Planned(plan, others, judge)


def _stay_float(judge: Judge, step: Quantize, context: Context, outcome: Outcome) -> tuple[list[str], float]:
    """Return the layers that sensitivity leaves float, and the loss that this was chosen for.

    Results that spoil the outputs stay float if asked for.
    """
    plan = judge.plan
    if step.float_sums and not plan.scheme.by_codes:
        outcome.refuse(plan.model.name, "no float sums: they are for onnxruntime and activations in uint8")
    if step.float_sums:
        _sum_in_float(judge, (), context, outcome)
    if not step.float_macs:
        return [], 0.0
    enough = loss_at(step.float_until)
    summed = len(plan.summed)
    choice = choose_float(
        judge,
        step.float_macs,
        context,
        ranges=step.ranges == "auto",
        results=step.terms == 1,  # else chosen with the two terms, which gain more with than after them
        enough=enough,
    )
    for one in choice.restored:
        for name in one.names:
            share = one.macs / max(plan.macs, 1)
            part = f"{one.caused:.1%}" if one.caused < 1 else "all"
            why = (
                f"beside the others that do, this takes {part} of the output error away"
                if one.beside
                else f"quantized alone it causes {part} of the output error that all cause together"
            )
            outcome.refuse(name, f"stays float: {why}, with {share:.2%} of the multiply-accumulates")
    names = choice.names
    if plan.residuals:
        outcome.change(plan.model.name, f"{len(plan.residuals)} sums of residual connections stay float")
    if len(plan.summed) > summed:
        outcome.change(
            plan.model.name,
            f"{len(plan.summed) - summed} convolutions on codes give float results, as products of matrices",
        )
    if names:
        share = choice.macs / max(plan.macs, 1)
        what = (
            f"{len(names)} layers with {share:.1%} of the multiply-accumulates stay float: the output error falls "
            f"from {decibels(choice.before):.1f} to {decibels(choice.after):.1f} dB"
        )
        outcome.changes.append(Change(plan.model.name, what, detail={"float_macs": share}))
        if choice.ranges:
            outcome.change(plan.model.name, f"then {choice.ranges}")
    else:
        outcome.refuse(
            plan.model.name, f"no layer stays float: the output error {_why_none(choice.before, enough)}"
        )
    if names and step.float_sums:
        _sum_in_float(judge, names, context, outcome)
    if step.ranges == "auto" and step.float_sums and plan.summed:
        outcome.change(plan.model.name, f"then {choose_ranges(judge, names)}")
    return names, choice.after


def _two_terms(judge: Judge, left: list[str], step: Quantize, context: Context, outcome: Outcome) -> float:
    """Let layers whose rounded input spoils the outputs read it as two terms; say so and return the loss."""
    plan = judge.plan
    enough = loss_at(step.float_until)
    terms = choose_terms(judge, left, context, enough)
    if not terms.layers:
        why = _why_none(terms.before, enough)
        if terms.after < terms.before:
            both = f"{decibels(terms.before):.1f} to {decibels(terms.after):.1f} dB"
            why = f"falls from {both} with results that stay float"
        outcome.refuse(plan.model.name, f"no input is of two terms: the output error {why}")
        return terms.after
    share = terms.macs / max(plan.macs, 1)
    what = (
        f"{len(terms.layers)} layers multiply inputs of two terms, which takes {share:.1%} of the multiply-accumulates "
        f"a second time: the output error falls from {decibels(terms.before):.1f} to {decibels(terms.after):.1f} dB"
    )
    outcome.changes.append(Change(plan.model.name, what, detail={"terms_macs": share}))
    if step.ranges == "auto":
        outcome.change(plan.model.name, f"then {choose_ranges(judge, left)}")
        return judge.loss(without=left)
    return terms.after


def _why_none(loss: float, enough: float) -> str:
    """Return why nothing was chosen to lower a loss."""
    return f"is {decibels(loss):.1f} dB" if loss <= enough else "falls noticeably with none"


def _weights_of(plan: Plan, names: Collection[str]) -> set[Stored]:
    return stored(layer.layer for layer in plan.layers if layer.name in names)


def _sum_in_float(judge: Judge, without: Sequence[str], context: Context, outcome: Outcome) -> None:
    """Let results that spoil the outputs stay float; say so."""
    already = len(judge.plan.summed)
    before, after = float_sums(judge, without, context)
    added = len(judge.plan.summed) - already
    if added:
        outcome.change(
            judge.plan.model.name,
            f"{added} convolutions on codes give float results: the output error falls from "
            f"{decibels(before):.1f} to {decibels(after):.1f} dB",
        )


def _weights_alone(
    model: Graph,
    others: list[tuple[Layer, str]],
    judge: Judge | None,
    step: Quantize,
    scheme: Scheme,
    context: Context,
    outcome: Outcome,
) -> None:
    """Store the weights of layers quantized that cannot run on codes; their activations stay float.

    Tables that layers on codes look up are in codes already.
    """
    others = [(layer, why) for layer, why in others if layer.weight_graph.is_constant(layer.weight)]
    if not others:
        return
    weights = stored(layer for layer, _ in others)
    if judge is not None and (step.float_macs or step.terms > 1):
        store_by_outputs(model, weights, judge, step, scheme, context, outcome)
    else:
        store_weights(model, weights, step, scheme, context, outcome)
    for layer, reason in others:
        outcome.refuse(layer.name, f"its activations stay float: {reason}")


def select(model: Graph, step: Quantize, outcome: Outcome) -> list[Target]:
    """Return the weights that a step selects in the prepared model, where some names may be gone.

    Patterns were checked against the model as it came: one that now matches nothing named what
    simplification removed.
    """
    known = layer_names(model)
    include, exclude = (
        tuple(pattern for pattern in patterns if matches(pattern, known))
        for patterns in (step.include, step.exclude)
    )
    if step.include and not include:
        outcome.refuse(model.name, "simplification removed all that the include patterns match")
        return []
    targets = find_targets(model, outcome, step=step.pass_name(), include=include, exclude=exclude)
    chosen = []
    for target in targets:
        other = next((layer for layer in target.layers if layer.op_type not in step.op_types), None)
        if other is None or not step.op_types:
            chosen.append(target)
        else:
            outcome.refuse(target.where, f"{other.op_type} is not among op_types")
    return chosen
