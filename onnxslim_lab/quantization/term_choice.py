"""Which layers read their input as two terms: those whose input's rounding spoils the outputs most."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_choice import groups_of
from onnxslim_lab.quantization.float_results import Split, splittable, summable_layers
from onnxslim_lab.quantization.output_loss import Judge
from onnxslim_lab.quantization.plan import Plan

_WORTH = 0.75  # times the loss, for the products of a set of layers a second time: 1.25 dB
_MOST = 12  # sets of values that are tried


@dataclass(frozen=True)
class Terms:
    """What reads two terms, and what that gains.

    Attributes:
        layers: Names of the layers.
        macs: Their multiply-accumulates, which are done twice.
        before, after: The loss.
    """

    layers: tuple[str, ...]
    macs: int
    before: float
    after: float


@dataclass(frozen=True)
class _Step:
    """Layers that are chosen together.

    Attributes:
        doubled: Names of those that read two terms.
        summed: Names of those whose results stay float.
    """

    doubled: frozenset[str]
    summed: frozenset[str]


def choose_terms(judge: Judge, without: Collection[str], context: Context, enough: float) -> Terms:
    """Let the inputs of a plan's layers be two terms where rounding them to one spoils the outputs.

    A convolution that nothing but such layers reads is not rounded either. The value that gains most is taken as
    long as that is a quarter of the loss: what one gains beside others is more than alone, because the
    worst of several roundings in a row hides the rest. Models of many layers are tried in runs of neighbours.
    In the end, what was taken is taken back where the loss is good enough without, those of most products first;
    or the layers keep their one term, and their results alone stay float.

    Args:
        judge: Measures the loss; its plan is edited.
        without: Names of the layers that stay float.
        context: Its progress is told.
        enough: The loss that is as good as none.
    """
    plan = judge.plan
    start = _Step(frozenset(plan.doubled), frozenset(plan.summed))

    def loss(steps: Sequence[_Step]) -> float:
        _put(plan, [start, *steps])
        return judge.loss(without=without)

    chosen: list[_Step] = []
    before = least = loss(chosen)
    while least > enough:
        trials = []
        steps = _steps(splittable(plan, without))
        for number, step in enumerate(steps):
            context.progress(number + 1, len(steps), f"two terms of {min(step.doubled)}")
            trials.append((loss([*chosen, step]), number))
        _put(plan, [start, *chosen])
        best, number = min(trials, default=(least, 0))
        if best > _WORTH * least:
            break
        least = best
        chosen.append(steps[number])
        _put(plan, [start, *chosen])
    sizes = {layer.name: layer.macs or 0 for layer in plan.layers}
    for step in sorted(chosen, key=lambda one: -sum(sizes[name] for name in one.doubled)):
        rest = [other for other in chosen if other is not step]
        _put(plan, [start, *rest])
        able = {layer.name for layer in summable_layers(plan, without)}
        less = _Step(frozenset(), (step.doubled | step.summed) & able)
        for steps in [rest, [*rest, less]] if less.summed else [rest]:
            found = loss(steps)
            if found <= max(least, enough):
                chosen, least = steps, found
                break
    _put(plan, [start, *chosen])
    names = tuple(layer.name for layer in plan.layers if layer.name in plan.doubled - start.doubled)
    return Terms(names, sum(sizes[name] for name in names), before, least)


def _steps(splits: list[Split]) -> list[_Step]:
    """Return values in runs of neighbours as what to choose together."""
    groups = groups_of(splits, _MOST)
    doubled = [frozenset(layer.name for one in group for layer in one.readers) for group in groups]
    summed = [frozenset(name for one in group for name in one.sums) for group in groups]
    return [_Step(*both) for both in zip(doubled, summed, strict=True)]


def _put(plan: Plan, steps: Iterable[_Step]) -> None:
    """Let a plan read these values as two terms, and no others."""
    steps = list(steps)
    plan.doubled = {name for step in steps for name in step.doubled}
    plan.summed = {name for step in steps for name in step.summed} - plan.doubled
