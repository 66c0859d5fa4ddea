"""Optimal brain surgeon, row by row and exact: the order in which a layer's weights cost least.

Each row w of a layer's matrix is a least-squares problem of its own with the Hessian H = X^T X of the layer's
input rows X. Removing weight q and updating the others raises |X dw|^2 by w_q^2 / inv(H)_qq and changes the
row by -w_q / inv(H)_qq * inv(H)[:, q]. Hassibi & Stork, Optimal Brain Surgeon, 1993; row-wise for whole
layers: Frantar & Alistarh, Optimal Brain Compression, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.second_order.threads import in_parallel

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

STEPS = 64  # removals between two updates of the inverse Hessians
MEMORY = 48 << 20  # bytes of inverse Hessians that each thread holds


@dataclass(frozen=True)
class Elimination:
    """The order in which the weights of each row go, and what each removal costs.

    Attributes:
        order: Column removed at each step, (rows, steps).
        loss: What the removal adds to |X dw|^2, in units of the Gram matrix, (rows, steps).
    """

    order: Integers
    loss: Doubles

    def thresholds(self, columns: int) -> Doubles:
        """Return, for every weight, the loss its removal needs: the running maximum along the order.

        A weight that goes after a costly one is not cheap, whatever its own step costs. Weights that are
        never removed have an infinite one. Shape (rows, columns).
        """
        needed = np.full((len(self.order), columns), np.inf)
        np.put_along_axis(needed, self.order, np.maximum.accumulate(self.loss, axis=1), axis=1)
        return needed


RAISES = tuple(10.0**power for power in range(-8, -1))
"""Parts of the mean diagonal that are added, one after the other, to a matrix that rounding left indefinite."""


def damped(gram: Doubles, damping: float) -> Doubles:
    """Return Gram matrices (..., n, n) with `damping` times the mean of the diagonal added to the diagonal.

    Columns whose inputs are always zero get a diagonal of the mean: their weights cost nothing and
    everything stays invertible.
    """
    diagonal = np.einsum("...ii->...i", gram)
    mean = diagonal.mean(axis=-1, keepdims=True)
    mean = np.where(mean > 0, mean, 1.0)
    result = gram.astype(np.float64, copy=True)
    np.einsum("...ii->...i", result)[...] = np.where(diagonal > 0, diagonal, mean) + damping * mean
    return result


def inverse(gram: Doubles) -> Doubles:
    """Return the inverses of symmetric matrices (..., n, n) that are positive definite but for rounding.

    Of few rows, the damping may be less than the rounding of the sums: the diagonal is then raised by a growing
    part of its mean until the matrix is positive definite. Raises LinAlgError when a hundredth is not enough.
    """
    factor = np.linalg.inv(_cholesky(gram))
    result: Doubles = factor.swapaxes(-1, -2) @ factor
    return result


def _cholesky(gram: Doubles) -> Doubles:
    mean = np.einsum("...ii->...i", gram).mean(axis=-1)[..., None, None]
    raised = gram
    for part in RAISES:
        try:
            return np.asarray(np.linalg.cholesky(raised))
        except np.linalg.LinAlgError:
            raised = gram + part * mean * np.eye(gram.shape[-1])
    return np.asarray(np.linalg.cholesky(raised))


def eliminate(
    matrix: NDArray[Any],
    gram: Doubles,
    *,
    damping: float = 1e-6,
    steps: int | None = None,
    group: int = 0,
    keep: int = 0,
) -> Elimination:
    """Remove the weights of every row one by one, each time the one that costs least, updating the others.

    Weights that are zero already go first, at no cost.

    Args:
        matrix: Weights (groups, out, columns); the result has groups * out rows.
        gram: X^T X of the input rows of each group, (groups, columns, columns).
        damping: Part of the mean diagonal that is added to the diagonal.
        steps: Removals in each row; by default all columns.
        group: Columns of an N:M group; 0 for none.
        keep: Weights that stay in every full group.

    Raises:
        LinAlgError: The damped Gram matrix is not positive definite.
    """
    groups, outputs, columns = matrix.shape
    rows = groups * outputs
    whole = np.asarray(matrix, np.float64).reshape(rows, columns)
    inverted = inverse(damped(gram, damping))
    group_of = np.arange(rows) // max(1, outputs)
    wanted = columns if steps is None else min(steps, columns)
    if group:
        full = columns // group
        wanted = min(wanted, full * (group - keep) + max(0, columns - full * group - keep))
    order = np.zeros((rows, wanted), np.int64)
    loss = np.zeros((rows, wanted))

    def work(start: int, stop: int) -> None:
        part = slice(start, stop)
        removal = _Removal(whole[part].copy(), inverted[group_of[part]], group, keep)
        for done in range(0, wanted, STEPS):
            block = slice(done, min(done + STEPS, wanted))
            order[part, block], loss[part, block] = removal.block(block.stop - block.start)

    in_parallel(work, rows, MEMORY // (8 * columns * columns))
    return Elimination(order, loss)


class _Removal:
    """A few rows at a time, each with an inverse Hessian of its own (which is used up), of the columns left.

    The rank-one updates of a block of steps are kept apart as U: inv(H) - U^T U, and applied together.
    """

    def __init__(self, weights: Doubles, inverted: Doubles, group: int, keep: int) -> None:
        rows, columns = weights.shape
        self.weights = weights
        self.inverse = inverted
        self.names = np.broadcast_to(np.arange(columns), (rows, columns)).copy()  # of the columns left
        self.group = group
        if group:
            sizes = np.minimum(group, columns - group * np.arange(-(-columns // group)))
            self.budget = np.broadcast_to(np.maximum(0, sizes - keep), (rows, sizes.size)).copy()

    def block(self, steps: int) -> tuple[Integers, Doubles]:
        """Make so many removals; return the columns and the losses, (rows, steps)."""
        rows, left = self.weights.shape
        row = np.arange(rows)
        updates = np.zeros((rows, steps, left))
        diagonal = np.einsum("rii->ri", self.inverse).copy()
        gone = np.zeros((rows, left), np.bool_)
        order = np.zeros((rows, steps), np.int64)
        losses = np.zeros((rows, steps))
        for step in range(steps):
            scores = self.weights**2 / diagonal
            scores[gone | self._barred()] = np.inf
            chosen = scores.argmin(axis=1)
            column = self.inverse[row, chosen]
            if step:
                mixed = updates[row, :step, chosen]
                column = column - (mixed[:, None, :] @ updates[:, :step])[:, 0]
            pivot = column[row, chosen]
            order[:, step] = self.names[row, chosen]
            losses[:, step] = scores[row, chosen]
            self.weights -= (self.weights[row, chosen] / pivot)[:, None] * column
            update = column / np.sqrt(pivot)[:, None]
            updates[:, step] = update
            diagonal -= update**2
            gone[row, chosen] = True
            self.weights[gone] = 0.0
            diagonal[gone] = 1.0
            np.maximum(diagonal, np.finfo(np.float64).tiny, out=diagonal)
            if self.group:
                self.budget[row, order[:, step] // self.group] -= 1
        self._shrink(updates, ~gone)
        return order, losses

    def _barred(self) -> Mask | bool:
        """Columns whose group has given all it may."""
        if not self.group:
            return False
        return np.take_along_axis(self.budget, self.names // self.group, axis=1) <= 0

    def _shrink(self, updates: Doubles, left: Mask) -> None:
        """Apply the block's updates to the columns that are left, and forget the others."""
        rows = len(left)
        kept = np.nonzero(left)[1].reshape(rows, -1)
        self.weights = np.take_along_axis(self.weights, kept, axis=1)
        self.names = np.take_along_axis(self.names, kept, axis=1)
        smaller = np.empty((rows, kept.shape[1], kept.shape[1]))
        for number, columns in enumerate(kept):
            update = updates[number][:, columns]
            smaller[number] = self.inverse[number][np.ix_(columns, columns)] - update.T @ update
        self.inverse = smaller


