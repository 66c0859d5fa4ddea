"""Which layers stay float: those that spoil the outputs most for the time that they take in float."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_cost import FloatCost
from onnxslim_lab.quantization.float_weights import round_in_float
from onnxslim_lab.quantization.output_loss import Judge, choose_ranges
from onnxslim_lab.quantization.static_layers import StaticLayer

GROUPS = 100
"""Most sets of layers whose effect is measured; longer models are cut into runs of neighbours."""

_NOTICEABLE = 0.01  # least part of the loss that a set of layers must cause
_STEPS = 6  # parts of a choice that are tried
_WORTH = 0.95  # times the loss, for the time of as many products as may stay float; a part must save its part
_WORTH_ALONE = (
    0.9  # likewise, by what layers cause alone: the rest is better chosen beside what that leaves float
)
_ENOUGH = 1e-5  # loss of outputs that are rounded to 8 bits themselves (50 dB): nothing stays float for less
_LEAST_LEFT = 0.02  # part of the loss that stays whatever is restored: what layers cause alone is an estimate
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
        beside: Whether it is the part that goes when they stay float beside those chosen before.
    """

    names: tuple[str, ...]
    macs: int
    caused: float
    beside: bool = False


@dataclass(frozen=True)
class Choice:
    """What stays float, and what that gains.

    Attributes:
        restored: The layers, those first that are worth most for their time.
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
        return _names(self.restored)

    @property
    def macs(self) -> int:
        """Their multiply-accumulates."""
        return sum(one.macs for one in self.restored)


def groups_of(layers: Sequence[StaticLayer], most: int = GROUPS) -> list[tuple[StaticLayer, ...]]:
    """Return the layers as runs of neighbours of equal length, at most so many."""
    size = max(1, math.ceil(len(layers) / most))
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


def pack(candidates: Sequence[Restored], budget: float) -> list[Restored]:
    """Return the set within a budget of multiply-accumulates that causes most in all.

    >>> first, second = Restored(("a",), 10, 0.5), Restored(("b",), 1, 0.2)
    >>> [one.names for one in pack([first, second], 10)]
    [('a',)]
    """
    best: list[tuple[float, tuple[Restored, ...]]] = [(0.0, ())] * (_ROOM + 1)  # by units of the budget taken
    for one in candidates:
        size = math.ceil(one.macs * _ROOM / max(budget, 1))
        for room in range(_ROOM, size - 1, -1):
            caused, taken = best[room - size]
            if caused + one.caused > best[room][0]:
                best[room] = caused + one.caused, (*taken, one)
    return list(best[_ROOM][1])


class Price:
    """What a loss is worth beside the time that it takes to have no more.

    Args:
        cost: Tells what layers cost in float.
        budget: Of multiply-accumulates.
        worth: What their time must bring the loss down to, as a factor.
    """

    def __init__(self, cost: FloatCost, budget: float, worth: float = _WORTH) -> None:
        self.budget = budget
        self._cost, self._worth = cost, worth

    def of(self, loss: float, names: Collection[str]) -> float:
        """Return the loss that would be as good if no layer stayed float."""
        return float((loss + _ENOUGH) * self._worth ** -(self._cost.of(names) / max(self.budget, 1)))

    def path(self, candidates: Sequence[Restored], start: Choice, *, all_of: bool) -> list[Restored]:
        """Return candidates in the order in which to restore them, each what gains most behind those before.

        Args:
            candidates: What may be restored, with the part of `start.after` that each causes.
            start: What stays float already.
            all_of: Whether to go on with what is not worth its time.
        """
        rest, chosen, names = list(candidates), list[Restored](), start.names
        best, budget = self.of(start.after, names), self.budget - start.macs
        while rest := [one for one in rest if one.macs <= budget]:
            left = 1 - sum(one.caused for one in chosen)
            prices = [
                self.of(start.after * max(left - one.caused, _LEAST_LEFT), [*names, *one.names])
                for one in rest
            ]
            price = min(prices)
            if price >= best and not all_of:
                break
            best, one = price, rest.pop(prices.index(price))
            chosen.append(one)
            names += one.names
            budget -= one.macs
        return chosen


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
    cost = FloatCost(plan, judge.sizes)
    price = Price(cost, share * plan.macs, _WORTH_ALONE)
    found = []
    for method in dict.fromkeys((plan.ranges, "minmax") if ranges else (plan.ranges,)):
        plan.use_ranges(method)
        choice = float_layers(judge, price, context)
        if choice.restored and ranges:
            told = choose_ranges(judge, choice.names)
            after = _loss_without(judge, choice.names, coded=choice.coded)
            choice = replace(choice, after=after, ranges=told)
        found.append((choice, plan.ranges))
    best, method = min(found, key=lambda one: price.of(one[0].after, one[0].names))
    plan.use_ranges(method)
    return more_layers(judge, best, Price(cost, price.budget), context) if best.restored else best


def float_layers(judge: Judge, price: Price, context: Context) -> Choice:
    """Return the layers to leave float with the ranges that the plan has.

    Layers whose multiply-accumulates are not known stay quantized. Each candidate is measured by the loss of
    the model in which it alone is quantized: rounding errors of different layers add up, and so neighbours
    whose common values are the trouble are found, of which one alone in float would help nothing. Two choices
    are then tried, in parts and as a whole: what causes most within the budget, and what is worth most for its
    time (see float_cost). The time of all of the budget must gain 5 % of the loss, a tenth of it a tenth of that. Their
    weights are to be stored in codes as well, wider ones only if that gains 3 dB.

    Args:
        judge: Measures the loss.
        price: Weighs it against time; it has the budget.
        context: Its progress is told.
    """
    candidates = _candidates(judge, price.budget)
    whole = judge.loss()
    none = Choice((), whole, whole)
    if not _ENOUGH < whole < math.inf:
        return none
    measured = []
    for number, group in enumerate(candidates):
        names = tuple(layer.name for layer in group)
        context.progress(number + 1, len(candidates), f"sensitivity of {names[0]}")
        measured.append(Restored(names, _macs(group), judge.loss(only=names) / whole))
    worth = [one for one in measured if one.caused > _NOTICEABLE]
    if not worth:
        return none
    parts = [
        *_parts(price.path(worth, none, all_of=False)),
        *_parts(price.path(pack(worth, price.budget), none, all_of=True)),
    ]
    choices = [
        Choice(part, whole, _loss_without(judge, _names(part), coded=coded), coded)
        for part in dict.fromkeys(parts)
        for coded in (True, False)
    ]
    least = {coded: min(one.after for one in choices if one.coded == coded) for coded in (True, False)}
    coded = least[False] >= _WORTH_BYTES * least[True]
    wanted = [none, *(one for one in choices if one.coded == coded)]
    return min(wanted, key=lambda one: price.of(one.after, one.names))


def more_layers(judge: Judge, choice: Choice, price: Price, context: Context) -> Choice:
    """Return a choice with what is worth its time beside it, measured by what else staying float gains.

    What a layer causes alone says little of what it gains once those that cause most stay float.

    Args:
        judge: Measures the loss, with the ranges that are best with the choice.
        choice: What stays float.
        price: Weighs the loss against time; it has the budget.
        context: Its progress is told.
    """
    candidates = [
        group
        for group in _candidates(judge, price.budget - choice.macs)
        if not set(choice.names).intersection(layer.name for layer in group)
    ]
    gains = []
    for number, group in enumerate(candidates):
        names = tuple(layer.name for layer in group)
        context.progress(number + 1, len(candidates), f"sensitivity of {names[0]} beside the chosen")
        loss = _loss_without(judge, [*choice.names, *names], coded=choice.coded)
        gains.append(Restored(names, _macs(group), 1 - loss / choice.after, beside=True))
    worth = [one for one in gains if one.caused > _NOTICEABLE]
    choices = [choice]
    for part in _parts(price.path(worth, choice, all_of=False)):
        both = (*choice.restored, *part)
        after = _loss_without(judge, _names(both), coded=choice.coded)
        choices.append(replace(choice, restored=both, after=after))
    return min(choices, key=lambda one: price.of(one.after, one.names))


def _candidates(judge: Judge, budget: float) -> list[tuple[StaticLayer, ...]]:
    counted = [layer for layer in judge.plan.layers if layer.macs is not None]
    return [group for group in groups_of(counted) if _macs(group) <= budget]


def _parts(path: Sequence[Restored]) -> list[tuple[Restored, ...]]:
    """Return the beginnings of a path that are tried, the whole path last."""
    ends = {math.ceil(len(path) * step / _STEPS) for step in range(1, _STEPS + 1)} - {0}
    return [tuple(path[:end]) for end in sorted(ends)]


def _names(restored: Collection[Restored]) -> list[str]:
    return [name for one in restored for name in one.names]


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
