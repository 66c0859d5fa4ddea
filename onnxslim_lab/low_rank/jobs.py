"""One weight on its way through factorization: what is known of it, its Gram matrix, and its replacement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxslim_lab.base import Change
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.low_rank.bases import Array, Method
from onnxslim_lab.low_rank.forms import factors
from onnxslim_lab.low_rank.sites import Candidate, Prepared, Site
from onnxslim_lab.low_rank.write import write_factors
from onnxslim_lab.selection import Target
from onnxslim_lab.statistics import Calibration, Gram


@dataclass(eq=False)
class Job:
    """One weight on its way.

    Attributes:
        target, layers, site: The weight, its layers (and whether transposed), its sizes.
        rank: The rank asked for, None to find one.
        method: How its directions are chosen.
        measured: Whether its losses are of outputs on the calibration data.
        applied: How often the matrix is applied in one run, where a budget counts that.
        candidates: The ways to write it.
        files: What the factors of each form are made from.
        losses: Relative loss by rank of form matrix.
    """

    target: Target
    layers: list[tuple[Layer, bool]]
    site: Site
    rank: int | None
    method: Method = "svd"
    measured: bool = False
    applied: float = 1.0
    candidates: list[Candidate] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    losses: Array | None = None

    @property
    def break_even(self) -> str:
        """How many weights two factors have, in words."""
        site = self.site
        return (
            f"two factors of a {site.out} x {site.inputs} matrix pay below rank out*in/(out+in) = "
            f"{site.break_even:.1f}"
        )


def grams_of(graph: Graph, jobs: Sequence[Job], calibration: Calibration) -> Iterator[Gram]:
    """Yield one Gram matrix for each job, over all its layers of the first one's arrangement."""
    users = [[layer for layer, flipped in job.layers if not flipped] for job in jobs]
    found = calibration.grams(graph, [layer for group in users for layer in group])
    for group in users:
        gram = next(found)[1]
        for _ in group[1:]:
            gram = gram.merge(next(found)[1])
        yield gram


def keep(prepared: Prepared, path: Path) -> Path:
    """Write what the factors are made from to a file, to free the memory."""
    np.savez(path, **prepared.arrays)  # type: ignore[arg-type]  # arrays by name
    return path


def write(job: Job, chosen: Candidate) -> Change:
    """Write the factors into the model and say what that did."""
    target, site = job.target, job.site
    matrix = target.layer.matrix
    with np.load(job.files[chosen.form]) as arrays:
        made = factors(site, matrix, dict(arrays), chosen)
    values = target.read()
    bytes_before, nonzeros = values.nbytes, int(np.count_nonzero(values))
    store = write_factors(job.layers, made)
    ranks = " and ".join(str(rank) for rank in chosen.ranks)
    parts = "three" if chosen.form == "tucker" else "two"
    detail: dict[str, float | int | str] = {
        "rank": chosen.ranks[-1],
        "method": job.method,
        "form": "channel" if chosen.form == "matrix" and math.prod(site.kernel) > 1 else chosen.form,
        "parameters before": target.size,
        "parameters after": chosen.parameters,
        "energy": 1 - chosen.loss,
        "output error" if job.measured else "weight error": math.sqrt(max(chosen.loss, 0.0)),
        "layers": len(target.layers),
    }
    if len(chosen.ranks) > 1:
        detail["input rank"] = chosen.ranks[0]
    return Change(
        where=target.where,
        what=f"written as {parts} of rank {ranks}: {', '.join(store.names)}",
        weights=(target.weight,),
        bytes_before=bytes_before,
        bytes_after=store.bytes,
        nonzeros_before=nonzeros,
        nonzeros_after=sum(int(np.count_nonzero(array)) for array in made.values()),
        detail=detail,
    )
