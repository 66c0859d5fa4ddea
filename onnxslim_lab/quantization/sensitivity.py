"""Explain the drop: what each layer's quantization costs the outputs, why, and what to do about it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.base import Context, Pass, Progress, silent
from onnxslim_lab.errors import DataError, ParameterError, SessionError, one_line
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import Feed
from onnxslim_lab.quantization.causes import Cause, causes, overflows, wants
from onnxslim_lab.quantization.output_error import ModelError, OutputJudge
from onnxslim_lab.quantization.variants import Named, PlanVariants, Variants, variants_of
from onnxslim_lab.recipe import step_text
from onnxslim_lab.report import DataReport, data_report
from onnxslim_lab.statistics import Calibration, Want

SCHEMA_VERSION = 1
_SHARE = 0.1  # of the multiply-accumulates that the suggestion may leave in float
_GAIN = 1.0  # decibels that make a suggestion worth a line
_SHOWN = 30  # layers in the table; JSON has all
_FAINT = 0.01  # of the noise of all layers: what causes less alone is not left out by itself as well
_EXPLAINED = 5  # of these, with reason and remedy


class LayerReport(BaseModel):
    """What quantizing one layer costs.

    Attributes:
        name: The layer.
        op_type: Its operator.
        macs_share: Its share of the multiply-accumulates of the layers compared; None when not known.
        alone_db: SQNR of the outputs when only it is quantized; None: onnxruntime refuses that model.
        without_db: SQNR when all but it are; None also where it is not measured, because the layer alone makes
            less than a hundredth of the noise of all.
        gain_db: How much better that is than with all.
        output: The output that suffers most when it alone is quantized, with the slice.
        refused: Why a variant does not run.
        causes: Why, the most expensive part of the layer first.
        remedy: What to write on the command line instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    name: str
    op_type: str
    macs_share: float | None
    alone_db: float | None
    without_db: float | None
    gain_db: float | None
    output: str
    refused: str = ""
    causes: list[Cause]
    remedy: str


