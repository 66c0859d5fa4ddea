"""Replace a layer by two or three thinner ones where that saves parameters and multiply-accumulates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.low_rank.bases import Method, Metric, shrinkage
from onnxslim_lab.low_rank.choose import Cost, allocate, cheapest_within
from onnxslim_lab.low_rank.forms import prepare
from onnxslim_lab.low_rank.jobs import Job, grams_of, keep, write
from onnxslim_lab.low_rank.places import ConvChoice, arranged, forms_of, site_of
from onnxslim_lab.low_rank.sites import Candidate, Search
from onnxslim_lab.macs import model_macs
from onnxslim_lab.selection import Overrides, Patterns, Target, find_targets
from onnxslim_lab.statistics import Calibration, Gram
from onnxslim_lab.statistics.calibration import gram_input

Rank = Annotated[int, Field(ge=1)]


class Factorize(Pass):
    """Replace layers by two or three thinner ones of low rank.

    before: y = W x + b                         after: y = U (V x) + b
    before: Conv k x k                          after: Conv k x k to r channels, Conv 1 x 1  (channel)
                                                   or: Conv k x 1, Conv 1 x k                (spatial)
                                                   or: Conv 1 x 1, Conv k x k, Conv 1 x 1    (tucker)

    Gemm, MatMul with the constant on either side, Conv (each group by itself) and, with `embeddings`, lookup
    tables. The directions kept are those that carry most of the layer's output on the calibration data
    ("whitened"; Wang et al., SVD-LLM, 2024), or of the weight itself ("svd", "qr" with column pivoting). The
    rank is given (`rank`, `overrides`), or found: the cheapest form that keeps `energy` or stays within
    `error`, or all layers together within `budget`, where rank is given up first where it costs the least
    loss for each weight (or multiply-accumulate) saved; a layer's loss is taken relative to its output.
    The loss that each change tells is exact on the calibration data for the method used.
    The last part keeps the node's name, its output and the bias; a shared weight's factors are shared.

    refuses: layers where it saves nothing (with the rank at which two factors break even), embeddings unless
    asked for, weights with NaN or infinity, ConvTranspose, LSTM, GRU, RNN, Einsum, weights that something else
    reads too; with method whitened layers that no feed reaches.

    >>> Factorize(budget=0.4, overrides="fc1:16").overrides
    {'fc1': 16}
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    method: Literal["auto", "svd", "qr", "whitened"] = Field(
        "auto", description="which directions stay; auto: whitened with real data, otherwise svd"
    )
    rank: Rank | None = Field(None, description="rank of every layer (of each group of a Conv)")
    energy: float | None = Field(
        None, gt=0, le=1, description="part of the energy of each layer's output (without bias) to keep"
    )
    error: float | None = Field(
        None, gt=0, lt=1, description="largest relative output error of each layer; sqrt(1 - energy)"
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="part to keep of all selected layers together; 0.5 when nothing is given",
    )
    budget_of: Literal["parameters", "macs"] = Field(
        "parameters", description="what the budget is counted in"
    )
    conv: ConvChoice = Field(
        "auto",
        description="how a Conv larger than 1 x 1 is written; auto: what loses least (channel with rank)",
    )
    multiple: int = Field(
        8, ge=1, le=1024, description="ranks found are multiples of this where four multiples would pay"
    )
    damping: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="part of the mean input energy added to the Gram matrix for whitening; by default by the number of rows",
    )
    include: Patterns = Field((), description="glob patterns of node or weight names; empty means all layers")
    exclude: Patterns = Field((), description="glob patterns of node or weight names to leave alone")
    overrides: Overrides[Rank] = Field(
        default_factory=dict, description="glob pattern -> rank of the layers it matches (first match)"
    )
    embeddings: bool = Field(
        False, description="whether lookup tables (Gather) are factorized: they then multiply"
    )

    @model_validator(mode="after")
    def _check_exclusive(self) -> Self:
        given = [name for name in ("rank", "energy", "error", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        if self.budget_of == "macs" and given and self.budget is None:
            raise ValueError("budget_of has no meaning without a budget; leave it out")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations."""
        return self.method in ("auto", "whitened") or self.error is not None

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Factorize the selected layers of the whole model in place.

        Memory: the Gram matrices that the calibration makes at a time, and one layer; bases wait in a scratch
        folder, as large as half the model in float64 at most.
        """
        outcome = Outcome()
        calibration = self._data(context)
        jobs = list(self._jobs(graph, outcome))
        if not jobs:
            return outcome
        if self.needs_calibration and calibration is None and self.method != "auto":
            what = "method whitened" if self.method == "whitened" else "error"
            raise ParameterError(f"factorize: {what} needs calibration data")
        if self.error is not None and calibration is None:
            raise ParameterError("factorize: error is of outputs and needs calibration data; use energy")
        jobs = self._counted(graph, jobs, outcome)
        with tempfile.TemporaryDirectory(prefix="onnxslim_lab-") as folder:
            ready = self._prepare(graph, jobs, calibration, context, outcome, Path(folder))
            for number, (job, chosen) in enumerate(zip(ready, self._choose(ready), strict=True)):
                context.progress(number, len(ready), f"factorize {job.target.where}")
                if chosen is None:
                    outcome.refuse(job.target.where, self._why_not(job))
                else:
                    outcome.changes.append(write(job, chosen))
        context.progress(len(ready), len(ready), "factorize")
        return outcome

    def _data(self, context: Context) -> Calibration | None:
        """Return the data to measure with: with method auto and no error to keep, only what is real."""
        data = context.calibration
        if data is not None and data.data.random and self.method == "auto" and self.error is None:
            return None
        return data

    def _jobs(self, graph: Graph, outcome: Outcome) -> Iterator[Job]:
        """Yield the weights that may be factorized; refuse the others."""
        for target in find_targets(
            graph,
            outcome,
            step=self.pass_name(),
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
        ):
            reason = self._unwanted(target)
            layers = reason or arranged(target)
            if isinstance(layers, str):
                outcome.refuse(target.where, layers)
                continue
            rank = self.rank if target.override is None else int(target.override)
            job = Job(target, layers, site_of(layers), rank)
            forms = forms_of(job.site, self.conv, ranked=rank is not None)
            if isinstance(forms, str):
                outcome.refuse(target.where, forms)
            elif forms == ["matrix"] and job.site.break_even <= (rank or 1):
                asked = "rank 1" if rank is None else f"rank {rank}"
                outcome.refuse(target.where, f"{asked} saves nothing: {job.break_even}")
            elif not np.isfinite(target.layer.matrix).all():
                outcome.refuse(target.where, "the weight has NaN or infinite values")
            else:
                yield job

    def _unwanted(self, target: Target) -> str:
        if target.is_lookup and not self.embeddings:
            return "a lookup table; embeddings=true factorizes it too"
        if any(
            layer.graph.is_constant(gram_input(layer)) for layer in target.layers if layer.role == "weight"
        ):
            return "its input is constant"
        return ""

    def _counted(self, graph: Graph, jobs: list[Job], outcome: Outcome) -> list[Job]:
        """Find how often each job's matrix is applied in one run, where that is what the budget counts."""
        if self.budget_of == "parameters":
            return jobs
        counted: dict[tuple[int, str], int] = {}
        for layer, count in model_macs(graph).layers:
            key = id(layer.weight_graph), layer.weight
            counted[key] = counted.get(key, 0) + (count or 0)
        known = []
        for job in jobs:
            count = counted.get((id(job.target.layer.weight_graph), job.target.weight), 0)
            job.applied = count / job.site.parameters
            if count or job.rank is not None:
                known.append(job)
            else:
                outcome.refuse(
                    job.target.where,
                    "its multiply-accumulates are none or not known: simplify first, or use budget_of=parameters",
                )
        return known

    def _prepare(
        self,
        graph: Graph,
        jobs: list[Job],
        calibration: Calibration | None,
        context: Context,
        outcome: Outcome,
        folder: Path,
    ) -> list[Job]:
        """Find the candidates of each job; return the jobs, without those that cannot be measured."""
        measured = None if calibration is None else grams_of(graph, jobs, calibration)
        ready = []
        for number, job in enumerate(jobs):
            context.progress(number, len(jobs), f"bases of {job.target.where}")
            gram = None if measured is None else next(measured)
            usable = gram is not None and bool(np.isfinite(gram.matrix).all() and gram.matrix.any())
            if gram is not None and not usable and (self.method == "whitened" or self.error is not None):
                outcome.refuse(
                    job.target.where, "no feed reaches it, or its inputs are all zero or not finite"
                )
                continue
            metric = self._metric(job, gram) if gram is not None and usable else None
            job.measured = metric is not None
            job.method = self._method(job)
            matrix = job.target.layer.matrix
            search = Search(job.method, job.rank, self.multiple, context.seed)
            forms = forms_of(job.site, self.conv, ranked=job.rank is not None)
            assert not isinstance(forms, str)
            for form in forms:
                found = prepare(form, job.site, matrix, metric, search)
                job.candidates += found.candidates
                job.files[form] = keep(found, folder / f"{number}-{form}.npz")
                job.losses = found.losses if form == "matrix" else job.losses
            ready.append(job)
        return ready

    def _method(self, job: Job) -> Method:
        if self.method == "auto":
            return "whitened" if job.measured else "svd"
        return self.method

    def _metric(self, job: Job, gram: Gram) -> Metric:
        if job.target.layer.op_type == "Gather":
            return Metric.of(gram.matrix, counts=1.0)
        suited = shrinkage(gram.count, job.site.inputs)
        return Metric.of(gram.matrix, damping=suited if self.damping is None else self.damping)

    def _choose(self, jobs: list[Job]) -> list[Candidate | None]:
        """Return the candidate of each job, None where none will do."""
        chosen: list[Candidate | None] = [None] * len(jobs)
        pool = []
        for number, job in enumerate(jobs):
            if job.rank is not None:
                chosen[number] = next(iter(job.candidates), None)
            elif self._most is not None:
                chosen[number] = cheapest_within(job.candidates, self._most, lambda one: one.parameters)
            else:
                pool.append(number)
        if not pool:
            return chosen
        costs = [_cost(self.budget_of, jobs[number].applied) for number in pool]
        wholes = [jobs[number].site.parameters * jobs[number].applied for number in pool]
        budget = (0.5 if self.budget is None else self.budget) * sum(wholes)
        found = allocate([jobs[number].candidates for number in pool], wholes, budget, costs)
        for number, candidate in zip(pool, found, strict=True):
            chosen[number] = candidate
        return chosen

    @property
    def _most(self) -> float | None:
        """The largest relative loss of a layer, None where a budget rules."""
        if self.error is not None:
            return self.error**2
        return None if self.energy is None else 1 - self.energy

    def _why_not(self, job: Job) -> str:
        if job.rank is not None:
            return f"rank {job.rank} saves nothing: {job.break_even}"
        if self._most is None:
            what = "saves nothing at any rank" if not job.candidates else "the budget is met without it"
            return f"{what}: {job.break_even}"
        wanted = f"error {self.error}" if self.error is not None else f"energy {self.energy}"
        reached = None if job.losses is None else np.flatnonzero(job.losses <= self._most)
        if reached is None or not reached.size:
            return f"{wanted} is not reached at any rank that saves something: {job.break_even}"
        rounded = f" and a multiple of {self.multiple}" if reached[0] < job.site.break_even else ""
        return f"{wanted} needs rank {reached[0]}{rounded}, which saves nothing: {job.break_even}"


def _cost(what: Literal["parameters", "macs"], times: float) -> Cost:
    """Return what a candidate costs, in weights or in multiply-accumulates of one run."""
    if what == "parameters":
        return lambda candidate: candidate.parameters
    return lambda candidate: candidate.macs * times