def refit(
    matrix: NDArray[Any], mask: Mask, gram: Doubles, *, goal: Doubles | None = None, damping: float = 1e-6
) -> Doubles:
    """Return each row's least-squares weights on its support.

    They minimise |X w - X matrix|^2 over the w that are zero where `mask` is False; with `goal`,
    |X w - Y|^2 for any other outputs Y.

    Args:
        matrix: Weights (groups, out, columns).
        mask: True where a weight may stay, like `matrix`.
        gram: X^T X of the input rows of each group, (groups, columns, columns).
        goal: Y^T X, like `matrix`, where the outputs to meet are not X matrix^T.
        damping: Part of the mean diagonal that is added to the diagonal, pulling towards `matrix`.
    """
    hessian = damped(gram, damping)
    weights = np.asarray(matrix, np.float64)
    wanted = weights @ hessian if goal is None else goal + weights @ (hessian - gram)
    result = np.zeros(weights.shape)
    outputs = weights.shape[1]

    def work(start: int, stop: int) -> None:
        for place in range(start, stop):
            group, row = divmod(place, outputs)
            support = np.flatnonzero(mask[group, row])
            if support.size:
                block = hessian[group][np.ix_(support, support)]
                result[group, row, support] = _solve(block, wanted[group, row, support])

    in_parallel(work, weights.shape[0] * outputs, 64)
    return result


