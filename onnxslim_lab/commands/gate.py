"""`gate`: may a candidate ship? Budgets, verdicts, outputs for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from onnxslim_lab.commands.shared import (
    Data,
    Dims,
    Json,
    Limit,
    Quiet,
    Threads,
    err,
    out,
    print_json,
    progress,
    read_dims,
)
from onnxslim_lab.errors import ParameterError, SaveError, quote, suggest

_FORMATS = ("json", "junit", "sarif", "github", "summary", "gitlab")


def _print(name: str, *, wanted: bool) -> None:
    """Print what a function of `onnxslim_lab.gate.example` returns, and end the command."""
    if wanted:
        from onnxslim_lab.gate import example  # noqa: PLC0415 - `--help` must not wait for numpy

        print_json(getattr(example, name)().removesuffix("\n"))
        raise typer.Exit


def gate(
    candidate: Annotated[Path, typer.Argument(help="The .onnx file that is to ship.")],
    baseline: Annotated[Path, typer.Option("--baseline", "-b", help="The .onnx file it replaces.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="Budgets: YAML, TOML, or pyproject.toml with [tool.onnxslim_lab.gate]. "
            "Default: gate.yaml here, else pyproject.toml.",
        ),
    ] = None,
    data: Data = None,
    dim: Dims = None,
    limit: Limit = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="FORMAT=FILE, may be repeated; - is standard output. Formats: json, junit, sarif, github "
            "(annotations), summary (Markdown), gitlab (code quality).",
        ),
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(min=0.5, max=0.9999, help="Of each one-sided bound. Default: 0.95.")
    ] = None,
    minimum_samples: Annotated[
        int | None, typer.Option(min=1, help="Fewer samples decide nothing statistical. Default: 30.")
    ] = None,
    undecided: Annotated[
        Literal["failure", "warning"] | None, typer.Option(help="What an undecided budget counts as.")
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(help="What was measured before. Default: onnxslim-lab.lock beside the configuration."),
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Write the lock file with what is measured now.")
    ] = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    _example: Annotated[
        bool,
        typer.Option(
            "--example",
            is_eager=True,
            callback=lambda value: _print("example_config", wanted=value),
            help="Print a gate.yaml with every budget explained, and exit.",
        ),
    ] = False,
    _schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            is_eager=True,
            callback=lambda value: _print("schema", wanted=value),
            help="Print the JSON schema of gate.yaml, and exit.",
        ),
    ] = False,
) -> None:
    """Judge a candidate against its baseline by budgets: pass, fail or undecided, with the cause.

    Statistical budgets are accepted by a one-sided confidence bound on paired samples, so that noise or
    too little data never passes; it says how many more samples would decide.

    \b
    onnxslim-lab gate --example > gate.yaml
    onnxslim-lab gate small.onnx --baseline model.onnx --config gate.yaml --data test.npz
    onnxslim-lab gate small.onnx -b model.onnx -o junit=gate.xml -o sarif=gate.sarif -o github=-

    \b
    Exit codes, of several causes the first in this list:
     0  every budget passed
     2  bad usage or input: no verdict
     3  internal error: no verdict
    10  the candidate does not load or run
    11  inputs, outputs or open dimensions changed
    12  NaN or Inf, or the two engines disagree
    13  metrics, agreement or output error
    14  operators, domains, opset, types or the target's profile
    15  file, transfer, parameters or multiply-accumulates
    16  latency, memory or load time
    17  too little is quantized or pruned
    18  provenance, or random data
    19  a figure left what the lock file holds
    20  undecided, where that counts as failure
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab.gate.config import GateConfig, find_config  # noqa: PLC0415 - `--help` must not wait for numpy
    from onnxslim_lab.gate.lock import NAME, Lock  # noqa: PLC0415
    from onnxslim_lab.gate.outputs import FORMATS  # noqa: PLC0415
    from onnxslim_lab.gate.outputs.table import table  # noqa: PLC0415
    from onnxslim_lab.gate.run import run_gate  # noqa: PLC0415
    from onnxslim_lab.gate.writing import write_atomic  # noqa: PLC0415
    from onnxslim_lab.sessions import Runner  # noqa: PLC0415

    targets = [_target(text) for text in output or []]
    path = config or find_config(Path())
    if path is None:
        raise ParameterError(
            "give --config FILE, or put gate.yaml or [tool.onnxslim_lab.gate] of pyproject.toml here"
        )
    changed = {"confidence": confidence, "minimum_samples": minimum_samples, "undecided": undecided}
    budgets = GateConfig.load(path).model_copy(
        update={key: value for key, value in changed.items() if value is not None}
    )
    place = lock or path.parent / NAME
    held = Lock.load(place) if not update_baseline and (lock is not None or place.exists()) else None
    with progress(quiet or as_json) as show, Runner(threads=threads) as runner:
        report = run_gate(
            candidate,
            baseline,
            budgets,
            config_name=str(path),
            data=data,
            dims=read_dims(dim),
            limit=limit,
            lock=held,
            runner=runner,
            progress=show,
        )
    printed = False
    for name, file in targets:
        text = FORMATS[name](report)
        if file is None:
            print_json(text.removesuffix("\n"))
            printed = True
        else:
            write_atomic(file, text)
    if as_json:
        print_json(report.to_json())
    elif not quiet and not printed:
        out.print(table(report))
    if update_baseline and report.of("fail"):
        err.print("[yellow]the lock file was not written: a budget failed[/yellow]", soft_wrap=True)
    elif update_baseline:
        Lock.of(report).save(place)
        if not quiet and not as_json and not printed:
            out.print(f"wrote {place}", markup=False)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _target(text: str) -> tuple[str, Path | None]:
    """Return format and file of an --output; the file is None for standard output."""
    name, equals, file = text.partition("=")
    if name not in _FORMATS:
        raise ParameterError(f"--output {quote(text)}: no format {quote(name)}{suggest(name, _FORMATS)}")
    if not equals or not file:
        raise ParameterError(f"--output {quote(text)} must be FORMAT=FILE, or FORMAT=- for standard output")
    path = None if file == "-" else Path(file)
    if path is not None and not path.parent.is_dir():
        raise SaveError(f"cannot write {quote(file)}: no such folder")
    return name, path
