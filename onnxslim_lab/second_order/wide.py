"""Layers with too many inputs for rows of their own: one inverse Hessian serves all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.second_order.blocked import compensators, prune_blocked, static_scores
from onnxslim_lab.second_order.obs import Doubles, Mask, output_loss
from onnxslim_lab.second_order.patterns import Pattern, by_pattern, cheapest
from onnxslim_lab.statistics import Gram

EXACT = 1200  # columns up to which rows are eliminated exactly
_FRACTIONS = (0.1, 0.25, 0.5, 0.7, 0.85, 0.95)
_LEAST = 0.01  # damping of the one inverse Hessian


def too_wide(columns: int) -> bool:
    """Return whether a layer has too many inputs for rows of their own."""
    return columns > EXACT


def wide_scores(matrix: Doubles, gram: Gram, damping: float) -> Doubles:
    """Return, for every weight (groups, out, in), the loss if it alone were removed."""
    pairs = zip(matrix, gram.xtx, strict=True)
    return np.stack([static_scores(part, xtx, damping) for part, xtx in pairs])


def wide_losses(matrix: Doubles, gram: Gram, damping: float) -> Doubles:
    """Return losses (groups, out, in) in the order of `wide_scores` that add up to what removals cost together.

    What each weight costs alone is far below what it costs once others have gone, so that a threshold over
    several layers would empty this one. Growing parts of the weights are removed, the rest making good for
    it, and the loss between these measurements is interpolated (its logarithm, over the part removed).
    """
    order = np.argsort(wide_scores(matrix, gram, damping), axis=None, kind="stable")
    uppers = [compensators(xtx, max(damping, _LEAST)) for xtx in gram.xtx]
    whole = float(output_loss(matrix, gram.xtx).sum())
    sums = []
    for fraction in _FRACTIONS:
        change = _without(matrix, uppers, Pattern(), fraction)[0] - matrix
        sums.append(float(output_loss(change, gram.xtx).sum()))
    logarithms = np.log(np.maximum([*sums, whole], max(whole, np.finfo(np.float64).tiny) * 1e-12))
    parts = np.arange(order.size + 1) / order.size
    together = np.exp(np.interp(parts, [*_FRACTIONS, 1.0], np.maximum.accumulate(logarithms)))
    first = parts < _FRACTIONS[0]
    together[first] *= (parts[first] / _FRACTIONS[0]) ** 3
    losses = np.empty(order.size)
    losses[order] = np.maximum.accumulate(np.diff(together))
    return losses.reshape(matrix.shape)


def compensate_wide(matrix: NDArray[Any], gram: Gram, mask: Mask, damping: float) -> Doubles:
    """Return the weights of a wide layer with the masked ones removed and the rest updated, left to right."""
    result = np.array(matrix, np.float64)
    for part, xtx, gone in zip(result, gram.xtx, mask, strict=True):
        upper = compensators(xtx, max(damping, _LEAST))

        def choose(scores: Doubles, start: int, gone: Mask = gone) -> Mask:
            return gone[:, start : start + scores.shape[1]]

        part[...] = prune_blocked(part, upper, choose)[0]
    return result


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
    fraction = 0.0 if gone is None else float(gone.mean())
    uppers = [compensators(xtx, max(damping, _LEAST)) for xtx in gram.xtx]
    return _without(np.asarray(matrix, np.float64), uppers, pattern, fraction)[1]


def _without(
    matrix: Doubles, uppers: list[Doubles], pattern: Pattern, fraction: float
) -> tuple[Doubles, Mask]:
    """Return the weights without those that a fraction or the pattern takes, the others updated, and the mask."""
    kept, removed = np.zeros(matrix.shape), np.zeros(matrix.shape, np.bool_)
    seen = done = 0

    def choose(scores: Doubles, _start: int) -> Mask:
        nonlocal seen, done
        if pattern.group:
            return np.isfinite(by_pattern(scores, pattern))
        seen += scores.size
        count = round(fraction * seen) - done  # of all columns so far: rounding does not add up
        done += count
        return cheapest(scores, count)

    for number, (part, upper) in enumerate(zip(matrix, uppers, strict=True)):
        kept[number], removed[number] = prune_blocked(part, upper, choose, multiple=max(1, pattern.group))
    return kept, removed
