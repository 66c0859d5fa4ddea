"""Budgets on what the candidate computes: it runs, metrics, agreement, output error, NaN, the two engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np

from onnxslim_lab.accuracy import Float64, Metric, find_metric
from onnxslim_lab.errors import LabError, ParameterError, quote, suggest
from onnxslim_lab.evaluate import one_number, resampled
from onnxslim_lab.gate import bounds
from onnxslim_lab.gate.bounds import Judged
from onnxslim_lab.gate.budgets import MetricBudget, OutputErrorBudget
from onnxslim_lab.gate.causes import Found, explain
from onnxslim_lab.gate.paired import Counts
from onnxslim_lab.gate.result import BudgetResult, number, percent
from onnxslim_lab.gate.subject import NotMeasured, Subject
from onnxslim_lab.metrics import OutputError


def check_runs(subject: Subject) -> Iterator[BudgetResult]:
    """Yield a failure when the candidate does not run on the baseline's inputs, or lacks an output."""
    cause, where = subject.problem, tuple[str, ...]()
    if not cause:
        lacking = [name for name in subject.baseline.outputs if name not in subject.candidate.outputs]
        if lacking:
            close = suggest(lacking[0], subject.candidate.outputs)
            cause = f"the candidate lacks the baseline's output {quote(lacking[0])}{close}"
            where = (lacking[0],)
    status: Literal["pass", "fail"] = "fail" if cause else "pass"
    yield BudgetResult(
        budget="runs",
        kind="runs",
        status=status,
        cause=cause or f"runs on {len(subject.feeds)} feeds",
        samples=len(subject.feeds),
        where=where,
    )


def check_metrics(subject: Subject) -> Iterator[BudgetResult]:
    """Yield a verdict for each metric, and for agreement."""
    budgets = subject.config.budgets
    for budget in budgets.metrics:
        kind = "drop" if budget.drop is not None else "relative_drop"
        yield _told(subject, f"metrics.{budget.name}.{kind}", partial(_metric, subject, budget))
    if budgets.agreement is not None:
        yield _told(subject, "agreement.least", partial(_agreement, subject))


def _told(subject: Subject, key: str, judge: Callable[[], BudgetResult]) -> BudgetResult:
    """Return a verdict with the cause of a failure; undecided where the candidate did not run.

    What the baseline cannot be measured by is no verdict but an error; the candidate has failed then.
    """
    try:
        result = judge()
    except NotMeasured as error:
        return BudgetResult.unmeasured(key, "quality", error)
    except _UnlikeError as error:
        return BudgetResult(budget=key, kind="quality", status="fail", cause=str(error))
    result = result.model_copy(update={"budget": key})
    if result.status == "fail":
        found = explain(subject)
        if found is not None:
            result = result.model_copy(
                update={"cause": f"{result.cause}; {found.what}", "where": found.where}
            )
    return result


def _metric(subject: Subject, budget: MetricBudget) -> BudgetResult:
    config = subject.config
    metric = find_metric(budget.name)
    labels = subject.data.labels
    before = metric.measure(subject.reference, labels, None)
    after = _measured(metric, subject)
    limit = budget.drop if budget.drop is not None else budget.relative_drop
    assert limit is not None
    relative = budget.drop is None
    if isinstance(before, float) or isinstance(after, float):
        first, second = float(np.mean(before)), float(np.mean(after))
        samples = len(subject.feeds)
        allowed = limit * abs(first) if relative else limit
        again = resampled([one_number(metric)] * 2, [subject.reference, subject.result], labels, config.seed)
        judged = bounds.judge_resampled_drop(
            None if again is None else -again, allowed, config.alpha, samples
        )
        judged = _scaled(judged, abs(first)) if relative else judged
    else:
        if before.shape != after.shape:
            raise _UnlikeError(
                f"metric {quote(budget.name)} gave {before.size} samples for the baseline, {after.size} for the "
                "candidate"
            )
        first, second, samples = float(before.mean()), float(after.mean()), before.size
        if metric.proportion:
            counts = Counts(samples, int((before > after).sum()), int((after > before).sum()))
            if relative:
                judged = bounds.judge_relative_drop(counts, int(before.sum()), limit, config.alpha)
            else:
                judged = bounds.judge_drop(counts, limit, config.alpha)
        elif (
            relative and np.count_nonzero(before - after) >= bounds.DIFFERING
        ):  # the drop from what may be lost of each sample's own value
            shift = before * (1 - limit) if first > 0 else before * (1 + limit)
            judged = bounds.judge_mean_drop(shift, after, 0.0, config.alpha, config.seed)
            judged = _scaled(judged, abs(first), limit)
        else:
            allowed = limit * abs(first) if relative else limit
            judged = bounds.judge_mean_drop(before, after, allowed, config.alpha, config.seed)
            judged = _scaled(judged, abs(first)) if relative else judged
    drop = (first - second) / abs(first) if relative and first else first - second
    what = f"{budget.name} {number(first)} became {number(second)}"
    return _verdict(subject, what, "drop", drop, limit, judged, samples, more=False)


