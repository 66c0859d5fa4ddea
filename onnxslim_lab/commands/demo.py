"""`demo`: the main job on an embedded default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxslim_lab.commands.shared import Quiet, out, progress


def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Keep the two models here; by default they are thrown away.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a small classifier on scikit-learn's digits, compress it, and check its accuracy. No network."""
    from onnxslim_lab.demo import run  # noqa: PLC0415

    with progress(quiet) as show:
        found = run(folder, show)
    if not quiet:
        out.print(found.table())
    if not found.passed:
        raise typer.Exit(1)
