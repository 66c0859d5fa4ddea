"""Write the page: one template, everything inlined, nothing fetched."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from onnxslim_lab.errors import ParameterError, one_line
from onnxslim_lab.gate.result import number
from onnxslim_lab.report_page import charts
from onnxslim_lab.report_page.layers import layer_rows, noise_by_part
from onnxslim_lab.report_page.reading import Sources
from onnxslim_lab.report_page.summary import (
    before_after,
    by_urgency,
    bytes_text,
    mood_of,
    refusals_by_reason,
    verdicts,
)

if TYPE_CHECKING:
    from jinja2 import Environment

_ASSETS = files("onnxslim_lab.report_page") / "assets"
_WHOLE = 1 << 20  # characters of one text; longer ones lose their middle
_SHORT = 96  # characters shown before the rest is folded away
_SIGNS = {"good": "✓", "bad": "✗", "unsure": "?", "absent": "-"}


def render(sources: Sources) -> str:
    """Return the page as HTML.

    Text of a model stands in it escaped, control characters as escapes. plotly.js is inlined only when there
    is something to draw: about 2 MB; without a chart the page has some tens of kB.

    Raises:
        ParameterError: jinja2, or plotly where it is needed, is not installed.
    """
    figures = []
    if sources.run is not None:
        figures.append(charts.waterfall(sources.run))
    if sources.sensitivity is not None and sources.sensitivity.layers:
        figures.append(charts.heat_map(sources.sensitivity))
    if sources.bench is not None and sources.bench.first.seconds and sources.bench.second.seconds:
        figures.append(charts.latency(sources.bench))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            s=sources,
            title=_title(sources),
            verdicts=verdicts(sources),
            budgets=by_urgency(sources.gate) if sources.gate else [],
            pairs=before_after(sources),
            steps=charts.waterfall_steps(sources.run) if sources.run else [],
            outputs=_outputs(sources),
            rows=layer_rows(sources),
            noise=[(layer, noise_by_part(layer)) for layer in sources.sensitivity.layers]
            if sources.sensitivity
            else [],
            refusals=refusals_by_reason(sources.run) if sources.run else [],
            provenance=_provenance(sources),
            drawn={figure["id"] for figure in figures},
            heat_limit=charts.LAYERS,
            figures=figures,
            plotly=charts.plotly_script() if figures else "",
            style=_asset("page.css"),
            script=_asset("page.js"),
        )
    )


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined  # noqa: PLC0415 - an extra
        from markupsafe import Markup, escape  # noqa: PLC0415
    except ImportError as error:
        raise ParameterError("the report page needs jinja2: pip install 'onnxslim-lab[report]'") from error
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(_asset),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clean": lambda text: one_line(str(text), _WHOLE),
        "short": lambda text: one_line(str(text), _SHORT),
        "breakable": lambda text: Markup("/<wbr>").join(map(escape, str(text).split("/"))),
        "bytes": bytes_text,
        "figure": number,
        "mood": mood_of,
        "percent": lambda share: "" if share is None else f"{share:.1%}",
        "sign": _SIGNS.__getitem__,
    }
    return environment


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _title(sources: Sources) -> str:
    if sources.run is not None:
        return sources.run.source
    if sources.comparison is not None:
        return sources.comparison.second
    if sources.gate is not None:
        return sources.gate.candidate
    if sources.bench is not None:
        return sources.bench.second.path
    return sources.sensitivity.model if sources.sensitivity is not None else "model"


def _outputs(sources: Sources) -> list[tuple[str, Any]]:
    """Return (what was compared, output) of every comparison with the original."""
    parts = [("run", sources.run.final)] if sources.run else []
    parts += [("comparison", sources.comparison.verdict)] if sources.comparison else []
    return [(what, output) for what, verdict in parts for output in verdict.outputs]


def _provenance(sources: Sources) -> list[tuple[str, str]]:
    """Return what is known of where the figures come from."""
    found: list[tuple[str, str]] = []
    if (made := sources.provenance) is not None:
        found += [(f"made with {name}", text) for name, text in made.versions().items()]
        found += [
            ("seed", str(made.seed)),
            ("recipe", json.dumps(made.recipe, ensure_ascii=False)),
            ("SHA-256 of the source", made.source_sha256),
            ("SHA-256 of the result's weights", made.weights_sha256),
        ]
        if made.data is not None:
            kind = "random" if made.data.random else "real"
            found.append(("SHA-256 of the data", f"{made.data.sha256} ({made.data.feeds} feeds, {kind})"))
    if (run := sources.run) is not None:
        found += [("source", run.source), ("run by version", run.tool_version)]
        found.append(("steps", " ".join(f"-p {step.text}" for step in run.steps)))
        found += [("note on the data", note) for note in (run.data.notes if run.data else ())]
    if (gate := sources.gate) is not None:
        found += [
            ("gate's candidate", gate.candidate),
            ("gate's baseline", gate.baseline),
            ("SHA-256 of the baseline", gate.baseline_sha256),
            ("gate's configuration", gate.config),
            ("gate started", f"{gate.started} UTC"),
            ("gate's version", gate.tool_version),
        ]
    if (bench := sources.bench) is not None:
        place = f"{bench.machine}, {bench.provider}, {bench.threads or 'automatic'} threads"
        found += [("timed on", place), ("timed with onnxruntime", bench.onnxruntime)]
        found.append(("timed", f"{bench.pairs} pairs of {bench.block} runs, in turn"))
    return found
