"""Compare: where two models differ, output by output, and the first value from which they do."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError, SessionError, one_line, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.judging import NOISE_FACTOR, TOLERANCE, departure, judge
from onnxslim_lab.metrics import Feed, OutputError, compare_outputs
from onnxslim_lab.report import DataReport, Verdict, data_report
from onnxslim_lab.second_opinion import second_opinion
from onnxslim_lab.sessions import Runner

SCHEMA_VERSION = 1
_CHUNK = 32  # intermediate values asked for at a time, so that memory stays bounded


class Divergence(BaseModel):
    """The first value, in the order of the second model, that differs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    node: str
    op_type: str
    relative: float
    compared: int


class Comparison(BaseModel):
    """The verdict on two models."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    first: str
    second: str
    data: DataReport
    verdict: Verdict
    engines: Verdict
    divergence: Divergence | None

    def table(self) -> Group:
        """Return what a person wants to see."""
        table = Table(title=f"{_safe(self.first)} against {_safe(self.second)}", title_justify="left")
        table.add_column("output", overflow="fold")
        for heading in ("max abs", "relative", "SQNR dB", "cosine", "mismatches"):
            table.add_column(heading, justify="right")
        for output in self.verdict.outputs:
            table.add_row(
                _safe(output.name),
                f"{output.max_abs:.3g}",
                f"{output.relative:.3g}",
                "" if output.sqnr_db is None else f"{output.sqnr_db:.1f}",
                "" if output.cosine is None else f"{output.cosine:.6f}",
                str(output.exact_mismatches),
            )
        colour = "green" if self.verdict.status == "passed" else "red"
        lines: list[Table | str] = [table, f"[{colour}]{_safe(self.verdict.reason)}[/{colour}]"]
        lines.append(f"second opinion: {_safe(self.engines.reason)}")
        if self.divergence is not None:
            found = self.divergence
            lines.append(
                f"first differing value: {_safe(found.value)}, made by {_safe(found.node)} ({found.op_type}), "
                f"relative difference {found.relative:.3g}; {found.compared} values compared"
            )
        if self.data.random:
            lines.append("[yellow]compared on RANDOM data; give --data for a real check[/yellow]")
        return Group(*lines)


def compare(
    first: Graph,
    second: Graph,
    data: Dataset,
    runner: Runner,
    *,
    tolerance: float | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models on the same data and compare their outputs.

    Args:
        first: The reference.
        second: The model to judge; it must have the same input and output names.
        data: Feeds for both.
        runner: Where they run.
        tolerance: Largest relative difference; by default 1e-4, or three times the difference between
            onnxruntime's own optimization levels on the first model where that is larger.
        progress: Called as progress(done, total, what).

    Raises:
        DataError: inputs or outputs have other names.
        SessionError: one of the models does not run.
    """
    for what, left, right in (
        ("input", set(first.input_types()), set(second.input_types())),
        ("output", set(first.outputs), set(second.outputs)),
    ):
        if left != right:
            name = min(left ^ right)
            other = right if name in left else left
            raise DataError(f"{what} {quote(name)} is in one model only{suggest(name, other)}")
    feeds = data.feeds
    progress(0, 4, "running the first model")
    if tolerance is None:
        tolerance = max(TOLERANCE, NOISE_FACTOR * runner.noise(first, feeds))
    reference = runner.run(first, feeds)
    progress(1, 4, "running the second model")
    result = runner.run(second, feeds)
    verdict = judge(compare_outputs(reference, result), tolerance)
    divergence = None
    if verdict.status == "failed":
        progress(2, 4, "looking for the first difference")
        divergence = first_divergence(first, second, feeds, runner, tolerance)
    progress(3, 4, "asking the NumPy runtime")
    return Comparison(
        first=first.source.name,
        second=second.source.name,
        data=data_report(data),
        verdict=verdict,
        engines=second_opinion(second, feeds, result, runner, tolerance),
        divergence=divergence,
    )


def first_divergence(
    first: Graph, second: Graph, feeds: Sequence[Feed], runner: Runner, tolerance: float
) -> Divergence | None:
    """Return the first value known by the same name to both main graphs that differs; None if none does.

    Values are compared in topological order of the second model, a few at a time, with onnxruntime's
    optimizations off so that every one of them exists.
    """
    known = {name for node in first.nodes for name in node.output}
    common = [(name, node) for node in second.nodes for name in node.output if name and name in known]
    compared = 0
    for start in range(0, len(common), _CHUNK):
        part = common[start : start + _CHUNK]
        names = [name for name, _ in part]
        try:
            left = runner.run(first, feeds, outputs=names, optimization="off")
            right = runner.run(second, feeds, outputs=names, optimization="off")
        except SessionError:  # a value that cannot be an output, such as one of unknown type
            continue
        errors: dict[str, OutputError] = {error.name: error for error in compare_outputs(left, right)}
        for name, node in part:
            compared += 1
            if name in errors and departure(errors[name], tolerance):
                return Divergence(
                    value=name,
                    node=node.name,
                    op_type=node.op_type,
                    relative=errors[name].relative,
                    compared=compared,
                )
    return None


def _safe(text: str) -> str:
    return escape(one_line(text, limit=200))
