"""Gather and Slice: elements read by position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.shape import positive_axes


@kernel("Gather", since=1)
def Gather(data: Array, indices: Array, *, axis: int = 0) -> Array:
    """Return the entries of `axis` at the indices; negative ones count from the end.

    Raises:
        IndexError: An index is out of range.
    """
    return np.take(data, indices.astype(np.int64), axis)


@kernel("GatherElements", since=11)
def GatherElements(data: Array, indices: Array, *, axis: int = 0) -> Array:
    """Return data[i][index][k] for every position of indices, the index put at `axis`."""
    axis += data.ndim if axis < 0 else 0
    return np.asarray(data[grid(indices, axis)])


def grid(indices: Array, axis: int) -> tuple[Array, ...]:
    """Return the coordinates that an *Elements operator means: its own position but for `axis`."""
    coordinates = list(np.ogrid[tuple(slice(0, length) for length in indices.shape)])
    coordinates[axis] = indices.astype(np.int64)
    return tuple(coordinates)


@kernel("GatherND", since=11)
def GatherND_11(data: Array, indices: Array) -> Array:
    """Return the slices of data that the last axis of indices names."""
    return GatherND_12(data, indices)


@kernel("GatherND", since=12)
def GatherND_12(data: Array, indices: Array, *, batch_dims: int = 0) -> Array:
    """Return the slices of data that the last axis of indices names, the first axes shared.

    Raises:
        ValueError: The indices name more axes than data has.
    """
    named = indices.shape[-1]
    if batch_dims + named > data.ndim:
        raise ValueError(f"GatherND: {named} indices after {batch_dims} batch axes of {data.ndim}")
    around = [
        np.arange(length).reshape([-1 if i == axis else 1 for i in range(indices.ndim - 1)])
        for axis, length in enumerate(indices.shape[:batch_dims])
    ]
    inside = [indices[..., i].astype(np.int64) for i in range(named)]
    return np.asarray(data[tuple(around + inside)])


def sliced(
    data: Array,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None,
    steps: Sequence[int] | None,
) -> Array:
    """Return the part of data from starts to before ends, clamped to the shape: a view.

    Raises:
        ValueError: The lists differ in length or a step is 0.
    """
    chosen = positive_axes(range(len(starts)) if axes is None else axes, data.ndim)
    strides = [1] * len(starts) if steps is None else steps
    if 0 in strides:
        raise ValueError("Slice: a step is 0")
    window = [slice(None)] * data.ndim
    for axis, start, end, step in zip(chosen, starts, ends, strides, strict=True):
        window[axis] = slice(start, end, step)  # clamps as the specification does
    return data[tuple(window)]


@kernel("Slice", since=1)
def Slice_1(
    data: Array, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None
) -> Array:
    """Return the part of data from starts to before ends."""
    return sliced(data, starts, ends, axes, None)


@kernel("Slice", since=10)
def Slice_10(
    data: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None
) -> Array:
    """Return the part of data from starts to before ends, in steps."""
    return sliced(
        data,
        starts.reshape(-1).tolist(),
        ends.reshape(-1).tolist(),
        None if axes is None else axes.reshape(-1).tolist(),
        None if steps is None else steps.reshape(-1).tolist(),
    )


@kernel("ReverseSequence", since=10)
def ReverseSequence(input: Array, sequence_lens: Array, *, batch_axis: int = 1, time_axis: int = 0) -> Array:
    """Return the input with the first `sequence_lens` time steps of each batch entry reversed."""
    moved = np.moveaxis(input, (batch_axis, time_axis), (0, 1)).copy()
    for row, length in enumerate(sequence_lens.tolist()):
        moved[row, :length] = moved[row, :length][::-1]
    return np.moveaxis(moved, (0, 1), (batch_axis, time_axis))
