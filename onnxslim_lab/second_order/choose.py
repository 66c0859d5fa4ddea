"""Which weights to remove: the loss that each removal needs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.second_order.obs import Doubles, eliminate, eliminate_blocks
from onnxslim_lab.second_order.patterns import Pattern, by_pattern
from onnxslim_lab.second_order.wide import too_wide, wide_losses, wide_scores
from onnxslim_lab.statistics import Gram

Criterion = Literal["magnitude", "wanda", "obs"]


def removal_losses(
    matrix: NDArray[Any], gram: Gram | None, criterion: Criterion, pattern: Pattern, damping: float
) -> Doubles:
    """Return, for every weight (groups, out, in), the loss below which it stays and from which it goes.

    The unit is |X dw|^2 over the rows that the Gram matrix counts. "magnitude": w^2. "wanda": w^2 times the
    energy of its input, nothing else changed (Sun et al., A Simple and Effective Pruning Approach for Large
    Language Models, 2023). "obs": the running maximum along the order in which optimal brain surgeon removes the
    weights of the row, all others updated; for wide layers see `wide_losses`. Weights
    that a pattern keeps are infinite. Only the diagonal of the Gram matrix is used where no more is there.
    """
    groups, outputs, columns = matrix.shape
    weights = np.asarray(matrix, np.float64)
    if criterion == "magnitude" or gram is None:
        return by_pattern(weights**2, pattern)
    if criterion == "wanda" or not gram.full:
        return by_pattern(weights**2 * np.asarray(gram.diagonal)[:, None, :], pattern)
    if too_wide(columns):
        scores = wide_scores if pattern.group else wide_losses
        return by_pattern(scores(weights, gram, damping), pattern)
    if pattern.block > 1:
        found = eliminate_blocks(weights, gram.xtx, pattern.block, damping=damping)
        blocks = -(-columns // pattern.block)
        losses: Doubles = np.repeat(found.thresholds(blocks), pattern.block, axis=1)[:, :columns]
        sizes = np.minimum(pattern.block, columns - pattern.block * (np.arange(columns) // pattern.block))
        shared: Doubles = (losses / sizes).reshape(matrix.shape)
        return shared
    found = eliminate(weights, gram.xtx, damping=damping, group=pattern.group, keep=pattern.keep)
    return found.thresholds(columns).reshape(groups, outputs, columns)


def output_energy(matrix: NDArray[Any], gram: Gram) -> float:
    """Return the variance of the layer's outputs, summed over outputs and rows: what losses are relative to."""
    weights = np.asarray(matrix, np.float64)
    if not gram.full:
        return float((weights**2 * np.asarray(gram.diagonal)[:, None, :]).sum())
    centred = gram.xtx - gram.count * np.einsum("gi,gj->gij", gram.mean, gram.mean)
    return max(float(np.einsum("gri,gri->", weights @ centred, weights)), np.finfo(np.float64).tiny)
