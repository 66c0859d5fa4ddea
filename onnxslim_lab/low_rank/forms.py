"""The ways to write a layer as two or three thinner ones: by rank, what each keeps, costs and loses.

    matrix    y = U (V x)            out x in                 any product; a Conv as k x k to r channels, then 1 x 1
    spatial   k x 1, then 1 x k      (out, k) x (in, k)       Jaderberg et al. 2014
    tucker    1 x 1, k x k, 1 x 1    both channel modes       Tucker-2, Kim et al. 2016

Ranks are per group, all groups alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.low_rank.bases import Doubles, Method, Metric, balanced, find_basis

Array = NDArray[Any]
FormName = Literal["matrix", "spatial", "tucker"]

GRID = 20  # ranks tried where each needs its loss computed
COSTLY = 4096  # smaller side from which no more than LARGEST directions are looked at
LARGEST = 1024


@dataclass(frozen=True)
class Site:
    """Where the factors go: sizes of the layer, and how many more positions its parts meet.

    Attributes:
        groups, out, inputs: The matrix's shape.
        kernel: Spatial sizes of a Conv, () otherwise.
        spread: Input positions for each output position of a Conv (its strides' product, about).
        row_spread: The same along the last axis alone.
        lookup: Whether the layer looks rows up, which multiplies nothing.
    """

    groups: int
    out: int
    inputs: int
    kernel: tuple[int, ...] = ()
    spread: float = 1.0
    row_spread: float = 1.0
    lookup: bool = False

    @property
    def parameters(self) -> int:
        """Weights of the layer; multiply-accumulates for each output position as well."""
        return self.groups * self.out * self.inputs

    @property
    def channels(self) -> int:
        """Input channels of each group of a Conv."""
        return self.inputs // math.prod(self.kernel)

    @property
    def break_even(self) -> float:
        """The rank at which two factors have as many weights as the matrix."""
        return self.out * self.inputs / (self.out + self.inputs)

    def pays(self, candidate: Candidate) -> bool:
        """Whether it has fewer parameters and multiply-accumulates than the layer (a lookup: parameters)."""
        cheaper = self.lookup or candidate.macs < self.parameters
        return candidate.parameters < self.parameters and cheaper


@dataclass(frozen=True)
class Candidate:
    """One way to write a layer.

    Attributes:
        form: How.
        ranks: One rank, or two: of the inputs and of the outputs (tucker).
        parameters: Weights of the factors.
        macs: Multiply-accumulates for each output position.
        loss: Energy of the output's error as part of the output's, 0 to 1 (a little more for tucker).
    """

    form: FormName
    ranks: tuple[int, ...]
    parameters: int
    macs: float
    loss: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A form of one layer, ready to be cut at any of its candidates' ranks.

    Attributes:
        candidates: What pays, by falling loss.
        arrays: What the factors are made from.
        losses: Of form matrix: relative loss at rank 0, 1, ..., as far as known.
    """

    form: FormName
    candidates: list[Candidate]
    arrays: dict[str, Doubles]
    losses: Doubles | None = None


@dataclass(frozen=True)
class Search:
    """How ranks are looked for.

    Attributes:
        method: How directions are chosen.
        rank: The only rank to look at; None for all.
        multiple: Ranks are multiples of this where the layer is large enough (four multiples pay).
        seed: Of randomized SVD.
    """

    method: Method
    rank: int | None = None
    multiple: int = 8
    seed: int = 0

    def ranks(self, largest: int) -> Iterable[int]:
        """Return the ranks to look at, up to the largest that pays."""
        if self.rank is not None:
            return [self.rank] if self.rank <= largest else []
        step = self.step(largest)
        return range(step, largest + 1, step)

    def step(self, largest: int) -> int:
        """Return the multiple that ranks of a layer keep."""
        return self.multiple if largest >= 4 * self.multiple else 1


def prepare(form: FormName, site: Site, matrix: Array, metric: Metric | None, search: Search) -> Prepared:
    """Return one form of a layer's weight (groups, out, in), measured in the metric."""
    made = {"matrix": _matrix, "spatial": _spatial, "tucker": _tucker}[form](site, matrix, metric, search)
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
    total = _energy(weights, metric)
    for rank in _thinned(list(search.ranks(largest))):
        columns = basis.columns[..., :rank]
        kept = columns @ (columns.swapaxes(1, 2) @ upright)
        split = kept.reshape(site.groups, site.out, width, site.channels, height)
        error = weights - split.transpose(0, 1, 3, 4, 2).reshape(weights.shape)
        macs = site.groups * rank * (tall * site.row_spread + wide)
        loss = _energy(error, metric) / total if total else 0.0
        candidates.append(Candidate("spatial", (rank,), site.groups * rank * (tall + wide), macs, loss))
    most = max((candidate.ranks[0] for candidate in candidates), default=0)
    return Prepared("spatial", candidates, {"columns": np.ascontiguousarray(basis.columns[..., :most])})


def _tucker(site: Site, matrix: Array, metric: Metric | None, search: Search) -> Prepared:
    weights = np.asarray(matrix, np.float64)
    taps = math.prod(site.kernel)
    split = weights.reshape(site.groups, site.out, site.channels, taps)
    unfolded = split.swapaxes(2, 3).reshape(site.groups, -1, site.channels)
    inner = None if metric is None else Metric(channel_gram(site, metric.gram), metric.ridge * taps)
    down, up, energy = _input_basis(unfolded, search.method, inner)
    basis = find_basis(weights, search.method, metric, seed=search.seed)
    tails = (np.append(np.cumsum(energy[::-1])[::-1], 0.0), basis.losses())
    most = (down.shape[1] - 1, basis.columns.shape[2] - 1)
    total = _energy(weights, metric)
    candidates = []
    for inside, outside in _rank_pairs(tails, most, search):
        columns = basis.columns[..., :outside]
        kept = split.swapaxes(2, 3) @ up[:, None, :, :inside] @ down[:, None, :inside]
        folded = kept.swapaxes(2, 3).reshape(weights.shape)
        error = weights - columns @ (columns.swapaxes(1, 2) @ folded)
        core = inside * outside * taps + outside * site.out
        first = site.channels * inside
        loss = _energy(error, metric) / total if total else 0.0
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


def channel_gram(site: Site, gram: Doubles) -> Doubles:
    """Return the Gram matrix of the input channels, summed over the kernel's taps."""
    if gram.ndim == 2:
        return np.asarray(gram.reshape(site.groups, site.channels, -1).sum(axis=2))
    taps = math.prod(site.kernel)
    shape = (site.groups, site.channels, taps, site.channels, taps)
    return np.asarray(np.einsum("gatbt->gab", gram.reshape(shape)))


def _energy(matrix: Doubles, metric: Metric | None) -> float:
    """Return what a weight (groups, out, in) carries."""
    if metric is None:
        return float(np.einsum("goi,goi->", matrix, matrix))
    return sum(float(metric.energies(part, group).sum()) for group, part in enumerate(matrix))
