"""Which convolutions on codes give float results: those that are read in float and better not rounded before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
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

    def loss() -> float:
        return judge.loss(without=without)

    return _let_sum(judge.plan, summable_layers(judge.plan, without), loss, _WORTH_SUMS, context)


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
    plan, already = judge.plan, judge.plan.summed

    def after() -> float:
        return loss_without(judge, choice.names, coded=choice.coded)

    layers = [
        one
        for one in summable_layers(plan, choice.names)
        if one.macs is not None and is_product(plan, one.layer)
    ]
    _let_sum(plan, layers, lambda: price.of(after(), choice.names), 1.0, context)
    return choice if plan.summed == already else replace(choice, after=after())


def _let_sum(
    plan: Plan, layers: Iterable[StaticLayer], measure: Callable[[], float], worth: float, context: Context
) -> tuple[float, float]:
    """Let sets of neighbours give float sums that lower a measure below `worth` of what it was.

    Each is tried alone; those that suffice are tried again in the order of what they gain.

    Returns:
        The measure before and after.
    """
    kept = set(plan.summed)
    groups = groups_of([one for one in layers if one.name not in kept], _MOST)
    before = least = measure() if groups else 0.0
    trials = []
    for number, group in enumerate(groups):
        context.progress(number + 1, len(groups), f"float sums of {group[0].name}")
        names = {layer.name for layer in group}
        plan.summed = kept | names
        trials.append((measure(), names))
    for alone, names in sorted(trials, key=lambda trial: trial[0]):
        if alone > before * worth:
            break
        plan.summed = kept | names
        with_it = measure()
        if with_it <= least * worth:
            least, kept = with_it, plan.summed
    plan.summed = kept
    return before, least