class Suggestion(BaseModel):
    """Layers to leave in float together, tried."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    layers: list[str]
    macs_share: float
    sqnr_db: float
    command: str


class SensitivityReport(BaseModel):
    """The layers of a model, those that cost most first.

    Attributes:
        steps: The steps; the last is the one whose layers are compared.
        all_db: SQNR of the worst output with all layers quantized.
        sliced: Outputs whose slices differ in scale, with the axis along which they are judged one by one.
        layers: Ranked by what each costs alone.
        suggestion: What leaving a few layers in float gains, where that is worth it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    model: str
    steps: list[str]
    data: DataReport
    judged: int
    all_db: float | None
    sliced: dict[str, int]
    layers: list[LayerReport]
    suggestion: Suggestion | None

    def table(self) -> Group:
        """Return what a person wants to see."""
        table = Table(title=f"{escape(one_line(self.model))}: {escape(self.steps[-1])}", title_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("MACs", "alone dB", "all but it dB", "gain dB"):
            table.add_column(heading, justify="right")
        table.add_column("cause", overflow="fold")
        for layer in self.layers[:_SHOWN]:
            cause = "refused" if layer.refused else next((c.kind for c in layer.causes), "")
            share = "" if layer.macs_share is None else f"{layer.macs_share:.1%}"
            figures = (_decibels(layer.alone_db), _decibels(layer.without_db), _decibels(layer.gain_db))
            table.add_row(escape(f"{one_line(layer.name)} {layer.op_type}"), share, *figures, cause)
        lines: list[Any] = [table]
        if len(self.layers) > _SHOWN:
            lines.append(f"{len(self.layers) - _SHOWN} more layers cost less; --json has them")
        lines.append(f"all quantized: {_decibels(self.all_db)} dB")
        for name, axis in self.sliced.items():
            lines.append(f"output {escape(name)} mixes scales: judged slice by slice along axis {axis}")
        for layer in self.layers[:_EXPLAINED]:
            why = layer.refused or (_because(layer.causes[0]) if layer.causes else "no part of it stands out")
            lines.append(f"{escape(one_line(layer.name))}: {escape(why)}\n    {escape(layer.remedy)}")
        if self.suggestion is not None:
            found = self.suggestion
            lines.append(
                f"[green]{len(found.layers)} layers in float ({found.macs_share:.1%} of the multiply-accumulates): "
                f"{_decibels(found.sqnr_db)} dB with[/green] {escape(found.command)}"
            )
        if self.data.random:
            lines.append(
                "[yellow]measured on RANDOM data; give --data for figures that mean something[/yellow]"
            )
        return Group(*lines)


def _because(cause: Cause) -> str:
    channels = ", ".join(map(str, cause.channels[:8])) + (", ..." if len(cause.channels) > 8 else "")
    return cause.what + (f" (channels {channels})" if channels else "")


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def sensitivity(
    model: Graph,
    steps: Sequence[Pass],
    calibration: Calibration,
    *,
    samples: int = 8,
    seed: int = 0,
    memory: int = 256 << 20,
    progress: Progress = silent,
) -> SensitivityReport:
    """Measure what each layer's quantization costs.

    Every layer is quantized alone, and left out alone if that may show, and the outputs are compared with the
    original's on onnxruntime, as it runs such models. Outputs that mix scales are judged slice by slice.

    Args:
        model: The main graph of the original; it is not changed.
        steps: Steps to run; all but the last once, the last one layer by layer.
        calibration: The data, and the runner; errors are measured on its first feeds.
        samples: Feeds to measure errors on; fewer when the outputs do not fit the memory.
        seed: Seed of everything random.
        memory: Working memory in bytes.
        progress: Told how many variants are done.

    Raises:
        DataError: There are no feeds.
        ParameterError: No steps, or the last one's layers cannot be told apart.
        SessionError: The original does not run.
    """
    if not len(calibration.data):
        raise DataError("there is no data to measure on: the data set has no feeds")
    if not steps:
        raise ParameterError("sensitivity needs the step whose layers it compares, such as -p quantize")
    context = Context(seed=seed, memory=memory, calibration=calibration, original=model, progress=progress)
    base = model.copy()
    for step in steps[:-1]:
        step.run(base, context)
    last = steps[-1]
    feeds, judge = _references(model, calibration, samples, memory)
    variants = variants_of(base, last, context, feeds[0])
    total = sum(layer.macs or 0 for layer in variants.layers)
    everything, _ = _measure(variants, calibration, feeds, judge)
    reasons = _reasons(variants, base, calibration)
    reports = []
    for number, layer in enumerate(variants.layers):
        progress(number, len(variants.layers), f"without and with {layer.name} alone")
        alone, no = _measure(variants, calibration, feeds, judge, only=[layer.name])
        without, no_other = None, ""
        if alone is None or everything is None or not alone.noise < _FAINT * everything.noise:
            without, no_other = _measure(variants, calibration, feeds, judge, without=[layer.name])
        found = reasons.get(layer.name, [])
        gain = without.sqnr_db - everything.sqnr_db if without and everything else None
        reports.append(
            LayerReport(
                name=layer.name,
                op_type=layer.op_type,
                macs_share=None if layer.macs is None or not total else layer.macs / total,
                alone_db=alone.sqnr_db if alone else None,
                without_db=without.sqnr_db if without else None,
                gain_db=0.0 if gain is not None and gain != gain else gain,  # noqa: PLR0124 - inf - inf
                output=" ".join(filter(None, (alone.output, alone.where))) if alone else "",
                refused=no or no_other,
                causes=found,
                remedy=_remedy(steps, layer, found),
            )
        )
    reports.sort(key=lambda report: float("-inf") if report.alone_db is None else report.alone_db)
    return SensitivityReport(
        model=model.name or "model",
        steps=[step_text(step) for step in steps],
        data=data_report(calibration.data),
        judged=len(feeds),
        all_db=everything.sqnr_db if everything else None,
        sliced={name: axis for name in model.outputs if (axis := judge.axis(name)) is not None},
        layers=reports,
        suggestion=_suggest(variants, steps, calibration, feeds, judge, reports, everything),
    )


def _references(
    model: Graph, calibration: Calibration, samples: int, memory: int
) -> tuple[list[Feed], OutputJudge]:
    """Run the original on as many feeds as the outputs of which fit a quarter of the memory."""
    feeds: list[Feed] = []
    outputs: list[Feed] = []
    held = 0
    chosen = list(calibration.data.feeds[:samples])
    for feed, result in zip(chosen, calibration.runner.stream(model, chosen), strict=True):
        feeds.append(feed)
        outputs.append(result)
        held += sum(getattr(value, "nbytes", 0) * 2 for value in result.values())
        if held > memory // 4:
            break
    return feeds, OutputJudge(outputs)


def _measure(
    variants: Variants,
    calibration: Calibration,
    feeds: Sequence[Feed],
    judge: OutputJudge,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> tuple[ModelError | None, str]:
    """Return the error of a variant, or None and the reason why it does not run."""
    graph = variants.make(only=only, without=without)
    try:
        return judge.judge(calibration.runner.stream(graph, feeds)), ""
    except SessionError as error:
        return None, str(error)


def _reasons(variants: Variants, base: Graph, calibration: Calibration) -> dict[str, list[Cause]]:
    """Return the causes of each layer's error, from one more pass over the data."""
    if isinstance(variants, PlanVariants):
        statistics = calibration.collect(variants.plan.model, wants(variants.plan))
        return {layer.name: causes(variants.plan, layer, statistics) for layer in variants.plan.layers}
    names = {layer.name for layer in variants.layers}
    nodes = {(node.name or node.output[0]): node for node in base.nodes}
    values = {name: nodes[name].output[0] for name in names if name in nodes}
    if not values:
        return {}
    statistics = calibration.collect(base, [Want(base, value) for value in values.values()])
    found = {name: overflows(statistics.get(base, value)) for name, value in values.items()}
    return {name: [cause] for name, cause in found.items() if cause is not None}


def _remedy(steps: Sequence[Pass], layer: Named, found: Sequence[Cause]) -> str:
    """Return the command line that answers a layer's first cause; leaving it in float is the last resort."""
    last: Any = steps[-1]
    wanted = found[0].remedy if found else "exclude"
    key, equals, value = wanted.partition("=")
    if equals and key in type(last).model_fields and str(getattr(last, key)) not in (value, "auto"):
        return _command([*steps[:-1], last.model_copy(update={key: value})])
    if wanted == "equalize" and all(step.pass_name() != "equalize" for step in steps):
        return "-p equalize " + _command(steps)
    return _command([*steps[:-1], _excluding(last, [layer.name])])


def _excluding(step: Any, names: Sequence[str]) -> Pass:
    kept: Pass = step.model_copy(update={"exclude": (*step.exclude, *names)})
    return kept


def _command(steps: Sequence[Pass]) -> str:
    return " ".join(f"-p {shlex.quote(step_text(step))}" for step in steps)


def _suggest(
    variants: Variants,
    steps: Sequence[Pass],
    calibration: Calibration,
    feeds: Sequence[Feed],
    judge: OutputJudge,
    reports: Sequence[LayerReport],
    everything: ModelError | None,
) -> Suggestion | None:
    """Try the layers that cost most, up to a tenth of the multiply-accumulates, together in float."""
    names: list[str] = []
    share = 0.0
    for report in reports[: max(1, len(reports) // 2)]:
        if report.macs_share is None or share + report.macs_share > _SHARE:
            continue
        names.append(report.name)
        share += report.macs_share
    if not names:
        return None
    error, _ = _measure(variants, calibration, feeds, judge, without=names)
    if error is None or (everything is not None and error.sqnr_db < everything.sqnr_db + _GAIN):
        return None
    command = _command([*steps[:-1], _excluding(steps[-1], names)])
    return Suggestion(layers=names, macs_share=share, sqnr_db=error.sqnr_db, command=command)
