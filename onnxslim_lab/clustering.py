"""k-means in one dimension: a weighted histogram of the values, then centres for its points."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import numpy as np
from threadpoolctl import ThreadpoolController

from onnxslim_lab.floats import Array, blocks, sort_key

Places = np.ndarray[Any, np.dtype[np.intp]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Init = Literal["linear", "density", "random"]


def scale_of(values: Array) -> float:
    """Return the power of two that brings float64 values near 1, so that squares neither over- nor underflow."""
    if values.dtype != np.float64:
        return 1.0  # squares of float32 values are safe in float64
    largest = max(float(np.max(np.abs(block))) for block in blocks(values))
    return math.ldexp(1.0, max(-1000, min(1000, -math.frexp(largest)[1])))


def scaled(values: Array, scale: float) -> Iterator[Array]:
    """Yield the elements as float32, or as float64 times `scale`, block by block."""
    for block in blocks(values):
        yield block * scale if block.dtype == np.float64 else block.astype(np.float32, copy=False)


def distinct(values: Array, scale: float, limit: int) -> tuple[Doubles, Doubles] | None:
    """Return the distinct values, ascending, and their counts; None when there are more than `limit`."""
    known, counts = np.empty(0), np.empty(0)
    for block in scaled(values, scale):
        some, often = np.unique(block, return_counts=True)
        known, place = np.unique(np.append(known, some.astype(np.float64)), return_inverse=True)
        if known.size > limit:
            return None
        counts = np.bincount(place, weights=np.append(counts, often)).astype(np.float64)
    return known, counts


def histogram(values: Array, scale: float, bins: int, least: int) -> tuple[Doubles, Doubles]:
    """Return a weighted histogram of the nonzero values, as (means, counts) of its nonempty bins, ascending.

    The bins follow the data: the upper 16 bits of the float (sign, exponent, leading mantissa) count it
    coarsely whatever its range, and each of these bins is split in proportion to what is in it.

    Args:
        values: Finite floats.
        scale: Factor put on every value.
        bins: Bins to aim at; up to one more per coarse bin comes out.
        least: Where values differ in late bits only and fewer bins would be filled, sorted values are
            cut into pieces of equal count instead.
    """
    coarse = np.zeros(1 << 16, np.int64)
    for block in scaled(values, scale):
        coarse += np.bincount(sort_key(block[block != 0]) >> 16, minlength=1 << 16)
    parts = np.ceil(coarse * (bins / max(1, coarse.sum()))).astype(np.int64)
    first = np.cumsum(parts) - parts
    counts, sums = np.zeros(parts.sum()), np.zeros(parts.sum())
    for block in scaled(values, scale):
        nonzero = block[block != 0]
        key = sort_key(nonzero)
        index = first[key >> 16] + ((key & 0xFFFF) * parts[key >> 16] >> 16)
        counts += np.bincount(index, minlength=counts.size)
        sums += np.bincount(index, weights=nonzero, minlength=sums.size)
    if np.count_nonzero(counts) < least:
        ascending = np.sort(np.concatenate([block[block != 0] for block in scaled(values, scale)]))
        cuts = np.linspace(0, ascending.size, bins, endpoint=False).astype(np.intp)
        counts = np.diff(cuts, append=ascending.size).astype(np.float64)
        sums = np.add.reduceat(ascending.astype(np.float64), cuts)
    filled = counts > 0
    return sums[filled] / counts[filled], counts[filled]


def cluster(points: Doubles, counts: Doubles, size: int, *, init: Init, seed: int = 0) -> Doubles:
    """Return `size` centres of weighted points by scikit-learn's k-means, ascending.

    One thread: more would add up in varying order, and the result would depend on it in the last bit.

    >>> cluster(np.array([1.0, 2.0, 9.0]), np.array([3.0, 1.0, 1.0]), 2, init="linear")
    array([1.25, 9.  ])
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415 - takes a second that other commands need not wait
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415 - likewise

    if points.size <= size:
        return points
    if init == "linear":
        start = np.linspace(points[0], points[-1], size)
    elif init == "density":
        start = np.interp(
            (np.arange(size) + 0.5) / size, (np.cumsum(counts) - counts / 2) / counts.sum(), points
        )
    else:
        chance = counts / counts.sum()
        start = np.sort(
            points[np.random.default_rng(seed).choice(points.size, size, replace=False, p=chance)]
        )
    means = KMeans(size, init=start[:, None], n_init=1, max_iter=30, algorithm="lloyd")
    with _thread_pools().limit(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `settle` brings centres without members to use
        means.fit(points[:, None], sample_weight=counts)
    return np.sort(means.cluster_centers_[:, 0])


@cache
def _thread_pools() -> ThreadpoolController:
    """Return the process's thread pools; looking them up costs more than a small clustering."""
    return ThreadpoolController()


def settle(points: Doubles, counts: Doubles, centres: Doubles, moves: int = 50) -> Doubles:
    """Return better centres: Lloyd's iteration to its fixed point, and moves that it does not make itself.

    A move takes centres from where they save least (those without members first) to where the loss is
    largest; it stands when the loss falls. Poor starts and values of very different size need it. A
    centre at zero stays.

    Args:
        points: Ascending values.
        counts: Their weights.
        centres: Ascending centres.
        moves: Moves at most.
    """
    centres = _lloyd(points, counts, centres, limit=100)
    loss = _losses(points, counts, centres).sum()
    batch = centres.size
    for _ in range(moves):
        trial = _lloyd(points, counts, _move(points, counts, centres, batch), limit=100)
        fallen = _losses(points, counts, trial).sum()
        if fallen < loss * (1 - 1e-4):
            centres, loss = trial, fallen
        elif batch == 1:
            break
        else:
            batch = max(1, batch // 4)
    return _lloyd(points, counts, centres, limit=5000)


def _lloyd(points: Doubles, counts: Doubles, centres: Doubles, limit: int) -> Doubles:
    moments = counts * points
    for _ in range(limit):
        cuts = _cuts(points, centres)
        held = np.diff(cuts) > 0
        mass, moment = np.zeros((2, centres.size))
        mass[held] = np.add.reduceat(counts, cuts[:-1][held])
        moment[held] = np.add.reduceat(moments, cuts[:-1][held])
        moved = means_or(moment, mass, centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _move(points: Doubles, counts: Doubles, centres: Doubles, batch: int) -> Doubles:
    """Return the centres, ascending, with up to `batch` of them moved to where the loss is larger.

    Taking a centre away costs at most its weight times the square of the way to its neighbour; cutting
    a cluster into n pieces leaves about 1 / n**2 of its loss.
    """
    cuts = _cuts(points, centres)
    widths = np.diff(cuts)
    losses = _losses(points, counts, centres)
    mass = np.bincount(np.repeat(np.arange(centres.size), widths), counts, minlength=centres.size)
    gaps = np.diff(centres, prepend=-np.inf, append=np.inf)
    cost = np.where(centres == 0, np.inf, mass * np.minimum(gaps[:-1], gaps[1:]) ** 2)
    pieces = np.ones(centres.size, np.intp)
    taken: list[int] = []
    for idle in np.argsort(cost, kind="stable")[:batch]:
        gain = np.where(pieces < widths, losses * (1 / pieces**2 - 1 / (pieces + 1) ** 2), 0)
        gain[[idle, *taken]] = 0
        cut = int(np.argmax(gain))
        if pieces[idle] > 1 or gain[cut] <= cost[idle]:
            break
        pieces[cut] += 1
        taken.append(int(idle))
    fresh = []
    for crowd in np.flatnonzero(pieces > 1):
        inside = slice(cuts[crowd], cuts[crowd + 1])
        upto = np.cumsum(counts[inside])
        places = np.searchsorted(upto, upto[-1] * np.arange(1, pieces[crowd]) / pieces[crowd])
        fresh.append(points[inside][places])
    return np.sort(np.concatenate([np.delete(centres, taken), *fresh]))


def _cuts(points: Doubles, centres: Doubles) -> Places:
    """Return where each centre's members begin among the points, and the end."""
    return np.concatenate([[0], np.searchsorted(points, midpoints(centres)), [points.size]])


def _losses(points: Doubles, counts: Doubles, centres: Doubles) -> Doubles:
    owner = np.repeat(np.arange(centres.size), np.diff(_cuts(points, centres)))
    losses: Doubles = np.bincount(owner, counts * (points - centres[owner]) ** 2, centres.size).astype(
        np.float64
    )
    return losses


def midpoints(centres: Doubles) -> Doubles:
    """Return the borders between ascending centres, each above its lower centre even where halves underflow."""
    return np.maximum(centres[:-1] + np.diff(centres) / 2, np.nextafter(centres[:-1], np.inf))


def means_or(sums: Doubles, counts: Doubles, centres: Doubles) -> Doubles:
    """Return sums / counts; a centre without members, or at zero, stays where it is."""
    free = (counts > 0) & (centres != 0)
    return np.divide(sums, counts, out=centres.copy(), where=free)
