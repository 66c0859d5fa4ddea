"""Operators on strings: object arrays of str."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel


def texts(items: Iterable[str], shape: Sequence[int]) -> Array:
    """Return strings as an object array of the shape."""
    result = np.empty(tuple(shape), object)
    result.reshape(-1)[:] = list(items)
    return result


@kernel("StringConcat", since=20)
def StringConcat(X: Array, Y: Array) -> Array:
    """Return X followed by Y, element by element with broadcasting."""
    left, right = np.broadcast_arrays(X.astype(object), Y.astype(object))
    pairs = zip(left.reshape(-1).tolist(), right.reshape(-1).tolist(), strict=True)
    return texts((first + second for first, second in pairs), left.shape)


@kernel("StringSplit", since=20)
def StringSplit(
    X: Array, *, delimiter: str | None = None, maxsplit: int | None = None
) -> tuple[Array, Array]:
    """Return the parts of every string along a new last axis, filled up with "", and their numbers.

    Without a delimiter, or with an empty one, strings are split at runs of white space.
    """
    limit = -1 if maxsplit is None else maxsplit
    split = [text.split(delimiter or None, limit) for text in X.reshape(-1).tolist()]
    most = max(map(len, split), default=0)
    filled = [part for row in split for part in row + [""] * (most - len(row))]
    counts = np.array([len(row) for row in split], np.int64).reshape(X.shape)
    return texts(filled, (*X.shape, most)), counts


@kernel("StringNormalizer", since=10)
def StringNormalizer(
    X: Array,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str | None = None,
    stopwords: Sequence[str] | None = None,
) -> Array:
    """Return the strings that are no stop words, in the case asked for; one empty string when none is left.

    X is (C,) or (1, C). Case is changed by Unicode's rules, which the locale does not alter here.

    Raises:
        ValueError: X has another shape or the action is unknown.
    """
    changes: dict[str, Callable[[str], str]] = {"NONE": str, "LOWER": str.lower, "UPPER": str.upper}
    if case_change_action not in changes:
        raise ValueError(f"StringNormalizer: case_change_action {case_change_action!r} is not known")
    if X.ndim not in {1, 2} or (X.ndim == 2 and X.shape[0] != 1):
        raise ValueError(f"StringNormalizer: the input is {X.shape}, not (C,) or (1, C)")
    compared: Callable[[str], str] = str if is_case_sensitive else str.lower
    stopped = {compared(word) for word in stopwords or ()}
    kept = [text for text in X.reshape(-1).tolist() if compared(text) not in stopped]
    changed = [changes[case_change_action](text) for text in kept] or [""]
    return texts(changed, (1,) * (X.ndim - 1) + (len(changed),))


@kernel("RegexFullMatch", since=20)
def RegexFullMatch(X: Array, *, pattern: str | None = None) -> Array:
    r"""Return where the whole string matches the pattern.

    The specification means RE2's syntax; Python's differs in corners only (named groups, classes such as
    \pL, which Python refuses).

    Raises:
        ValueError: The pattern is missing or is no regular expression.
    """
    if pattern is None:
        raise ValueError("RegexFullMatch: the attribute pattern is missing")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"RegexFullMatch: pattern {pattern!r}: {error}") from error
    found = [compiled.fullmatch(text) is not None for text in X.reshape(-1).tolist()]
    return np.array(found, np.bool_).reshape(X.shape)
