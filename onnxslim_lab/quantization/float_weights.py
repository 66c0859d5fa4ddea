"""The weights of layers that compute in float: stored in codes all the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.graph import Graph
from onnxslim_lab.layer_views.kinds import RecurrentKind
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization import weight_jobs, weight_only, weight_rounding
from onnxslim_lab.quantization.numerics import dequantize
from onnxslim_lab.quantization.output_loss import Judge
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.scheme import Scheme
from onnxslim_lab.quantization.types import QuantType, find_type
from onnxslim_lab.selection import Target, find_targets
from onnxslim_lab.statistics.collected import Place, place

if TYPE_CHECKING:
    from onnxslim_lab.passes.quantize import Quantize

_NOTICEABLE = 1.1  # times the loss: 0.4 dB
_SPARE = 0.01  # of all parameters: those that take 16 bits unasked
_FAINT = 1e-4  # a loss that is not noticed in any case: 40 dB
_WIDER = "int16"
_BLOCK = 32
_BLOCKS = (_BLOCK, 16)  # that are tried for recurrent weights
_MOST = 12  # weights for which more scales are tried

Stored = tuple[Place, str]
"""Where a weight is stored, equal in copies of the model."""


def stored(layers: Iterable[Layer]) -> set[Stored]:
    """Return where layers' weights are stored."""
    return {(place(layer.weight_graph), layer.weight) for layer in layers}


def store_weights(
    model: Graph,
    weights: set[Stored],
    step: Quantize,
    scheme: Scheme,
    context: Context,
    outcome: Outcome,
    kind: QuantType | None = None,
    *,
    rounding: str = "nearest",
    block: int = 0,
    decode: bool = False,
) -> None:
    """Store weights in codes, a scale for each channel or block; what reads them computes in float.

    Args:
        model: The main graph, edited.
        weights: Which.
        step: The quantize pass.
        scheme: The types.
        context: Of the pass.
        outcome: Receives a change or a refusal for each weight.
        kind: The type; None: that of the layers on codes.
        rounding: How they are rounded.
        block: Weights of a channel that share a scale; 0: all of them.
        decode: Whether all of them are decoded at load, which takes no time at inference; else each is
            written in the form that costs least memory for little time.
    """
    kind = kind or scheme.weights
    cut = {"granularity": "block", "block": block} if block else {"granularity": "channel"}
    part = step.model_copy(update={"weights": kind.name, **cut})
    jobs = [weight_jobs.make_job(target, part, kind, scheme.profile) for target in _targets(model, weights)]
    if decode and scheme.profile.is_onnxruntime:
        jobs = [replace(job, form="decoded") for job in jobs]
    how = weight_rounding.Scheme(rounding, symmetric=scheme.symmetric_weights)
    weight_only.quantize_jobs(model, jobs, how, context, outcome)


def loss_without(judge: Judge, names: Collection[str], *, coded: bool) -> float:
    """Return the loss of a plan with layers left float, their weights as they are or rounded as in codes."""
    graph = judge.plan.model.copy()
    judge.plan.write(graph, without=names)
    if coded:
        round_in_float(graph, names, judge.plan)
    return judge.loss_of(graph)


def store_by_outputs(
    model: Graph,
    weights: set[Stored],
    judge: Judge,
    step: Quantize,
    scheme: Scheme,
    context: Context,
    outcome: Outcome,
) -> None:
    """Store weights in codes with a scale for each channel, or each block where that helps the outputs.

    Only the largest of recurrent layers are tried, one at a time, smaller blocks where larger ones helped: scales of
    blocks make the file larger, and what these layers get wrong they read again at every step.

    Args:
        model: The quantized model but for these weights, edited.
        weights: Which; what reads them computes in float.
        judge: Measures the outputs.
        step: The quantize pass.
        scheme: The types.
        context: Of the pass.
        outcome: Receives a change or a refusal for each weight.
    """
    store = partial(store_weights, step=step, scheme=scheme, context=context, rounding=_best(step))

    def put(graph: Graph, blocks: dict[Stored, int], outcome: Outcome) -> Graph:
        for block in (0, *_BLOCKS):
            part = {one for one in weights if blocks.get(one, 0) == block}
            if part:
                store(graph, part, outcome=outcome, block=block)
        return graph

    def loss(blocks: dict[Stored, int]) -> float:
        return judge.loss_of(put(model.copy(), blocks, Outcome()))

    layers = [layer for target in _targets(model, weights) for layer in target.layers]
    recurrent = stored(layer for layer in layers if isinstance(layer.kind, RecurrentKind))
    fine: dict[Stored, int] = {}
    least = loss(fine) if recurrent else 0.0
    if recurrent and least > judge.loss_of(model) * _NOTICEABLE:
        for one in list(_by_size(model, recurrent))[: -_MOST - 1 : -1]:
            for block in _BLOCKS:
                found = loss(fine | {one: block})
                if found * _NOTICEABLE >= least:
                    break
                fine, least = fine | {one: block}, found
    put(model, fine, outcome)


