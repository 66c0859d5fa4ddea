"""Boxes: RoiAlign, MaxRoiPool and NonMaxSuppression; and CenterCropPad."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.shape import positive_axes


def expect_images(op_type: str, X: Array, rois: Array, columns: int) -> None:
    """Check the shapes of images (N, C, H, W) and regions (count, columns).

    Raises:
        ValueError: They do not fit.
    """
    if X.ndim != 4 or rois.ndim != 2 or rois.shape[1] != columns:
        raise ValueError(
            f"{op_type}: X has shape {X.shape} and rois {rois.shape}, expected (N, C, H, W) and (R, {columns})"
        )


def samples(start: Array, size: Array, bins: int, per_bin: int, length: int) -> tuple[Array, ...]:
    """Return for the sampling points of one axis: lower and upper positions, their weights, validity."""
    step = size / np.asarray(bins, size.dtype)
    offsets = (np.arange(per_bin, dtype=size.dtype) + size.dtype.type(0.5)) * step / size.dtype.type(per_bin)
    points = (start + np.arange(bins, dtype=size.dtype)[:, None] * step + offsets).reshape(-1)
    valid = (points >= -1) & (points <= length)
    points = np.maximum(points, 0)
    low = np.minimum(points.astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    part = np.where(low >= length - 1, 0, points - low).astype(size.dtype)
    return low, high, 1 - part, part, valid


def roi_align(
    X: Array,
    rois: Array,
    batch_indices: Array,
    mode: str,
    output: tuple[int, int],
    sampling_ratio: int,
    spatial_scale: float,
    *,
    half_pixel: bool,
) -> Array:
    """Return every region of X resampled to the output's size; see `RoiAlign_16`."""
    expect_images("RoiAlign", X, rois, 4)
    if mode not in {"avg", "max"}:
        raise ValueError(f"RoiAlign: mode {mode!r} is not avg or max")
    if batch_indices.shape != rois.shape[:1]:
        raise ValueError(
            f"RoiAlign: batch_indices has shape {batch_indices.shape}, expected {rois.shape[:1]}"
        )
    x, boxes = wide(X), wide(rois)
    kind = boxes.dtype.type
    y = np.empty((len(rois), X.shape[1], *output), x.dtype)
    shift = kind(0.5 if half_pixel else 0)
    for number, batch in enumerate(batch_indices.tolist()):
        if not 0 <= batch < X.shape[0]:
            raise ValueError(f"RoiAlign: batch index {batch} is not within 0 and {X.shape[0] - 1}")
        x1, y1, x2, y2 = boxes[number] * kind(spatial_scale) - shift
        height, width = y2 - y1, x2 - x1
        if not half_pixel:
            height, width = max(height, kind(1)), max(width, kind(1))
        rows = sampling_ratio or max(math.ceil(height / output[0]), 0)
        columns = sampling_ratio or max(math.ceil(width / output[1]), 0)
        if rows == 0 or columns == 0:
            y[number] = 0
            continue
        top, bottom, above, below, in_y = samples(y1, height, output[0], rows, X.shape[2])
        left, right, before, after, in_x = samples(x1, width, output[1], columns, X.shape[3])
        image = x[batch]
        inside = in_y[:, None] & in_x
        corners = [
            np.where(inside, image[:, i[:, None], j] * (u[:, None] * v), np.zeros((), x.dtype))
            for i, u in ((top, above), (bottom, below))
            for j, v in ((left, before), (right, after))
        ]
        shape = (X.shape[1], output[0], rows, output[1], columns)
        if mode == "avg":
            total = corners[0] + corners[1] + corners[2] + corners[3]
            y[number] = total.reshape(shape).mean(axis=(2, 4))
        else:
            best = np.maximum(np.maximum(corners[0], corners[1]), np.maximum(corners[2], corners[3]))
            y[number] = best.reshape(shape).max(axis=(2, 4))
    return y.astype(X.dtype, copy=False)


