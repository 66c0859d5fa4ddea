"""TfIdfVectorizer: counts of n-grams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel

_MODES = ("TF", "IDF", "TFIDF")


def pool_of(items: Sequence[int] | Sequence[str], starts: Sequence[int]) -> list[tuple[int | str, ...]]:
    """Return the n-grams of a pool in order: those of length n lie between starts[n - 1] and starts[n].

    >>> pool_of([2, 3, 5, 4], [0, 2])
    [(2,), (3,), (5, 4)]
    """
    ends = [*starts[1:], len(items)]
    grams: list[tuple[int | str, ...]] = []
    for length, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
        grams += [tuple(items[place : place + length]) for place in range(start, end, length)]
    return grams


@kernel("TfIdfVectorizer", since=9)
def TfIdfVectorizer(
    X: Array,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] | None = None,
    pool_strings: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> Array:
    """Return how often every n-gram of the pool occurs in each row: (C,) -> (K,), (N, C) -> (N, K).

    With skips, the items of an n-gram may lie s + 1 apart for every s up to `max_skip_count`; single items
    have no gaps and are counted once. "TF" counts, "IDF" puts the weight where the count is not 0, "TFIDF"
    multiplies count and weight.

    Raises:
        ValueError: The mode is unknown, or not exactly one pool is given.
    """
    if mode not in _MODES:
        raise ValueError(f"TfIdfVectorizer: mode {mode!r} is not TF, IDF or TFIDF")
    pool = pool_strings if pool_int64s is None else pool_int64s
    if pool is None or (pool_int64s is not None and pool_strings is not None):
        raise ValueError("TfIdfVectorizer: one of pool_int64s and pool_strings is required")
    grams = pool_of(pool, ngram_counts)
    columns = dict(zip(grams, ngram_indexes, strict=True))
    lengths = range(min_gram_length, min(max_gram_length, len(ngram_counts)) + 1)
    rows = X.reshape(1, -1) if X.ndim < 2 else X
    counts = np.zeros((len(rows), max(ngram_indexes) + 1), np.float32)
    for row, items in enumerate(rows.tolist()):
        for length in lengths:
            for step in range(1, max_skip_count + 2 if length > 1 else 2):
                last = len(items) - (length - 1) * step
                for start in range(last):
                    column = columns.get(tuple(items[start : start + (length - 1) * step + 1 : step]))
                    if column is not None:
                        counts[row, column] += 1
    factor = np.ones(counts.shape[1], np.float32)
    if weights is not None:
        factor[np.asarray(ngram_indexes)] = weights
    if mode == "IDF":
        counts = np.where(counts > 0, factor, np.float32(0))
    elif mode == "TFIDF":
        counts = counts * factor
    return counts.reshape(-1) if X.ndim < 2 else counts
