"""Refit: the weights that are left, so that each layer gives what it gave before channels were removed.

Layer after layer in the order data flows, by least squares on the calibration data: x is a layer's input in
the edited model, y in the original, and W' x + b' shall be W y + b in the rows that are left. What earlier
layers lose, later ones so make good as far as they can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.base import Progress
from onnxslim_lab.channels.cutting import Kept
from onnxslim_lab.equalization.biases import BiasSlot, add_to_bias, find_slots
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, find_layers, layer_of
from onnxslim_lab.second_order.repair import Moments
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.statistics.calibration import gram_input

Array = NDArray[Any]
Doubles = NDArray[np.float64]
ROWS = 16  # rows of data for each column of a matrix
LEAST_ROWS = 4096


def solved(
    matrix: Array, kept: Kept, sums: Moments, *, damping: float, shifts: bool
) -> tuple[Doubles, Doubles]:
    """Return the weights that are left, refitted, and what is to be added to the bias, (groups, out).

    Args:
        matrix: The original's weights (groups, out, in).
        kept: What is left of them.
        sums: Sums over the inputs; of the groups that are left.
        damping: Pull towards the original's weights, part of the mean energy of an input.
        shifts: Whether the layer has a bias to add to; 0 is returned otherwise.
    """
    full = matrix[kept.groups][:, kept.rows].astype(np.float64)
    prior = full[:, :, kept.columns]
    size = prior.shape[2]
    own, goal = sums.own, full @ sums.cross[:, :-1]
    if not shifts:
        own, goal = own[:, :size, :size], goal[:, :, :size]
    else:
        prior = np.concatenate([prior, np.zeros((*prior.shape[:2], 1))], axis=2)
    energy = np.einsum("gii->gi", own[:, :size, :size]).mean(axis=1)
    pull = np.zeros((own.shape[0], own.shape[1]))
    pull[:, :size] = np.where(energy > 0, damping * energy, 1.0)[:, None]
    pull[:, size:] = 1e-12 * np.maximum(1.0, own[:, -1:, -1])
    hessian = own + pull[:, :, None] * np.eye(own.shape[1])
    found = np.linalg.solve(hessian, (goal + prior * pull[:, None]).swapaxes(1, 2)).swapaxes(1, 2)
    shift = found[:, :, size] if shifts else np.zeros(found.shape[:2])
    return np.asarray(found[:, :, :size]), np.asarray(shift)


def refit(
    model: Graph,
    original: Graph,
    kept: Mapping[str, Kept],
    calibration: Calibration,
    *,
    damping: float,
    progress: Progress,
) -> list[str]:
    """Refit every layer of the main graph behind a removal; returns the names of those that were.

    Memory: the sums of one layer and the rows of one feed at a time.

    Args:
        model: The edited model.
        original: The model before.
        kept: What is left of the layers that shrank, by the first output of the node.
        calibration: The data.
        damping: See `solved`.
        progress: Called for each layer.
    """
    slots = {id(slot.node): slot for slot in find_slots(model)[0]}
    twins = {node.output[0]: node for node in original.nodes}
    behind = _behind(model, kept)
    layers = [layer for layer in find_layers(model)[0] if layer.node.output[0] in behind]
    done = []
    for number, layer in enumerate(layers):
        progress(number, len(layers), f"refit {layer.name}")
        node = twins.get(layer.node.output[0])
        twin = layer_of(original, node) if node is not None else None
        if not isinstance(twin, Layer) or not _refittable(layer):
            continue
        left = kept.get(layer.node.output[0]) or Kept(*(np.ones(size, np.bool_) for size in twin.shape))
        slot = slots.get(id(layer.node))
        if slot is not None and slot.kind != "float" and slot.slot != 2:
            slot = None  # an Add of its own would cost time
        _refit_one(layer, twin, left, slot, calibration, damping)
        done.append(layer.name)
    return done


def _refittable(layer: Layer) -> bool:
    plain = layer.role == "weight" and layer.op_type in ("Conv", "Gemm", "MatMul")
    return plain and not layer.sharers and layer.kind.scale == 1.0


def _behind(model: Graph, kept: Iterable[str]) -> set[str]:
    """Return the first outputs of the nodes that shrank or read, at however many removes, what shrank."""
    changed = set(kept)
    for node in model.nodes:
        if not changed.isdisjoint(node.input) or not changed.isdisjoint(node.output[:1]):
            changed.update(node.output)
    return changed


def _refit_one(
    layer: Layer, twin: Layer, kept: Kept, slot: BiasSlot | None, calibration: Calibration, damping: float
) -> None:
    columns = layer.shape[2]
    sums = Moments.empty(layer, twin)
    value, before = gram_input(layer), gram_input(twin)
    feeds = max(1, len(calibration.data))
    most = max(LEAST_ROWS, ROWS * columns) // feeds + 1
    random = np.random.default_rng(0)
    runs = calibration.stream(layer.graph, [value]), calibration.stream(twin.graph, [before])
    for mine, theirs in zip(*runs, strict=True):
        x = layer.rows(np.asarray(mine[value]))
        y = twin.rows(np.asarray(theirs[before]))[kept.groups]
        if x.shape[1] > most:
            chosen = random.choice(x.shape[1], most, replace=False)
            x, y = x[:, chosen], y[:, chosen]
        sums.add(x, y)
    if not np.isfinite(sums.own).all() or not np.isfinite(sums.cross).all():
        return
    found, shift = solved(twin.matrix, kept, sums, damping=damping, shifts=slot is not None)
    with np.errstate(over="ignore"):
        narrow = layer.with_matrix(found)
    if not np.isfinite(narrow.astype(np.float64)).all():
        return
    layer.set(narrow)
    if slot is not None:
        add_to_bias(slot, shift.reshape(-1))
