"""`passes`: the passes and their parameters."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from onnxslim_lab.commands.shared import Json, out, print_json
from onnxslim_lab.errors import ParameterError, quote, suggest


def passes(
    name: Annotated[str | None, typer.Argument(help="A pass to explain.")] = None, as_json: Json = False
) -> None:
    """List the passes, or explain one with its parameters."""
    from onnxslim_lab import describe  # noqa: PLC0415
    from onnxslim_lab.recipe import BY_NAME  # noqa: PLC0415

    if name is not None and name not in BY_NAME:
        raise ParameterError(f"unknown pass {quote(name)}{suggest(name, BY_NAME)}")
    kinds = list(BY_NAME.values()) if name is None else [BY_NAME[name]]
    if as_json:
        print_json(json.dumps([describe.as_dict(kind) for kind in kinds], indent=2))
    elif name is None:
        out.print(describe.table(kinds))
    else:
        out.print(describe.explanation(kinds[0]))
