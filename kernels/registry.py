"""The table of kernels: which function computes an operator at an opset version."""

from __future__ import annotations

import functools
import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Any]
AnyFunction = TypeVar("AnyFunction", bound=Function)

IGNORED = frozenset({"consumed_inputs"})
"""Attributes that never meant anything for the result: in-place hints of opsets 1 to 5."""


@dataclass(frozen=True)
class Kernel:
    """One version of an operator.

    Attributes:
        op_type, domain: The operator; the default domain is "".
        since: First opset version this function implements.
        function: Inputs positional, attributes by keyword; returns an array or a tuple of arrays.
        counts_outputs: Whether the function takes `output_count`, the number of outputs of the node.
        tensors: Whether all inputs and outputs are tensors: no sequences (lists), optionals or maps (dicts).
    """

    op_type: str
    domain: str
    since: int
    function: Function
    counts_outputs: bool
    tensors: bool = True


_TABLE: dict[tuple[str, str], list[Kernel]] = {}


def kernel(
    op_type: str, since: int, domain: str = "", *, tensors: bool = True
) -> Callable[[AnyFunction], AnyFunction]:
    """Register a function as the kernel of an operator from opset version `since` on.

    The function runs with NumPy's floating point warnings off; scalars it returns become 0-d arrays.
    With `tensors` False it may take and return lists (sequences), dicts (maps) and None.

    Raises:
        ValueError: The operator has a kernel of that version already.
    """

    def register(function: AnyFunction) -> AnyFunction:
        @functools.wraps(function)
        def quiet(*inputs: Any, **attributes: Any) -> Any:
            with np.errstate(all="ignore"):
                result = function(*inputs, **attributes)
            if isinstance(result, tuple):
                return tuple(settle(value) for value in result)
            return settle(result)

        counts = "output_count" in inspect.signature(function).parameters
        versions = _TABLE.setdefault((domain, op_type), [])
        if any(known.since == since for known in versions):
            raise ValueError(f"kernel {op_type} since {since} is registered twice")
        versions.append(Kernel(op_type, domain, since, quiet, counts, tensors))
        versions.sort(key=lambda known: known.since)
        return function

    return register


def earlier(
    newest: Function,
    op_type: str,
    since: int,
    *,
    lacks: Sequence[str] = (),
    required: Sequence[str] = (),
    unread: Mapping[str, Any] | None = None,
) -> None:
    """Register the earlier version of an operator that differs from the newest in its signature alone.

    Args:
        newest: The kernel of the newest version.
        op_type: The operator, of ai.onnx.
        since: The opset version where the earlier one starts.
        lacks: Attributes that the earlier version does not have.
        required: Inputs that are not optional in it.
        unread: Attributes that it has besides, which change nothing, with their defaults.
    """
    extra = unread or {}

    def older(*inputs: Any, **attributes: Any) -> Any:
        return newest(*inputs, **{name: value for name, value in attributes.items() if name not in extra})

    empty, keyword = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    signature = inspect.signature(newest)
    parameters = [
        value.replace(default=empty) if name in required else value
        for name, value in signature.parameters.items()
        if name not in lacks
    ]
    parameters += [inspect.Parameter(name, keyword, default=value) for name, value in extra.items()]
    older.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    older.__name__ = older.__qualname__ = f"{op_type}_{since}"
    older.__doc__ = newest.__doc__
    kernel(op_type, since)(older)


def settle(value: Any) -> Any:
    """Return a result as a value: sequences, maps, absent ones and arrays as they are, scalars as arrays."""
    return value if value is None or isinstance(value, np.ndarray | list | dict) else np.asarray(value)


def lookup(op_type: str, domain: str = "", opset: int = 1) -> Kernel | None:
    """Return the kernel with the greatest `since` not above the opset, or None.

    >>> lookup("Squeeze", "", 12).since, lookup("Squeeze", "ai.onnx", 21).since, lookup("Nope")
    (1, 13, None)
    """
    versions = _TABLE.get(("" if domain == "ai.onnx" else domain, op_type), [])
    position = bisect_right(versions, opset, key=lambda known: known.since)
    return versions[position - 1] if position else None


def kernels() -> Iterator[Kernel]:
    """Yield every registered kernel."""
    for versions in _TABLE.values():
        yield from versions


def run(
    found: Kernel, inputs: Sequence[Array | None], attributes: Mapping[str, Any], output_count: int = 1
) -> tuple[Array, ...]:
    """Compute a node; returns all outputs of the operator, at least `output_count` of them.

    Raises:
        ValueError, TypeError, IndexError, ZeroDivisionError, NotImplementedError: The inputs do not fit.
    """
    given = {name: value for name, value in attributes.items() if name not in IGNORED}
    if found.counts_outputs:
        given["output_count"] = output_count
    result = found.function(*inputs, **given)
    return result if isinstance(result, tuple) else (result,)
