"""Pooling over whole images, and MaxUnpool."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.pool import lowest, norm_of, spatial
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, paddings, spread, volume


def spatial_axes(op_type: str, X: Array) -> tuple[int, ...]:
    """Return the positions of the spatial axes of X (N, C, ...)."""
    return tuple(range(2, 2 + len(spatial(op_type, X))))


@kernel("GlobalAveragePool", since=1)
def GlobalAveragePool(X: Array) -> Array:
    """Return the mean over all spatial axes, which keep the length 1."""
    axes = spatial_axes("GlobalAveragePool", X)
    flat = wide(X).reshape(*X.shape[:2], -1) if X.size else wide(X).sum(axes)[..., None]
    mean = np.matmul(flat, np.ones(flat.shape[2], flat.dtype)) / flat.dtype.type(volume(X.shape[2:]))
    return np.asarray(mean).astype(X.dtype, copy=False).reshape(*X.shape[:2], *[1] * len(axes))


@kernel("GlobalMaxPool", since=1)
def GlobalMaxPool(X: Array) -> Array:
    """Return the greatest value over all spatial axes, which keep the length 1."""
    axes = spatial_axes("GlobalMaxPool", X)
    return np.asarray(np.maximum.reduce(X, axis=axes, keepdims=True, initial=lowest(X.dtype)[()]))


@kernel("GlobalLpPool", since=1)
def GlobalLpPool_1(X: Array, *, p: float = 2.0) -> Array:
    """Return the p-norm over all spatial axes, which keep the length 1."""
    axes = spatial_axes("GlobalLpPool", X)
    result = norm_of(wide(X), p, lambda powers: np.sum(powers, axis=axes, keepdims=True))
    return result.astype(X.dtype, copy=False)


@kernel("GlobalLpPool", since=2)
def GlobalLpPool_2(X: Array, *, p: int = 2) -> Array:
    """Return the p-norm over all spatial axes, which keep the length 1."""
    return GlobalLpPool_1(X, p=p)


@kernel("MaxUnpool", since=9)
def MaxUnpool(
    X: Array,
    I: Array,  # noqa: E741 - the specification's name
    output_shape: Array | None = None,
    *,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return zeros with the values of X at the positions I that MaxPool gave.

    The positions count through the shape that kernel, strides and pads imply; an output_shape asked for
    beyond that one adds zeros after every axis, one below it cuts.

    Raises:
        ValueError: The shapes do not fit or a position lies outside.
    """
    if X.shape != I.shape:
        raise ValueError(f"MaxUnpool: X has shape {X.shape} and I {I.shape}, expected the same")
    lengths = spatial("MaxUnpool", X)
    rank = len(lengths)
    size = spread("MaxUnpool", "kernel_shape", kernel_shape, rank, 1)
    steps = spread("MaxUnpool", "strides", strides, rank, 1)
    begins, ends = paddings("MaxUnpool", pads, rank)
    shape = list(X.shape[:2])
    for axis, length in enumerate(lengths):
        shape.append((length - 1) * steps[axis] + size[axis] - begins[axis] - ends[axis])
    implied = np.zeros(volume(shape), X.dtype)
    places = I.reshape(-1)
    if places.size and (places.min() < 0 or places.max() >= implied.size):
        raise ValueError(f"MaxUnpool: a position lies outside the shape {tuple(shape)}")
    implied[places] = X.reshape(-1)
    implied = implied.reshape(shape)
    if output_shape is None:
        return implied
    wanted = output_shape.tolist()
    if len(wanted) != X.ndim:
        raise ValueError(f"MaxUnpool: output_shape is {wanted}, expected {X.ndim} entries")
    result = np.zeros(wanted, X.dtype)
    common = tuple(slice(min(pair)) for pair in zip(shape, wanted, strict=True))
    result[common] = implied[common]
    return result
