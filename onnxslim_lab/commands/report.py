"""`report`: what a run did and whether it may ship, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxslim_lab.commands.shared import Quiet, out
from onnxslim_lab.errors import SaveError, quote


def report(
    run: Annotated[
        Path, typer.Argument(help="JSON of optimize --report, or of gate, compare, bench, sensitivity.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")],
    gate: Annotated[Path | None, typer.Option(help="JSON of gate --output json=FILE.")] = None,
    bench: Annotated[Path | None, typer.Option(help="JSON of bench --json.")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="JSON of sensitivity --json.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The result as .onnx, for the provenance in its metadata.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file with verdicts, bytes per step, layers, refusals and provenance.

    It needs no network: everything is inside. With a chart it takes about 2 MB, for plotly.js, compressed.
    What was not measured says so. Needs `pip install 'onnxslim-lab[report]'`.

    \b
    onnxslim-lab report run.json -o report.html
    onnxslim-lab report run.json --gate gate.json --bench bench.json --model small.onnx -o report.html
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab.gate.writing import write_atomic  # noqa: PLC0415 - `--help` must not wait for numpy
    from onnxslim_lab.report_page import read_sources, render  # noqa: PLC0415

    if not output.parent.is_dir():
        raise SaveError(f"cannot write {quote(str(output))}: no such folder")
    sources = read_sources(run, gate=gate, bench=bench, sensitivity=sensitivity, model=model)
    write_atomic(output, render(sources))
    if not quiet:
        out.print(f"wrote {output}", markup=False)
