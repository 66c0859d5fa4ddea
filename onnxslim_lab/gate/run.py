"""Run the gate: every budget of a configuration, judged on a candidate and its baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.data import Dataset, load_data
from onnxslim_lab.engine import tool_version
from onnxslim_lab.errors import DataError, ModelError, quote
from onnxslim_lab.gate.checks_model import check_data, check_interface, check_operators
from onnxslim_lab.gate.checks_origin import check_provenance, file_sha256
from onnxslim_lab.gate.checks_quality import (
    check_metrics,
    check_output_error,
    check_runs,
)
from onnxslim_lab.gate.checks_size import check_coverage, check_size
from onnxslim_lab.gate.checks_speed import check_speed
from onnxslim_lab.gate.checks_values import check_engines, check_finite
from onnxslim_lab.gate.config import GateConfig
from onnxslim_lab.gate.keys import not_judged
from onnxslim_lab.gate.lock import Lock, check_drift
from onnxslim_lab.gate.result import BudgetResult, GateReport
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.probe import runnable_data
from onnxslim_lab.report import data_report
from onnxslim_lab.sessions import Runner

Check = Callable[[Subject], Iterator[BudgetResult]]

CHECKS: tuple[Check, ...] = (
    check_runs,
    check_interface,
    check_finite,
    check_engines,
    check_metrics,
    check_output_error,
    check_operators,
    check_size,
    check_speed,
    check_coverage,
    check_provenance,
    check_data,
)
"""All checks, in the order of the report; each yields nothing when its budgets are not set."""

_RANDOM = 4  # feeds made up when there is no data


def run_gate(
    candidate: Path,
    baseline: Path,
    config: GateConfig,
    *,
    config_name: str = "gate configuration",
    data: str | Dataset | None = None,
    dims: Mapping[str, int] | None = None,
    limit: int | None = None,
    lock: Lock | None = None,
    runner: Runner | None = None,
    progress: Progress = silent,
) -> GateReport:
    """Judge a candidate against its baseline.

    Args:
        candidate: The .onnx file that is to ship.
        baseline: The .onnx file it replaces.
        config: Budgets.
        config_name: What the report calls the configuration.
        data: Inputs and labels, or how they are named on the command line; None makes up random inputs.
        dims: Sizes of open dimensions for random inputs.
        limit: Use at most so many samples.
        lock: What was measured before, to flag drift.
        runner: Sessions to use; by default a new one, closed at the end.
        progress: Told what is done.

    Raises:
        LabError: The baseline or the data cannot be used, or there is no candidate: no verdict.
    """
    start, started = time.perf_counter(), datetime.now(tz=UTC)
    original = Graph.load(baseline)
    if not candidate.is_file():
        raise ModelError(f"cannot read {quote(str(candidate))}: no such file")
    if candidate.samefile(baseline):
        raise ModelError("candidate and baseline are the same file: there is nothing to judge")
    own = None
    if runner is None:
        runner = own = Runner()
    notices: list[str] = []
    try:
        feeds = _feeds(original, config, data, dims, limit, runner)
        try:
            judged = Graph.load(candidate)
        except ModelError as error:
            results = [BudgetResult(budget="runs", kind="runs", status="fail", cause=str(error))]
            results += not_judged(config.budgets, "not judged: the candidate does not load")
        else:
            subject = Subject(candidate, baseline, judged, original, feeds, runner, config, progress, notices)
            results = _judged(subject)
    finally:
        if own is not None:
            own.close()
    if lock is not None:
        notices += lock.differences(file_sha256(baseline), feeds.source)
        results += check_drift(lock, results)
    return GateReport(
        tool_version=tool_version(),
        candidate=str(candidate),
        baseline=str(baseline),
        baseline_sha256=file_sha256(baseline),
        config=config_name,
        confidence=config.confidence,
        undecided=config.undecided,
        started=started.strftime("%Y-%m-%dT%H:%M:%S"),
        seconds=time.perf_counter() - start,
        data=data_report(feeds),
        budgets=tuple(results),
        notices=tuple(notices),
    )


def _feeds(
    original: Graph,
    config: GateConfig,
    data: str | Dataset | None,
    dims: Mapping[str, int] | None,
    limit: int | None,
    runner: Runner,
) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if data is not None:
        return load_data(data, original, limit=limit)
    labelled = [item.name for item in config.budgets.metrics if ":" not in item.name]
    if labelled:
        raise DataError(f"metric {labelled[0]} needs labels, which random data has not: give --data")
    return runnable_data(runner, original, samples=_RANDOM, seed=config.seed, dims=dims)


def _judged(subject: Subject) -> list[BudgetResult]:
    """Return the verdicts of all checks."""
    _ = subject.reference  # a baseline that does not run is no verdict on the candidate
    if subject.data.random:
        subject.notice("outputs were computed on RANDOM data; give --data for a verdict on the task")
    return [result for check in CHECKS for result in check(subject)]
