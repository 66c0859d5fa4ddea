"""Operators on sequences; a sequence is a list, and no operator changes the list it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel


def _place(position: Array, count: int, most: int) -> int:
    """Return a position as an index from 0 to `most`, negative ones counted from the end.

    Raises:
        IndexError: It is outside.
    """
    index = int(position.item())
    if not -count <= index <= most:
        raise IndexError(f"position {index} is outside a sequence of {count}")
    return index + count if index < 0 else index


@kernel("SequenceEmpty", since=11, tensors=False)
def SequenceEmpty(*, dtype: int | None = None) -> list[Array]:
    """Return a sequence without tensors."""
    return []


@kernel("SequenceConstruct", since=11, tensors=False)
def SequenceConstruct(*inputs: Array) -> list[Array]:
    """Return the inputs as a sequence."""
    return list(inputs)


@kernel("SequenceLength", since=11, tensors=False)
def SequenceLength(input_sequence: Sequence[Array]) -> Array:
    """Return the number of tensors as an int64 scalar."""
    return np.asarray(len(input_sequence), np.int64)


@kernel("SequenceAt", since=11, tensors=False)
def SequenceAt(input_sequence: Sequence[Array], position: Array) -> Array:
    """Return the tensor at a position; negative positions count from the end.

    Raises:
        IndexError: The position is outside.
    """
    return input_sequence[_place(position, len(input_sequence), len(input_sequence) - 1)]


@kernel("SequenceInsert", since=11, tensors=False)
def SequenceInsert(
    input_sequence: Sequence[Array], tensor: Array, position: Array | None = None
) -> list[Array]:
    """Return the sequence with a tensor put before a position, at the end by default.

    Raises:
        IndexError: The position is outside.
    """
    count = len(input_sequence)
    index = count if position is None else _place(position, count, count)
    return [*input_sequence[:index], tensor, *input_sequence[index:]]


@kernel("SequenceErase", since=11, tensors=False)
def SequenceErase(input_sequence: Sequence[Array], position: Array | None = None) -> list[Array]:
    """Return the sequence without the tensor at a position, the last by default.

    Raises:
        IndexError: The position is outside, or the sequence is empty.
    """
    count = len(input_sequence)
    index = _place(np.asarray(-1) if position is None else position, count, count - 1)
    return [*input_sequence[:index], *input_sequence[index + 1 :]]


@kernel("SplitToSequence", since=11, tensors=False)
def SplitToSequence(
    input: Array, split: Array | None = None, *, axis: int = 0, keepdims: int = 1
) -> list[Array]:
    """Return parts of a tensor along an axis: of one length, of given lengths, or single slices.

    Args:
        input: The tensor.
        split: Length of every part (a scalar; the last part may be shorter) or one length for each;
            without it the parts have length 1.
        axis: Axis to split.
        keepdims: Whether slices keep the axis; it counts only without `split`.

    Raises:
        ValueError: The lengths do not add up to the axis, or one is not positive.
        IndexError: There is no such axis.
    """
    if not -input.ndim <= axis < input.ndim:
        raise IndexError(f"axis {axis} is outside a tensor of rank {input.ndim}")
    length = input.shape[axis]
    if split is None:
        parts = [np.take(input, [i], axis) for i in range(length)]
        return parts if keepdims else [part.squeeze(axis) for part in parts]
    if split.ndim == 0:
        step = int(split)
        if step <= 0:
            raise ValueError(f"split must be positive, not {step}")
        ends = list(range(step, length, step))
    else:
        lengths = split.reshape(-1).tolist()
        if min(lengths, default=0) < 0 or sum(lengths) != length:
            raise ValueError(f"split {lengths} does not add up to {length}, the length of axis {axis}")
        ends = np.cumsum(lengths)[:-1].tolist()
        if not lengths:
            return []
    return list(np.split(input, ends, axis))


@kernel("ConcatFromSequence", since=11, tensors=False)
def ConcatFromSequence(input_sequence: Sequence[Array], *, axis: int, new_axis: int = 0) -> Array:
    """Return the tensors of a sequence joined along an axis, a new one when `new_axis` is 1.

    Raises:
        ValueError: The sequence is empty or the shapes do not fit.
    """
    if not input_sequence:
        raise ValueError("the sequence is empty")
    return np.stack(input_sequence, axis) if new_axis else np.concatenate(input_sequence, axis)
