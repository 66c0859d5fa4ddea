"""Verdicts at the top of the page, and the figures before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxslim_lab.bench_report import BenchReport
from onnxslim_lab.gate.result import BudgetResult, GateReport, Status
from onnxslim_lab.report import DataReport, MetricReport, Report
from onnxslim_lab.report import Verdict as Judgement
from onnxslim_lab.report_page.reading import Sources

_CAUSES = 6  # budgets that did not pass, in the summary
_URGENCY: tuple[Status, ...] = ("fail", "undecided", "pass")

Mood = Literal["good", "bad", "unsure", "absent"]

_MOODS: dict[str, Mood] = {
    "passed": "good",
    "pass": "good",
    "faster": "good",
    "failed": "bad",
    "fail": "bad",
    "slower": "bad",
    "undecided": "unsure",
    "measured": "unsure",
    "skipped": "absent",
}


@dataclass(frozen=True)
class Verdict:
    """One line of the summary; `status` is the word a person reads, `mood` its colour and sign."""

    what: str
    status: str
    mood: Mood
    text: str = ""


@dataclass(frozen=True)
class Pair:
    """A figure of the original and of the result, written out; "" where it is not known."""

    what: str
    before: str
    after: str
    change: str = ""


def mood_of(status: str) -> Mood:
    """Return how a status is shown.

    >>> mood_of("fail"), mood_of("measured")
    ('bad', 'unsure')
    """
    return _MOODS.get(status, "unsure")


def verdicts(sources: Sources) -> list[Verdict]:
    """Return the verdicts, those that were not measured too."""
    run, comparison, gate, bench = sources.run, sources.comparison, sources.gate, sources.bench
    found = []
    if gate is None:
        found.append(_absent("gate"))
    else:
        count = {status: len(gate.of(status)) for status in ("pass", "fail", "undecided")}
        text = ", ".join(f"{number} {status}" for status, number in count.items())
        held = "undecided" if not count["fail"] else "failed"
        word = "passed" if gate.passed else held
        found.append(Verdict("gate", word, mood_of(word), f"{text}; exit code {gate.exit_code}"))
        wrong = [item for item in by_urgency(gate) if item.status != "pass"]
        found += [
            Verdict(item.budget, item.status, mood_of(item.status), item.cause) for item in wrong[:_CAUSES]
        ]
        if len(wrong) > _CAUSES:
            found.append(
                Verdict(
                    "more budgets", f"{len(wrong) - _CAUSES} more", "unsure", "see the section of the gate"
                )
            )
    found.append(_judged("outputs", run.final if run else None))
    if comparison is not None:
        found.append(_judged("outputs compared", comparison.verdict))
    engines = run.engines if run else comparison.engines if comparison else None
    found.append(_judged("second engine", engines))
    if bench is None:
        found.append(_absent("latency"))
    else:
        text = f"{bench.ratio:.3f} of the original's time (95 %: {bench.low:.3f} to {bench.high:.3f})"
        found.append(Verdict("latency", bench.verdict, mood_of(bench.verdict), text))
    for what, data in _data(sources).items():
        text = f"{data.source}, {data.samples} samples"
        if data.random:
            text += ": made up; figures on it say little about real inputs"
        found.append(
            Verdict(
                f"data of the {what}",
                "random" if data.random else "real",
                "unsure" if data.random else "good",
                text,
            )
        )
    return found


def by_urgency(gate: GateReport) -> list[BudgetResult]:
    """Return the budgets: those that failed, the undecided ones, those that passed."""
    return [item for status in _URGENCY for item in gate.of(status)]


def before_after(sources: Sources) -> list[Pair]:
    """Return the figures of original and result."""
    found = []
    if (run := sources.run) is not None:
        found.append(_bytes_pair("file", run.bytes_before, run.bytes_after))
        found.append(Pair("nodes", f"{run.nodes_before:,}", f"{run.nodes_after:,}"))
        found += [_metric(metric) for metric in run.metrics]
    if (bench := sources.bench) is not None:
        found += _speed(bench, with_bytes=run is None)
    return found


def bytes_text(size: int | None) -> str:
    """Return bytes as a person reads them.

    >>> bytes_text(1067204), bytes_text(12)
    ('1.07 MB (1,067,204 bytes)', '12 bytes')
    """
    if size is None:
        return ""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name} ({size:,} bytes)"
    return f"{size:,} bytes"


def _data(sources: Sources) -> dict[str, DataReport]:
    parts = {
        "run": sources.run,
        "comparison": sources.comparison,
        "gate": sources.gate,
        "sensitivity": sources.sensitivity,
    }
    return {what: part.data for what, part in parts.items() if part is not None and part.data is not None}


def _absent(what: str) -> Verdict:
    return Verdict(what, "not measured", "absent")


def _judged(what: str, verdict: Judgement | None) -> Verdict:
    if verdict is None:
        return _absent(what)
    if verdict.status == "skipped":
        return Verdict(what, "not measured", "absent", verdict.reason)
    text = verdict.reason
    if verdict.outputs:
        worst = max(verdict.outputs, key=lambda output: output.relative)
        text = "; ".join(filter(None, [text, f"largest relative difference {worst.relative:.2e}"]))
        if worst.sqnr_db is not None:
            text += f", SQNR {worst.sqnr_db:.1f} dB"
    return Verdict(what, verdict.status, mood_of(verdict.status), text)


def _bytes_pair(what: str, before: int, after: int) -> Pair:
    return Pair(what, bytes_text(before), bytes_text(after), f"{before / max(1, after):.2f}x smaller")


def _metric(metric: MetricReport) -> Pair:
    change = f"{metric.difference:+.4g}"
    if metric.low is not None and metric.high is not None:
        change += f" (95 %: {metric.low:+.4g} to {metric.high:+.4g})"
    before = "" if metric.original is None else f"{metric.original:.4g}"
    return Pair(
        metric.name, before, f"{metric.result:.4g}", f"{change}; {metric.method}, {metric.samples} samples"
    )


def _speed(bench: BenchReport, *, with_bytes: bool) -> list[Pair]:
    a, b = bench.first, bench.second
    found = [_bytes_pair("file", a.file_bytes, b.file_bytes)] if with_bytes else []
    for what, first, second in (
        ("latency, median", a.median_seconds, b.median_seconds),
        ("latency, 5 % quantile", a.low_seconds, b.low_seconds),
        ("latency, 95 % quantile", a.high_seconds, b.high_seconds),
        ("load time", a.load_seconds, b.load_seconds),
    ):
        change = f"{second / first:.3f} times" if first else ""
        found.append(Pair(what, f"{first * 1e3:.4g} ms", f"{second * 1e3:.4g} ms", change))
    found.append(Pair("memory of loading and running", bytes_text(a.model_bytes), bytes_text(b.model_bytes)))
    return found


def refusals_by_reason(run: Report) -> list[tuple[str, str, list[str]]]:
    """Return (step, reason, names) of what was left alone, most names first; equal reasons are one."""
    found: dict[tuple[str, str], list[str]] = {}
    for step in run.steps:
        for refusal in step.refusals:
            found.setdefault((step.name, refusal.reason), []).append(refusal.where)
    return sorted(((*key, names) for key, names in found.items()), key=lambda item: -len(item[2]))
