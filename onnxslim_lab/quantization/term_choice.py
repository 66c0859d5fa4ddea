"""Which layers read their input as two terms: those whose input's rounding spoils the outputs most."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_results import Split, splittable
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


def choose_terms(judge: Judge, without: Collection[str], context: Context, enough: float) -> Terms:
    """Let the inputs of a plan's layers be two terms where rounding them to one spoils the outputs.

    A convolution that nothing but such layers reads is not rounded either. The value that gains most is taken as
    long as that is a quarter of the loss: what one gains beside others is more than alone, because the
    worst of several roundings in a row hides the rest. Models of many layers are tried in runs of neighbours.

    Args:
        judge: Measures the loss; its plan is edited.
        without: Names of the layers that stay float.
        context: Its progress is told.
        enough: The loss that is as good as none.
    """
    plan = judge.plan
    before = least = judge.loss(without=without)
    chosen: list[str] = []
    while least > enough:
        trials = []
        groups = _groups(splittable(plan, without))
        for number, group in enumerate(groups):
            context.progress(number + 1, len(groups), f"two terms of {group[0].value}")
            with _split(plan, group):
                trials.append((judge.loss(without=without), number))
        best, number = min(trials, default=(least, 0))
        if best > _WORTH * least:
            break
        least = best
        chosen += [layer.name for one in groups[number] for layer in one.readers]
        plan.doubled = plan.doubled | _readers(groups[number])
        plan.summed = plan.summed | _sums(groups[number])
    macs = sum(layer.macs or 0 for layer in plan.layers if layer.name in chosen)
    return Terms(tuple(chosen), macs, before, least)


def _groups(splits: list[Split]) -> list[list[Split]]:
    size = max(1, -(-len(splits) // _MOST))
    return [splits[start : start + size] for start in range(0, len(splits), size)]


def _readers(group: list[Split]) -> set[str]:
    return {layer.name for one in group for layer in one.readers}


def _sums(group: list[Split]) -> set[str]:
    return {name for one in group for name in one.sums} - _readers(group)


@contextmanager
def _split(plan: Plan, group: list[Split]) -> Iterator[None]:
    """Let a plan read values as two terms for a while."""
    doubled, summed = plan.doubled, plan.summed
    plan.doubled, plan.summed = doubled | _readers(group), summed | _sums(group)
    try:
        yield
    finally:
        plan.doubled, plan.summed = doubled, summed
