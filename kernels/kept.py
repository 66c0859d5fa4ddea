"""What is made from a node's attributes once and used at every run."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

_CALLS = 16

P = ParamSpec("P")
R = TypeVar("R")


def kept(make: Callable[P, R]) -> Callable[P, R]:
    """Return a function that remembers the results of its last calls by the identity of the arguments.

    A node is run with the same attribute objects each time, so that what is made from them, an index of a
    forest of trees say, need not be made anew. Arguments, and the values of dicts among them, must not be
    changed afterwards; they are held as long as the result is.

    >>> pairs = kept(lambda values: list(zip(values, values)))
    >>> numbers = [1, 2]
    >>> pairs(numbers) is pairs(numbers), pairs([1, 2]) is pairs([1, 2])
    (True, False)
    """
    calls: OrderedDict[tuple[int, ...], tuple[list[Any], R]] = OrderedDict()

    @functools.wraps(make)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        parts = [*_parts(arguments), *_parts(named)]
        key = tuple(map(id, parts))
        if key not in calls:
            calls[key] = parts, make(*arguments, **named)
            if len(calls) > _CALLS:
                calls.popitem(last=False)
        else:
            calls.move_to_end(key)
        return calls[key][1]

    return call


def _parts(value: Any) -> Iterator[Any]:
    """Yield the arguments one by one, dicts by their keys and values."""
    if isinstance(value, tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _parts(item)
    else:
        yield value
