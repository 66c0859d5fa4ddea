"""The ways to write a layer as two or three thinner ones: by rank, what each keeps, costs and loses.

    matrix    y = U (V x)            out x in                 any product; a Conv as k x k to r channels, then 1 x 1
    spatial   k x 1, then 1 x k      (out, k) x (in, k)       Jaderberg et al. 2014
    tucker    1 x 1, k x k, 1 x 1    both channel modes       Tucker-2, Kim et al. 2016

Ranks are per group, all groups alike.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.low_rank.bases import Doubles, Metric, balanced, find_basis
from onnxslim_lab.low_rank.sites import Candidate, FormName, Prepared, Search, Site
from onnxslim_lab.low_rank.tucker import GRID, energy_of, tucker, tucker_factors

Array = NDArray[Any]

COSTLY = 4096  # smaller side from which no more than LARGEST directions are looked at
LARGEST = 1024


def prepare(form: FormName, site: Site, matrix: Array, metric: Metric | None, search: Search) -> Prepared:
    """Return one form of a layer's weight (groups, out, in), measured in the metric."""
    made = {"matrix": _matrix, "spatial": _spatial, "tucker": tucker}[form](site, matrix, metric, search)
    paying = [candidate for candidate in made.candidates if site.pays(candidate)]
    return Prepared(form, paying, made.arrays, made.losses)


def factors(
    site: Site, matrix: Array, arrays: dict[str, Doubles], candidate: Candidate
) -> dict[str, Doubles]:
    """Return the factors by name, in the order data flows: v, (core,) u.

    matrix: v (groups, r, in), u (groups, out, r). spatial: v (groups, r, channels, kh), u (groups, out, r, kw).
    tucker: v (groups, r, channels), core (groups, s, r, *kernel), u (groups, out, s).
    """
    weights = np.asarray(matrix, np.float64)
    if candidate.form == "matrix":
        columns = arrays["columns"][..., : candidate.ranks[0]]
        first, second = balanced(columns.swapaxes(1, 2) @ weights, columns)
        return {"v": first, "u": second}
    if candidate.form == "spatial":
        (rank,) = candidate.ranks
        columns = arrays["columns"][..., :rank]
        height, width = site.kernel
        first, second = balanced(columns.swapaxes(1, 2) @ _upright(site, weights), columns)
        split = second.reshape(site.groups, site.out, width, rank).swapaxes(2, 3)
        return {"v": first.reshape(site.groups, rank, site.channels, height), "u": split}
    return tucker_factors(site, weights, arrays, candidate)


def product(site: Site, made: dict[str, Doubles]) -> Doubles:
    """Return the weight (groups, out, in) that factors stand for."""
    if "core" in made:
        kernel = made["core"].reshape(*made["core"].shape[:3], -1)
        whole = np.einsum("gos,gsrk,grc->gock", made["u"], kernel, made["v"], optimize=True)
    elif made["v"].ndim == 4:
        whole = np.einsum("gorw,grch->gochw", made["u"], made["v"], optimize=True)
    else:
        whole = made["u"] @ made["v"]
    return np.asarray(whole.reshape(site.groups, site.out, site.inputs))


def _matrix(site: Site, matrix: Array, metric: Metric | None, search: Search) -> Prepared:
    largest = math.ceil(site.break_even) - 1
    smaller = min(site.out, site.inputs)
    components = None if search.rank is None else min(search.rank, smaller)
    if components is None and smaller >= COSTLY:
        components = min(LARGEST, largest)
    basis = find_basis(matrix, search.method, metric, components=components, seed=search.seed)
    losses = basis.losses() / basis.total if basis.total else np.zeros(len(basis.energy) + 1)
    largest = min(largest, len(basis.energy))
    each = site.groups * (site.out + site.inputs)
    macs = site.groups * site.out if site.lookup else each
    candidates = [
        Candidate("matrix", (rank,), rank * each, rank * macs, float(losses[rank]))
        for rank in search.ranks(largest)
    ]
    most = max((candidate.ranks[0] for candidate in candidates), default=0)
    columns = np.ascontiguousarray(basis.columns[..., :most])
    return Prepared("matrix", candidates, {"columns": columns}, losses)


def _spatial(site: Site, matrix: Array, metric: Metric | None, search: Search) -> Prepared:
    height, width = site.kernel
    tall, wide = site.channels * height, site.out * width
    largest = math.ceil(site.parameters / site.groups / (tall * max(site.row_spread, 1.0) + wide)) - 1
    weights = np.asarray(matrix, np.float64)
    upright = _upright(site, weights)
    inner = None if metric is None else Metric(column_gram(site, metric.gram), metric.ridge * width)
    basis = find_basis(upright, search.method, inner, seed=search.seed)
    candidates = []
    total = energy_of(weights, metric)
    for rank in _thinned(list(search.ranks(largest))):
        columns = basis.columns[..., :rank]
        kept = columns @ (columns.swapaxes(1, 2) @ upright)
        split = kept.reshape(site.groups, site.out, width, site.channels, height)
        error = weights - split.transpose(0, 1, 3, 4, 2).reshape(weights.shape)
        macs = site.groups * rank * (tall * site.row_spread + wide)
        loss = energy_of(error, metric) / total if total else 0.0
        candidates.append(Candidate("spatial", (rank,), site.groups * rank * (tall + wide), macs, loss))
    most = max((candidate.ranks[0] for candidate in candidates), default=0)
    return Prepared("spatial", candidates, {"columns": np.ascontiguousarray(basis.columns[..., :most])})


def _thinned(ranks: list[int]) -> list[int]:
    """Return at most GRID of the ranks, evenly spread, both ends among them."""
    if len(ranks) <= GRID:
        return ranks
    return [ranks[round(place)] for place in np.linspace(0, len(ranks) - 1, GRID)]


def _upright(site: Site, weights: Doubles) -> Doubles:
    """Return (groups, out, channels * kh * kw) as (groups, out * kw, channels * kh)."""
    split = weights.reshape(site.groups, site.out, site.channels, *site.kernel)
    tall = site.channels * site.kernel[0]
    return split.transpose(0, 1, 4, 2, 3).reshape(site.groups, -1, tall)


def column_gram(site: Site, gram: Doubles) -> Doubles:
    """Return the Gram matrix of the kernel's columns: the patches' own, summed over columns."""
    if gram.ndim == 2:
        return np.asarray(gram.reshape(site.groups, -1, site.kernel[1]).sum(axis=2))
    rows, width = site.inputs // site.kernel[1], site.kernel[1]
    return np.asarray(np.einsum("gawbw->gab", gram.reshape(site.groups, rows, width, rows, width)))
