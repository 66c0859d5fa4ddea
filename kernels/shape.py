"""Operators that read or change the shape of a tensor and keep its elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel


def positive_axes(axes: Sequence[int] | Array, rank: int) -> list[int]:
    """Return the axes counted from the front.

    Raises:
        ValueError: An axis is out of range or repeated.

    >>> positive_axes([-1, 0], 3)
    [2, 0]
    """
    given = axes.reshape(-1).tolist() if isinstance(axes, np.ndarray) else axes
    if len(given) == 1 and -rank <= given[0] < rank:
        return [int(given[0]) % rank]
    result = [int(axis) + (rank if axis < 0 else 0) for axis in given]
    if len(set(result)) != len(result) or (result and not 0 <= min(result) <= max(result) < rank):
        raise ValueError(f"axes {list(map(int, axes))} do not fit rank {rank}")
    return result


@kernel("Shape", since=1)
def Shape_1(data: Array) -> Array:
    """Return the shape, int64."""
    return np.array(data.shape, np.int64)


@kernel("Shape", since=15)
def Shape_15(data: Array, *, start: int = 0, end: int | None = None) -> Array:
    """Return the dimensions from `start` to before `end`, int64."""
    return np.array(data.shape[start:end], np.int64)


@kernel("Size", since=1)
def Size(data: Array) -> Array:
    """Return the number of elements, int64."""
    return np.array(data.size, np.int64)


def reshaped(data: Array, shape: Sequence[int], *, allowzero: bool) -> Array:
    """Return data in a shape that may hold -1 (inferred) and, unless allowed as lengths, 0 (kept).

    Where nothing tells what -1 is, the axes that are kept count on neither side: an empty batch (0, 3, 4)
    becomes (0, 12) for [0, -1]. onnxruntime refuses that.

    Raises:
        ValueError: The shape does not fit.
    """
    lengths = [int(length) for length in shape]
    kept = {i for i, length in enumerate(lengths) if length == 0 and not allowzero}
    if not allowzero:
        if any(length == 0 and i >= data.ndim for i, length in enumerate(lengths)):
            raise ValueError(f"Reshape: shape {lengths} keeps a dimension that {data.shape} lacks")
        lengths = [length or data.shape[i] for i, length in enumerate(lengths)]
    if -1 in lengths and data.size == 0:
        rest = math.prod(length for i, length in enumerate(lengths) if length != -1 and i not in kept)
        whole = math.prod(length for i, length in enumerate(data.shape) if i not in kept)
        lengths = [(whole // rest if rest else 1) if length == -1 else length for length in lengths]
    return data.reshape(lengths)


@kernel("Reshape", since=1)
def Reshape_1(data: Array, *, shape: Sequence[int] | None = None) -> Array:
    """Return data in the shape of the attribute."""
    return reshaped(data, shape or (), allowzero=False)


@kernel("Reshape", since=5)
def Reshape_5(data: Array, shape: Array) -> Array:
    """Return data in the shape of the second input; 0 keeps a dimension, -1 infers one."""
    return reshaped(data, shape.tolist(), allowzero=False)


@kernel("Reshape", since=14)
def Reshape_14(data: Array, shape: Array, *, allowzero: int = 0) -> Array:
    """Return data in the shape of the second input; 0 is a length when `allowzero` is 1."""
    return reshaped(data, shape.tolist(), allowzero=bool(allowzero))


@kernel("Flatten", since=1)
def Flatten(input: Array, *, axis: int = 1) -> Array:
    """Return a matrix: axes before `axis` times the others."""
    axis += input.ndim if axis < 0 else 0
    return input.reshape(math.prod(input.shape[:axis]), math.prod(input.shape[axis:]))


def squeezed(data: Array, axes: Sequence[int] | Array | None) -> Array:
    """Return data without the given axes of length 1, or without any such."""
    if axes is None:
        return np.squeeze(data)
    return np.squeeze(data, tuple(positive_axes(axes, data.ndim)))


@kernel("Squeeze", since=1)
def Squeeze_1(data: Array, *, axes: Sequence[int] | None = None) -> Array:
    """Return data without the axes, which must be of length 1; without all such when none are given."""
    return squeezed(data, axes)


@kernel("Squeeze", since=13)
def Squeeze_13(data: Array, axes: Array | None = None) -> Array:
    """Return data without the axes, which must be of length 1; without all such when none are given."""
    return squeezed(data, axes)


def unsqueezed(data: Array, axes: Sequence[int] | Array) -> Array:
    """Return data with axes of length 1 inserted where the result is to have them."""
    shape = list(data.shape)
    for axis in sorted(positive_axes(axes, data.ndim + len(axes))):
        shape.insert(axis, 1)
    return data.reshape(shape)


@kernel("Unsqueeze", since=1)
def Unsqueeze_1(data: Array, *, axes: Sequence[int]) -> Array:
    """Return data with axes of length 1 inserted."""
    return unsqueezed(data, axes)


@kernel("Unsqueeze", since=13)
def Unsqueeze_13(data: Array, axes: Array) -> Array:
    """Return data with axes of length 1 inserted."""
    return unsqueezed(data, axes.reshape(-1))


@kernel("Transpose", since=1)
def Transpose(data: Array, *, perm: Sequence[int] | None = None) -> Array:
    """Return data with its axes permuted, reversed unless `perm` is given."""
    return np.transpose(data, perm)


@kernel("Expand", since=8)
def Expand(input: Array, shape: Array) -> Array:
    """Return the input broadcast against the shape: a read-only view."""
    lengths = tuple(int(length) for length in shape.reshape(-1))
    return np.broadcast_to(input, np.broadcast_shapes(input.shape, lengths))


@kernel("Tile", since=1)
def Tile_1(input: Array, tiles: Array, axis: Array) -> Array:
    """Return the input repeated along one axis."""
    repeats = [1] * input.ndim
    repeats[int(axis.reshape(()))] = int(tiles.reshape(()))
    return np.tile(input, repeats)


@kernel("Tile", since=6)
def Tile_6(input: Array, repeats: Array) -> Array:
    """Return the input repeated along every axis.

    Raises:
        ValueError: There is not one number of repeats per axis.
    """
    if repeats.shape != (input.ndim,):
        raise ValueError(f"Tile: {repeats.shape} repeats for {input.ndim} dimensions")
    return np.tile(input, repeats.tolist())


@kernel("Concat", since=1)
def Concat_1(*inputs: Array, axis: int | None = None) -> Array:
    """Return the inputs joined along `axis`, 1 unless given."""
    return np.concatenate(inputs, axis=1 if axis is None else axis)


@kernel("Concat", since=4)
def Concat_4(*inputs: Array, axis: int) -> Array:
    """Return the inputs joined along `axis`."""
    return np.concatenate(inputs, axis=axis)


def parts(input: Array, lengths: Sequence[int], axis: int) -> tuple[Array, ...]:
    """Return consecutive parts of the given lengths along an axis.

    Raises:
        ValueError: The lengths do not add up to the axis.
    """
    if sum(lengths) != input.shape[axis] or any(length < 0 for length in lengths):
        raise ValueError(f"Split: {list(lengths)} does not add up to {input.shape[axis]}")
    return tuple(np.split(input, np.cumsum(lengths)[:-1], axis))


def even(length: int, count: int) -> list[int]:
    """Return `count` lengths that add up to `length`, all equal but for a smaller last one.

    >>> even(7, 3)
    [3, 3, 1]
    """
    chunk = -(-length // count)
    return [max(min(chunk, length - i * chunk), 0) for i in range(count)]


@kernel("Split", since=1)
def Split_1(
    input: Array,
    split: Array | None = None,
    *,
    axis: int | None = None,
    output_count: int,
) -> tuple[Array, ...]:
    """Return parts along `axis`; the attribute of the same name as the input comes in its place."""
    return Split_13(input, split, axis=axis or 0, output_count=output_count)


@kernel("Split", since=2)
def Split_2(
    input: Array, *, split: Sequence[int] | None = None, axis: int = 0, output_count: int
) -> tuple[Array, ...]:
    """Return parts along `axis`, equal unless `split` gives their lengths."""
    return parts(input, split or even(input.shape[axis], output_count), axis)


@kernel("Split", since=13)
def Split_13(
    input: Array, split: Array | None = None, *, axis: int = 0, output_count: int
) -> tuple[Array, ...]:
    """Return parts along `axis`, equal unless `split` gives their lengths."""
    lengths = even(input.shape[axis], output_count) if split is None else split.tolist()
    return parts(input, lengths, axis)


@kernel("Split", since=18)
def Split_18(
    input: Array,
    split: Array | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    output_count: int,
) -> tuple[Array, ...]:
    """Return parts along `axis`: lengths by `split`, or `num_outputs` of them, the last one smaller."""
    count = output_count if num_outputs is None else num_outputs
    return Split_13(input, split, axis=axis, output_count=count)


@kernel("DepthToSpace", since=1)
def DepthToSpace(input: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    """Return blocks of channels laid out in space: (N, C, H, W) -> (N, C/b^2, H*b, W*b)."""
    n, c, h, w = input.shape
    b = blocksize
    if mode == "DCR":
        split = input.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        split = input.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return split.reshape(n, c // (b * b), h * b, w * b)


@kernel("SpaceToDepth", since=1)
def SpaceToDepth(input: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    """Return blocks of space stacked in channels: (N, C, H, W) -> (N, C*b^2, H/b, W/b)."""
    n, c, h, w = input.shape
    b = blocksize
    split = input.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return split.transpose(order).reshape(n, c * b * b, h // b, w // b)