def round_in_float(model: Graph, names: Collection[str], plan: Plan) -> None:
    """Round the weights of layers that stay float as their codes would be, but for the smallest ones.

    What `store_float_layers` will do to them is so known beforehand, at no cost.

    Args:
        model: A copy of the plan's model that was written without these layers, edited.
        names: The layers.
        plan: Has the codes.
    """
    planned = {next(iter(stored([one.layer]))): one for one in plan.layers if one.name in names}
    small = _smallest(model, set(planned), _SPARE * plan.parameters)
    graphs = {place(part): part for part in model.walk()}
    for where, one in planned.items():
        if where not in small:
            view = one.layer.stored
            array = view.backward(dequantize(*plan.weight(one, one.layer)))
            before = graphs[where[0]].constant(where[1])
            assert before is not None
            graphs[where[0]].set_constant(where[1], array.astype(before.dtype), view.data_type)


def store_float_layers(
    model: Graph,
    weights: set[Stored],
    judge: Judge,
    step: Quantize,
    scheme: Scheme,
    context: Context,
    expected: float,
) -> Outcome:
    """Store the weights of layers that stay float for the sake of the outputs, unless that spoils them.

    The smallest take 16 bits, as long as that makes the file larger by less than a hundredth. The others are
    tried at once in the type of the other weights, rounded to nearest; if that is noticed, each half of them,
    and so on. What is left is tried so by GPTQ, then with more scales, then in 16 bits; where all of it is noticed
    a weight stays float.

    Args:
        model: The quantized model, edited.
        weights: Of the layers that stay float.
        judge: Measures the outputs.
        step: The quantize pass.
        scheme: The types.
        context: Of the pass.
        expected: The loss that these layers were chosen for; more is noticed.

    Returns:
        One change for each weight, or a refusal.
    """
    limit = max(max(judge.loss_of(model), expected) * _NOTICEABLE, _FAINT)
    outcome = Outcome()

    def unnoticed(how: tuple[QuantType, str, int], part: Sequence[Stored]) -> bool:
        """Store some weights if the outputs stay within the limit; return whether they do."""
        kind, rounding, block = how
        trial = model.copy()
        store = partial(
            store_weights,
            weights=set(part),
            step=step,
            scheme=scheme,
            context=context,
            kind=kind,
            rounding=rounding,
            block=block,
            decode=True,
        )
        store(trial, outcome=Outcome())
        if judge.loss_of(trial) > limit:
            return False
        store(model, outcome=outcome)
        return True

    kind, wide = scheme.weights, (find_type(_WIDER), "nearest", 0)
    best = _best(step)
    again = [(kind, best, 0)] if best != "nearest" else []
    tries = [(kind, "nearest", 0), *again, (kind, best, _BLOCK), wide]
    small = _smallest(model, weights, _SPARE * judge.plan.parameters)
    left = _unsettled(small, partial(unnoticed, wide)) + sorted(weights - set(small))
    for how in tries:
        left = _unsettled(left, partial(unnoticed, how))
    for _, name in left:
        outcome.refuse(name, f"its values stay float: {_WIDER} is noticed in the outputs")
    # what was done to these layers does not make them run on codes
    outcome.changes = [replace(change, weights=()) for change in outcome.changes]
    return outcome


def _best(step: Quantize) -> str:
    """Return the best rounding of weights that a step allows."""
    return "nearest" if step.rounding == "nearest" else "gptq"


def _smallest(model: Graph, weights: set[Stored], budget: float) -> list[Stored]:
    """Return the smallest weights that have at most so many elements together."""
    chosen = []
    for one, size in _by_size(model, weights).items():
        budget -= size
        if budget < 0:
            break
        chosen.append(one)
    return chosen


def _by_size(model: Graph, weights: set[Stored]) -> dict[Stored, int]:
    """Return how many elements each weight has, the smallest first."""
    sizes = {
        one: target.size
        for target in _targets(model, weights)
        for one in stored(target.layers)
        if one in weights
    }
    return {one: sizes[one] for one in sorted(sizes, key=lambda one: (sizes[one], one))}


def _unsettled(part: Sequence[Stored], settle: Callable[[Sequence[Stored]], bool]) -> list[Stored]:
    """Settle a set as a whole, or else each half of it; return the weights that by themselves cannot be.

    >>> _unsettled(["a", "bad", "c", "d"], lambda part: "bad" not in part)
    ['bad']
    """
    if not part or settle(part):
        return []
    if len(part) == 1:
        return list(part)
    middle = len(part) // 2
    return [*_unsettled(part[:middle], settle), *_unsettled(part[middle:], settle)]


def _targets(model: Graph, weights: set[Stored]) -> list[Target]:
    found = find_targets(model, Outcome(), step="quantize")
    return [target for target in found if stored(target.layers) <= weights]
