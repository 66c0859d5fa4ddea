"""`reproduce`: make a model again from what its provenance says, and compare the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from onnxslim_lab.commands.shared import (
    Data,
    Dims,
    Json,
    Limit,
    Quiet,
    Threads,
    out,
    print_json,
    progress,
    read_dims,
)


def reproduce(
    model: Annotated[Path, typer.Argument(help="An .onnx file that `optimize` wrote.")],
    source: Annotated[Path, typer.Option("--source", "-s", help="The .onnx file it was made from.")],
    data: Data = None,
    dim: Dims = None,
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep what was made here.")] = None,
    threads: Threads = 0,
    cache: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="Use what calibration measured in earlier runs."),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the recipe in a model's provenance again and say whether every byte is the same.

    Source, data, weights and versions are compared with those recorded first. The number of threads makes
    no difference; another kind of processor can, where steps measure activations.

    \b
    onnxslim-lab reproduce small.onnx --source model.onnx --data calibration.npz

    \b
    Exit codes:
     0  the bytes are identical
     1  they differ, with the same inputs and versions
     2  bad usage or input, or no provenance
     3  internal error
    10  source, data or the model's own weights are not those recorded: nothing was run
    11  the bytes differ, and so do versions
    """  # noqa: D301 - the help needs the real character
    from onnxslim_lab.reproduction import reproduce as run  # noqa: PLC0415 - `--help` must not wait for numpy

    with progress(quiet or as_json) as show:
        found = run(
            model,
            source,
            data=data,
            limit=limit,
            dims=read_dims(dim),
            output=output,
            threads=threads,
            cache=cache,
            progress=show,
        )
    if as_json:
        print_json(found.model_dump_json(indent=2))
    elif not quiet:
        for line in found.differences:
            out.print(escape(line))
        told = {
            "identical": "[green]identical[/green]: made again, every byte is the same",
            "different": "[red]different[/red]: same source, data and versions, other bytes",
            "other-versions": "[red]different[/red]: made with other versions",
            "other-inputs": "[red]not run[/red]: source, data or weights are not those recorded",
        }
        out.print(told[found.status])
    if found.exit_code:
        raise typer.Exit(found.exit_code)
