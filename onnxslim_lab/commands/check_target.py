"""`check-target`: what a target will not run, not fuse, or run badly."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxslim_lab.commands.shared import (
    Data,
    Dims,
    Json,
    Limit,
    Model,
    Quiet,
    out,
    print_json,
    progress,
    read_dims,
)


def check_target(
    model: Model,
    target: Annotated[
        str, typer.Option(help="The target's profile; auto is that of this machine's CPU.")
    ] = "auto",
    data: Data = None,
    dim: Dims = None,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what a target will not run, not fuse, or run slower than it could, and what to do.

    For targets whose int8 products saturate (x86 without VNNI), --data shows which layers do and how
    often, computed with exact integers.

    \b
    onnxslim-lab check-target int8.onnx --target tensorrt
    onnxslim-lab check-target int8.onnx --target onnxruntime-x86 --data calibration.npz
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab.data import load_data  # noqa: PLC0415 - `--help` must not wait for numpy
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inputs.random_data import random_data  # noqa: PLC0415
    from onnxslim_lab.profiles import find_profile  # noqa: PLC0415
    from onnxslim_lab.target_check import target_report  # noqa: PLC0415

    profile = find_profile(target)
    graph = Graph.load(model)
    feeds = None
    if data:
        feeds = load_data(data, graph, limit=limit)
    elif dim:
        feeds = random_data(graph, limit or 2, 0, read_dims(dim))
    with progress(quiet or as_json) as show:
        found = target_report(graph, profile, feeds, progress=show)
    if as_json:
        print_json(found.model_dump_json(indent=2))
    elif not quiet:
        out.print(found.table())
    if not found.runs:
        raise typer.Exit(1)
