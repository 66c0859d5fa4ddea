"""`recipe init|check|schema`: write, check and describe recipe files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from onnxslim_lab.commands.shared import out, print_json, write_text
from onnxslim_lab.errors import SaveError, quote

recipe_app = typer.Typer(help="Write, check and describe recipe files.", no_args_is_help=True)


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    from onnxslim_lab.recipe import json_schema  # noqa: PLC0415

    print_json(json.dumps(json_schema(), indent=2))


@recipe_app.command("init")
def recipe_init(
    output: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe to start from, every key explained."""
    from onnxslim_lab.describe import example_recipe  # noqa: PLC0415

    if output.exists() and not force:
        raise SaveError(f"{quote(str(output))} exists; --force replaces it")
    write_text(output, example_recipe())
    out.print(f"wrote {escape(str(output))}")


@recipe_app.command("check")
def recipe_check(recipe: Annotated[Path, typer.Argument(help="The recipe file.")]) -> None:
    """Check a recipe file without running it, and show its steps."""
    from onnxslim_lab.recipe import Recipe, step_text  # noqa: PLC0415

    for step in Recipe.load(recipe).steps:
        out.print(escape(step_text(step)))