@kernel("RoiAlign", since=10)
def RoiAlign_10(
    X: Array,
    rois: Array,
    batch_indices: Array,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Array:
    """Return every region resampled as `RoiAlign_16` does with the mode output_half_pixel."""
    size = (output_height, output_width)
    return roi_align(X, rois, batch_indices, mode, size, sampling_ratio, spatial_scale, half_pixel=False)


@kernel("RoiAlign", since=16)
def RoiAlign_16(
    X: Array,
    rois: Array,
    batch_indices: Array,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Array:
    """Return every region (x1, y1, x2, y2) of X (N, C, H, W) resampled: (R, C, height, width).

    Each output is the mean, or the greatest weighted corner, of `sampling_ratio` ** 2 points read
    bilinearly; ceil(region / output) ** 2 points with sampling_ratio 0.

    Raises:
        ValueError: A shape, a mode or a batch index does not fit.
    """
    known = {"half_pixel": True, "output_half_pixel": False}
    if coordinate_transformation_mode not in known:
        raise ValueError(
            f"RoiAlign: {coordinate_transformation_mode!r} is not half_pixel or output_half_pixel"
        )
    half = known[coordinate_transformation_mode]
    size = (output_height, output_width)
    return roi_align(X, rois, batch_indices, mode, size, sampling_ratio, spatial_scale, half_pixel=half)


def bins(start: int, end: int, count: int, length: int) -> list[slice]:
    """Return the positions of each of `count` bins between two ends, cut to the image."""
    step = np.float32(max(end - start + 1, 1)) / np.float32(count)
    lows = np.floor(np.arange(count, dtype=np.float32) * step).astype(int) + start
    highs = np.ceil(np.arange(1, count + 1, dtype=np.float32) * step).astype(int) + start
    return [
        slice(min(max(low, 0), length), min(max(high, 0), length))
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True)
    ]


@kernel("MaxRoiPool", since=1)
def MaxRoiPool(X: Array, rois: Array, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0) -> Array:
    """Return the greatest values in a grid over every region (batch, x1, y1, x2, y2) of X; zero if empty.

    Raises:
        ValueError: A shape or a batch index does not fit.
    """
    expect_images("MaxRoiPool", X, rois, 5)
    y = np.zeros((len(rois), X.shape[1], *pooled_shape), X.dtype)
    for number, roi in enumerate(rois.astype(np.float64)):
        batch = int(roi[0])
        if not 0 <= batch < X.shape[0]:
            raise ValueError(f"MaxRoiPool: batch index {batch} is not within 0 and {X.shape[0] - 1}")
        x1, y1, x2, y2 = (int(np.floor(side * spatial_scale + 0.5)) for side in roi[1:])
        rows = bins(y1, y2, pooled_shape[0], X.shape[2])
        columns = bins(x1, x2, pooled_shape[1], X.shape[3])
        for i, row in enumerate(rows):
            strip = X[batch, :, row]
            for j, column in enumerate(columns):
                part = strip[:, :, column]
                if part.size:
                    y[number, :, i, j] = part.max(axis=(1, 2))
    return y


def survivors(boxes: Array, order: Array, most: int, threshold: float) -> list[int]:
    """Return the boxes that no better one overlaps by more than the threshold, best first.

    Args:
        boxes: (count, 4): lower and upper end of the first axis, then of the second... as y1, x1, y2, x2.
        order: Positions of the candidates, best first.
    """
    y1, x1, y2, x2 = boxes[order].T
    area = (y2 - y1) * (x2 - x1)
    kept: list[int] = []
    while order.size and len(kept) < most:
        kept.append(int(order[0]))
        height = np.minimum(y2[0], y2[1:]) - np.maximum(y1[0], y1[1:])
        width = np.minimum(x2[0], x2[1:]) - np.maximum(x1[0], x1[1:])
        shared = np.maximum(height, 0) * np.maximum(width, 0)
        union = area[0] + area[1:] - shared
        apart = ~((shared > 0) & (area[0] > 0) & (area[1:] > 0) & (shared / union > threshold))
        order, area = order[1:][apart], area[1:][apart]
        y1, x1, y2, x2 = (side[1:][apart] for side in (y1, x1, y2, x2))
    return kept


@kernel("NonMaxSuppression", since=10)
def NonMaxSuppression(
    boxes: Array,
    scores: Array,
    max_output_boxes_per_class: Array | None = None,
    iou_threshold: Array | None = None,
    score_threshold: Array | None = None,
    *,
    center_point_box: int = 0,
) -> Array:
    """Return (batch, class, box) of the boxes kept: int64, best first within a batch and class.

    Args:
        boxes: (N, S, 4) opposite corners y1, x1, y2, x2, or with center_point_box centre x, y, width, height.
        scores: (N, C, S).

    Raises:
        ValueError: The shapes do not fit or iou_threshold is not within 0 and 1.
    """
    if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape != (scores.shape[0], scores.shape[2], 4):
        raise ValueError(
            f"NonMaxSuppression: boxes {boxes.shape} and scores {scores.shape}, expected (N, S, 4) and (N, C, S)"
        )
    most = 0 if max_output_boxes_per_class is None else int(max_output_boxes_per_class.reshape(()))
    threshold = np.float32(0) if iou_threshold is None else np.float32(iou_threshold.reshape(()))
    if not 0 <= threshold <= 1:
        raise ValueError(f"NonMaxSuppression: iou_threshold is {threshold}, expected within 0 and 1")
    if center_point_box:
        x, y, width, height = np.moveaxis(boxes, 2, 0)
        corners = np.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], axis=2)
    else:
        first, second = boxes[..., :2], boxes[..., 2:]
        corners = np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=2)
    rows = []
    for batch, number in np.ndindex(*scores.shape[:2]) if most > 0 else ():
        score = scores[batch, number]
        order = np.arange(score.size)
        if score_threshold is not None:
            order = np.flatnonzero(score > score_threshold.reshape(()))
        order = order[np.argsort(-score[order], kind="stable")]
        rows += [(batch, number, kept) for kept in survivors(corners[batch], order, most, float(threshold))]
    return np.array(rows, np.int64).reshape(-1, 3)


@kernel("CenterCropPad", since=18)
def CenterCropPad(input_data: Array, shape: Array, *, axes: Sequence[int] | None = None) -> Array:
    """Return the input cut or filled with zeros around its centre so that the axes have these lengths.

    Raises:
        ValueError: There is not one length per axis.
    """
    chosen = positive_axes(axes, input_data.ndim) if axes is not None else list(range(input_data.ndim))
    if len(chosen) != shape.size:
        raise ValueError(f"CenterCropPad: shape has {shape.size} entries for {len(chosen)} axes")
    lengths = list(input_data.shape)
    source, target = [slice(None)] * input_data.ndim, [slice(None)] * input_data.ndim
    for axis, wanted in zip(chosen, shape.reshape(-1).tolist(), strict=True):
        length, lengths[axis] = lengths[axis], wanted
        common = min(length, wanted)
        cut, gap = (length - common) // 2, (wanted - common) // 2
        source[axis], target[axis] = slice(cut, cut + common), slice(gap, gap + common)
    result = np.zeros(lengths, input_data.dtype)
    result[tuple(target)] = input_data[tuple(source)]
    return result
