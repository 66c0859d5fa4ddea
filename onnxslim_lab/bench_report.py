"""What a bench found, and how it is told."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.report import DataReport

SCHEMA_VERSION = 1
_EXPLAINED = 5  # operators named
_SAME = 0.02  # operators whose time differs by less than this share of the model's are not worth a line


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeTime(_Part):
    """A node that takes long: its name in onnxruntime's optimized graph, operator and seconds of one run."""

    name: str
    op_type: str
    seconds: float


class ModelTimes(_Part):
    """What one model takes.

    Attributes:
        path: Its file.
        file_bytes: Bytes on disk, external data included.
        load_seconds: Median time to create a session.
        peak_bytes: Most memory of its process from before loading to the last run; None if not known.
        model_bytes: The part of it that loading and running added.
        median_seconds, low_seconds, high_seconds: Latency of one run: median, 5 % and 95 % quantile.
        slowest: The nodes that take longest.
        seconds: The latency in each pair, in order.
    """

    path: str
    file_bytes: int
    load_seconds: float
    peak_bytes: int | None
    model_bytes: int | None
    median_seconds: float
    low_seconds: float
    high_seconds: float
    slowest: list[NodeTime]
    seconds: tuple[float, ...] = ()


class OperatorTimes(_Part):
    """Seconds of one run in all nodes of a kind, integer and fused forms counted with the plain operator."""

    op_type: str
    first: float
    second: float

    @property
    def difference(self) -> float:
        """What the second takes more."""
        return self.second - self.first


class BenchReport(_Part):
    """Two models timed in turn.

    Attributes:
        machine, onnxruntime, provider, threads: Where and how they ran.
        pairs, block: Timed pairs, and runs that each time is the mean of.
        ratio, low, high: The second's median latency over the first's, with the 95 % confidence interval.
        verdict: "undecided" when the interval contains 1.
        operators: Time by operator, what the second takes most more first; from separate profiled runs.
    """

    schema_version: int = SCHEMA_VERSION
    machine: str
    onnxruntime: str
    provider: str
    threads: int
    data: DataReport
    pairs: int
    block: int
    first: ModelTimes
    second: ModelTimes
    ratio: float
    low: float
    high: float
    verdict: Literal["faster", "slower", "undecided"]
    operators: list[OperatorTimes]

    def table(self) -> Group:
        """Return what a person wants to see."""
        table = Table(title=escape(f"{self.machine}, {self.provider}"), title_justify="left")
        for heading in ("", "original", "result", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        a, b = self.first, self.second
        table.add_row("latency ms", _ms(a.median_seconds), _ms(b.median_seconds), f"{self.ratio:.3f}")
        table.add_row(
            "  5 % .. 95 %",
            f"{_ms(a.low_seconds)} .. {_ms(a.high_seconds)}",
            f"{_ms(b.low_seconds)} .. {_ms(b.high_seconds)}",
            "",
        )
        table.add_row(
            "load ms", _ms(a.load_seconds), _ms(b.load_seconds), _over(b.load_seconds, a.load_seconds)
        )
        table.add_row(
            "memory MB", _mb(a.model_bytes), _mb(b.model_bytes), _over(b.model_bytes, a.model_bytes)
        )
        table.add_row("file MB", _mb(a.file_bytes), _mb(b.file_bytes), _over(b.file_bytes, a.file_bytes))
        lines: list[Any] = [table, f"{_COLOURED[self.verdict]} {self._sentence()}"]
        lines += [escape(line) for line in self.explanation()]
        lines.append(
            f"{self.pairs} pairs of {self.block} runs in turn, {self.threads or 'automatic'} threads, "
            f"onnxruntime {self.onnxruntime}"
        )
        if self.data.random:
            lines.append("random inputs: the time of models whose work depends on the data may differ")
        return Group(*lines)

    def _sentence(self) -> str:
        span = f"the result takes {self.ratio:.3f} of the original's time (95 %: {self.low:.3f} to {self.high:.3f})"
        if self.verdict == "undecided":
            return f"{span}: no difference can be told; more --runs narrow the interval"
        return span

    def explanation(self) -> list[str]:
        """Return which operators cost the difference, in one line each; none unless the result is slower."""
        if self.verdict != "slower":
            return []
        total = self.first.median_seconds
        costly = [item for item in self.operators if item.difference > _SAME * total]
        return [
            f"{item.op_type}: {_ms(item.first)} ms became {_ms(item.second)} ms (+{_ms(item.difference)} ms)"
            for item in costly[:_EXPLAINED]
        ] or ["no operator by itself explains it: the difference is spread or outside the nodes"]


_COLOURED = {
    "faster": "[green]faster:[/green]",
    "slower": "[red]SLOWER:[/red]",
    "undecided": "[yellow]undecided:[/yellow]",
}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.3g}"


def _over(second: float | None, first: float | None) -> str:
    return f"{second / first:.3f}" if second is not None and first else ""
