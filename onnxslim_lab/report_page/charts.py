"""Charts as plotly figures: plain dictionaries, colours by role (the page's script fills them in)."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from os.path import commonprefix
from typing import Any

from onnxslim_lab.bench_report import BenchReport
from onnxslim_lab.errors import ParameterError, one_line
from onnxslim_lab.quantization.sensitivity import SensitivityReport
from onnxslim_lab.report import Report
from onnxslim_lab.report_page.layers import noise_by_part

Figure = dict[str, Any]

LAYERS = 40
"""Layers in the heat map; the table has all."""
_LABEL = 22  # characters at an axis, so that a phone has room for the chart
_PARTS = {"model": "model's outputs", "input": "its input", "weight": "its weights", "output": "its output"}


def label(text: str, limit: int = _LABEL) -> str:
    """Return text that plotly shows as it is: plotly reads tags and entities in labels.

    >>> label("<b>conv & co</b>")
    '&lt;b&gt;conv &amp; co&lt;/b&gt;'
    """
    short = one_line(text, limit)
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def told_apart(names: list[str]) -> list[str]:
    """Return names without the folders that all begin and end with, where some are too long for an axis.

    >>> told_apart(["/model/features/block0/conv/Conv", "/model/features/block1/conv/Conv"])
    ['...block0...', '...block1...']
    """
    if len(set(names)) < 2 or max(map(len, names)) <= _LABEL:
        return names
    head = commonprefix(names)  # noqa: RUF071 - any text, cut at a separator below
    start = max(head.rfind("/"), head.rfind(".")) + 1
    tail = commonprefix([name[start:][::-1] for name in names])  # noqa: RUF071
    end = max(tail.rfind("/"), tail.rfind(".")) + 1
    return [
        ("..." if start else "") + name[start : len(name) - end] + ("..." if end else "") for name in names
    ]


def waterfall_steps(run: Report) -> list[tuple[str, int]]:
    """Return what each step added to the file's bytes; what saving added comes last, where it did."""
    steps = [(step.name, step.bytes_after - step.bytes_before) for step in run.steps]
    rest = run.bytes_after - run.bytes_before - sum(delta for _, delta in steps)
    return [*steps, ("saving", rest)] if rest else steps


def waterfall(run: Report) -> Figure:
    """Return bytes from the original over each step to the result."""
    steps = waterfall_steps(run)
    names = ["original", *(name for name, _ in steps), "result"]
    values = [run.bytes_before, *(delta for _, delta in steps), run.bytes_after]
    totals, total = [], run.bytes_before
    for index, value in enumerate(values):
        total += value if 0 < index < len(values) - 1 else 0
        totals.append(total)
    trace = {
        "type": "waterfall",
        "orientation": "h",
        "y": list(range(len(names))),
        "x": values,
        "measure": ["absolute", *("relative" for _ in steps), "total"],
        "text": [f"{value:+,}" if 0 < i < len(names) - 1 else f"{value:,}" for i, value in enumerate(values)],
        "hovertext": [f"{label(n, 60)}: then {t:,} bytes" for n, t in zip(names, totals, strict=True)],
        "hoverinfo": "text",
        "textposition": "none",
        "decreasing": {"marker": {"color": "good"}},
        "increasing": {"marker": {"color": "bad"}},
        "totals": {"marker": {"color": "accent"}},
        "connector": {"line": {"color": "line", "width": 1}},
    }
    axis = _labels([f"{i} {name}" if 0 < i < len(names) - 1 else name for i, name in enumerate(names)])
    return _figure("waterfall", [trace], height=90 + 34 * len(names), x="bytes", yaxis=axis, tickformat="~s")


def heat_map(report: SensitivityReport) -> Figure:
    """Return the noise that quantizing each layer alone makes, for the layers that cost most."""
    layers = report.layers[:LAYERS]
    noise = [noise_by_part(layer) for layer in layers]
    values = [[row[part] for part in _PARTS] for row in noise]
    trace = {
        "type": "heatmap",
        "x": list(range(len(_PARTS))),
        "y": list(range(len(layers))),
        "z": values,
        "text": [["" if v is None else f"{v:.0f}" for v in row] for row in values],
        "texttemplate": "%{text}",
        "hovertext": [
            [
                f"{label(layer.name, 60)}, {what}: " + ("not measured" if v is None else f"{v:.1f} dB")
                for v, what in zip(row, _PARTS.values(), strict=True)
            ]
            for layer, row in zip(layers, values, strict=True)
        ],
        "hoverinfo": "text",
        "colorscale": "Cividis",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "title": {"text": "dB", "side": "top"},
            "orientation": "h",
            "thickness": 10,
            "thicknessmode": "pixels",
            "y": 0,
            "yanchor": "top",
        },
    }
    figure = _figure(
        "heat-map",
        [trace],
        height=150 + 26 * len(layers),
        yaxis=_labels(told_apart([layer.name for layer in layers])),
    )
    columns = ["outputs", "input", "weight", "output"]
    figure["layout"]["xaxis"] |= {
        "tickvals": list(range(len(columns))),
        "ticktext": columns,
        "side": "top",
        "showgrid": False,
    }
    return figure


def latency(bench: BenchReport) -> Figure:
    """Return the latency of each timed run of original and result."""
    traces = [
        {
            "type": "box",
            "name": name,
            "x": [seconds * 1e3 for seconds in times.seconds],
            "boxpoints": "all",
            "jitter": 0.6,
            "pointpos": 0,
            "marker": {"color": colour, "size": 4},
            "line": {"width": 1.5},
            "showlegend": False,
        }
        for name, times, colour in (("result", bench.second, "good"), ("original", bench.first, "accent"))
    ]
    return _figure("latency-chart", traces, height=240, x="ms for one run", yaxis={})


@cache
def plotly_script() -> str:
    """Return plotly.js, compressed (gzip) and as base64: 1.9 MB of text instead of 4.8.

    Raises:
        ParameterError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415 - slow, and an extra
    except ImportError as error:
        raise ParameterError("the report page needs plotly: pip install 'onnxslim-lab[report]'") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _labels(names: list[str]) -> Figure:
    """Return an axis of rows from top to bottom; rows are numbers, so that equal labels stay two rows."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [label(name) for name in names],
        "autorange": "reversed",
        "showgrid": False,
        "zeroline": False,
    }


def _figure(
    name: str, traces: list[Figure], *, height: int, yaxis: Figure, x: str = "", tickformat: str = ""
) -> Figure:
    return {
        "id": name,
        "data": traces,
        "layout": {
            "height": height,
            "margin": {"l": 10, "r": 10, "t": 30, "b": 50},
            "xaxis": {"title": {"text": x}, "tickformat": tickformat, "zeroline": False, "automargin": True},
            "yaxis": {"automargin": True, **yaxis},
            "showlegend": False,
            "dragmode": False,
        },
    }
