"""Which weights to remove: the loss that each removal needs, and the masks that a budget makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.second_order.blocked import compensators, prune_blocked, static_scores
from onnxslim_lab.second_order.obs import Doubles, Mask, eliminate, eliminate_blocks
from onnxslim_lab.statistics import Gram

Criterion = Literal["magnitude", "wanda", "obs"]
EXACT = 1200  # columns up to which rows are eliminated exactly; above, one inverse Hessian serves all rows


@dataclass(frozen=True)
class Pattern:
    """Which sets of weights go together: single ones, N of every M, or blocks of consecutive columns.

    >>> Pattern.parse("2:4"), Pattern.parse("block:8").block
    (Pattern(keep=2, group=4, block=1), 8)
    """

    keep: int = 0
    group: int = 0
    block: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern "any", "N:M" or "block:N"; raises ValueError for anything else."""
        if text == "any":
            return cls()
        if parts := re.fullmatch(r"block:(\d{1,4})", text):
            if int(parts[1]) > 1:
                return cls(block=int(parts[1]))
        elif (parts := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)) and 0 < int(parts[1]) < int(parts[2]):
            return cls(keep=int(parts[1]), group=int(parts[2]))
        raise ValueError('must be "any", N:M with 0 < N < M such as 2:4, or block:N with N > 1')


def removal_losses(
    matrix: NDArray[Any], gram: Gram | None, criterion: Criterion, pattern: Pattern, damping: float
) -> Doubles:
    """Return, for every weight (groups, out, in), the loss below which it stays and from which it goes.

    The unit is |X dw|^2 over the rows that the Gram matrix counts. "magnitude": w^2. "wanda": w^2 times the
    energy of its input, nothing else changed (Sun et al., A Simple and Effective Pruning Approach for Large
    Language Models, 2023). "obs": the running maximum along the order in which optimal brain surgeon removes the
    weights of the row, all others updated; for wide layers the loss if it alone were removed. Weights
    that a pattern keeps are infinite. Only the diagonal of the Gram matrix is used where no more is there.
    """
    groups, outputs, columns = matrix.shape
    weights = np.asarray(matrix, np.float64)
    if criterion == "magnitude" or gram is None:
        return by_pattern(weights**2, pattern)
    if criterion == "wanda" or not gram.full:
        return by_pattern(weights**2 * np.asarray(gram.diagonal)[:, None, :], pattern)
    if columns > EXACT:
        pairs = zip(weights, gram.xtx, strict=True)
        return by_pattern(np.stack([static_scores(part, xtx, damping) for part, xtx in pairs]), pattern)
    if pattern.block > 1:
        found = eliminate_blocks(weights, gram.xtx, pattern.block, damping=damping)
        blocks = -(-columns // pattern.block)
        losses: Doubles = np.repeat(found.thresholds(blocks), pattern.block, axis=1)[:, :columns]
        sizes = np.minimum(pattern.block, columns - pattern.block * (np.arange(columns) // pattern.block))
        shared: Doubles = (losses / sizes).reshape(matrix.shape)
        return shared
    found = eliminate(weights, gram.xtx, damping=damping, group=pattern.group, keep=pattern.keep)
    return found.thresholds(columns).reshape(groups, outputs, columns)


def by_pattern(scores: Doubles, pattern: Pattern) -> Doubles:
    """Return independent scores (groups, out, in) made to follow a pattern.

    Blocks share the mean of their scores; in N:M groups the N largest become infinite.
    """
    columns = scores.shape[-1]
    step = pattern.block if pattern.block > 1 else pattern.group
    if not step:
        return scores
    result = scores.copy()
    for start in range(0, columns, step):
        part = result[..., start : start + step]
        if pattern.block > 1:
            part[...] = part.mean(axis=-1, keepdims=True)
        else:
            largest = np.argsort(-part, axis=-1, kind="stable")[..., : pattern.keep]
            np.put_along_axis(part, largest, np.inf, axis=-1)
    return result


def cheapest(losses: Doubles, count: int) -> Mask:
    """Return the mask of the `count` smallest losses; infinite ones never go; ties in storage order."""
    flat = losses.reshape(-1)
    count = min(count, int(np.isfinite(flat).sum()))
    mask = np.zeros(flat.shape, np.bool_)
    if count:
        threshold = np.partition(flat, count - 1)[count - 1]
        mask[flat < threshold] = True
        ties = np.flatnonzero(flat == threshold)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(losses.shape)


def output_energy(matrix: NDArray[Any], gram: Gram) -> float:
    """Return the variance of the layer's outputs, summed over outputs and rows: what losses are relative to."""
    weights = np.asarray(matrix, np.float64)
    if not gram.full:
        return float((weights**2 * np.asarray(gram.diagonal)[:, None, :]).sum())
    centred = gram.xtx - gram.count * np.einsum("gi,gj->gij", gram.mean, gram.mean)
    return max(float(np.einsum("gri,gri->", weights @ centred, weights)), np.finfo(np.float64).tiny)


def compensate_wide(matrix: NDArray[Any], gram: Gram, mask: Mask, damping: float) -> Doubles:
    """Return the weights of a wide layer with the masked ones removed and the rest updated, left to right."""
    result = np.array(matrix, np.float64)
    for part, xtx, gone in zip(result, gram.xtx, mask, strict=True):
        upper = compensators(xtx, max(damping, 0.01))

        def choose(scores: Doubles, start: int, gone: Mask = gone) -> Mask:
            return gone[:, start : start + scores.shape[1]]

        part[...] = prune_blocked(part, upper, choose)[0]
    return result


def too_wide(columns: int) -> bool:
    """Return whether a layer has too many inputs for rows of their own."""
    return columns > EXACT


def removed_in_wide(
    matrix: NDArray[Any], gram: Gram, gone: Mask | None, pattern: Pattern, damping: float
) -> Mask:
    """Return what goes of a wide layer, chosen as the weights are when their columns' turn comes.

    Args:
        matrix: Weights (groups, out, in).
        gram: Gram matrix of the inputs.
        gone: How much goes is taken from there, where the pattern does not say it: the same part of every
            block of columns.
        pattern: Single weights or N:M.
        damping: Part of the mean energy of an input that is added to the Gram matrix.
    """
    result = np.zeros(matrix.shape, np.bool_)
    fraction = 0.0 if gone is None else float(gone.mean())
    seen = done = 0

    def choose(scores: Doubles, _start: int) -> Mask:
        nonlocal seen, done
        if pattern.group:
            return np.isfinite(by_pattern(scores, pattern))
        seen += scores.size
        count = round(fraction * seen) - done  # of all columns so far: rounding does not add up
        done += count
        return cheapest(scores, count)

    for number, (part, xtx) in enumerate(zip(matrix, gram.xtx, strict=True)):
        upper = compensators(xtx, max(damping, 0.01))
        result[number] = prune_blocked(part, upper, choose, multiple=max(1, pattern.group))[1]
    return result
