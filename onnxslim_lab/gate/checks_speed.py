"""Budgets on time and memory, measured on this machine with candidate and baseline in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from onnxslim_lab.errors import LabError
from onnxslim_lab.gate.bounds import Judged, judge_median
from onnxslim_lab.gate.result import BudgetResult, number, percent
from onnxslim_lab.gate.subject import NotMeasured, Subject


def check_speed(subject: Subject) -> Iterator[BudgetResult]:
    """Yield verdicts on latency, memory and load time; no model is timed when none is asked for."""
    budgets = subject.config.budgets
    keys = [
        key
        for key, limit in (
            ("latency.ratio", budgets.latency and budgets.latency.ratio),
            ("latency.milliseconds", budgets.latency and budgets.latency.milliseconds),
            ("peak_memory", budgets.peak_memory),
            ("load_milliseconds", budgets.load_milliseconds),
        )
        if limit is not None
    ]
    if not keys:
        return
    try:
        report = subject.timing
    except (NotMeasured, LabError) as error:
        for key in keys:
            yield BudgetResult.unmeasured(key, "speed", error)
        return
    alpha = subject.config.alpha
    seconds = np.array(report.second.seconds)
    if budgets.latency is not None and budgets.latency.ratio is not None:
        ratios = seconds / np.array(report.first.seconds)
        limit = budgets.latency.ratio
        slow = "; ".join(report.explanation()) if float(np.median(ratios)) > limit else ""
        yield _median(subject, "latency.ratio", ratios, limit, "", judge_median(ratios, limit, alpha), slow)
    if budgets.latency is not None and budgets.latency.milliseconds is not None:
        times, limit = seconds * 1e3, budgets.latency.milliseconds
        slowest = ", ".join(f"{n.op_type} {n.seconds * 1e3:.3g} ms" for n in report.second.slowest[:3])
        judged = judge_median(times, limit, alpha)
        slow = f"slowest nodes: {slowest}" if slowest else ""
        yield _median(subject, "latency.milliseconds", times, limit, "ms", judged, slow)
    if budgets.peak_memory is not None:
        peak = report.second.peak_bytes
        if peak is None:
            cause = "this system does not tell the peak memory of a process"
            yield BudgetResult(budget="peak_memory", kind="speed", status="undecided", cause=cause)
        else:
            yield _once(
                "peak_memory", float(peak), float(budgets.peak_memory), "bytes", "the process that ran it"
            )
    if budgets.load_milliseconds is not None:
        load = report.second.load_seconds * 1e3
        yield _once("load_milliseconds", load, budgets.load_milliseconds, "ms", "median of three loads")


def _median(
    subject: Subject,
    key: str,
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    limit: float,
    unit: str,
    judged: Judged,
    slow: str,
) -> BudgetResult:
    median = float(np.median(values))
    side = "lower" if judged.status == "fail" else "upper"
    cause = f"median {number(median, unit)}, limit {number(limit, unit)}, {side} "
    cause += f"{percent(subject.config.confidence)} bound {number(judged.bound, unit)} on {len(values)} pairs in turn"
    if judged.status == "undecided":
        cause += (
            f": about {judged.needed:,} pairs would decide"
            if judged.needed is not None
            else ": the median is too close to the limit"
        )
    elif judged.status == "fail" and slow:
        cause += f"; {slow}"
    return BudgetResult(
        budget=key,
        kind="speed",
        status=judged.status,
        cause=cause,
        observed=median,
        limit=limit,
        bound=judged.bound,
        unit=unit,
        samples=len(values),
        needed=judged.needed,
        method=judged.method,
    )


def _once(key: str, observed: float, limit: float, unit: str, told: str) -> BudgetResult:
    status: Literal["pass", "fail"] = "fail" if observed > limit else "pass"
    cause = f"{number(observed, unit)}, limit {number(limit, unit)}: {told}"
    return BudgetResult(
        budget=key,
        kind="speed",
        status=status,
        cause=cause,
        observed=observed,
        limit=limit,
        unit=unit,
        method=told,
    )