class _UnlikeError(Exception):
    """The candidate gives nothing that a metric of the baseline can be compared with."""


def _measured(metric: Metric, subject: Subject) -> Float64 | float:
    """Return a metric of the candidate; it is known to work on the baseline."""
    try:
        return metric.measure(subject.result, subject.data.labels, subject.reference)
    except LabError as error:
        raise _UnlikeError(f"the candidate's outputs: {error}") from error


def _scaled(judged: Judged, by: float, shift: float = 0.0) -> Judged:
    """Return a verdict whose bound is a share of the baseline's value."""
    bound = judged.bound / by + shift if by else math.inf
    return Judged(judged.status, bound, judged.needed, judged.method)


def _agreement(subject: Subject) -> BudgetResult:
    budget = subject.config.budgets.agreement
    assert budget is not None
    name = "agreement" if budget.output is None else f"agreement@{budget.output}"
    metric = find_metric(name)
    metric.measure(subject.reference, None, subject.reference)
    same = np.asarray(_measured(metric, subject))
    judged = bounds.judge_share(int(same.sum()), same.size, budget.least, subject.config.alpha)
    share = float(same.mean())
    what = f"{int(same.sum())} of {same.size} decisions are the baseline's"
    return _verdict(subject, what, "agreement", share, budget.least, judged, same.size, more=True)


def _verdict(
    subject: Subject,
    what: str,
    figure: str,
    observed: float,
    limit: float,
    judged: Judged,
    samples: int,
    *,
    more: bool,
) -> BudgetResult:
    """Return a statistical verdict in words; too few samples decide nothing."""
    config = subject.config
    status, needed = judged.status, judged.needed
    if samples < config.minimum_samples:
        status, needed = "undecided", max(config.minimum_samples, needed or 0)
    side = "upper" if more == (status == "fail") else "lower"
    text = f"{what}; {figure} {number(observed)}, limit {number(limit)}"
    text += f", {side} {percent(config.confidence)} bound {number(judged.bound)} on {samples} samples"
    if samples < config.minimum_samples:
        text += f": fewer than the {config.minimum_samples} samples that are the least; {needed:,} would do"
    elif status == "undecided":
        text += (
            f": about {needed - samples:,} more samples ({needed:,} in all) would decide at these rates"
            if needed is not None
            else ": no number of samples would decide at these rates, the figure is too close to the limit"
        )
    if subject.data.random:
        text += " (RANDOM data)"
    return BudgetResult(
        budget=figure,
        kind="quality",
        status=status,
        cause=text,
        observed=observed,
        limit=limit,
        bound=judged.bound,
        samples=samples,
        needed=needed,
        method=judged.method,
        better="more" if more else "less",
    )


def check_output_error(subject: Subject) -> Iterator[BudgetResult]:
    """Yield a verdict for each output and kind of error: the worst over all samples, so there is no bound."""
    known = subject.baseline.outputs
    for budget in subject.config.budgets.output_error:
        if budget.output != "*" and budget.output not in known:
            hint = suggest(budget.output, known)
            raise ParameterError(
                f"budget output_error: the baseline has no output {quote(budget.output)}{hint}"
            )
        try:
            errors = subject.errors
        except NotMeasured as error:
            key = f"output_error.{budget.output}"
            yield BudgetResult.unmeasured(key, "quality", error)
            continue
        names = list(errors) if budget.output == "*" else [budget.output]
        for name in names:
            yield from _errors(subject, budget, errors[name])


def _errors(subject: Subject, budget: OutputErrorBudget, error: OutputError) -> Iterator[BudgetResult]:
    samples, least = len(subject.feeds), subject.config.minimum_samples
    figures: tuple[tuple[str, float | None, float, bool, str], ...] = (
        ("relative", budget.relative, error.relative, False, ""),
        ("max_abs", budget.max_abs, error.max_abs, False, ""),
        ("sqnr_db", budget.sqnr_db, error.sqnr_db, True, "dB"),
        ("cosine", budget.cosine, error.cosine, True, ""),
    )
    for name, limit, observed, more, unit in figures:
        if limit is None:
            continue
        broken = observed < limit if more else observed > limit
        cause = f"output {quote(error.name)}: {name} {number(observed, unit)}, limit {number(limit, unit)}, "
        cause += f"over all of {samples} feeds" if name == "sqnr_db" else f"the worst of {samples} feeds"
        status: Literal["pass", "fail", "undecided"] = "fail" if broken else "pass"
        where: tuple[str, ...] = ()
        if broken:
            if error.structure:
                cause += f"; {error.structure}"
            found = explain(subject) or Found("")
            cause, where = (f"{cause}; {found.what}" if found.what else cause), found.where
        elif samples < least:
            status = "undecided"
            cause += f": fewer than the {least} samples that are the least"
        yield BudgetResult(
            budget=f"output_error.{error.name}.{name}",
            kind="quality",
            status=status,
            cause=cause,
            observed=observed,
            limit=limit,
            unit=unit,
            samples=samples,
            needed=least if status == "undecided" else None,
            method="the worst over all samples",
            better="more" if more else "less",
            where=where,
        )
