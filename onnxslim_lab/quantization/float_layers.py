"""Which layers stay float: those that spoil the outputs most for the time that they take in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_choice import Choice, Price, Restored, groups_of, names_of, pack
from onnxslim_lab.quantization.float_cost import FloatCost
from onnxslim_lab.quantization.float_weights import loss_without
from onnxslim_lab.quantization.output_loss import Judge, choose_ranges
from onnxslim_lab.quantization.residuals import float_residuals
from onnxslim_lab.quantization.result_choice import float_results
from onnxslim_lab.quantization.static_layers import StaticLayer

_NOTICEABLE = 0.01  # least part of the loss that a set of layers must cause
_STEPS = 12  # parts of a choice that are tried, at most
_WORTH_ALONE = (
    0.9  # times the loss, for the time of as many products as may stay float; a part saves its part
)
_WORTH_BESIDE = 0.95  # likewise, for what is chosen by what it gains beside others
_WORTH_BYTES = 0.5  # times the loss, for weights of 16 bits in layers that stay float: 3 dB


def choose_float(
    judge: Judge, share: float, context: Context, *, ranges: bool, results: bool = True, enough: float = 0.0
) -> Choice:
    """Return the layers to leave float; sums and results of layers that are worth it stay so in the plan.

    Where the outputs choose the ranges, they are tried under ranges that clip nothing as well as under those that
    suit all layers quantized. Clipping is a compromise with the layers that suffer without it: these can as well
    stay float, and the others keep what was seen. Which is better, the outputs tell.

    Args:
        judge: Measures the loss; its plan is left with the ranges that are best with the choice.
        share: Largest share of the multiply-accumulates to leave float.
        context: Its progress is told.
        ranges: Whether the outputs choose the ranges.
        results: Whether convolutions on codes may give float results.
        enough: The loss that is as good as none.
    """
    plan = judge.plan
    cost, budget = FloatCost(plan), share * plan.macs
    price = Price(cost, budget, enough, _WORTH_ALONE)
    found = []
    for method in dict.fromkeys((plan.ranges, "minmax") if ranges else (plan.ranges,)):
        plan.use_ranges(method)
        choice = float_layers(judge, price, context)
        if choice.restored and ranges:
            told = choose_ranges(judge, choice.names)
            after = loss_without(judge, choice.names, coded=choice.coded)
            choice = replace(choice, after=after, ranges=told)
        found.append((choice, plan.ranges))
    best, method = min(found, key=lambda one: price.of(one[0].after, one[0].names))
    plan.use_ranges(method)
    if best.after <= enough:
        return best
    price = Price(cost, budget, enough, _WORTH_BESIDE)
    best = float_residuals(judge, best, price, context)
    if results:
        best = float_results(judge, best, price, context)
    return more_layers(judge, best, price, context) if best.restored else best


def float_layers(judge: Judge, price: Price, context: Context) -> Choice:
    """Return the layers to leave float with the ranges that the plan has.

    Layers whose multiply-accumulates are not known stay quantized. Each candidate is measured by the loss of
    the model in which it alone is quantized: rounding errors of different layers add up, and so neighbours
    whose common values are the trouble are found, of which one alone in float would help nothing. Two choices
    are then tried, in parts and as a whole: what causes most within the budget, and what is worth most for its
    time (see float_cost): that of products as many as the budget must gain a tenth of the loss, a part of it a
    part of that. Their weights are to be stored in codes as well, wider ones only if that gains 3 dB.

    Args:
        judge: Measures the loss.
        price: Weighs it against time; it has the budget.
        context: Its progress is told.
    """
    candidates = _candidates(judge, price.budget)
    whole = judge.loss()
    none = Choice((), whole, whole)
    if not price.enough < whole < math.inf:
        return none
    worth = _noticed(candidates, context, lambda names: judge.loss(only=names) / whole)
    if not worth:
        return none
    parts = [
        *_parts(price.path(worth, none, all_of=False)),
        *_parts(price.path(pack(worth, price.budget), none, all_of=True)),
    ]
    choices = [
        Choice(part, whole, loss_without(judge, names_of(part), coded=coded), coded)
        for part in dict.fromkeys(parts)
        for coded in (True, False)
    ]
    least = {coded: min(one.after for one in choices if one.coded == coded) for coded in (True, False)}
    coded = least[False] >= _WORTH_BYTES * least[True]
    wanted = [none, *(one for one in choices if one.coded == coded)]
    return min(wanted, key=lambda one: price.of(one.after, one.names))


def more_layers(judge: Judge, choice: Choice, price: Price, context: Context) -> Choice:
    """Return a choice with what is worth its time beside it, measured by what else staying float gains.

    What a layer causes alone says little of what it gains once those that cause most stay float. Half as much is
    asked of it as there: it is measured, not estimated.

    Args:
        judge: Measures the loss, with the ranges that are best with the choice.
        choice: What stays float.
        price: Weighs the loss against time; it has the budget.
        context: Its progress is told.
    """
    if choice.after <= price.enough:
        return choice
    candidates = [
        group
        for group in _candidates(judge, price.budget - choice.macs)
        if not set(choice.names).intersection(layer.name for layer in group)
    ]

    def gain(names: tuple[str, ...]) -> float:
        return 1 - loss_without(judge, [*choice.names, *names], coded=choice.coded) / choice.after

    worth = _noticed(candidates, context, gain, beside=True)
    choices = [choice]
    for part in _parts(price.path(worth, choice, all_of=False)):
        both = (*choice.restored, *part)
        after = loss_without(judge, names_of(both), coded=choice.coded)
        choices.append(replace(choice, restored=both, after=after))
    return min(choices, key=lambda one: price.of(one.after, one.names))


def _candidates(judge: Judge, budget: float) -> list[tuple[StaticLayer, ...]]:
    counted = [layer for layer in judge.plan.layers if layer.macs is not None]
    return [group for group in groups_of(counted) if _macs(group) <= budget]


def _noticed(
    candidates: Sequence[tuple[StaticLayer, ...]],
    context: Context,
    part: Callable[[tuple[str, ...]], float],
    *,
    beside: bool = False,
) -> list[Restored]:
    """Return the candidates that a noticeable part of the loss is due to, as `part` measures it."""
    found = []
    for number, group in enumerate(candidates):
        names = tuple(layer.name for layer in group)
        told = f"sensitivity of {names[0]}" + (" beside the chosen" if beside else "")
        context.progress(number + 1, len(candidates), told)
        found.append(Restored(names, _macs(group), part(names), beside=beside))
    return [one for one in found if one.caused > _NOTICEABLE]


def _parts(path: Sequence[Restored]) -> list[tuple[Restored, ...]]:
    """Return the beginnings of a path that are tried, the whole path last."""
    ends = {math.ceil(len(path) * step / _STEPS) for step in range(1, _STEPS + 1)} - {0}
    return [tuple(path[:end]) for end in sorted(ends)]


def _macs(group: Sequence[StaticLayer]) -> int:
    return sum(layer.macs or 0 for layer in group)
