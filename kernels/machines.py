"""ai.onnx.ml: linear models and support vector machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.kernels.activation import Sigmoid
from onnxslim_lab.kernels.kept import kept
from onnxslim_lab.kernels.ml import ML
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.scores import labels_at, transformed, two_classes

_CLOSE = 0.005  # libsvm's bound of the error of coupled probabilities, divided by the number of classes
_LEAST = 1e-7
_ROUNDS = 100


def rows_of(X: Array) -> Array:
    """Return the input as float32 rows: a vector is one row."""
    return np.atleast_2d(X).astype(np.float32)


@kernel("LinearRegressor", since=1, domain=ML)
def LinearRegressor(
    X: Array,
    *,
    coefficients: Sequence[float] | None = None,
    intercepts: Sequence[float] | None = None,
    post_transform: str = "NONE",
    targets: int = 1,
) -> Array:
    """Return X times the coefficients of every target, plus its intercept."""
    weights = np.array(coefficients, np.float32).reshape(targets, -1)
    scores = rows_of(X) @ weights.T
    if intercepts:
        scores = scores + np.array(intercepts, np.float32)
    return transformed(np.asarray(scores), post_transform)


@kernel("LinearClassifier", since=1, domain=ML)
def LinearClassifier(
    X: Array,
    *,
    classlabels_ints: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    coefficients: Sequence[float],
    intercepts: Sequence[float] | None = None,
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Array, Array]:
    """Return the label of the greatest score, and the transformed scores.

    A single row of coefficients for two labels scores the second one.
    """
    rows = rows_of(X)
    scores = rows @ np.array(coefficients, np.float32).reshape(-1, rows.shape[1]).T
    if intercepts:
        scores = scores + np.array(intercepts, np.float32)
    if scores.shape[1] > 1:
        place = scores.argmax(1)
        return labels_at(place, classlabels_ints, classlabels_strings), transformed(scores, post_transform)
    place = (scores[:, 0] > 0).astype(np.int64)
    if len(classlabels_strings or classlabels_ints or ()) != 2:
        found = place if not classlabels_strings else np.where(place > 0, "1", "0").astype(object)
        return found, transformed(scores, post_transform)
    result = two_classes(scores, post_transform, probability=True)
    return labels_at(place, classlabels_ints, classlabels_strings), result


def similarity(rows: Array, vectors: Array, kernel_type: str, kernel_params: Sequence[float] | None) -> Array:
    """Return the kernel of every row (N, F) with every vector (V, F): (N, V), computed in float64.

    Raises:
        ValueError: The kernel is unknown.
    """
    gamma, offset, degree = kernel_params or (0.0, 0.0, 0.0)
    product = rows.astype(np.float64) @ vectors.astype(np.float64, copy=False).T
    if kernel_type == "LINEAR":
        return np.asarray(product)
    if kernel_type == "POLY":
        return np.asarray((gamma * product + offset) ** int(degree))
    if kernel_type == "SIGMOID":
        return np.tanh(gamma * product + offset)
    if kernel_type == "RBF":
        left, right = (np.square(side.astype(np.float64, copy=False)).sum(1) for side in (rows, vectors))
        return np.asarray(np.exp(-gamma * np.maximum(left[:, None] - 2 * product + right, 0)))
    raise ValueError(f"kernel_type {kernel_type!r} is not LINEAR, POLY, RBF or SIGMOID")


@kernel("SVMRegressor", since=1, domain=ML)
def SVMRegressor(
    X: Array,
    *,
    coefficients: Sequence[float] | None = None,
    kernel_params: Sequence[float] | None = None,
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: Sequence[float] | None = None,
    support_vectors: Sequence[float] | None = None,
) -> Array:
    """Return the weighted kernels plus rho, (N, 1); for one class 1 where that is positive, else -1."""
    rows, weights = rows_of(X), np.array(coefficients, np.float64)
    if n_supports:
        vectors = np.array(support_vectors, np.float32).reshape(n_supports, -1)
        scores = similarity(rows, vectors, kernel_type, kernel_params) @ weights[:n_supports]
    else:
        scores = rows.astype(np.float64) @ weights
    scores = scores + (rho or [0.0])[0]
    if one_class:
        scores = np.where(scores > 0, 1.0, -1.0)
    return transformed(scores[:, None].astype(np.float32), post_transform)


def coupled(pairs: Array) -> Array:
    """Return class probabilities (N, C) from those of pairs (N, C, C): [n, i, j] is that of i against j.

    Source: Wu, Lin and Weng 2004, the second method, as libsvm iterates it.
    """
    count, classes = pairs.shape[:2]
    against = np.swapaxes(pairs, 1, 2)
    system = -against * pairs
    diagonal = np.arange(classes)
    system[:, diagonal, diagonal] = np.square(against).sum(2)
    chance = np.full((count, classes), 1 / classes)
    active = np.arange(count)
    for _ in range(_ROUNDS):
        q, p = system[active], chance[active]
        qp = np.einsum("nij,nj->ni", q, p)
        pqp = (p * qp).sum(1)
        open_ = np.abs(qp - pqp[:, None]).max(1) >= _CLOSE / classes
        if not open_.any():
            break
        active, q, p, qp, pqp = active[open_], q[open_], p[open_], qp[open_], pqp[open_]
        for t in range(classes):
            step = (pqp - qp[:, t]) / q[:, t, t]
            grown = (1 + step)[:, None]
            pqp = (pqp + step * (step * q[:, t, t] + 2 * qp[:, t])) / (1 + step) ** 2
            p[:, t] += step
            qp = (qp + step[:, None] * q[:, t]) / grown
            p = p / grown
        chance[active] = p
    return chance


@dataclass(frozen=True)
class Pairwise:
    """A machine for every pair of classes.

    Attributes:
        vectors: Support vectors in float64, (V, F).
        weights: Their weights in every machine, (V, pairs); 0 for those of other classes.
        firsts, seconds: The classes of every pair.
    """

    vectors: Array
    weights: Array
    firsts: Array
    seconds: Array


@kept
def _pairwise(
    coefficients: Sequence[float] | None,
    support_vectors: Sequence[float] | None,
    vectors_per_class: Sequence[int],
) -> Pairwise:
    """Return the machines that libsvm's attributes stand for: the weights of a class differ by the other one."""
    ends = np.cumsum(vectors_per_class)
    starts = ends - np.array(vectors_per_class)
    count = int(ends[-1])
    duals = np.array(coefficients, np.float64).reshape(-1, count)
    firsts, seconds = np.triu_indices(len(ends), 1)
    weights = np.zeros((count, len(firsts)))
    for pair, (i, j) in enumerate(zip(firsts.tolist(), seconds.tolist(), strict=True)):
        own, other = slice(starts[i], ends[i]), slice(starts[j], ends[j])
        weights[own, pair], weights[other, pair] = duals[j - 1, own], duals[i, other]
    vectors = np.array(support_vectors, np.float32).reshape(count, -1).astype(np.float64)
    return Pairwise(vectors, weights, firsts, seconds)


