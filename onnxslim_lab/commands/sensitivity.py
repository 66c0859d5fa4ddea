"""`sensitivity`: what each layer's quantization costs, why, and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from onnxslim_lab.commands.shared import (
    Data,
    Dims,
    Json,
    Keep,
    Limit,
    Memory,
    Model,
    Quiet,
    Threads,
    err,
    out,
    print_json,
    progress,
    read_bytes,
    read_dims,
)


def sensitivity(
    model: Model,
    steps: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            "-p",
            help="The step to explain, NAME or NAME:KEY=VALUE,...; steps before it run first. Default: quantize.",
        ),
    ] = None,
    data: Data = None,
    dim: Dims = None,
    limit: Limit = None,
    samples: Annotated[int, typer.Option(min=1, help="Feeds that errors are measured on.")] = 8,
    threads: Threads = 0,
    memory: Memory = "1GiB",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    cache: Keep = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Rank layers by what quantizing each of them costs the outputs, with the cause and a remedy.

    Every layer is quantized alone, and left out alone. Outputs that mix scales (boxes and scores) are judged
    slice by slice. Each remedy is a --pass line to use in `optimize`.

    \b
    onnxslim-lab sensitivity model.onnx --data calibration.npz
    onnxslim-lab sensitivity model.onnx --data calibration.npz -p equalize -p quantize:ranges=mse --json
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab.data import load_data  # noqa: PLC0415 - `--help` must not wait for numpy
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inputs.probe import runnable_data  # noqa: PLC0415
    from onnxslim_lab.quantization.sensitivity import sensitivity as measure  # noqa: PLC0415
    from onnxslim_lab.recipe import parse_step  # noqa: PLC0415
    from onnxslim_lab.sessions import Runner  # noqa: PLC0415
    from onnxslim_lab.statistics import Calibration, default_folder  # noqa: PLC0415

    budget = max(64 << 20, read_bytes(memory))
    parsed = [parse_step(step) for step in steps or ["quantize"]]
    graph = Graph.load(model, memory=budget // 4)
    feeds = load_data(data, graph, limit=limit) if data else None
    with progress(quiet or as_json) as show, Runner(threads=threads, memory=budget) as runner:
        if feeds is None:
            feeds = runnable_data(runner, graph, samples=limit or 8, seed=seed, dims=read_dims(dim))
        notices: list[str] = []
        folder = default_folder() if cache else None
        calibration = Calibration(
            runner, feeds, memory=budget // 2, cache=folder, progress=show, notices=notices
        )
        found = measure(
            graph, parsed, calibration, samples=samples, seed=seed, memory=budget // 4, progress=show
        )
    if not quiet:
        for notice in notices:
            err.print(f"note: {escape(notice)}")
    if as_json:
        print_json(found.model_dump_json(indent=2))
    elif not quiet:
        out.print(found.table())
