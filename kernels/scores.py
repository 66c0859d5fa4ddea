"""What the classifiers and regressors of ai.onnx.ml do with scores: post transforms and labels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from onnxslim_lab.kernels.activation import Sigmoid, softmax
from onnxslim_lab.kernels.registry import Array
from onnxslim_lab.kernels.strings import texts

TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
"""The post transforms, at the numbers that TreeEnsemble gives them."""
_NEAR_ZERO = 1e-7


def quantile(probability: float) -> float:
    """Return the quantile of the normal distribution: NaN outside [0, 1].

    >>> round(quantile(0.975), 2)
    1.96
    """
    if probability in {0.0, 1.0}:
        return float("inf") if probability else float("-inf")
    return NormalDist().inv_cdf(probability) if 0 < probability < 1 else float("nan")


def transformed(scores: Array, post_transform: str) -> Array:
    """Return scores (N, E) after the post transform; the sums are taken over each row.

    Raises:
        ValueError: The transform is unknown.
    """
    if post_transform == "NONE":
        return scores
    if post_transform == "LOGISTIC":
        return Sigmoid(scores)
    if post_transform == "PROBIT":
        return np.asarray(np.frompyfunc(quantile, 1, 1)(scores.astype(np.float64))).astype(scores.dtype)
    if post_transform == "SOFTMAX":
        return softmax(scores, -1)
    if post_transform == "SOFTMAX_ZERO":
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        zero = np.abs(scores) <= _NEAR_ZERO
        powers = np.where(zero, scores * np.exp(-top), np.exp(scores - top))
        return np.asarray(powers / np.where(zero, 0, powers).sum(-1, keepdims=True))
    raise ValueError(f"post_transform {post_transform!r} is not one of {', '.join(TRANSFORMS)}")


def two_classes(score: Array, post_transform: str, *, probability: bool) -> Array:
    """Return the scores of both classes, (N, 2), from that of the second one, as onnxruntime does.

    LOGISTIC and PROBIT apply to both; the other transforms do not apply to a single score.

    Args:
        score: (N, 1).
        post_transform: What is done with them.
        probability: The score is a probability: the other one is 1 less it, not its negative.
    """
    if post_transform == "LOGISTIC":
        return Sigmoid(np.concatenate((-score, score), 1))
    pair = np.concatenate((1 - score if probability else -score, score), 1)
    return transformed(pair, "PROBIT") if post_transform == "PROBIT" else pair


def labels_at(place: Array, ints: Sequence[int] | None, strings: Sequence[str] | None) -> Array:
    """Return the class labels at positions: strings, integers, or the positions where there are none."""
    if strings:
        return texts(strings, (len(strings),))[place]
    return np.array(ints, np.int64)[place] if ints else place.astype(np.int64)
