"""Reshape targets: constants that say what a symbolic shape says."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim_lab.symbols.dimensions import Size, equal
from onnxslim_lab.symbols.facts import Shape


def reshape_target(shape: Shape | None, wanted: Sequence[Size]) -> list[int] | None:
    """Return a constant for Reshape (allowzero=0) that makes the wanted sizes of a tensor of this shape.

    A size equal to the input's at the same place becomes 0 (copy); one further size that is not an
    integer becomes -1. None when more are open. A size of 0 is refused: as a target it would copy.
    An empty tensor with both a copied empty axis and a -1 is the one case in which a runtime may refuse
    the constant.

    >>> from onnxslim_lab.symbols.dimensions import multiply, symbol
    >>> n, s = symbol("n"), symbol("s")
    >>> reshape_target((n, s, 12, 32), [n, s, 384]), reshape_target((n, s, 8), [multiply(n, s), 8])
    ([0, 0, 384], [-1, 8])
    """
    target: list[int] = []
    for index, size in enumerate(wanted):
        if isinstance(size, int):
            if size < 1:
                return None
            target.append(size)
        elif shape is not None and index < len(shape) and equal(shape[index], size):
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1:
        return None
    return target


def literal_target(shape: Shape | None, wanted: Sequence[Size], *, zero_is_zero: bool) -> list[int] | None:
    """Return a constant for a target that may itself have 0 (copy, unless `zero_is_zero`) or -1.

    >>> from onnxslim_lab.symbols.dimensions import symbol
    >>> literal_target((symbol("n"), 2, 3), [symbol("n"), -1], zero_is_zero=False)
    [0, -1]
    """
    target: list[int] = []
    for index, size in enumerate(wanted):
        if isinstance(size, int):
            if size < -1 or (size == 0 and zero_is_zero):
                return None
            target.append(size)
        else:
            copied = shape is not None and index < len(shape) and equal(shape[index], size)
            target.append(0 if copied else -1)
    return target if target.count(-1) <= 1 else None


def same_shape(first: Shape | None, second: Shape | None) -> bool:
    """Whether two shapes are known to be equal."""
    if first is None or second is None or len(first) != len(second):
        return False
    return all(one == other for one, other in zip(first, second, strict=True))
