"""Errors: one line each, saying what, where, the rule, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_QUOTE = 120


class LabError(Exception):
    """Base of every error this package raises on purpose.

    `exit_code` is what the command line returns: 1 a verdict failed, 2 bad usage or bad input,
    3 internal.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, limit=2000))


class ModelError(LabError):
    """The model cannot be read, is not valid ONNX, or asks for more than is allowed."""


class ExternalDataError(ModelError):
    """External data of a tensor is unsafe, missing or of the wrong size."""


class ParameterError(LabError):
    """A pass, parameter, pattern, metric or option does not exist or has a bad value."""


class RecipeError(ParameterError):
    """A recipe file cannot be used."""


class DataError(LabError):
    """Calibration or evaluation data does not fit the model."""


class SaveError(LabError):
    """The result could not be written; what was there before is intact."""


class SessionError(LabError):
    """onnxruntime refused the model or ended its process."""


class UnsupportedError(LabError):
    """The NumPy runtime has no kernel for an operator of the model; nothing was run."""


class RunError(LabError):
    """A node could not be computed by the NumPy runtime: its inputs do not fit each other or the operator."""


class VerificationError(LabError):
    """The result is not what was promised: outputs differ, or the file grew."""

    exit_code = 1


class InternalError(LabError):
    """A defect of this package."""

    exit_code = 3


def one_line(text: str, limit: int = LONGEST_QUOTE) -> str:
    r"""Return text printable on one line: control characters escaped, the middle cut out past `limit`.

    >>> one_line("a\nb")
    'a\\nb'
    """
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(safe) <= limit:
        return safe
    half = (limit - 3) // 2
    return f"{safe[:half]}...{safe[-half:]}"


def quote(name: str) -> str:
    r"""Return a name in quotes for use in an error: escaped and bounded.

    >>> quote("conv\n1")
    "'conv\\n1'"
    """
    return f"'{one_line(name)}'"


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest choice, else the list of choices.

    >>> suggest("sparsty", ["sparsity", "scope"])
    "; did you mean 'sparsity'?"
    >>> suggest("zzz", ["sparsity", "scope"])
    '; choose from scope, sparsity'
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {quote(close[0])}?"
    if not known:
        return ""
    shown = ", ".join(one_line(choice) for choice in known[:12])
    return f"; choose from {shown}" + (", ..." if len(known) > 12 else "")
