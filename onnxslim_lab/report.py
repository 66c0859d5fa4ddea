"""Report: what a run did, measured; as JSON with a versioned schema and as tables."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import one_line

SCHEMA_VERSION: Literal[1] = 1
_SHOWN = 10  # reasons in the table


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ChangeReport(_Part):
    """One edit; see `onnxslim_lab.base.Change`."""

    where: str
    what: str
    bytes_before: int
    bytes_after: int
    nonzeros_before: int | None
    nonzeros_after: int | None
    detail: dict[str, float | int | str]


class RefusalReport(_Part):
    """Something that was left alone, with the reason."""

    where: str
    reason: str


class Coverage(_Part):
    """Which share of the model a step touched, each in [0, 1]; None when the total is zero or unknown."""

    weights: float | None = Field(description="share of the layers' parameters")
    macs: float | None = Field(description="share of the multiply-accumulates whose shapes are known")


class OutputReport(_Part):
    """How far one output is from the reference."""

    name: str
    max_abs: float
    relative: float
    sqnr_db: float | None
    cosine: float | None
    exact_mismatches: int


class Verdict(_Part):
    """The result of comparing outputs."""

    status: Literal["passed", "failed", "skipped", "measured"]
    reason: str
    tolerance: float | None = None
    outputs: tuple[OutputReport, ...] = ()


class StepReport(_Part):
    """One step of a run."""

    name: str
    text: str = Field(description="the step as command-line text")
    exact: bool
    seconds: float
    bytes_before: int
    bytes_after: int
    nodes_before: int
    nodes_after: int
    coverage: Coverage
    verdict: Verdict
    changes: tuple[ChangeReport, ...]
    refusals: tuple[RefusalReport, ...]
    notices: tuple[str, ...] = Field(
        (), description="what else the step says, such as why it chose its types"
    )


class DataReport(_Part):
    """Which data the outputs were compared on."""

    source: str
    random: bool
    samples: int
    notes: tuple[str, ...] = ()


def data_report(data: Dataset) -> DataReport:
    """Return which data outputs were compared on."""
    return DataReport(
        source=data.source, random=data.random, samples=len(data.feeds), notes=tuple(data.notes)
    )


class MetricReport(_Part):
    """A task metric of the original and the result, with 95 % confidence intervals."""

    name: str
    original: float | None
    result: float
    difference: float
    low: float | None = Field(description="lower end of the interval of the difference")
    high: float | None = Field(description="upper end of the interval of the difference")
    method: str
    samples: int


class Report(_Part):
    """A whole run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    source: str
    bytes_before: int
    bytes_after: int
    bytes_provenance: int = Field(
        0, description="of bytes_after: the metadata that says how the file was made"
    )
    nodes_before: int
    nodes_after: int
    seconds: float
    data: DataReport | None
    steps: tuple[StepReport, ...]
    final: Verdict
    engines: Verdict = Field(description="the result on onnxruntime against the NumPy runtime")
    metrics: tuple[MetricReport, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller the result is than the original."""
        return self.bytes_before / max(1, self.bytes_after)

    def to_json(self) -> str:
        """Return the report as JSON; `Report.model_validate_json` reads it back."""
        return self.model_dump_json(indent=2)

    def table(self) -> Group:
        """Return what a person wants to see: the steps, the totals, refusals by reason, notices."""
        table = Table(title=f"{_safe(self.source)}", title_justify="left")
        for heading in ("step", "bytes", "nodes", "changes", "weights", "seconds", "outputs"):
            justify: Literal["left", "right"] = "left" if heading in ("step", "outputs") else "right"
            table.add_column(heading, justify=justify, overflow="fold", no_wrap=justify == "right")
        table.add_row("(original)", f"{self.bytes_before:,}", f"{self.nodes_before:,}", "", "", "", "")
        for step in self.steps:
            table.add_row(
                _safe(step.text),
                f"{step.bytes_after:,}",
                f"{step.nodes_after:,}",
                f"{len(step.changes):,}",
                _percent(step.coverage.weights),
                f"{step.seconds:.2f}",
                _safe(_verdict(step.verdict)),
            )
        lines: list[Any] = [table]
        lines.append(
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes "
            f"({self.ratio:.2f}x smaller), {self.nodes_before} -> {self.nodes_after} nodes, "
            f"{self.seconds:.1f} s"
        )
        lines.append(f"second opinion: {_safe(self.engines.reason)}")
        for metric in self.metrics:
            before = "" if metric.original is None else f"{metric.original:.4g} -> "
            interval = ""
            if metric.low is not None and metric.high is not None:
                interval = f", 95 % interval {metric.low:+.4g} to {metric.high:+.4g}"
            lines.append(
                f"{_safe(metric.name)}: {before}{metric.result:.4g} "
                f"({metric.difference:+.4g}{interval}; {_safe(metric.method)}; {metric.samples} samples)"
            )
        if self.data is not None and self.data.random and self.final.status != "skipped":
            lines.append(
                "[yellow]outputs were compared on RANDOM data; give --data for a real check[/yellow]"
            )
        told = dict.fromkeys(f"{step.name}: {notice}" for step in self.steps for notice in step.notices)
        lines += [_safe(notice) for notice in told]
        lines += [f"[yellow]{_safe(notice)}[/yellow]" for notice in self.notices]
        refused = self.refusal_summary()
        if refused:
            lines.append("left alone:")
            lines += [
                f"  {count}x {_safe(step)}: {_safe(reason)}" for (step, reason), count in refused[:_SHOWN]
            ]
            if len(refused) > _SHOWN:
                lines.append(f"  and {len(refused) - _SHOWN} more reasons: see the JSON report")
        return Group(*lines)

    def refusal_summary(self) -> list[tuple[tuple[str, str], int]]:
        """Return ((step, reason), count), most frequent first; reasons that differ in numbers are one."""
        counts: dict[tuple[str, str], int] = {}
        shown: dict[tuple[str, str], str] = {}
        for step in self.steps:
            for refusal in step.refusals:
                key = (step.name, re.sub(r"\d+", "#", refusal.reason))
                counts[key] = counts.get(key, 0) + 1
                shown.setdefault(key, refusal.reason)
        named = [((name, shown[name, kind]), count) for (name, kind), count in counts.items()]
        return sorted(named, key=lambda item: -item[1])


def _safe(text: str) -> str:
    """Return text that neither breaks the line nor is read as markup."""
    return escape(one_line(text, limit=300))


def _percent(share: float | None) -> str:
    return "" if not share else f"{share:.1%}"


def _verdict(verdict: Verdict) -> str:
    if verdict.status in ("skipped", "failed"):
        return f"{verdict.status}: {verdict.reason}"
    worst = max((output.relative for output in verdict.outputs), default=0.0)
    if verdict.status == "passed":
        return f"equal ({worst:.1e})"
    sqnr = min((o.sqnr_db for o in verdict.outputs if o.sqnr_db is not None), default=None)
    return f"error {worst:.2e}" + ("" if sqnr is None else f", SQNR {sqnr:.1f} dB")
