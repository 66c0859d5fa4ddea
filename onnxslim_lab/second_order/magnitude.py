"""Pruning by magnitude: exact thresholds over arrays of any size, without sorting and with one array in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from onnxslim_lab.floats import BLOCK, Array, blocks, kth_magnitude, magnitude_bits
from onnxslim_lab.selection import Target

Mask = np.ndarray[Any, np.dtype[np.bool_]]


def zero_upto(values: Array, key: int, ties: int, *, wide: bool) -> tuple[Array, int]:
    """Return a copy with magnitudes below `key`, and the first `ties` equal to it, set to zero.

    Returns:
        The new array (same shape and dtype) and how many ties are left for the arrays that follow.
    """
    result = values.copy()
    for block in blocks(result):
        keys = magnitude_bits(block, wide=wide)
        block[keys < key] = 0
        if ties:
            equal = np.flatnonzero(keys == key)[:ties]
            block[equal] = 0
            ties -= equal.size
    return result, ties


def zero_smallest(values: Array, k: int) -> Array:
    """Return a copy with the k smallest magnitudes set to zero; among equals the first in storage order.

    >>> zero_smallest(np.float32([3, -1, 1, 2, 1]), 2)
    array([3., 0., 0., 2., 1.], dtype=float32)
    """
    if not k:
        return values.copy()
    wide = values.dtype.itemsize > 4
    key, ties = kth_magnitude(lambda: blocks(values), k, wide=wide)
    return zero_upto(values, key, ties, wide=wide)[0]


def zero_below(values: Array, threshold: float) -> Array:
    """Return a copy with every |value| < threshold set to zero, compared in float64."""
    result = values.copy()
    for block in blocks(result):
        block[np.abs(block.astype(np.float64)) < threshold] = 0
    return result


def smallest_in_rows(matrix: Array, k: int) -> Mask:
    """Return the mask of the k smallest magnitudes of each row; among equals the first columns.

    Args:
        matrix: Floats of shape (rows, columns).
        k: Elements to choose in each row, 0 to columns.
    """
    mask = np.zeros(matrix.shape, np.bool_)
    if k <= 0 or not matrix.size:
        return mask
    step = max(1, BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        keys = magnitude_bits(matrix[start : start + step], wide=matrix.dtype.itemsize > 4)
        kth = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]
        less, equal = keys < kth, keys == kth
        ties = k - less.sum(axis=1, keepdims=True)
        mask[start : start + step] = less | (equal & (np.cumsum(equal, axis=1) <= ties))
    return mask


def pattern_mask(matrix: Array, keep: int, group: int) -> Mask:
    """Return the mask of what an N:M pattern zeroes: all but the `keep` largest of each `group` columns.

    A last group that is not full keeps at most `keep` values too: it is an N:M group once the row is
    padded with zeros, which is what sparse hardware does. Mishra et al., Accelerating Sparse Deep
    Neural Networks, 2021.

    >>> pattern_mask(np.float32([[3, -1, 2, 4, 5]]), 2, 4).astype(int).tolist()
    [[0, 1, 1, 0, 0]]
    """
    rows, columns = matrix.shape
    full = columns - columns % group
    mask = np.zeros(matrix.shape, np.bool_)
    grouped = np.ascontiguousarray(matrix[:, :full]).reshape(-1, group)
    mask[:, :full] = smallest_in_rows(grouped, group - keep).reshape(rows, full)
    mask[:, full:] = smallest_in_rows(matrix[:, full:], columns - full - keep)
    return mask


def count_nonzeros(values: Array) -> int | None:
    """Return the number of nonzero elements, or None when there is a NaN."""
    nonzeros = 0
    for block in blocks(values):
        if np.isnan(block).any():
            return None
        nonzeros += int(np.count_nonzero(block))
    return nonzeros


def zeros_wanted(sparsity: float, elements: int) -> int:
    """Return how many of `elements` a sparsity zeroes: rounded half to even, as torch does.

    >>> zeros_wanted(0.5, 5), zeros_wanted(0.5, 7)
    (2, 4)
    """
    return round(sparsity * elements)


def stream(targets: Iterable[Target]) -> Iterator[Array]:
    """Yield the elements of all targets in order, block by block."""
    for target in targets:
        yield from blocks(target.read())


def fraction_of_rows(rows: Array, sparsity: float) -> Mask:
    """Return the mask of that part of each row that is smallest."""
    return smallest_in_rows(rows, zeros_wanted(sparsity, rows.shape[1]))


def zero_rows(target: Target, choose: Callable[[Array], Mask]) -> Array:
    """Return the weight with the elements zeroed that `choose` finds in the rows of its matrix."""
    matrix = target.layer.matrix
    rows = matrix.reshape(-1, matrix.shape[-1])
    return target.layer.with_matrix(np.where(choose(rows), matrix.dtype.type(0), rows).reshape(matrix.shape))
