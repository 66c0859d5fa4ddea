"""Scatter operators: elements written by position."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.indexing import grid
from onnxslim_lab.kernels.registry import Array, kernel

_COMBINE = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def scattered(data: Array, where: tuple[Array, ...], updates: Array, reduction: str) -> Array:
    """Return a copy of data with the updates written to, or combined into, the coordinates.

    Raises:
        ValueError: The reduction is unknown.
    """
    result = data.copy()
    if reduction == "none":
        result[where] = updates
    elif reduction in _COMBINE:
        _COMBINE[reduction].at(result, where, updates)
    else:
        raise ValueError(f"Scatter: reduction {reduction!r} is not none, add, mul, max or min")
    return result


@kernel("ScatterElements", since=11)
def ScatterElements_11(data: Array, indices: Array, updates: Array, *, axis: int = 0) -> Array:
    """Return data with updates[i][j][k] written at [i][index][k], the index put at `axis`."""
    axis += data.ndim if axis < 0 else 0
    return scattered(data, grid(indices, axis), updates, "none")


@kernel("ScatterElements", since=16)
def ScatterElements_16(
    data: Array, indices: Array, updates: Array, *, axis: int = 0, reduction: str = "none"
) -> Array:
    """Return data with updates[i][j][k] combined into [i][index][k], the index put at `axis`."""
    axis += data.ndim if axis < 0 else 0
    return scattered(data, grid(indices, axis), updates, reduction)


@kernel("Scatter", since=9)
def Scatter(data: Array, indices: Array, updates: Array, *, axis: int = 0) -> Array:
    """Return what ScatterElements does."""
    return ScatterElements_11(data, indices, updates, axis=axis)


@kernel("ScatterND", since=11)
def ScatterND_11(data: Array, indices: Array, updates: Array) -> Array:
    """Return data with the slices that the last axis of indices names replaced."""
    return ScatterND_16(data, indices, updates)


@kernel("ScatterND", since=16)
def ScatterND_16(data: Array, indices: Array, updates: Array, *, reduction: str = "none") -> Array:
    """Return data with the updates combined into the slices that the last axis of indices names."""
    where = tuple(np.moveaxis(indices.astype(np.int64), -1, 0))
    return scattered(data, where, updates, reduction)
