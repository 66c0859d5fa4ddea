"""Operators that read an image between its positions: GridSample, AffineGrid, DeformConv."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.conv import check
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.resize import cubic_weights
from onnxslim_lab.kernels.windows import Ints, slide

Resolve = Callable[[Array, int], Array]
"""From positions and a length to positions; those still outside count as zero."""


def read(image: Array, places: Sequence[Array], resolve: Resolve | None = None) -> Array:
    """Return the values (C, P) of an image (C, lengths...) at integral positions, zero outside.

    Args:
        places: For each axis float or int (P,).
        resolve: Moves positions into the image, unless given none are.
    """
    flat = np.zeros(places[0].shape, np.int64)
    inside = np.ones(places[0].shape, np.bool_)
    for place, length in zip(places, image.shape[1:], strict=True):
        moved = place if resolve is None else resolve(place, length)
        inside &= (moved >= 0) & (moved < length)
        flat = flat * length + np.nan_to_num(np.clip(moved, 0, max(length - 1, 0))).astype(np.int64)
    if image[0].size == 0:
        return np.zeros((image.shape[0], flat.size), image.dtype)
    values = image.reshape(image.shape[0], -1)[:, flat]
    return values if inside.all() else np.where(inside, values, np.zeros((), image.dtype))


def blend(image: Array, points: Sequence[Array], mode: str, resolve: Resolve | None = None) -> Array:
    """Return the values (C, P) of an image (C, lengths...) between positions, linear or cubic.

    Args:
        points: For each axis float (P,).
    """
    floors = [np.floor(point) for point in points]
    steps = range(2) if mode == "linear" else range(-1, 3)
    weights: list[list[Array]] = []
    for point, floor in zip(points, floors, strict=True):
        part = point - floor
        if mode == "linear":
            weights.append([1 - part, part])
        else:
            weights.append([cubic_weights(part - step, -0.75).astype(part.dtype) for step in steps])
    total = np.zeros((image.shape[0], points[0].size), image.dtype)
    for corner in itertools.product(range(len(steps)), repeat=len(points)):
        weight = np.ones((), points[0].dtype)
        for axis, number in enumerate(corner):
            weight = weight * weights[axis][number]
        places = [floor + steps[number] for floor, number in zip(floors, corner, strict=True)]
        total += read(image, places, resolve) * weight
    return total


def reflect(x: Array, low: float, high: float) -> Array:
    """Return positions mirrored at both ends until they lie within."""
    if high <= low:
        return np.zeros_like(x)
    span = high - low
    offset = np.mod(x - low, 2 * span)
    return np.asarray(np.where(offset > span, 2 * span - offset, offset) + low)


def resolver(padding_mode: str, *, align_corners: bool) -> Resolve | None:
    """Return how positions outside the image are moved into it.

    Raises:
        ValueError: The padding mode is unknown.
    """
    if padding_mode == "zeros":
        return None
    if padding_mode == "border":
        return lambda x, length: np.clip(x, 0, length - 1)
    if padding_mode == "reflection":
        edge = 0.0 if align_corners else 0.5
        return lambda x, length: reflect(x, -edge, length - 1 + edge)
    raise ValueError(f"GridSample: padding_mode {padding_mode!r} is not zeros, border or reflection")


@kernel("GridSample", since=16)
def GridSample_16(
    X: Array,
    grid: Array,
    *,
    align_corners: int = 0,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Array:
    """Return X sampled at the grid; mode bilinear, nearest or bicubic."""
    plain = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return GridSample_20(X, grid, align_corners=align_corners, mode=plain, padding_mode=padding_mode)


@kernel("GridSample", since=20)
def GridSample_20(
    X: Array,
    grid: Array,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Array:
    """Return X (N, C, D1, ...) sampled at the grid (N, P1, ..., rank): (N, C, P1, ...).

    Grid positions go from -1 to 1, the last spatial axis first.

    Raises:
        ValueError: The shapes or a mode do not fit.
    """
    rank = X.ndim - 2
    if rank < 1 or grid.ndim != X.ndim or grid.shape[-1] != rank or grid.shape[0] != X.shape[0]:
        raise ValueError(
            f"GridSample: the grid has shape {grid.shape}, expected ({X.shape[0]}, ..., {rank}) of rank {X.ndim}"
        )
    if mode not in {"linear", "nearest", "cubic"}:
        raise ValueError(f"GridSample: mode {mode!r} is not linear, nearest or cubic")
    resolve = resolver(padding_mode, align_corners=bool(align_corners))
    x = X if mode == "nearest" else X.astype(np.float64) if X.dtype.kind in "iub" else wide(X)
    places = wide(grid).reshape(X.shape[0], -1, rank)
    y = np.empty((*X.shape[:2], places.shape[1]), x.dtype)
    for n in range(X.shape[0]):
        points = []
        for axis, length in enumerate(X.shape[2:]):
            place = places[n, :, rank - 1 - axis]
            points.append((place + 1) / 2 * (length - 1) if align_corners else ((place + 1) * length - 1) / 2)
        if mode == "nearest":
            y[n] = read(x[n], [np.rint(point) for point in points], resolve)
        else:
            y[n] = blend(x[n], points, mode, resolve)
    return y.astype(X.dtype, copy=False).reshape(*X.shape[:2], *grid.shape[1:-1])


@kernel("AffineGrid", since=20)
def AffineGrid(theta: Array, size: Array, *, align_corners: int = 0) -> Array:
    """Return the grid (N, D1, ..., rank) that theta (N, rank, rank + 1) maps the positions of size to.

    Raises:
        ValueError: The shapes do not fit.
    """
    lengths = size.tolist()[2:]
    rank = len(lengths)
    if rank not in {2, 3} or theta.shape != (size[0], rank, rank + 1):
        raise ValueError(
            f"AffineGrid: theta has shape {theta.shape}, expected ({size[0]}, {rank}, {rank + 1}) with rank 2 or 3"
        )
    lines = []
    for length in lengths:
        index = np.arange(length, dtype=np.float64)
        even = index * 2 / max(length - 1, 1) - 1 if align_corners else (2 * index + 1) / max(length, 1) - 1
        lines.append(even)
    axes = np.meshgrid(*lines, indexing="ij")
    points = np.stack([*reversed(axes), np.ones_like(axes[0])], axis=-1)
    precise = theta.astype(np.float64)
    grid = np.matmul(points.reshape(1, -1, rank + 1), precise.transpose(0, 2, 1))
    return np.asarray(grid.reshape(theta.shape[0], *lengths, rank), theta.dtype)


@kernel("DeformConv", since=19)
def DeformConv(
    X: Array,
    W: Array,
    offset: Array,
    B: Array | None = None,
    mask: Array | None = None,
    *,
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    offset_group: int = 1,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the convolution of X whose taps read at positions moved by `offset`, times `mask`.

    Args:
        X: (N, C, D1, ...).
        W: (M, C / group, k1, ...).
        offset: (N, offset_group * taps * rank, output...), for every tap one number per axis.
        B: (M,).
        mask: (N, offset_group * taps, output...).

    Raises:
        ValueError: The shapes do not fit.
    """
    check("DeformConv", X, W, B, group, kernel_shape)
    window = slide("DeformConv", X.shape[2:], W.shape[2:], strides, dilations, pads)
    rank, taps, batch = X.ndim - 2, int(np.prod(W.shape[2:])), X.shape[0]
    if offset_group < 1 or X.shape[1] % offset_group:
        raise ValueError(f"DeformConv: {X.shape[1]} channels do not divide into {offset_group} offset groups")
    expected = (batch, offset_group * taps * rank, *window.output)
    if offset.shape != expected:
        raise ValueError(f"DeformConv: offset has shape {offset.shape}, expected {expected}")
    expected = (batch, offset_group * taps, *window.output)
    if mask is not None and mask.shape != expected:
        raise ValueError(f"DeformConv: mask has shape {mask.shape}, expected {expected}")
    x = wide(X)
    moved = wide(offset).reshape(batch, offset_group, taps, rank, *window.output)
    weight = None if mask is None else wide(mask).reshape(batch, offset_group, 1, -1)
    images = x.reshape(batch, offset_group, -1, *X.shape[2:])
    columns = np.empty((batch, X.shape[1], taps * int(np.prod(window.output))), x.dtype)
    parts = columns.reshape(batch, offset_group, X.shape[1] // offset_group, -1)
    bases = []
    for axis in range(rank):
        out = np.arange(window.output[axis]) * window.strides[axis] - window.begins[axis]
        tap = np.arange(window.kernel[axis]) * window.dilations[axis]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = len(tap), len(out)
        full = np.broadcast_to((tap[:, None] + out).reshape(shape), (*window.kernel, *window.output))
        bases.append(full.reshape(taps, *window.output).astype(x.dtype))
    for n, g in np.ndindex(batch, offset_group):
        points = [(bases[axis] + moved[n, g, :, axis]).reshape(-1) for axis in range(rank)]
        values = blend(images[n, g], points, "linear")
        parts[n, g] = values if weight is None else values * weight[n, g]
    matrix = wide(W).reshape(group, W.shape[0] // group, -1)
    depth = (X.shape[1] // group) * taps
    y = np.matmul(matrix, columns.reshape(batch, group, depth, -1))
    y = y.reshape(batch, W.shape[0], *window.output)
    if B is not None:
        y += wide(B).reshape(-1, *[1] * rank)
    return np.asarray(y, X.dtype)
