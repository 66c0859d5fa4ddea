"""The engine: runs the steps of a recipe over a model, verifies each one and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto
from threadpoolctl import threadpool_limits

from onnxslim_lab.accuracy import find_metric
from onnxslim_lab.base import Context, Outcome, Pass, Progress, silent
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError, ParameterError, SaveError, SessionError, VerificationError, quote
from onnxslim_lab.evaluate import PairedResult, evaluate_pair
from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.inputs.probe import runnable_data
from onnxslim_lab.inputs.random_data import random_data
from onnxslim_lab.macs import fed_sizes, model_macs
from onnxslim_lab.modelfile import SavedFiles
from onnxslim_lab.provenance import KEY, content_sha256, current_versions, record
from onnxslim_lab.recipe import Recipe, step_text
from onnxslim_lab.report import (
    ChangeReport,
    Coverage,
    MetricReport,
    RefusalReport,
    Report,
    StepReport,
    Verdict,
    data_report,
)
from onnxslim_lab.sessions import Runner, SessionTooLarge
from onnxslim_lab.statistics import Calibration, default_folder
from onnxslim_lab.verify import Verifier

DEFAULT_STEPS = ("simplify", "encode")


def tool_version() -> str:
    """Return the installed version of this package."""
    return current_versions()["tool"]


def node_count(graph: Graph) -> int:
    """Count the nodes of a model, bodies and functions included, Constant nodes not."""
    return sum(not is_op(node, "Constant") for part in graph.walk() for node in part.nodes)


@dataclass
class Result:
    """The optimized model, its report, and the files it was saved to."""

    graph: Graph
    report: Report
    files: SavedFiles | None = None


@dataclass
class _Run:
    """The state of one optimization."""

    graph: Graph
    recipe: Recipe
    progress: Progress
    original: Graph | None = None
    verifier: Verifier | None = None
    calibration: Calibration | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # that the data gives open dimensions
    notices: list[str] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)

    def step(self, step: Pass, index: int) -> None:
        """Run one step, verify it, append its report; raises VerificationError when it broke its promise."""
        total = len(self.recipe.steps)
        if not step.exact and self.original is None:
            self.original = self.graph.copy()
        self.progress(index, total, step.pass_name())
        context = Context(
            progress=lambda done, of, what: self.progress(
                index, total, f"{step.pass_name()} {what} {done}/{of}"
            ),
            seed=self.recipe.seed,
            allow_opset_raise=self.recipe.allow_opset_raise,
            memory=self.recipe.memory // 4,
            calibration=self.calibration if step.needs_calibration else None,
            original=self.original,
        )
        totals = _layer_totals(self.graph, self.sizes)
        bytes_before, nodes_before = self.graph.file_bytes(), node_count(self.graph)
        start = time.perf_counter()
        version_before = self.graph.version
        with threadpool_limits(1, user_api="blas"):  # its sums differ with the number of threads
            outcome = step.run(self.graph, context)
        seconds = time.perf_counter() - start
        verdict = self._verify(step, unchanged=self.graph.version == version_before)
        report = StepReport(
            name=step.pass_name(),
            text=step_text(step),
            exact=step.exact,
            seconds=seconds,
            bytes_before=bytes_before,
            bytes_after=self.graph.file_bytes(),
            nodes_before=nodes_before,
            nodes_after=node_count(self.graph),
            coverage=coverage(outcome, totals),
            verdict=verdict,
            changes=tuple(
                ChangeReport(**{k: getattr(c, k) for k in ChangeReport.model_fields}) for c in outcome.changes
            ),
            refusals=tuple(RefusalReport(where=r.where, reason=r.reason) for r in outcome.refusals),
            notices=tuple(outcome.notices),
        )
        self.steps.append(report)
        if verdict.status == "failed":
            raise VerificationError(f"step {step.pass_name()!r} broke the model: {verdict.reason}")

    def _verify(self, step: Pass, *, unchanged: bool) -> Verdict:
        if self.recipe.verify != "each":
            return Verdict(status="skipped", reason=f"verify is {self.recipe.verify}")
        if self.verifier is None:
            return Verdict(status="skipped", reason="the original was not run")
        if unchanged:
            return Verdict(status="passed", reason="nothing was changed")
        return self.verifier.step(self.graph, exact=step.exact)


Totals = dict[str, tuple[int, int]]  # parameters and multiply-accumulates by weight


def _layer_totals(graph: Graph, sizes: dict[str, int]) -> Totals:
    totals: Totals = {}
    for layer, count in model_macs(graph, sizes).layers:
        parameters, macs = totals.get(layer.weight, (layer.parameters, 0))
        totals[layer.weight] = (parameters, macs + (count or 0))
    return totals


def coverage(outcome: Outcome, totals: Totals) -> Coverage:
    """Return which share of the layers' parameters and multiply-accumulates the changes touched."""
    touched = {weight for change in outcome.changes for weight in change.weights}
    shares: list[float | None] = []
    for column in (0, 1):
        whole = sum(item[column] for item in totals.values())
        part = sum(item[column] for weight, item in totals.items() if weight in touched)
        shares.append(part / whole if whole else None)
    return Coverage(weights=shares[0], macs=shares[1])


