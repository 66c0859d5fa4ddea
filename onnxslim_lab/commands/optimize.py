"""`optimize`: run passes over a model, verify each, save the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from onnxslim_lab.commands.shared import (
    Data,
    Dims,
    Json,
    Keep,
    Model,
    Quiet,
    Threads,
    out,
    print_json,
    progress,
    read_bytes,
    read_dims,
    write_text,
)
from onnxslim_lab.errors import ParameterError, SaveError, quote


def optimize(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to save the result. Required but for --dry-run."),
    ] = None,
    steps: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", "-p", help="A pass to run, NAME or NAME:KEY=VALUE,...; may be repeated. See `passes`."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with the passes. See `recipe`.")] = None,
    data: Data = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Data with labels for the metrics; the same forms as --data.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="agreement, top1, top5, NAME@OUTPUT or module:function; may be repeated."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    dim: Dims = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many samples of the data.")] = None,
    verify: Annotated[
        Literal["each", "end", "off"] | None,
        typer.Option(help="Compare outputs after each step, at the end, or not. Default: each."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Working memory, such as 512MB. Default: 1 GiB.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random. Default: 0.")] = None,
    threads: Threads = 0,
    external: Annotated[
        bool | None,
        typer.Option(
            "--external/--embed", help="Weights in a file of their own, or inside. Default: as needed."
        ),
    ] = None,
    allow_opset_raise: Annotated[
        bool, typer.Option("--allow-opset-raise", help="Let passes raise the model's opset.")
    ] = False,
    allow_growth: Annotated[
        bool, typer.Option("--allow-growth", help="Save even if the result is larger than the source.")
    ] = False,
    provenance: Annotated[
        bool | None,
        typer.Option(
            "--provenance/--no-provenance",
            help="Say in the file's metadata how it was made (see `reproduce`). Default: unless all "
            "passes are exact and it alone would make the file larger than its source.",
        ),
    ] = None,
    cache: Keep = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but save.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run passes over a model, verify each, and save a smaller plain .onnx.

    Without --pass or --recipe it runs `simplify` and `encode`, which lose nothing.

    \b
    onnxslim-lab optimize model.onnx -o small.onnx
    onnxslim-lab optimize model.onnx -o small.onnx -p simplify -p prune:sparsity=0.8 -p share:bits=4 -p encode
    onnxslim-lab optimize model.onnx --recipe recipe.yaml --data calibration.npz --eval test.npz --metric top1 -o small.onnx
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab import engine  # noqa: PLC0415 - `--help` must not wait for numpy and scikit-learn
    from onnxslim_lab.data import load_data  # noqa: PLC0415
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inputs.probe import runnable_data  # noqa: PLC0415
    from onnxslim_lab.recipe import Recipe  # noqa: PLC0415
    from onnxslim_lab.sessions import Runner  # noqa: PLC0415

    if output is None and not dry_run:
        raise ParameterError("give -o OUT, or --dry-run to save nothing")
    if recipe is not None and steps:
        raise ParameterError("give --pass or --recipe, not both")
    plan = Recipe.of(steps or engine.DEFAULT_STEPS) if recipe is None else Recipe.load(recipe)
    changed: dict[str, object] = {
        "verify": verify,
        "seed": seed,
        "allow_opset_raise": allow_opset_raise or None,
    }
    if memory is not None:
        changed["memory"] = max(1 << 20, read_bytes(memory))
    plan = plan.model_copy(update={key: value for key, value in changed.items() if value is not None})
    if report is not None and not report.parent.is_dir():
        raise SaveError(f"cannot write the report {quote(str(report))}: no such folder")
    graph = Graph.load(model, memory=plan.memory // 4)
    feeds = load_data(data, graph, limit=limit) if data else None
    judged = load_data(evaluation, graph, limit=limit) if evaluation else None
    with progress(quiet) as show, Runner(threads=threads, memory=plan.memory) as runner:
        if feeds is None and plan.verify != "off" and dim:
            feeds = runnable_data(runner, graph, samples=2, seed=plan.seed, dims=read_dims(dim))
        result = engine.optimize(
            graph,
            None if dry_run else output,
            recipe=plan,
            data=feeds,
            evaluation=judged,
            metrics=metric or (),
            runner=runner,
            external=external,
            allow_growth=allow_growth,
            provenance=provenance,
            cache=cache,
            progress=show,
        )
    if report is not None:
        write_text(report, result.report.to_json() + "\n")
    if as_json:
        print_json(result.report.to_json())
    elif not quiet:
        out.print(result.report.table())
        if result.files is not None:
            out.print(f"saved {escape(', '.join(str(path) for path in result.files.paths))}")
        else:
            out.print("dry run: nothing was saved")