def _solve(matrix: Doubles, right: Doubles) -> Doubles:
    """Return the solution of one symmetric system, by Cholesky where rounding leaves it definite."""
    from scipy.linalg.lapack import dposv  # noqa: PLC0415 - not before it is needed

    _, found, failed = dposv(matrix, right)
    return np.asarray(np.linalg.solve(matrix, right) if failed else found, np.float64)


def output_loss(change: Doubles, gram: Doubles) -> Doubles:
    """Return |X dw|^2 of each row of a change of weights (groups, out, columns): (groups, out)."""
    loss: Doubles = np.einsum("gri,gri->gr", change @ gram, change)
    return np.maximum(loss, 0.0)


def eliminate_blocks(
    matrix: NDArray[Any], gram: Doubles, size: int, *, damping: float = 1e-6, steps: int | None = None
) -> Elimination:
    """As `eliminate`, with `size` consecutive columns removed together; steps and order count blocks.

    Removing the columns B raises |X dw|^2 by w_B inv(inv(H)_BB) w_B. A last block that is not full is one
    with fewer columns.

    Args:
        matrix: Weights (groups, out, columns).
        gram: X^T X of the input rows of each group, (groups, columns, columns).
        size: Columns of a block.
        damping: Part of the mean diagonal that is added to the diagonal.
        steps: Blocks to remove in each row; by default all.
    """
    groups, outputs, columns = matrix.shape
    blocks = -(-columns // size)
    padded = blocks * size
    whole = np.zeros((groups, outputs, padded))
    whole[..., :columns] = matrix
    hessian = np.broadcast_to(np.eye(padded), (groups, padded, padded)).copy()
    hessian[:, :columns, :columns] = damped(gram, damping)
    inverted = inverse(hessian)
    wanted = blocks if steps is None else min(steps, blocks)
    order = np.zeros((groups * outputs, wanted), np.int64)
    loss = np.zeros((groups * outputs, wanted))

    def work(start: int, stop: int) -> None:
        for row in range(start, stop):
            order[row], loss[row] = _remove_blocks(
                whole.reshape(-1, padded)[row].copy(), inverted[row // outputs].copy(), size, wanted
            )

    in_parallel(work, groups * outputs, MEMORY // (8 * padded * padded))
    return Elimination(order, loss)


def _remove_blocks(weights: Doubles, inverted: Doubles, size: int, steps: int) -> tuple[Integers, Doubles]:
    """Return the blocks of one row in the order they go, and their losses; uses both arrays up."""
    names = np.arange(weights.size // size)
    order, losses = np.zeros(steps, np.int64), np.zeros(steps)
    for step in range(steps):
        left = names.size
        corners = inverted.reshape(left, size, left, size)[np.arange(left), :, np.arange(left), :]
        parts = weights.reshape(left, size, 1)
        solved = np.linalg.solve(corners, parts)
        scores = (parts * solved).sum(axis=(1, 2))
        chosen = int(scores.argmin())
        order[step], losses[step] = names[chosen], scores[chosen]
        inside = slice(chosen * size, (chosen + 1) * size)
        columns = inverted[:, inside]
        kept = np.delete(np.arange(weights.size), np.arange(weights.size)[inside])
        weights = (weights - columns @ solved[chosen][:, 0])[kept]
        mixed = columns[kept]
        inverted = inverted[np.ix_(kept, kept)] - mixed @ np.linalg.solve(corners[chosen], mixed.T)
        names = np.delete(names, chosen)
    return order, losses
