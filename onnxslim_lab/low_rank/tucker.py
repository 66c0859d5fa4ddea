"""Tucker-2: a Conv as 1 x 1, k x k, 1 x 1, both channel modes of low rank (Kim et al. 2016)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.low_rank.bases import Doubles, Method, Metric, balanced, find_basis
from onnxslim_lab.low_rank.sites import Candidate, Prepared, Search, Site

Array = NDArray[Any]
GRID = 20  # pairs of ranks tried: each needs its loss computed


def tucker(site: Site, matrix: Array, metric: Metric | None, search: Search) -> Prepared:
    """Return the layer's weight (groups, out, in) as pairs of ranks in the metric, and what factors need."""
    weights = np.asarray(matrix, np.float64)
    taps = math.prod(site.kernel)
    split = weights.reshape(site.groups, site.out, site.channels, taps)
    unfolded = split.swapaxes(2, 3).reshape(site.groups, -1, site.channels)
    inner = None if metric is None else Metric(channel_gram(site, metric.gram), metric.ridge * taps)
    down, up, energy = _input_basis(unfolded, search.method, inner)
    basis = find_basis(weights, search.method, metric, seed=search.seed)
    tails = (np.append(np.cumsum(energy[::-1])[::-1], 0.0), basis.losses())
    most = (down.shape[1] - 1, basis.columns.shape[2] - 1)
    total = energy_of(weights, metric)
    candidates = []
    for inside, outside in _rank_pairs(tails, most, search):
        columns = basis.columns[..., :outside]
        kept = split.swapaxes(2, 3) @ up[:, None, :, :inside] @ down[:, None, :inside]
        folded = kept.swapaxes(2, 3).reshape(weights.shape)
        error = weights - columns @ (columns.swapaxes(1, 2) @ folded)
        core = inside * outside * taps + outside * site.out
        first = site.channels * inside
        loss = energy_of(error, metric) / total if total else 0.0
        parameters, macs = site.groups * (first + core), site.groups * (first * site.spread + core)
        candidates.append(Candidate("tucker", (inside, outside), parameters, macs, loss))
    return Prepared("tucker", candidates, {"down": down, "up": up, "columns": basis.columns})


def _input_basis(
    unfolded: Doubles, method: Method, metric: Metric | None
) -> tuple[Doubles, Doubles, Doubles]:
    """Return (down, up, energy): A is best kept at rank r as A up[:, :r] down[:r], for A (groups, n, channels)."""
    downs, ups, energies = [], [], np.zeros(min(unfolded.shape[1:]))
    for group, part in enumerate(unfolded):
        whiten = method == "whitened" and metric is not None
        root = metric.root(group) if whiten and metric is not None else np.eye(part.shape[1])
        root = np.diag(root) if root.ndim == 1 else root
        _, values, right = np.linalg.svd(part @ root, full_matrices=False)
        downs.append(np.linalg.solve(root.T, right.T).T)
        ups.append(root @ right.T)
        energies += values**2
    return np.stack(downs), np.stack(ups), energies


def _rank_pairs(
    tails: tuple[Doubles, Doubles], most: tuple[int, int], search: Search
) -> list[tuple[int, int]]:
    """Return pairs of ranks that lose about the same part of the energy in both modes."""
    if min(most) < 1:
        return []
    if search.rank is not None:
        return [(min(search.rank, most[0]), min(search.rank, most[1]))]
    pairs = set()
    for part in np.geomspace(1e-5, 0.7, GRID):
        pair = []
        for tail, largest in zip(tails, most, strict=True):
            rank = max(1, int(np.argmax(tail <= part * tail[0])))
            step = search.step(largest)
            pair.append(min(largest, -(-rank // step) * step))
        pairs.add((pair[0], pair[1]))
    return sorted(pairs)


def tucker_factors(
    site: Site, weights: Doubles, arrays: dict[str, Doubles], candidate: Candidate
) -> dict[str, Doubles]:
    """Return v (groups, r, channels), core (groups, s, r, *kernel), u (groups, out, s)."""
    inner, outer = candidate.ranks
    down, up = arrays["down"][:, :inner], arrays["up"][..., :inner]
    columns = arrays["columns"][..., :outer]
    mixed = columns.swapaxes(1, 2) @ weights
    core = mixed.reshape(site.groups, outer, site.channels, -1).swapaxes(2, 3) @ up[:, None]
    folded, last = balanced(core.reshape(site.groups, outer, -1), columns)
    core = folded.reshape(core.shape)
    first, rest = balanced(down, core.reshape(site.groups, -1, inner))
    core = rest.reshape(core.shape).swapaxes(2, 3)
    return {"v": first, "core": core.reshape(site.groups, outer, inner, *site.kernel), "u": last}


def channel_gram(site: Site, gram: Doubles) -> Doubles:
    """Return the Gram matrix of the input channels, summed over the kernel's taps."""
    if gram.ndim == 2:
        return np.asarray(gram.reshape(site.groups, site.channels, -1).sum(axis=2))
    taps = math.prod(site.kernel)
    shape = (site.groups, site.channels, taps, site.channels, taps)
    return np.asarray(np.einsum("gatbt->gab", gram.reshape(shape)))


def energy_of(matrix: Doubles, metric: Metric | None) -> float:
    """Return what a weight (groups, out, in) carries."""
    if metric is None:
        return float(np.einsum("goi,goi->", matrix, matrix))
    return sum(float(metric.energies(part, group).sum()) for group, part in enumerate(matrix))
