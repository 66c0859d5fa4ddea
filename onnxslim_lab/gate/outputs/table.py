"""The gate's report for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.gate.outputs.plain import line
from onnxslim_lab.gate.result import GateReport, Status, number

_WIDEST = 40  # characters of a budget on one line
_COLOURS: dict[Status, str] = {"pass": "green", "fail": "red", "undecided": "yellow"}


def table(report: GateReport) -> Group:
    """Return what a person wants to see: every budget, then the causes of those that did not pass."""
    shown = Table(title=f"{_safe(report.candidate)} against {_safe(report.baseline)}", title_justify="left")
    widest = max((len(item.budget) for item in report.budgets), default=0)
    shown.add_column("budget", overflow="fold", min_width=min(widest, _WIDEST))
    for heading in ("verdict", "observed", "bound", "limit", "samples"):
        shown.add_column(heading, justify="left" if heading == "verdict" else "right")
    for item in report.budgets:
        colour = _COLOURS[item.status]
        figures = (_safe(number(value, item.unit)) for value in (item.observed, item.bound, item.limit))
        samples = "" if item.samples is None else f"{item.samples:,}"
        shown.add_row(_safe(item.budget), f"[{colour}]{item.status}[/{colour}]", *figures, samples)
    lines: list[Table | str] = [shown]
    wrong = [*report.of("fail"), *report.of("undecided")]
    lines += [f"[{_COLOURS[item.status]}]{_safe(item.budget)}[/]: {_safe(item.cause)}" for item in wrong]
    lines += [f"[yellow]{_safe(text)}[/yellow]" for text in report.notices]
    counts = ", ".join(f"{len(report.of(status))} {status}" for status in _COLOURS if report.of(status))
    verdict = (
        "[green]the candidate may ship[/green]" if report.passed else "[red]the candidate may NOT ship[/red]"
    )
    lines.append(f"{verdict}: {counts}; exit code {report.exit_code}")
    return Group(*lines)


def _safe(text: str) -> str:
    return escape(line(text, 1000))