def optimize(
    source: str | os.PathLike[str] | bytes | ModelProto | Graph,
    output: str | os.PathLike[str] | None = None,
    *,
    steps: Iterable[str | Pass] | None = None,
    recipe: Recipe | None = None,
    data: Dataset | None = None,
    evaluation: Dataset | None = None,
    metrics: Sequence[str] = (),
    runner: Runner | None = None,
    external: bool | None = None,
    allow_growth: bool = False,
    provenance: bool | None = None,
    cache: bool = True,
    progress: Progress = silent,
) -> Result:
    """Optimize a model and save it; the source is never changed.

    Args:
        source: Path of an .onnx file, its bytes, a ModelProto, or a Graph (which is copied).
        output: Where to save the result; None: nowhere (a dry run).
        steps: Passes or their command-line texts; by default "simplify" and "encode".
        recipe: Steps and options together; excludes `steps`.
        data: Inputs to compare outputs on; by default random ones, and the report says so.
        evaluation: Data with labels that the metrics are computed on; by default `data`.
        metrics: Task metrics to report, each with the interval of its paired difference.
        runner: Sessions to use; by default a new one, closed at the end.
        external: Whether large tensors go to a data file; None: only when the model is over 2 GB.
        allow_growth: Save even if the result is larger than the source.
        provenance: Whether the result's metadata says how it was made; that counts as no growth. None: unless
            all steps are exact or changed nothing, and it alone would make the result larger than the source.
        cache: Keep what calibration measures in `statistics.default_folder()`, for later runs to use.
        progress: Called as progress(done, total, what).

    Raises:
        LabError: of the kind that says what is wrong; nothing is saved then.
        VerificationError: an exact step changed the outputs, or the result is larger than the source.
    """
    if recipe is not None and steps is not None:
        raise ParameterError("give steps or a recipe, not both")
    recipe = recipe or Recipe.of(DEFAULT_STEPS if steps is None else steps)
    for metric in metrics:
        find_metric(metric)
    judged = evaluation or data
    if metrics and judged is None:
        raise ParameterError("metrics need data: give evaluation or calibration data")
    if not recipe.steps:
        raise ParameterError("there are no steps to run")
    start = time.perf_counter()
    graph = source.copy() if isinstance(source, Graph) else Graph.load(source, memory=recipe.memory // 4)
    _check_target(output, graph.source.name)
    source_hash = "" if provenance is False else content_sha256(graph)
    graph.remove_metadata(KEY)  # of the source: not true of what it becomes
    own_runner = None
    if runner is None:
        runner = own_runner = Runner(memory=recipe.memory)
    try:
        original = graph.copy() if metrics else graph
        run = _prepare(graph, recipe, data, runner, progress, default_folder() if cache else None)
        report = _run_steps(run, start)
        if metrics and judged is not None:
            progress(len(recipe.steps), len(recipe.steps), "evaluating")
            pairs = evaluate_pair(runner, original, graph, judged, metrics, seed=recipe.seed)
            report = report.model_copy(update={"metrics": tuple(map(_metric_report, pairs))})
    finally:
        if own_runner is not None:
            own_runner.close()
    grown = report.bytes_after > report.bytes_before
    may_grow = allow_growth or any(getattr(step, "allow_growth", False) for step in recipe.steps)
    if grown and not may_grow:
        raise VerificationError(
            f"the result is larger than the source: {report.bytes_after:,} bytes against "
            f"{report.bytes_before:,}; nothing was saved (allow_growth accepts it)"
        )
    if source_hash:
        used = None if run.calibration is None else run.calibration.data
        added = record(graph, recipe, source_hash, used)
        tight = report.bytes_after + added > report.bytes_before
        same = all(step.exact or not step.changes for step in report.steps)
        if provenance is None and tight and not may_grow and same:
            graph.remove_metadata(KEY)
            notice = f"provenance was left out: its {added} bytes would make the file larger than the source"
            report = report.model_copy(update={"notices": (*report.notices, notice)})
        else:
            total = report.bytes_after + added
            report = report.model_copy(update={"bytes_after": total, "bytes_provenance": added})
    files = None if output is None else graph.save(output, external=external)
    return Result(graph, report, files)


def _check_target(output: str | os.PathLike[str] | None, source: str) -> None:
    """Find out that the result cannot be saved before the work, not after it."""
    if output is not None:
        target = Path(output)
        if target.is_dir() or not target.parent.is_dir():
            raise SaveError(f"cannot write {quote(str(target))}: it must be a file in an existing folder")
        if target.exists() and Path(source).exists() and target.samefile(source):
            raise ParameterError(
                f"{quote(str(target))} is the source, which is never changed; save elsewhere"
            )


def _prepare(
    graph: Graph, recipe: Recipe, data: Dataset | None, runner: Runner, progress: Progress, cache: Path | None
) -> _Run:
    """Run the original, so that every step has something to be compared with."""
    run = _Run(graph, recipe, progress)
    calibrating = [step.pass_name() for step in recipe.steps if step.needs_calibration]
    if recipe.verify == "off" and not calibrating:
        return run
    if data is None:
        progress(0, len(recipe.steps), "looking for inputs that run")
        data = _default_data(runner, graph, recipe.seed, run.notices)
    if data is not None:
        run.sizes = fed_sizes(graph, next(iter(data.feeds), {}))
    if data is not None and calibrating:
        if data.random:
            run.notices.append(f"{', '.join(calibrating)}: calibrated on random data; give data that is real")
        run.calibration = Calibration(
            runner, data, memory=recipe.memory // 2, cache=cache, progress=progress, notices=run.notices
        )
    if data is not None and recipe.verify != "off":
        progress(0, len(recipe.steps), "running the original")
        run.verifier = Verifier(runner, data, run.notices)
        run.verifier.start(graph)
    return run


def _run_steps(run: _Run, start: float) -> Report:
    """Run all steps and the last comparison; return the report."""
    graph, recipe = run.graph, run.recipe
    bytes_before, nodes_before = graph.source.total_bytes, node_count(graph)
    for index, step in enumerate(recipe.steps):
        run.step(step, index)
    reason = "verify is off" if recipe.verify == "off" else "the original was not run"
    final = engines = Verdict(status="skipped", reason=reason)
    if run.verifier is not None:
        run.progress(len(recipe.steps), len(recipe.steps), "comparing with the original")
        final, engines = run.verifier.final(graph, exact=all(step.exact for step in recipe.steps))
    if final.status == "failed":
        raise VerificationError(f"the result differs from the original: {final.reason}")
    if engines.status == "failed":
        raise VerificationError(f"the result is not to be trusted: {engines.reason}")
    return Report(
        tool_version=tool_version(),
        source=graph.source.name,
        bytes_before=bytes_before,
        bytes_after=graph.file_bytes(),
        nodes_before=nodes_before,
        nodes_after=node_count(graph),
        seconds=time.perf_counter() - start,
        data=None if run.verifier is None else data_report(run.verifier.data),
        steps=tuple(run.steps),
        final=final,
        engines=engines,
        notices=tuple(run.notices),
    )


def _default_data(runner: Runner, graph: Graph, seed: int, notices: list[str]) -> Dataset | None:
    """Return random inputs that the original runs on, None (and a notice) when there are none."""
    try:
        try:
            return runnable_data(runner, graph, samples=2, seed=seed)
        except SessionTooLarge:  # sizes cannot be tried; the verifier streams the model instead
            return random_data(graph, samples=1, seed=seed)
    except (DataError, SessionError) as error:
        notices.append(f"outputs were not compared: {error}")
        return None


def _metric_report(pair: PairedResult) -> MetricReport:
    return MetricReport(
        name=pair.name,
        original=None if pair.reference is None else pair.reference.value,
        result=pair.result.value,
        difference=pair.difference,
        low=pair.low,
        high=pair.high,
        method=pair.method,
        samples=pair.result.samples,
    )
