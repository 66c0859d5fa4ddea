"""The command line: `python -m onnxslim_lab` and `onnxslim-lab`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer
from rich.markup import escape

from onnxslim_lab.commands.bench import bench
from onnxslim_lab.commands.check_target import check_target
from onnxslim_lab.commands.compare import compare
from onnxslim_lab.commands.demo import demo
from onnxslim_lab.commands.gate import gate
from onnxslim_lab.commands.inspect import inspect
from onnxslim_lab.commands.optimize import optimize
from onnxslim_lab.commands.passes import passes
from onnxslim_lab.commands.recipe import recipe_app
from onnxslim_lab.commands.report import report
from onnxslim_lab.commands.reproduce import reproduce
from onnxslim_lab.commands.sensitivity import sensitivity
from onnxslim_lab.commands.shared import err, out
from onnxslim_lab.errors import InternalError, LabError

app = typer.Typer(
    name="onnxslim-lab",
    help="Make an exported ONNX model smaller and faster without making it worse, and prove it.",
    epilog="Exit codes: 0 ok, 1 a verdict failed, 2 bad usage or input, 3 internal error; `gate` and `reproduce` have more, see their --help.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command in (
    optimize,
    inspect,
    compare,
    sensitivity,
    bench,
    check_target,
    gate,
    report,
    reproduce,
    passes,
    demo,
):
    app.command()(_command)
app.add_typer(recipe_app, name="recipe")


def _version(asked: bool) -> None:
    if asked:
        from onnxslim_lab.engine import tool_version  # noqa: PLC0415

        out.print(tool_version())
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
    _version_asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set what all commands share."""
    if debug:
        os.environ["ONNXSLIM_LAB_DEBUG"] = "1"


def main() -> None:
    """Run the command line; every error is one line and an exit code."""
    try:
        app()
    except LabError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail(LabError("interrupted; nothing was saved"), 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except MemoryError as error:
        _fail(LabError(f"out of memory: {error}" if str(error) else "out of memory"), 2)
    except Exception as error:  # noqa: BLE001 - a defect of ours still gets one line
        wrapped = InternalError(f"{type(error).__name__}: {error}; run with --debug and report it")
        wrapped.__cause__ = error
        _fail(wrapped, InternalError.exit_code)


def _fail(error: LabError, code: int) -> None:
    if os.environ.get("ONNXSLIM_LAB_DEBUG"):
        traceback.print_exception(error)
    err.print(f"[red]error:[/red] {escape(str(error))}")
    sys.exit(code)
