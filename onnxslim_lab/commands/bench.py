"""`bench`: latency, memory, load time and bytes of original and result on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxslim_lab.commands.shared import Data, Dims, Json, Limit, Quiet, out, print_json, progress, read_dims


def bench(
    first: Annotated[Path, typer.Argument(help="The original .onnx file.")],
    second: Annotated[Path, typer.Argument(help="The .onnx file to judge.")],
    data: Data = None,
    dim: Dims = None,
    limit: Limit = None,
    runs: Annotated[int, typer.Option(min=5, help="Timed pairs of runs.")] = 40,
    warmup: Annotated[int, typer.Option(min=1, help="Runs before, that are not timed.")] = 3,
    threads: Annotated[
        int,
        typer.Option(
            min=0, help="Threads of onnxruntime; 0 lets it choose. One by default: such figures compare."
        ),
    ] = 1,
    provider: Annotated[
        str, typer.Option(help="Execution provider of onnxruntime.")
    ] = "CPUExecutionProvider",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time two models in turn and say which is faster, or that it cannot be told.

    Each runs in a process of its own, the two in turn; the ratio of their medians has a 95 % confidence
    interval from a bootstrap over the pairs. When the result is slower, onnxruntime's profiler tells which
    operators cost it. --dim sets the batch.

    \b
    onnxslim-lab bench model.onnx small.onnx --dim batch=8
    onnxslim-lab bench model.onnx small.onnx --data calibration.npz --limit 4 --threads 4
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab.bench import bench as measure  # noqa: PLC0415 - `--help` must not wait for numpy
    from onnxslim_lab.data import load_data  # noqa: PLC0415
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inputs.probe import runnable_data  # noqa: PLC0415
    from onnxslim_lab.sessions import Runner  # noqa: PLC0415

    graph = Graph.load(first)
    if data:
        feeds = load_data(data, graph, limit=limit or 4)
    else:
        with Runner(threads=1) as runner:
            feeds = runnable_data(runner, graph, samples=1, dims=read_dims(dim))
    with progress(quiet or as_json) as show:
        found = measure(
            first,
            second,
            feeds,
            runs=runs,
            warmup=warmup,
            threads=threads,
            provider=provider,
            progress=show,
        )
    if as_json:
        print_json(found.model_dump_json(indent=2))
    elif not quiet:
        out.print(found.table())
