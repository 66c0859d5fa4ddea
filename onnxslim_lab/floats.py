"""Floats of large tensors: in blocks, and as integers of the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 18  # elements handled at a time: temporaries stay in the processor's cache
DIGIT = 16  # bits of a magnitude resolved per reading of the data


def blocks(values: Array, size: int = BLOCK) -> Iterator[Array]:
    """Yield the elements in storage order, at most `size` at a time, as 1-D views."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, size):
        yield flat[start : start + size]


def magnitude_bits(values: Array, *, wide: bool) -> Array:
    """Return |values| as unsigned integers that sort alike: the IEEE 754 bits without the sign.

    Args:
        values: Floats of any width; float16 and bfloat16 become float32, exactly.
        wide: True for uint64 keys of float64, False for uint32 keys of float32. Keys compare only
            with keys of the same kind.

    >>> [int(key) for key in magnitude_bits(np.float32([-1.0, 0.0, 1.0]), wide=False)]
    [1065353216, 0, 1065353216]
    """
    if wide:
        return values.astype(np.float64).view(np.uint64) & np.uint64((1 << 63) - 1)
    return values.astype(np.float32).view(np.uint32) & np.uint32((1 << 31) - 1)


def sort_key(block: Array) -> Array:
    """Return integers in [0, 2**32) that sort as the floats do (float64: as their upper halves do)."""
    if block.dtype == np.float64:
        bits = (block.view(np.uint64) >> 32).astype(np.uint32)
    else:
        bits = block.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def kth_magnitude(read: Callable[[], Iterable[Array]], k: int, *, wide: bool) -> tuple[int, int]:
    """Return the k-th smallest magnitude of a stream, as (key, ties), without holding the stream.

    Radix selection: each reading counts one 16-bit digit of the keys whose higher digits are known
    to be the answer's, two readings for float32, four for float64.

    Args:
        read: Starts a reading of the stream, in arrays of any size.
        k: 1 for the smallest; at most the number of elements.
        wide: As in `magnitude_bits`.

    Returns:
        The magnitude's key and how many elements of exactly that key are among the k smallest.
    """
    key, rest = 0, 63 if wide else 31
    while rest:
        width = min(DIGIT, rest)
        rest -= width
        counts = np.zeros(1 << width, np.int64)
        for values in read():
            keys = magnitude_bits(values, wide=wide)
            if key:
                keys = keys[keys >> (rest + width) == key]
            elif rest + width < (63 if wide else 31):
                keys = keys[keys < 1 << (rest + width)]
            counts += np.bincount((keys >> rest).astype(np.intp) & ((1 << width) - 1), minlength=1 << width)
        upto = np.cumsum(counts)
        digit = int(np.searchsorted(upto, k))
        k -= int(upto[digit] - counts[digit])
        key = key << width | digit
    return key, k


def exact_half(array: Array) -> Array | None:
    """Return an array in float16 where that keeps every value, else None.

    >>> exact_half(np.float32([0.5, 3])).dtype, exact_half(np.float32([0.1])), exact_half(np.float32([1e6]))
    (dtype('float16'), None, None)
    """
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else None
