"""What all formats share: texts from models made harmless, and paths as URIs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

from onnxslim_lab.errors import one_line
from onnxslim_lab.gate.result import BudgetResult, GateReport

_LONGEST = 2000  # characters of a cause


def line(text: str, limit: int = _LONGEST) -> str:
    r"""Return text on one line without control characters, cut in the middle when it is long.

    >>> line("a\nb")
    'a\\nb'
    """
    return one_line(text, limit)


def headline(item: BudgetResult) -> str:
    """Return a verdict's title: the budget and what became of it."""
    return line(f"{item.budget}: {item.status}", 200)


def relative_path(path: str) -> str:
    """Return a path relative to the working folder, with forward slashes; as it is when it lies elsewhere."""
    place = Path(path)
    try:
        return place.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return place.as_posix()


def uri(path: str) -> str:
    """Return a path as a URI reference, relative where it can be.

    >>> uri("a b/ä.onnx")
    'a%20b/%C3%A4.onnx'
    """
    return quote(relative_path(path), safe="/")


def fingerprint(report: GateReport, item: BudgetResult) -> str:
    """Return what stays the same for the same budget on the same file, whatever is measured."""
    text = f"{relative_path(report.candidate)}\0{item.budget}"
    return hashlib.sha256(text.encode()).hexdigest()
