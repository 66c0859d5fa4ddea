"""Refit: the weights that are left, so that each layer gives what it gave before channels were removed.

Layer after layer in the order data flows, by least squares on the calibration data: x is a layer's input in
the edited model, y in the original, and W' x + b' shall be W y + b in the rows that are left. What earlier
layers lose, later ones so make good as far as they can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.base import Progress, Refusal
from onnxslim_lab.channels.behind import Key, Kinship
from onnxslim_lab.channels.cutting import Kept
from onnxslim_lab.channels.least_squares import BLOCK, Sums, fitted
from onnxslim_lab.channels.pairs import pairs
from onnxslim_lab.channels.recurrent import refit_recurrent
from onnxslim_lab.channels.rows import Rows
from onnxslim_lab.equalization.biases import BiasSlot, add_to_bias, find_slots
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.statistics.calibration import gram_input

Array = NDArray[Any]
ROWS = 16  # rows of data for each column of a matrix
LEAST_ROWS = 4096
HELD = 4  # one feed of so many chooses the damping
_REFITTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def refit(
    model: Graph,
    original: Graph,
    kept: Mapping[Key, Kept],
    calibration: Calibration,
    *,
    damping: float,
    progress: Progress,
) -> list[Refusal]:
    """Refit every layer behind a removal, in all graphs; returns those that were not, with the reason.

    Memory: the sums of one layer and the rows of one feed at a time; layers whose sums do not fit are refused.

    Args:
        model: The edited model.
        original: The model before.
        kept: What is left of the layers that shrank.
        calibration: The data.
        damping: See `Sums.solve`.
        progress: Called for each layer.
    """
    kinship = Kinship(model, original, kept)
    slots = {id(slot.node): slot for graph in model.walk() for slot in find_slots(graph)[0]}
    refused = []
    for number, layer in enumerate(kinship.layers):
        progress(number, len(kinship.layers), f"refit {layer.name}")
        if layer.role == "R":  # with its W
            continue
        try:
            if layer.role == "W":
                most = rows_wanted(layer.shape[1] + layer.shape[2], len(calibration.data))
                reason = refit_recurrent(layer, kinship, calibration, damping=damping, most=most)
            else:
                reason = _refit_one(layer, kinship, slots.get(id(layer.node)), calibration, damping)
        except (LookupError, np.linalg.LinAlgError) as error:
            reason = str(error)
        if reason:
            refused.append(Refusal(layer.name, f"not refitted: {reason}"))
    return refused


def rows_wanted(columns: int, feeds: int) -> int:
    """Return how many rows of each feed are used for a matrix with so many columns."""
    return max(LEAST_ROWS, ROWS * columns) // max(1, feeds) + 1


def _refit_one(
    layer: Layer, kinship: Kinship, slot: BiasSlot | None, calibration: Calibration, damping: float
) -> str:
    """Refit one layer; returns why it was not, "" when it was."""
    twin, kept = kinship.twin(layer), kinship.kept(layer)
    if layer.op_type not in _REFITTED:
        return "" if layer.op_type == "Gather" else f"no rows are made for {layer.op_type}"
    if layer.sharers:
        return "other layers use its weight"
    if slot is not None and slot.kind != "float" and slot.slot != 2:
        slot = None  # an Add of its own would cost time
    groups, out, columns = layer.shape
    needed = Sums.bytes_needed(groups, out, columns)
    if needed > calibration.memory:
        return f"the sums over its {columns} inputs take {needed} bytes, the memory budget is {calibration.memory}"
    sums = Sums.empty(groups, out, columns, shifts=slot is not None)
    held = None
    if Sums.bytes_needed(groups, out, columns, held=True) <= calibration.memory:
        held = Sums.empty(groups, out, columns, shifts=slot is not None)
    most = rows_wanted(columns, len(calibration.data))
    step = max(1, BLOCK // (8 * twin.groups * (twin.shape[2] + 1)))
    random = np.random.default_rng(0)
    full = twin.matrix[kept.groups][:, kept.rows].astype(
        np.float32 if twin.matrix.itemsize < 8 else np.float64
    )
    sides = (layer.graph, [gram_input(layer)]), (twin.graph, [gram_input(twin)])
    for number, ((mine,), (theirs,)) in enumerate(pairs(kinship.models, sides, calibration)):
        into = held if held is not None and number % HELD == HELD - 1 else sums
        if mine is None or theirs is None:
            continue
        own, other = Rows(layer.kind, mine), Rows(twin.kind, theirs)
        places = np.arange(own.count)
        if places.size > most:
            places = random.choice(own.count, most, replace=False)
        for x, y in zip(own.blocks(places, step=step), other.blocks(places, step=step), strict=True):
            into.add(x, y[kept.groups].astype(full.dtype, copy=False) @ full.swapaxes(1, 2))
    if not sums.own.any():
        return "no feed reaches it, or its inputs are all zero"
    if not all(np.isfinite(one.own).all() and np.isfinite(one.goal).all() for one in (sums, held) if one):
        return "its inputs are not all finite"
    found, shift = fitted(sums, held, full[:, :, kept.columns], damping)
    with np.errstate(over="ignore"):
        narrow = layer.with_matrix(found)
    if not np.isfinite(narrow.astype(np.float64)).all():
        return "the weights found do not fit its type"
    layer.set(narrow)
    return "" if slot is None else add_to_bias(slot, layer.kind.scale * shift.reshape(-1))
