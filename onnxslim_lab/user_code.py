"""Functions of the user's own, named as 'module:function'."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from onnxslim_lab.errors import LabError, quote, suggest


def is_function_spec(spec: str) -> bool:
    """Whether a text names a function: dotted identifiers, a colon, dotted identifiers.

    >>> is_function_spec("my.module:function"), is_function_spec("C:/data.npz")
    (True, False)
    """
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def load_function(spec: str, error: type[LabError]) -> Callable[..., Any]:
    """Return the function that 'module:function' names; modules of the current folder are found.

    Args:
        spec: Module and function.
        error: Raised when the module cannot be imported or has no such function.
    """
    module_name, _, name = spec.partition(":")
    here = os.getcwd()  # noqa: PTH109 - sys.path has text
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as cause:
        raise error(
            f"{quote(spec)}: cannot import module {quote(module_name)}: {type(cause).__name__}: {cause}"
        ) from cause
    finally:
        if added:
            sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            raise error(
                f"{quote(spec)}: {quote(module_name)} has no {quote(part)}"
                f"{suggest(part, [n for n in dir(found) if not n.startswith('_')])}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise error(f"{quote(spec)} is a {type(found).__name__}, not a function")
    checked: Callable[..., Any] = found
    return checked
