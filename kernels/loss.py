"""Losses of a classification, with class weights and an ignored class."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import log_softmax, wide
from onnxslim_lab.kernels.registry import Array, kernel


def likelihood_loss(
    log_probabilities: Array, target: Array, weight: Array | None, ignore_index: int | None, reduction: str
) -> Array:
    """Return minus the weighted log-probabilities of the target classes, reduced.

    Args:
        log_probabilities: (N, C, ...).
        target: Class indices (N, ...).
        weight: One per class (C,), ones unless given.
        ignore_index: A target that counts as nothing.
        reduction: "none", "sum", or "mean": the sum divided by the sum of the weights used.

    Raises:
        ValueError: The reduction is unknown.
        IndexError: A target is no class.
    """
    if reduction not in {"none", "sum", "mean"}:
        raise ValueError(f"reduction {reduction!r} is not none, sum or mean")
    ignored = np.zeros(target.shape, np.bool_) if ignore_index is None else target == ignore_index
    chosen = np.where(ignored, 0, target).astype(np.int64)
    picked = np.take_along_axis(log_probabilities, chosen[:, None], 1)[:, 0]
    factor = np.ones_like(picked) if weight is None else wide(weight)[chosen].astype(picked.dtype)
    factor = np.where(ignored, np.zeros((), picked.dtype), factor)
    loss = -picked * factor
    if reduction == "none":
        return np.asarray(loss)
    total = loss.sum()
    return np.asarray(total / factor.sum() if reduction == "mean" else total)


@kernel("NegativeLogLikelihoodLoss", since=12)
def NegativeLogLikelihoodLoss(
    input: Array,
    target: Array,
    weight: Array | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Array:
    """Return the loss of log-probabilities (N, C, ...) for the targets (N, ...)."""
    return likelihood_loss(wide(input), target, weight, ignore_index, reduction).astype(input.dtype)


@kernel("SoftmaxCrossEntropyLoss", since=12)
def SoftmaxCrossEntropyLoss(
    scores: Array,
    labels: Array,
    weights: Array | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array]:
    """Return the loss of scores (N, C, ...) for the labels (N, ...), and the log-probabilities."""
    log_probabilities = log_softmax(wide(scores), 1)
    loss = likelihood_loss(log_probabilities, labels, weights, ignore_index, reduction)
    return loss.astype(scores.dtype), log_probabilities.astype(scores.dtype)
