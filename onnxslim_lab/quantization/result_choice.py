"""Which convolutions on codes give float results: those that are read in float and better not rounded before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from onnxslim_lab.base import Context
from onnxslim_lab.quantization.float_choice import Choice, Price, groups_of
from onnxslim_lab.quantization.float_results import is_product, summable_layers
from onnxslim_lab.quantization.float_weights import loss_without
from onnxslim_lab.quantization.output_loss import Judge
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.static_layers import StaticLayer

_WORTH_SUMS = 0.9  # times the loss, for float sums of any kind: some take long, and their time is not known
_MOST = 12  # sets of layers that are tried

Measure = tuple[float, float]
"""What counts, and the loss."""


def float_sums(judge: Judge, without: Collection[str], context: Context) -> tuple[float, float]:
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
    groups = _groups(judge.plan, summable_layers(judge.plan, without))
    if not groups:
        return 0.0, 0.0

    def loss() -> Measure:
        found = judge.loss(without=without)
        return found, found

    before = loss()
    return before[1], _let_sum(judge.plan, groups, before, loss, _WORTH_SUMS, context)


def float_results(judge: Judge, choice: Choice, price: Price, context: Context) -> Choice:
    """Let convolutions that are written as MatMul give float results where that is worth its time.

    Args:
        judge: Measures the loss; its plan is edited.
        choice: What stays float.
        price: Weighs the loss against time.
        context: Its progress is told.

    Returns:
        The choice, with the loss that is left.
    """
    plan = judge.plan

    def priced() -> Measure:
        after = loss_without(judge, choice.names, coded=choice.coded)
        return price.of(after, choice.names), after

    able = summable_layers(plan, choice.names)
    layers = [one for one in able if one.macs is not None and is_product(plan, one.layer)]
    before = price.of(choice.after, choice.names), choice.after
    after = _let_sum(plan, _groups(plan, layers), before, priced, 1.0, context)
    return replace(choice, after=after)


def _groups(plan: Plan, layers: Iterable[StaticLayer]) -> list[tuple[StaticLayer, ...]]:
    """Return layers that do not give float sums yet in sets of neighbours."""
    return groups_of([one for one in layers if one.name not in plan.summed], _MOST)


def _let_sum(
    plan: Plan,
    groups: Sequence[tuple[StaticLayer, ...]],
    before: Measure,
    measure: Callable[[], Measure],
    worth: float,
    context: Context,
) -> float:
    """Let sets of layers give float sums that lower what counts to `worth` of what it was; return the loss then.

    Each is tried alone; those that suffice are tried again in the order of what they gain.
    """
    kept, least = set(plan.summed), before
    trials = []
    for number, group in enumerate(groups):
        context.progress(number + 1, len(groups), f"float sums of {group[0].name}")
        names = {layer.name for layer in group}
        plan.summed = kept | names
        trials.append((measure()[0], names))
    for alone, names in sorted(trials, key=lambda trial: trial[0]):
        if alone > before[0] * worth:
            break
        plan.summed = kept | names
        with_it = measure()
        if with_it[0] <= least[0] * worth:
            least, kept = with_it, plan.summed
    plan.summed = kept
    return least[1]
