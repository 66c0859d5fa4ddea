"""Pruning by what a weight costs at its layer's output, over a whole model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.base import Outcome, Progress
from onnxslim_lab.floats import blocks, kth_magnitude, magnitude_bits
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.low_rank.bases import shrinkage
from onnxslim_lab.second_order.choose import Criterion, output_energy, removal_losses
from onnxslim_lab.second_order.network import Network, twin
from onnxslim_lab.second_order.obs import Mask, output_loss, refit
from onnxslim_lab.second_order.patterns import Pattern, cheapest
from onnxslim_lab.second_order.wide import compensate_wide, removed_in_wide, too_wide
from onnxslim_lab.selection import Target
from onnxslim_lab.statistics import Calibration, Gram
from onnxslim_lab.statistics.calibration import gram_input

Array = NDArray[Any]
Scope = Literal["global", "layer", "row"]
Refit = Literal["none", "layer", "network"]
WIDEST = 2304  # columns up to which a least-squares problem is solved for each row


@dataclass(frozen=True)
class Plan:
    """What to prune, how far, and how the rest makes it good.

    Attributes:
        criterion: What a removal costs; see `removal_losses`.
        pattern: Which weights go together.
        scope: What the fraction is taken of: all weights together, each layer's, each row's.
        fraction: The fraction to remove, where no override of the target says otherwise.
        refit: Least squares on what is left: none; of each layer by itself ("layer"); or layer after
            layer against the original model, so that later layers make good what earlier ones lose.
        damping: Part of the mean energy of an input that is added to the Gram matrix.
    """

    criterion: Criterion
    pattern: Pattern
    scope: Scope
    fraction: float
    refit: Refit
    damping: float


@dataclass(frozen=True)
class Pruned:
    """A pruned weight: its values in the stored layout, and the output error that is left, relative.

    `error` is the energy of the output's change over the variance of the output, on the layer's inputs in
    the model before this pass; NaN where no Gram matrix was at hand.
    """

    target: Target
    values: Array
    error: float


def prune_by_loss(
    model: Graph,
    targets: Sequence[Target],
    plan: Plan,
    calibration: Calibration | None,
    progress: Progress,
) -> Iterator[Pruned]:
    """Yield each target pruned, in graph order; biases are updated in the model as it goes.

    The caller writes each result into the model before it takes the next: with refit "network" the next
    layer's inputs depend on it. Two passes over the data with refit "layer"; with "network" two more, in which
    the model runs layer by layer. Losses, and values between layers, are kept in scratch files; one Gram
    matrix group is in memory at a time.
    """
    original = model.copy() if plan.refit == "network" else model
    with tempfile.TemporaryDirectory(prefix="onnxslim_lab-") as folder:
        now = [target for target in targets if not _later(original, target, plan)]
        chosen = zip(now, _masks(model, now, plan, calibration, progress, Path(folder)), strict=True)
        masks = {id(target): mask for target, mask in chosen}
        grams, network = None, None
        if calibration is not None and plan.refit == "network":
            network = Network(original, model, calibration, plan.pattern, plan.damping, Path(folder))
        if calibration is not None and plan.refit == "layer":
            grams = target_grams(model, targets, calibration)
        for number, target in enumerate(targets):
            progress(number, len(targets), f"refit {target.where}")
            gram = None if grams is None else next(grams)
            mask = masks.pop(id(target), None)
            if calibration is None or plan.refit == "none" or target.is_lookup:
                assert mask is not None
                matrix = target.layer.matrix
                kept = np.where(mask, matrix.dtype.type(0), matrix)
                yield Pruned(target, target.layer.with_matrix(kept), float("nan"))
            else:
                yield _refitted(network, target, mask, gram, plan, calibration)


def target_grams(model: Graph, targets: Sequence[Target], calibration: Calibration) -> Iterator[Gram]:
    """Yield one Gram matrix for each target, over all layers that use the weight in the same arrangement."""
    users = [[layer for layer in t.layers if layer.shape == t.layer.shape] for t in targets]
    found = calibration.grams(model, [layer for group in users for layer in group])
    for group in users:
        gram = next(found)[1]
        for _ in group[1:]:
            gram = gram.merge(next(found)[1])
        yield gram


def _masks(
    model: Graph,
    targets: Sequence[Target],
    plan: Plan,
    calibration: Calibration | None,
    progress: Progress,
    folder: Path,
) -> list[Mask]:
    """Return for each target the mask (groups, out, in) of the weights that go."""
    losses: list[Array] = []
    grams = None
    if calibration is not None and plan.criterion != "magnitude":
        grams = target_grams(model, targets, calibration)
    for number, target in enumerate(targets):
        progress(number, len(targets), f"losses of {target.where}")
        gram, matrix = None if grams is None else next(grams), target.layer.matrix
        found = removal_losses(matrix, gram, plan.criterion, plan.pattern, _damping(plan, gram, matrix))
        relative = found if gram is None else found / output_energy(matrix, gram)
        kept = np.lib.format.open_memmap(
            folder / f"{number}.npy", "w+", dtype=np.float32, shape=relative.shape
        )
        kept[...] = relative
        losses.append(kept)
    pool = [n for n, t in enumerate(targets) if t.override is None]
    if plan.pattern.group:
        return [np.isfinite(found) for found in losses]
    if plan.scope == "global" and pool:
        parts = dict(zip(pool, _cheapest_of_all([losses[n] for n in pool], plan.fraction), strict=True))
    else:
        parts = {}
    masks = []
    for number, (target, found) in enumerate(zip(targets, losses, strict=True)):
        if number in parts:
            masks.append(parts[number].reshape(found.shape))
            continue
        fraction = plan.fraction if target.override is None else float(target.override)
        if plan.scope == "row":
            rows = [cheapest(row, round(fraction * row.size)) for row in found.reshape(-1, found.shape[-1])]
            masks.append(np.stack(rows).reshape(found.shape))
        else:
            masks.append(cheapest(np.asarray(found), round(fraction * found.size)))
    return masks


def _cheapest_of_all(losses: Sequence[Array], fraction: float) -> Iterator[Mask]:
    """Yield the mask of each layer's share of the smallest losses of all; infinite ones never go.

    One block of losses is in memory at a time. Ties go in graph and storage order.
    """
    count = round(fraction * sum(found.size for found in losses))
    count = min(count, sum(int(np.isfinite(block).sum()) for found in losses for block in blocks(found)))
    key, ties = 0, 0
    if count:
        key, ties = kth_magnitude(
            lambda: (block for found in losses for block in blocks(found)), count, wide=False
        )
    for found in losses:
        mask = np.zeros(found.size, np.bool_)
        done = 0
        for block in blocks(found):
            keys = magnitude_bits(block, wide=False)
            mask[done : done + block.size] = keys < key
            if ties:
                equal = np.flatnonzero(keys == key)[:ties]
                mask[done + equal] = True
                ties -= equal.size
            done += block.size
        yield mask.reshape(found.shape)


def _refitted(
    network: Network | None,
    target: Target,
    gone: Mask | None,
    gram: Gram | None,
    plan: Plan,
    calibration: Calibration,
) -> Pruned:
    """Return one target with the weights that go removed and the others refitted."""
    layer = target.layer
    other = None if network is None else _twin(network.original, layer, plan)
    if network is not None and other is not None:
        return Pruned(target, network.fitted(layer, other, gone), float("nan"))
    assert gone is not None
    matrix = np.asarray(layer.matrix, np.float64)
    if gram is None:
        gram = next(target_grams(layer.graph.root, [target], calibration))
    if not gram.full:
        return Pruned(target, layer.with_matrix(np.where(gone, 0.0, matrix)), float("nan"))
    damping = _damping(plan, gram, matrix)
    if too_wide(matrix.shape[2]) and plan.pattern.block == 1 and plan.criterion == "obs":
        gone = removed_in_wide(matrix, gram, gone, plan.pattern, damping)
    if matrix.shape[2] > WIDEST:
        result = compensate_wide(matrix, gram, gone, damping)
    else:
        result = refit(matrix, ~gone, gram.xtx, damping=damping)
    error = float(output_loss(result - matrix, gram.xtx).sum()) / output_energy(matrix, gram)
    return Pruned(target, layer.with_matrix(result), error)


def _damping(plan: Plan, gram: Gram | None, matrix: Array) -> float:
    """Return the damping, more where there are few rows for so many inputs."""
    return plan.damping if gram is None else max(plan.damping, shrinkage(gram.count, matrix.shape[2]))


def _twin(original: Graph, layer: Layer, plan: Plan) -> Layer | None:
    """Return the layer of the original whose outputs are met; None where each layer is refitted by itself."""
    if plan.refit != "network" or layer.shape[2] > WIDEST:
        return None
    return twin(original, layer)


def _later(original: Graph, target: Target, plan: Plan) -> bool:
    """Return whether a target's weights are chosen when its turn comes, from the inputs it then has."""
    fixed = plan.criterion == "obs" and plan.pattern.group
    return bool(fixed and not target.is_lookup and _twin(original, target.layer, plan))


def measurable(targets: Iterable[Target], outcome: Outcome) -> list[Target]:
    """Return the targets that a Gram matrix can be had for; the others are refused in the outcome."""
    found = []
    for target in targets:
        reason = _unmeasurable(target)
        if reason:
            outcome.refuse(target.where, reason)
        else:
            found.append(target)
    return found


def _unmeasurable(target: Target) -> str:
    """Return why no Gram matrix can be had for a target, "" when it can."""
    if any(layer.role == "R" for layer in target.layers):
        return (
            "recurrent weights multiply a hidden state that is no value of the graph; use criterion=magnitude"
        )
    if any(layer.graph.is_constant(gram_input(layer)) for layer in target.layers):
        return "its input is constant"
    return ""
