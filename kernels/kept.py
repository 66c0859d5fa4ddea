"""What is made from a node's attributes once and used at every run."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_CALLS = 256

P = ParamSpec("P")
R = TypeVar("R")


def lasting(*arrays: Any) -> bool:
    """Whether arrays are read-only, as a model's constants are and feeds are not."""
    return not any(array.flags.writeable for array in arrays)


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """Return a function that remembers the results of its last calls by the identity of the arguments.

    A node is run with the same attribute objects each time, so that what is made from them, an index of a
    forest of trees say, need not be made anew. Arguments must not be changed afterwards; they are held as
    long as the result is. Arrays that are not read-only, as constants are, may be changed: `lasting`.

    >>> pairs = kept(lambda values: list(zip(values, values)))
    >>> numbers = [1, 2]
    >>> pairs(numbers) is pairs(numbers), pairs([1, 2]) is pairs([1, 2])
    (True, False)
    """
    calls: OrderedDict[tuple[object, ...], tuple[tuple[Any, ...], R]] = OrderedDict()

    @functools.wraps(make)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        held: tuple[Any, ...] = (*arguments, *named.values())
        key = (*map(id, held), *named)
        if key not in calls:
            calls[key] = held, make(*arguments, **named)
            if len(calls) > _CALLS:
                calls.popitem(last=False)
        else:
            calls.move_to_end(key)
        return calls[key][1]

    return call
