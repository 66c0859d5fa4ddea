"""What commands share: option types, consoles, the progress bar, and readers of option texts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from onnxslim_lab.errors import ParameterError, SaveError, one_line, quote

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

Model = Annotated[Path, typer.Argument(help="An .onnx file; it is never changed.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Inputs to run: an .npz, a folder of .npy, a folder with test_data_set_*, "
        "or module:function. Without it random inputs are made, and every report says so."
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", help="Size of a dynamic axis for random inputs: NAME=N or INPUT:AXIS=N."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most so many samples of the data.")]
Memory = Annotated[str, typer.Option(help="Working memory, such as 512MB or 2GB.")]
Keep = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache",
        help="Keep what is measured on the data in a cache folder, for later runs to use.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of onnxruntime; 0 lets it choose.")]


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function(done, total, what) that draws a bar on a terminal and nothing elsewhere."""
    if quiet or not err.is_terminal:
        yield lambda _done, _total, _what: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415 - start-up time

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(one_line(what, 60)))

        yield show


def read_dims(texts: list[str] | None) -> dict[str, int]:
    """Return sizes by dimension from texts NAME=N.

    Raises:
        ParameterError: A text is of another form.

    >>> read_dims(["batch=8"])
    {'batch': 8}
    """
    dims = {}
    for text in texts or []:
        name, equals, size = text.rpartition("=")
        if not equals or not size.isdigit():
            raise ParameterError(f"--dim {quote(text)} must be NAME=N or INPUT:AXIS=N with a whole number N")
        dims[name] = int(size)
    return dims


def read_bytes(text: str) -> int:
    """Return bytes from text such as 512MB or 2GB (kB = 1000).

    Raises:
        ParameterError: It is not a size.

    >>> read_bytes("2 GiB")
    2147483648
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BbKkMmGgIi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ParameterError(f"{quote(text)} is not a size; write it as 512MB or 2GB") from None


def print_json(text: str) -> None:
    """Write JSON to standard output as it is."""
    sys.stdout.write(text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; raises SaveError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"cannot write {quote(str(path))}: {error.strerror}") from error
