"""A codebook for one tensor: k-means on its values, each of them then replaced by the nearest entry."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.clustering import (
    Doubles,
    Init,
    cluster,
    distinct,
    histogram,
    means_or,
    midpoints,
    scale_of,
    scaled,
    settle,
)
from onnxslim_lab.floats import Array, blocks

BINS = 1 << 14  # of the histogram that k-means runs on
ROUNDS = 4  # readings of the full data that refine the codebook, at most


@dataclass(frozen=True)
class Shared:
    """A tensor with shared values.

    Attributes:
        values: The tensor, shape and dtype as before, with only values of the codebook.
        codebook: The values in use, ascending, in the tensor's dtype.
    """

    values: Array
    codebook: Array


def share_values(
    values: Array, size: int, *, init: Init = "linear", seed: int = 0, reserve_zero: bool = False
) -> Shared | None:
    """Return the tensor with each value replaced by the nearest of `size` values, chosen by k-means.

    Minimises sum((w - codebook[index])**2). k-means runs on a weighted histogram of the nonzero values
    (each distinct value where there are few); the codebook is then refined on all values until it is
    the means of its members. Zeros stay zero: the codebook has a fixed entry 0.0 when there are any.
    Han et al., Deep Compression, 2016, section 3.

    Args:
        values: Finite floats of any shape.
        size: Entries of the codebook, zero included.
        init: Where the codebook starts: evenly over the range, over the quantiles, or at random values.
        seed: Seed of the random start.
        reserve_zero: Whether 0.0 is an entry even when no value is zero.

    Returns:
        None when there are no more than `size` distinct values: nothing to share.
    """
    scale = scale_of(values)
    if (found := distinct(values, scale, BINS)) is not None and found[0].size <= size:
        return None
    points, counts = found or histogram(values, scale, BINS, least=4 * size)
    zero = reserve_zero or any(not block.all() for block in blocks(values))
    points, counts = points[points != 0], counts[points != 0]
    centres = cluster(points, counts, size - zero, init=init, seed=seed)
    centres[centres == 0] = points[np.abs(points).argmin()]  # `settle` would not move them
    if zero:
        centres = np.append(centres, 0.0)
    centres = settle(points, counts, np.sort(centres))
    return _assign(values, _refine(values, centres, scale), scale)


def _refine(values: Array, centres: Doubles, scale: float) -> Doubles:
    """Return the exact means of each centre's members over all values, until membership is stable."""
    known = None
    for _ in range(ROUNDS):
        counts, sums = np.zeros(centres.size), np.zeros(centres.size)
        edges = midpoints(centres)
        for block in scaled(values, scale):
            index = _nearest(block, edges).astype(np.intp)
            counts += np.bincount(index, minlength=centres.size)
            sums += np.bincount(index, weights=block, minlength=centres.size)
        centres = means_or(sums, counts, centres)
        if known is not None and np.array_equal(known, counts):
            break
        known = counts
    return centres


def _assign(values: Array, centres: Doubles, scale: float) -> Shared:
    """Return the values replaced by the nearest centre, as rounded to the tensor's dtype."""
    codebook = np.unique((centres / scale).astype(values.dtype).astype(np.float64))
    edges = midpoints(codebook * scale)
    table = codebook.astype(values.dtype)
    result = np.empty(values.size, values.dtype)
    used = np.zeros(table.size, np.bool_)
    done = 0
    for block in scaled(values, scale):
        index = _nearest(block, edges)
        result[done : done + block.size] = table[index]
        used[index] = True
        done += block.size
    return Shared(result.reshape(values.shape), table[used])


def squares(original: Array, result: Array) -> tuple[float, float]:
    """Return the means of (result - original)**2 and of original**2.

    Kept between the smallest and the largest normal float64, so that logarithms exist.
    """
    error = power = 0.0
    with np.errstate(over="ignore"):
        for first, second in zip(blocks(original), blocks(result), strict=True):
            exact = first.astype(np.float64)
            error += float(np.sum((second.astype(np.float64) - exact) ** 2))
            power += float(np.sum(exact**2))
    means = (
        max(sys.float_info.min, min(total / original.size, sys.float_info.max)) for total in (error, power)
    )
    return next(means), next(means)


def _nearest(block: Array, edges: Doubles) -> Array:
    """Return for each element how many edges are not above it, as uint8: the index of its centre."""
    limits = edges.astype(block.dtype)
    limits = np.where(limits < edges, np.nextafter(limits, block.dtype.type(np.inf)), limits)
    index = np.zeros(block.size, np.uint8)
    for limit in limits:  # 16 comparisons of a block in cache are 10 times faster than a binary search
        index += (block >= limit).view(np.uint8)
    return index
