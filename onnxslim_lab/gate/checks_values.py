"""Budgets on the values themselves: no NaN or Inf, and two engines that agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from onnxslim_lab.errors import LabError, quote
from onnxslim_lab.gate.causes import first_nonfinite, nonfinite, poisoned_weight
from onnxslim_lab.gate.halves import half_overflow
from onnxslim_lab.gate.result import BudgetResult
from onnxslim_lab.gate.subject import NotMeasured, Subject
from onnxslim_lab.second_opinion import second_opinion


def check_finite(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether the candidate's outputs are free of NaN and Inf, those of the baseline aside."""
    if not subject.config.budgets.finite:
        return
    try:
        bad = nonfinite(subject.result)
    except NotMeasured as error:
        yield BudgetResult.unmeasured("finite", "values", error)
        return
    samples = len(subject.feeds)
    if bad is None:
        if (poisoned := poisoned_weight(subject)) is not None:
            cause = f"{poisoned.what}, though the outputs on this data do not show it"
            yield BudgetResult(
                budget="finite",
                kind="values",
                status="fail",
                cause=cause,
                samples=samples,
                where=poisoned.where,
            )
            return
        try:
            hidden = half_overflow(subject)
        except LabError as error:
            cause = f"no NaN or Inf in the outputs, but float16 values inside could not be looked at: {error}"
            yield BudgetResult(budget="finite", kind="values", status="undecided", cause=cause)
            return
        yield BudgetResult(
            budget="finite",
            kind="values",
            status="fail" if hidden else "pass",
            cause=hidden.what if hidden else f"no NaN or Inf on {samples} feeds",
            samples=samples,
            where=hidden.where if hidden else (),
        )
        return
    found = first_nonfinite(subject)
    name, sample, feeds, values = bad
    cause = (
        f"output {quote(name)} has {values} NaN or Inf in {feeds} of {samples} feeds, first in feed {sample}"
    )
    yield BudgetResult(
        budget="finite",
        kind="values",
        status="fail",
        cause=found.what if found else f"{cause}; the baseline has NaN or Inf too",
        observed=values,
        limit=0,
        samples=samples,
        where=found.where if found else (name,),
    )


def check_engines(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether onnxruntime and the NumPy runtime agree on the candidate."""
    if not subject.config.budgets.engines_agree:
        return
    key = "engines_agree"
    try:
        results = subject.result
        opinion = second_opinion(subject.candidate, subject.feeds, results, subject.runner, subject.tolerance)
    except (NotMeasured, LabError) as error:
        yield BudgetResult.unmeasured(key, "values", error)
        return
    if opinion.status == "failed":
        given = subject.reference
        before = second_opinion(subject.baseline, subject.feeds, given, subject.runner, subject.tolerance)
        if before.status == "failed":
            cause = f"as on the baseline, where they disagree too: {opinion.reason}"
            yield BudgetResult(budget=key, kind="values", status="undecided", cause=cause)
            return
    verdicts: dict[str, Literal["pass", "fail", "undecided"]] = {"passed": "pass", "failed": "fail"}
    status = verdicts.get(opinion.status, "undecided")
    yield BudgetResult(
        budget=key, kind="values", status=status, cause=opinion.reason, limit=subject.tolerance
    )
