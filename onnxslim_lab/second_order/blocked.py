"""Pruning with compensation for wide layers: one inverse Hessian for all rows, columns left to right.

Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023: with
inv(H) = U^T U (U upper triangular), row j of U holds, for every row of the layer alike, how removing a weight of
column j is made good by the columns to its right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.second_order.obs import Doubles, Mask, damped, inverse

BLOCK = 128

Choose = Callable[[Doubles, int], Mask]
"""From the scores of a block of columns (rows, columns) and its first column: what to remove."""


def compensators(gram: Doubles, damping: float = 0.01) -> Doubles:
    """Return U, upper triangular with inv(H) = U^T U, of one Gram matrix (columns, columns)."""
    return np.asarray(np.linalg.cholesky(inverse(damped(gram, damping))).T, np.float64)


def static_scores(matrix: NDArray[Any], gram: Doubles, damping: float = 0.01) -> Doubles:
    """Return w^2 / inv(H)_qq for every weight (rows, columns): the loss if it alone were removed."""
    diagonal = np.diagonal(inverse(damped(gram, damping)))
    return np.asarray(matrix, np.float64) ** 2 / diagonal


def prune_blocked(
    matrix: NDArray[Any], upper: Doubles, choose: Choose, *, multiple: int = 1
) -> tuple[Doubles, Mask]:
    """Remove weights column by column, adding each error to the columns to the right.

    Args:
        matrix: Weights (rows, columns).
        upper: What `compensators` gives.
        choose: Called for each block of columns, with scores w^2 / U_jj^2 of the weights as they are then.
        multiple: Blocks begin at multiples of this: N:M groups are not cut in two.

    Returns:
        The new weights and the mask of those that were removed.
    """
    weights = np.array(matrix, np.float64)
    removed = np.zeros(weights.shape, np.bool_)
    diagonal = np.diagonal(upper)
    step = multiple * max(1, BLOCK // multiple)
    for start in range(0, weights.shape[1], step):
        stop = min(start + step, weights.shape[1])
        block = weights[:, start:stop]
        gone = choose(block**2 / diagonal[start:stop] ** 2, start)
        removed[:, start:stop] = gone
        errors = np.zeros(block.shape)
        for column in range(stop - start):
            place = start + column
            errors[:, column] = np.where(gone[:, column], block[:, column], 0.0) / diagonal[place]
            block[:, column:] -= errors[:, column : column + 1] * upper[place, place:stop]
            block[gone[:, column], column] = 0.0
        weights[:, stop:] -= errors @ upper[start:stop, stop:]
    return weights, removed
