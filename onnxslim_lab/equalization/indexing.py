"""Channel indices: which scale each element of a tensor belongs to, followed through changes of shape.

An index is an int64 array of the tensor's rank: along an axis on which the scale does not vary it has size
1, along the others the tensor's size. Its entries are numbers of scale variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.shapes import Dim

Index = NDArray[np.int64]
Array = NDArray[Any]

LARGEST = 1 << 22  # entries of an index


def varying(index: Index) -> list[int]:
    """Return the axes along which the scale varies.

    >>> varying(np.array([[[0]], [[1]]]))
    [0]
    """
    return [axis for axis, size in enumerate(index.shape) if size != 1]


def along(index: Index, axis: int, size: int) -> Index | None:
    """Return the index as a vector along one axis, None when it varies along another.

    >>> along(np.array([[3, 4]]), -1, 2)
    array([3, 4])
    """
    axis %= index.ndim
    if any(other != axis for other in varying(index)) or index.shape[axis] not in (1, size):
        return None
    return np.broadcast_to(index.reshape(-1), (size,))


def place(vector: Index, rank: int, axis: int) -> Index:
    """Return a vector as the index of a tensor that varies along one axis only.

    >>> place(np.array([3, 4]), 3, 1).shape
    (1, 2, 1)
    """
    shape = [1] * rank
    shape[axis] = vector.size
    return vector.reshape(shape)


def reshaped(index: Index, before: Sequence[Dim], after: Sequence[Dim]) -> Index | None:
    """Return the index behind a reshape that keeps the order of the elements, None when it cannot be told.

    Args:
        index: The index before.
        before: The shape before; sizes that do not matter may be unknown.
        after: The shape behind it, likewise.

    >>> reshaped(np.array([[[3]], [[4]]]).reshape(1, 2, 1), ("N", 2, 3), ("N", 6))
    array([[3, 3, 3, 4, 4, 4]])
    """
    axes = varying(index)
    if not axes:
        return index.reshape((1,) * len(after)) if index.size else None
    if list(before[: axes[-1] + 1]) == list(after[: axes[-1] + 1]) and None not in before[: axes[-1] + 1]:
        kept = index.shape[: axes[-1] + 1]
        return index.reshape(*kept, *(1,) * (len(after) - len(kept)))
    for start in range(axes[0], -1, -1):  # the shortest tail of axes that is one of the result's too
        tail = before[start:]
        if not all(isinstance(size, int) for size in tail):
            return None
        sizes = [int(size) for size in tail if size is not None]
        total = math.prod(sizes)
        if not 0 < total <= LARGEST:
            return None
        first = _tail_of(after, total)
        if first is not None:
            whole = np.broadcast_to(index.reshape(index.shape[start:]), sizes)
            own = whole.reshape([int(size) for size in after[first:] if size is not None])
            return squeezed(own).reshape((1,) * first + squeezed(own).shape)
    return None


def _tail_of(shape: Sequence[Dim], total: int) -> int | None:
    """Return the first axis of the tail of a shape that has so many elements."""
    product = 1
    for axis in range(len(shape) - 1, -1, -1):
        size = shape[axis]
        if not isinstance(size, int):
            return None
        product *= size
        if product == total:
            return axis
        if product > total:
            return None
    return None


def squeezed(index: Index) -> Index:
    """Return an index with size 1 along every axis on which it does not vary.

    >>> squeezed(np.array([[3, 3], [4, 4]]))
    array([[3],
           [4]])
    """
    for axis, size in enumerate(index.shape):
        first = index.take([0], axis)
        if size > 1 and (index == first).all():
            index = first
    return index


def common_shape(*indices: Index) -> tuple[int, ...] | None:
    """Return the shape that indices broadcast to, None when they do not fit each other."""
    try:
        return np.broadcast_shapes(*(index.shape for index in indices))
    except ValueError:
        return None
