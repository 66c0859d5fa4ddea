"""Which layers stay float: those that spoil the outputs most for the multiply-accumulates they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_weights import round_in_float
from onnxslim_lab.quantization.output_loss import Judge
from onnxslim_lab.quantization.static_layers import StaticLayer

GROUPS = 60
"""Most sets of layers whose effect is measured; longer models are cut into runs of neighbours."""

_NOTICEABLE = 0.01  # least part of the loss that a set of layers must cause
_STEPS = 4  # parts of the chosen layers that are tried
_WORTH = 0.8  # times the loss, for layers to stay float: 1 dB; less is not worth what it takes of the speed
_WORTH_BYTES = 0.5  # times the loss, for weights of 16 bits in layers that stay float: 3 dB
_WORTH_SUMS = 0.9  # times the loss, for float sums, which take less of it
_MOST_SUMS = 12  # sets of layers whose sums are tried
_ENOUGH = 1.05  # a smaller part is taken when its loss is at most so many times the least


@dataclass(frozen=True)
class Restored:
    """Layers that stay float.

    Attributes:
        names: The layers.
        macs: Their multiply-accumulates.
        caused: The part of the loss that there is when they alone are quantized.
    """

    names: tuple[str, ...]
    macs: int
    caused: float


def groups_of(layers: Sequence[StaticLayer], most: int = GROUPS) -> list[tuple[StaticLayer, ...]]:
    """Return the layers as runs of neighbours of equal length, at most so many."""
    size = max(1, math.ceil(len(layers) / most))
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


def choose(candidates: Sequence[Restored], budget: float) -> list[Restored]:
    """Return what to restore within a budget of multiply-accumulates: those that cause most for each first.

    >>> first, second = Restored(("a",), 10, 0.5), Restored(("b",), 1, 0.2)
    >>> [one.names for one in choose([first, second], 10)]
    [('b',)]
    """
    chosen, left = [], budget
    for one in sorted(candidates, key=lambda one: one.caused / max(one.macs, 1), reverse=True):
        if one.caused > _NOTICEABLE and one.macs <= left:
            chosen.append(one)
            left -= one.macs
    return chosen


def float_layers(judge: Judge, share: float, context: Context) -> tuple[list[Restored], float, float]:
    """Return the layers to leave float, the loss with all layers quantized, and the loss without these.

    Layers whose multiply-accumulates are not known stay quantized. Each candidate is measured by the loss of
    the model in which it alone is quantized: rounding errors of different layers add up, and so neighbours
    whose common values are the trouble are found, of which one alone in float would help nothing. What is
    chosen is then tried, the worst part of it and all of it, and dropped when it gains less than 1 dB. Their
    weights are to be stored in codes as well, wider ones only if that gains 3 dB.

    Args:
        judge: Measures the loss.
        share: Largest share of the multiply-accumulates to leave float.
        context: Its progress is told.
    """
    plan = judge.plan
    budget = share * plan.macs
    counted = [layer for layer in plan.layers if layer.macs is not None]
    candidates = [group for group in groups_of(counted) if _macs(group) <= budget]
    whole = judge.loss()
    if not 0 < whole < math.inf:
        return [], whole, whole
    measured = []
    for number, group in enumerate(candidates):
        names = tuple(layer.name for layer in group)
        context.progress(number + 1, len(candidates), f"sensitivity of {names[0]}")
        measured.append(Restored(names, _macs(group), judge.loss(only=names) / whole))
    chosen = sorted(choose(measured, budget), key=lambda one: one.caused, reverse=True)
    coded, wide = {0: whole}, {0: whole}  # loss by how many stay float, with their weights in codes or not
    for step in range(1, _STEPS + 1):
        count = math.ceil(len(chosen) * step / _STEPS)
        if count not in coded:
            names = tuple(name for one in chosen[:count] for name in one.names)
            graph = plan.model.copy()
            plan.write(graph, without=names)
            wide[count] = judge.loss_of(graph)
            round_in_float(graph, names, plan)
            coded[count] = judge.loss_of(graph)
    tried = wide if min(wide.values()) < _WORTH_BYTES * min(coded.values()) else coded
    least = min(tried.values())
    if least > whole * _WORTH:
        return [], whole, whole
    count = min(count for count, loss in tried.items() if loss <= least * _ENOUGH)
    return chosen[:count], whole, tried[count]


def float_sums(judge: Judge, without: Sequence[str], context: Context) -> tuple[float, float]:
    """Let convolutions of the plan whose rounded results spoil the outputs give float sums.

    Those that nothing takes in codes are tried one set after another, and kept where the loss falls by a tenth:
    they take time. Sums that the plan has stay.

    Args:
        judge: Measures the loss; its plan is edited.
        without: Names of the layers that stay float.
        context: Its progress is told.

    Returns:
        The loss before, and with what was added.
    """
    plan = judge.plan
    kept = set(plan.summed)
    groups = groups_of([one for one in plan.summable(without) if one.name not in kept], _MOST_SUMS)
    before = least = judge.loss(without=without) if groups else 0.0
    trials = []
    for number, group in enumerate(groups):
        context.progress(number + 1, len(groups), f"float sums of {group[0].name}")
        names = {layer.name for layer in group}
        plan.summed = kept | names
        trials.append((judge.loss(without=without), names))
    plan.summed = kept
    for loss, names in sorted(trials, key=lambda trial: trial[0]):
        if loss > before * _WORTH_SUMS:
            break
        plan.summed = plan.summed | names
        with_it = judge.loss(without=without)
        if with_it > least * _WORTH_SUMS:
            plan.summed = plan.summed - names
        else:
            least = with_it
    return before, least


def _macs(group: Sequence[StaticLayer]) -> int:
    return sum(layer.macs or 0 for layer in group)
