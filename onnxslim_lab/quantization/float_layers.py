"""Which layers stay float: those that spoil the outputs most for the multiply-accumulates they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_weights import round_in_float
from onnxslim_lab.quantization.output_loss import Judge, choose_ranges
from onnxslim_lab.quantization.static_layers import StaticLayer

GROUPS = 100
"""Most sets of layers whose effect is measured; longer models are cut into runs of neighbours."""

_NOTICEABLE = 0.01  # least part of the loss that a set of layers must cause
_STEPS = 4  # parts of the chosen layers that are tried
_WORTH = 0.8  # times the loss, for all that may stay float to do so: 1 dB; a part of it must save its part
_ROOM = 1000  # units of the budget that sets of layers are packed by
_WORTH_BYTES = 0.5  # times the loss, for weights of 16 bits in layers that stay float: 3 dB
_WORTH_SUMS = 0.9  # times the loss, for float sums, which take less of it
_MOST_SUMS = 12  # sets of layers whose sums are tried


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


@dataclass(frozen=True)
class Choice:
    """What stays float, and what that gains.

    Attributes:
        restored: The layers, those first that cause most for each multiply-accumulate.
        before: The loss with all layers quantized.
        after: The loss without these, their weights stored as they will be.
        coded: Whether that is in codes like the other weights.
        ranges: How the ranges were chosen behind it, in words; "" where that was not asked.
    """

    restored: tuple[Restored, ...]
    before: float
    after: float
    coded: bool = True
    ranges: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [name for one in self.restored for name in one.names]


def groups_of(layers: Sequence[StaticLayer], most: int = GROUPS) -> list[tuple[StaticLayer, ...]]:
    """Return the layers as runs of neighbours of equal length, at most so many."""
    size = max(1, math.ceil(len(layers) / most))
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


def choose(candidates: Sequence[Restored], budget: float) -> list[Restored]:
    """Return what to restore within a budget of multiply-accumulates: the set that causes most in all.

    Returns:
        The set, those first that cause most for each multiply-accumulate.

    >>> first, second = Restored(("a",), 10, 0.5), Restored(("b",), 1, 0.2)
    >>> [one.names for one in choose([first, second], 10)]
    [('a',)]
    """
    worth = [one for one in candidates if one.caused > _NOTICEABLE and one.macs <= budget]
    best: list[tuple[float, tuple[Restored, ...]]] = [(0.0, ())] * (_ROOM + 1)  # by units of the budget taken
    for one in worth:
        size = math.ceil(one.macs * _ROOM / max(budget, 1))
        for room in range(_ROOM, size - 1, -1):
            caused, taken = best[room - size]
            if caused + one.caused > best[room][0]:
                best[room] = caused + one.caused, (*taken, one)
    return sorted(best[_ROOM][1], key=lambda one: one.caused / max(one.macs, 1), reverse=True)


def choose_float(judge: Judge, share: float, context: Context, *, ranges: bool) -> Choice:
    """Return the layers to leave float.

    Where the outputs choose the ranges, they are tried under ranges that clip nothing as well as under those that
    suit all layers quantized. Clipping is a compromise with the layers that suffer without it: these can as well
    stay float, and the others keep what was seen. Which is better, the outputs tell.

    Args:
        judge: Measures the loss; its plan is left with the ranges that are best with the choice.
        share: Largest share of the multiply-accumulates to leave float.
        context: Its progress is told.
        ranges: Whether the outputs choose the ranges.
    """
    plan = judge.plan
    if not ranges:
        return float_layers(judge, share, context)
    found = []
    for method in dict.fromkeys((plan.ranges, "minmax")):
        plan.use_ranges(method)
        choice = float_layers(judge, share, context)
        if choice.restored:
            told = choose_ranges(judge, choice.names)
            after = _loss_without(judge, choice.names, coded=choice.coded)
            choice = replace(choice, after=after, ranges=told)
        found.append((choice, plan.ranges))
    best, method = min(found, key=lambda one: one[0].after)
    plan.use_ranges(method)
    return best


def float_layers(judge: Judge, share: float, context: Context) -> Choice:
    """Return the layers to leave float with the ranges that the plan has.

    Layers whose multiply-accumulates are not known stay quantized. Each candidate is measured by the loss of
    the model in which it alone is quantized: rounding errors of different layers add up, and so neighbours
    whose common values are the trouble are found, of which one alone in float would help nothing. What is
    chosen is then tried, the part of it that costs least and all of it: all of the budget must gain 1 dB, a
    tenth of it a tenth of that. Their weights are to be stored in codes as well, wider ones only if that gains
    3 dB.

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
        return Choice((), whole, whole)
    measured = []
    for number, group in enumerate(candidates):
        names = tuple(layer.name for layer in group)
        context.progress(number + 1, len(candidates), f"sensitivity of {names[0]}")
        measured.append(Restored(names, _macs(group), judge.loss(only=names) / whole))
    chosen = choose(measured, budget)
    used = [0.0, *(macs / max(budget, 1) for macs in accumulate(one.macs for one in chosen))]
    losses = {coded: {0: whole} for coded in (True, False)}  # by how many stay float
    for step in range(1, _STEPS + 1):
        count = math.ceil(len(chosen) * step / _STEPS)
        restored = [name for one in chosen[:count] for name in one.names]
        for coded, known in losses.items():
            if count not in known:
                known[count] = _loss_without(judge, restored, coded=coded)
    coded = min(losses[False].values()) >= _WORTH_BYTES * min(losses[True].values())
    tried = losses[coded]
    count = min(tried, key=lambda count: tried[count] * _WORTH ** -used[count])
    return Choice(tuple(chosen[:count]), whole, tried[count], coded)


def _loss_without(judge: Judge, names: Sequence[str], *, coded: bool) -> float:
    """Return the loss with layers left float, their weights as they are or rounded as in codes."""
    graph = judge.plan.model.copy()
    judge.plan.write(graph, without=names)
    if coded:
        round_in_float(graph, names, judge.plan)
    return judge.loss_of(graph)


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
