"""`compare`: the outputs of two models, and where they part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxslim_lab.commands.shared import (
    Data,
    Dims,
    Json,
    Quiet,
    Threads,
    out,
    print_json,
    progress,
    read_dims,
)


def compare(
    first: Annotated[Path, typer.Argument(help="The reference .onnx file.")],
    second: Annotated[Path, typer.Argument(help="The .onnx file to judge.")],
    data: Data = None,
    dim: Dims = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many samples of the data.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest relative difference. Default: 1e-4, or three times the difference between "
            "onnxruntime's own optimization levels where that is larger.",
        ),
    ] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare the outputs of two models, and find the first value from which they differ."""
    from onnxslim_lab.compare import compare as compare_graphs  # noqa: PLC0415
    from onnxslim_lab.data import load_data  # noqa: PLC0415
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inputs.probe import runnable_data  # noqa: PLC0415
    from onnxslim_lab.sessions import Runner  # noqa: PLC0415

    left, right = Graph.load(first), Graph.load(second)
    feeds = load_data(data, left, limit=limit) if data else None
    with progress(quiet) as show, Runner(threads=threads) as runner:
        if feeds is None:
            feeds = runnable_data(runner, left, samples=4, dims=read_dims(dim))
        found = compare_graphs(left, right, feeds, runner, tolerance=tolerance, progress=show)
    if as_json:
        print_json(found.model_dump_json(indent=2))
    elif not quiet:
        out.print(found.table())
    if found.verdict.status != "passed":
        raise typer.Exit(1)