@kernel("SVMClassifier", since=1, domain=ML)
def SVMClassifier(
    X: Array,
    *,
    classlabels_ints: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    kernel_params: Sequence[float] | None = None,
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: Sequence[float] | None = None,
    prob_b: Sequence[float] | None = None,
    rho: Sequence[float] | None = None,
    support_vectors: Sequence[float] | None = None,
    vectors_per_class: Sequence[int] | None = None,
) -> tuple[Array, Array]:
    """Return the labels, and the scores: probabilities when prob_a is given, else those of class pairs.

    Without support vectors it is a linear model with one row of coefficients per class. Otherwise every
    pair of classes votes for the label, which need not be the most probable one.
    """
    rows = rows_of(X)
    classes = len(classlabels_strings or classlabels_ints or ())
    offsets = np.array(rho, np.float64)
    if not vectors_per_class:
        weights = np.array(coefficients, np.float32).reshape(classes, -1)
        scores = (similarity(rows, weights, "LINEAR", None) + offsets[0]).astype(np.float32)
        place = scores.argmax(1)
        return labels_at(place, classlabels_ints, classlabels_strings), transformed(scores, post_transform)
    machines = _pairwise(coefficients, support_vectors, vectors_per_class)
    firsts, seconds = machines.firsts, machines.seconds
    kernels = similarity(rows, machines.vectors, kernel_type, kernel_params)
    decisions = kernels @ machines.weights + offsets[: len(firsts)]
    votes = np.zeros((len(rows), classes), np.int64)
    winners = np.where(decisions > 0, firsts, seconds)
    np.add.at(votes, (np.arange(len(rows))[:, None], winners), 1)
    labels = labels_at(votes.argmax(1), classlabels_ints, classlabels_strings)
    if prob_a:
        chances = 1 - Sigmoid(decisions * np.array(prob_a, np.float64) + np.array(prob_b, np.float64))
        chances = np.clip(chances, _LEAST, 1 - _LEAST)
        pairs = np.zeros((len(rows), classes, classes))
        pairs[:, firsts, seconds] = chances
        pairs[:, seconds, firsts] = 1 - chances
        return labels, transformed(coupled(pairs).astype(np.float32), post_transform)
    scores = decisions.astype(np.float32)
    if classes == 2:
        return labels, two_classes(scores, post_transform, probability=post_transform != "NONE")
    return labels, transformed(scores, post_transform)
