"""Repair: the weights that are left, refitted so that each layer gives what it gave in the original model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.layers import Layer
from onnxslim_lab.second_order.obs import Doubles, Mask, refit
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.statistics.calibration import gram_input

Array = NDArray[Any]
Values = dict[str, Any]


@dataclass
class Moments:
    """Sums over pairs of input rows: x in the edited model, y in the original, a one appended to both.

    Attributes:
        own: Sum of x x^T, (groups, in + 1, in + 1).
        cross: Sum of y x^T, (groups, in of the original + 1, in + 1).
        moved: Sum of d x^T, (groups, out, in + 1), where d is what the value that the output is added to has
            lost; the layer then makes good for that too. None where it is added to nothing.
    """

    own: Doubles
    cross: Doubles
    moved: Doubles | None = None

    @classmethod
    def empty(cls, edited: Layer, original: Layer) -> Moments:
        """Return the sums over no rows; the original may have more inputs."""
        groups, _, columns = edited.shape
        size = columns + 1
        return cls(np.zeros((groups, size, size)), np.zeros((groups, original.shape[2] + 1, size)))

    def add(self, x: Array, y: Array, lost: Array | None = None) -> None:
        """Add rows (groups, n, in) of both models, and what the value added to the output lost (groups, n, out)."""
        ones = np.ones((*x.shape[:2], 1), np.float32)
        mine = np.concatenate([x.astype(np.float32, copy=False), ones], axis=2)
        theirs = np.concatenate([y.astype(np.float32, copy=False), ones], axis=2)
        self.own += mine.swapaxes(1, 2) @ mine
        self.cross += theirs.swapaxes(1, 2) @ mine
        if lost is not None:
            more = lost.astype(np.float32, copy=False).swapaxes(1, 2) @ mine
            self.moved = more.astype(np.float64) if self.moved is None else self.moved + more


def moments(
    calibration: Calibration, edited: Layer, original: Layer, limit: int | None = None, *, added: str = ""
) -> Moments:
    """Return the moments of a layer of the main graph's inputs in an edited model and in the original.

    Args:
        calibration: The data.
        edited: The layer in the edited model.
        original: Its counterpart.
        limit: Use the first so many feeds only.
        added: A value of both models that is added to the layer's output, "" for none.
    """
    values = [gram_input(layer) for layer in (edited, original)]
    mine, theirs = (
        calibration.stream(layer.graph, [value, added] if added else [value], limit=limit)
        for layer, value in zip((edited, original), values, strict=True)
    )
    return paired(mine, theirs, edited, original, added=added)


def paired(
    edited_run: Iterable[Values],
    original_run: Iterable[Values],
    edited: Layer,
    original: Layer,
    *,
    added: str,
) -> Moments:
    """Return the moments of two runs over the same feeds; see `moments`."""
    result = Moments.empty(edited, original)
    values = [gram_input(layer) for layer in (edited, original)]
    for mine, theirs in zip(edited_run, original_run, strict=True):
        rows = edited.rows(mine[values[0]])
        lost = edited.output_rows(theirs[added] - mine[added]) if added else None
        if lost is not None and lost.shape[:2] != rows.shape[:2]:
            lost = None  # it is broadcast: not one value for each output
        result.add(rows, original.rows(theirs[values[1]]), lost)
    return result


def repaired(
    matrix: Array, bias: Array | None, mask: Mask, found: Moments, *, damping: float
) -> tuple[Doubles, Doubles | None]:
    """Return the weights and the bias that meet the original's outputs best, weights only where `mask` is.

    Args:
        matrix: The original's weights (groups, out, in).
        bias: The original's bias (groups, out), None where the layer has none: it then gets none.
        mask: True where a weight stays, like `matrix`.
        found: Moments of the inputs.
        damping: Pull towards the original's weights, part of the mean energy of an input.
    """
    columns = matrix.shape[2]
    if bias is None:
        inner = slice(0, columns)
        goal = matrix @ found.cross[:, inner, inner]
        if found.moved is not None:
            goal = goal + found.moved[..., inner]
        return refit(matrix, mask, found.own[:, inner, inner], goal=goal, damping=damping), None
    whole = np.concatenate([np.asarray(matrix, np.float64), bias[..., None]], axis=2)
    stays = np.concatenate([mask, np.ones((*mask.shape[:2], 1), np.bool_)], axis=2)
    goal = whole @ found.cross if found.moved is None else whole @ found.cross + found.moved
    result = refit(whole, stays, found.own, goal=goal, damping=damping)
    return result[..., :columns], result[..., columns]
