"""The command line: `python -m onnxslim_lab` and `onnxslim-lab`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from onnxslim_lab.errors import InternalError, LabError, ParameterError, SaveError, one_line, quote, suggest

app = typer.Typer(
    name="onnxslim-lab",
    help="Make an exported ONNX model smaller and faster without making it worse, and prove it.",
    epilog="Exit codes: 0 ok, 1 a verdict failed, 2 bad usage or input, 3 internal error.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
recipe_app = typer.Typer(help="Write, check and describe recipe files.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

_out = Console(soft_wrap=True, highlight=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False)

Model = Annotated[Path, typer.Argument(help="An .onnx file; it is never changed.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Inputs to compare outputs on: an .npz, a folder of .npy, a folder with test_data_set_*, "
        "or module:function. Without it random inputs are made, and every report says so."
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", help="Size of a dynamic axis for random inputs: NAME=N or INPUT:AXIS=N."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of onnxruntime; 0 lets it choose.")]


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function(done, total, what) that draws a bar on a terminal and nothing elsewhere."""
    if quiet or not _err.is_terminal:
        yield lambda _done, _total, _what: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415 - start-up time

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(one_line(what, 60)))

        yield show


def _dims(texts: list[str] | None) -> dict[str, int]:
    dims = {}
    for text in texts or []:
        name, equals, size = text.rpartition("=")
        if not equals or not size.isdigit():
            raise ParameterError(f"--dim {quote(text)} must be NAME=N or INPUT:AXIS=N with a whole number N")
        dims[name] = int(size)
    return dims


def _bytes(text: str) -> int:
    """Return bytes from text such as 512MB or 2GB (kB = 1000)."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ParameterError(f"{quote(text)} is not a size; write it as 512MB or 2GB") from None


@app.command()
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but save.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    r"""Run passes over a model, verify each, and save a smaller plain .onnx.

    Without --pass or --recipe it runs `simplify` and `encode`, which lose nothing.

    \b
    onnxslim-lab optimize model.onnx -o small.onnx
    onnxslim-lab optimize model.onnx -o small.onnx -p simplify -p prune:sparsity=0.8 -p share:bits=4 -p encode
    onnxslim-lab optimize model.onnx --recipe recipe.yaml --data calibration.npz --eval test.npz --metric top1 -o small.onnx
    """
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
        changed["memory"] = max(1 << 20, _bytes(memory))
    plan = plan.model_copy(update={key: value for key, value in changed.items() if value is not None})
    if report is not None and not report.parent.is_dir():
        raise SaveError(f"cannot write the report {quote(str(report))}: no such folder")
    graph = Graph.load(model, memory=plan.memory // 4)
    feeds = load_data(data, graph, limit=limit) if data else None
    judged = load_data(evaluation, graph, limit=limit) if evaluation else None
    with _progress(quiet) as show, Runner(threads=threads, memory=plan.memory) as runner:
        if feeds is None and plan.verify != "off" and dim:
            feeds = runnable_data(runner, graph, samples=2, seed=plan.seed, dims=_dims(dim))
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
            progress=show,
        )
    if report is not None:
        _write_text(report, result.report.to_json() + "\n")
    if as_json:
        _print_json(result.report.to_json())
    elif not quiet:
        _out.print(result.report.table())
        if result.files is not None:
            _out.print(f"saved {escape(', '.join(str(path) for path in result.files.paths))}")
        else:
            _out.print("dry run: nothing was saved")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot write {quote(str(path))}: {error.strerror}") from error


def _print_json(text: str) -> None:
    sys.stdout.write(text + "\n")


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show what is in a model: operators, parameters, multiply-accumulates, bytes, dynamic axes, warnings."""
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.inspection import inspect as inspect_graph  # noqa: PLC0415

    with _progress(as_json) as show:
        found = inspect_graph(Graph.load(model), show)
    if as_json:
        _print_json(found.model_dump_json(indent=2))
    else:
        _out.print(found.table())


@app.command()
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
    with _progress(quiet) as show, Runner(threads=threads) as runner:
        if feeds is None:
            feeds = runnable_data(runner, left, samples=4, dims=_dims(dim))
        found = compare_graphs(left, right, feeds, runner, tolerance=tolerance, progress=show)
    if as_json:
        _print_json(found.model_dump_json(indent=2))
    elif not quiet:
        _out.print(found.table())
    if found.verdict.status != "passed":
        raise typer.Exit(1)


@app.command()
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
        _print_json(json.dumps([describe.as_dict(kind) for kind in kinds], indent=2))
    elif name is None:
        _out.print(describe.table(kinds))
    else:
        _out.print(describe.explanation(kinds[0]))


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipe files, for editors."""
    from onnxslim_lab.recipe import json_schema  # noqa: PLC0415

    _print_json(json.dumps(json_schema(), indent=2))


@recipe_app.command("init")
def recipe_init(
    output: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe to start from, every key explained."""
    from onnxslim_lab.describe import example_recipe  # noqa: PLC0415

    if output.exists() and not force:
        raise SaveError(f"{quote(str(output))} exists; --force replaces it")
    _write_text(output, example_recipe())
    _out.print(f"wrote {escape(str(output))}")


@recipe_app.command("check")
def recipe_check(recipe: Annotated[Path, typer.Argument(help="The recipe file.")]) -> None:
    """Check a recipe file without running it, and show its steps."""
    from onnxslim_lab.recipe import Recipe, step_text  # noqa: PLC0415

    for step in Recipe.load(recipe).steps:
        _out.print(escape(step_text(step)))


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option(help="Keep the two models here; by default they are thrown away.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train a small classifier on scikit-learn's digits, compress it, and check its accuracy. No network."""
    from onnxslim_lab.demo import run  # noqa: PLC0415

    with _progress(quiet) as show:
        found = run(folder, show)
    if not quiet:
        _out.print(found.table())
    if not found.passed:
        raise typer.Exit(1)


def _version(asked: bool) -> None:
    if asked:
        from onnxslim_lab.engine import tool_version  # noqa: PLC0415

        _out.print(tool_version())
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
    _err.print(f"[red]error:[/red] {escape(str(error))}")
    sys.exit(code)
