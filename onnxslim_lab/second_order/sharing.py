"""Shared values chosen and assigned by what they cost at the layer's output; zeros stay zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.clustering import Init, cluster, midpoints, settle
from onnxslim_lab.second_order.obs import Doubles, Mask, damped, inverse
from onnxslim_lab.second_order.threads import in_parallel
from onnxslim_lab.statistics import Gram

POINTS = 1 << 14  # that k-means sees
LEAST_ENERGY = 1e-3  # of the mean: an input that never moved in the data may move in another

Array = NDArray[Any]


def weighted_codebook(values: Doubles, masses: Doubles, size: int, *, init: Init, seed: int) -> Doubles:
    """Return `size` values (or as many as there are distinct ones), ascending, by k-means with masses.

    Choi, El-Khamy & Lee, Towards the Limit of Network Quantization, 2017: each weight counts as much as
    the diagonal of the Hessian says.

    Args:
        values: Weights, one-dimensional, finite.
        masses: Their positive masses.
        size: Entries.
        init: Start of k-means.
        seed: Seed of a random start.
    """
    order = np.argsort(values, kind="stable")
    ascending, mass = values[order], masses[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=-np.inf))
    if starts.size <= size:
        return ascending[starts]
    if starts.size > POINTS:
        starts = np.unique(np.searchsorted(ascending, ascending[:: -(-ascending.size // POINTS)]))
    counts = np.add.reduceat(mass, starts)
    points = np.add.reduceat(mass * ascending, starts) / counts
    return np.sort(settle(points, counts, cluster(points, counts, size, init=init, seed=seed)))


def share_by_output(
    matrix: Array,
    gram: Gram,
    size: int,
    *,
    compensate: bool,
    init: Init = "linear",
    seed: int = 0,
    damping: float = 1e-3,
) -> Array | None:
    """Return a matrix (groups, out, in) of at most `size` values, zero included where it has zeros.

    Args:
        matrix: Finite weights.
        gram: Gram matrix of the layer's input rows; its diagonal weighs the inputs.
        size: Entries of the codebook.
        compensate: Whether to round column by column, each rounding error made good by the weights of the
            row that are not rounded yet (GPTQ, Frantar et al. 2022) and not zero; a row keeps the nearest
            values where that costs its output less.
        init: Start of k-means.
        seed: Seed of a random start.
        damping: Part of the mean input energy added to the Gram matrix.

    Returns:
        None when there are no more than `size` distinct values: nothing to share.
    """
    weights = np.asarray(matrix, np.float64)
    support = weights != 0
    zeros = not support.all()
    masses = input_masses(gram, weights.shape)
    if np.unique(weights).size <= size:
        return None
    centres = weighted_codebook(weights[support], masses[support], size - zeros, init=init, seed=seed)
    table = np.unique(centres.astype(matrix.dtype)).astype(np.float64)
    nearest = np.where(support, _nearest(weights, table), 0.0)
    if compensate and gram.full:
        nearest = _compensated(weights, support, nearest, table, damped(gram.xtx, damping))
    return nearest.astype(matrix.dtype)


def input_masses(gram: Gram, shape: tuple[int, ...]) -> Doubles:
    """Return what the squared error of each weight (groups, out, in) counts: the energy of its input."""
    energy = np.asarray(gram.diagonal, np.float64)
    energy = np.maximum(energy, LEAST_ENERGY * max(float(energy.mean()), np.finfo(np.float64).tiny))
    return np.broadcast_to(energy[:, None, :], shape)


def _nearest(values: Doubles, table: Doubles) -> Doubles:
    found: Doubles = table[np.searchsorted(midpoints(table), values)]
    return found


def _compensated(
    weights: Doubles, support: Mask, nearest: Doubles, table: Doubles, hessian: Doubles
) -> Doubles:
    """Return each row rounded with compensation on its support, or as it is where that is no better."""
    result = nearest.copy()
    outputs = weights.shape[1]

    def work(start: int, stop: int) -> None:
        for place in range(start, stop):
            group, row = divmod(place, outputs)
            kept = np.flatnonzero(support[group, row])
            if not kept.size:
                continue
            block = hessian[group][np.ix_(kept, kept)]
            rounded = _round_row(weights[group, row, kept], table, block)
            before = nearest[group, row, kept] - weights[group, row, kept]
            after = rounded - weights[group, row, kept]
            if after @ block @ after < before @ block @ before:
                result[group, row, kept] = rounded

    in_parallel(work, weights.shape[0] * outputs, 16)
    return result


def _round_row(weights: Doubles, table: Doubles, hessian: Doubles) -> Doubles:
    """Round one row, the inputs of most energy first, passing each error on to what is left."""
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    upper = np.linalg.cholesky(inverse(hessian[np.ix_(order, order)])).T
    left = weights[order].copy()
    edges = midpoints(table)
    for place in range(left.size):
        chosen = table[np.searchsorted(edges, left[place])]
        error = (left[place] - chosen) / upper[place, place]
        left[place + 1 :] -= error * upper[place, place + 1 :]
        left[place] = chosen
    result = np.empty_like(left)
    result[order] = left
    return result
