"""Operators on optionals; an optional is its value, or None when it is empty."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel


@kernel("Optional", since=15, tensors=False)
def Optional(input: Any = None, *, type: Any = None) -> Any:
    """Return an optional that holds the input, empty without one.

    Args:
        input: A tensor or a sequence.
        type: The element's TypeProto, for an empty optional.
    """
    return input


@kernel("OptionalHasElement", since=15, tensors=False)
def OptionalHasElement(input: Any = None) -> Array:
    """Return whether there is a value, as a bool scalar."""
    return np.asarray(input is not None)


@kernel("OptionalGetElement", since=15, tensors=False)
def OptionalGetElement(input: Any) -> Any:
    """Return the value of an optional; a tensor or a sequence is its own value.

    Raises:
        ValueError: The optional is empty.
    """
    if input is None:
        raise ValueError("the optional is empty")
    return input
