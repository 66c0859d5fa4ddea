"""The expected squared error of a quantized value, computed from its histogram."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.numerics import Grid, code_range, dequantize, grid_of, quantize
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.statistics import ValueStatistics

Bins = tuple[Array, Array, Array]

_POINTS = 5  # per bin, for types whose error has no closed form


def spread(statistics: ValueStatistics) -> Bins:
    """Return the nonempty bins as (lower ends, upper ends, shares of all elements), float64.

    The outermost bins end at the least and greatest element, so that a value met often, such as the 6 of
    Clip(0, 6), stays a point.
    """
    histogram = statistics.histogram
    assert histogram is not None
    low, high, counts = histogram.filled
    low = np.clip(low, statistics.low, statistics.high)
    high = np.clip(high, statistics.low, statistics.high)
    return low, high, counts / counts.sum()


def coarse(bins: Bins) -> Bins:
    """Return fewer bins for a search: 32 to an octave, one for what is below 2**-20 of the greatest magnitude.

    Bins that are points stay as they are.
    """
    low, high, shares = bins
    middle = (low + high) / 2
    size = np.abs(middle)
    least = float(size.max(initial=0)) * 2.0**-20
    octaves = np.log2(np.maximum(size, max(least, 1e-300)))
    key = np.where(size > least, np.floor(octaves * 32) + 1e6, 0) * np.sign(middle)
    alone = np.where(low == high, np.arange(len(low)), -1)
    fresh = np.concatenate([[True], (np.diff(key) != 0) | (np.diff(alone) != 0)])[: len(low)]
    starts = np.flatnonzero(fresh)
    ends = np.append(starts[1:], len(low)) - 1
    return low[starts], high[ends], np.add.reduceat(shares, starts)


def errors(
    bins: Bins,
    kind: QuantType,
    ends: Array,
    *,
    symmetric: bool,
    reduce_range: bool = False,
) -> tuple[Array, Array]:
    """Return the expected squared errors of many ranges at once.

    Args:
        bins: (lower ends, upper ends, shares), each (bins,).
        kind: Type of the codes.
        ends: Ranges (ranges, 2).
        symmetric: Whether the grids are.
        reduce_range: One bit less.

    Returns:
        (rounding, clipping), each (ranges,).
    """
    scale, zero_point = grid_of(ends[:, 0], ends[:, 1], kind, symmetric=symmetric, reduce_range=reduce_range)
    if kind.floating:
        return _float_errors(bins, kind, scale)
    least, greatest = code_range(kind, symmetric=symmetric, reduce_range=reduce_range)
    step = scale.astype(np.float64)[:, None]
    zero = zero_point.astype(np.float64)[:, None]
    bottom, top = least - zero, greatest - zero
    low, high = bins[0] / step, bins[1] / step
    width = high - low
    inner = [np.clip(end, bottom - 0.5, top + 0.5) for end in (low, high)]
    total = _squares(high, bottom, top) - _squares(low, bottom, top)
    rounding = _squares(inner[1], bottom, top) - _squares(inner[0], bottom, top)
    point = width < 1e-6
    middle = (low + high) / 2
    error = (middle - np.clip(np.rint(middle), bottom, top)) ** 2
    beyond = (middle < bottom - 0.5) | (middle > top + 0.5)
    safe = np.where(point, 1.0, width)
    rounded = np.where(point, np.where(beyond, 0.0, error), rounding / safe)
    clipped = np.where(point, np.where(beyond, error, 0.0), (total - rounding) / safe)
    square = step[:, 0] ** 2
    return (rounded @ bins[2]) * square, (clipped @ bins[2]) * square


def _squares(t: Array, bottom: Array, top: Array) -> Array:
    """Return the antiderivative of (t - nearest code)**2: a twelfth per whole code, a cubic between."""
    code = np.clip(np.rint(t), bottom, top)
    return np.asarray(code / 12 + (t - code) ** 3 / 3)


def _float_errors(bins: Bins, kind: QuantType, scale: Array) -> tuple[Array, Array]:
    """Return (rounding, clipping) for float8 by quantizing some points of every bin."""
    low, high, shares = bins
    places = (np.arange(_POINTS) + 0.5) / _POINTS
    points = (low + np.multiply.outer(places, high - low)).astype(np.float32)
    result = np.zeros((2, len(scale)))
    for index, step in enumerate(scale):
        grid = Grid(kind, step, np.zeros((), kind.dtype))
        squares = (dequantize(quantize(points, grid), grid).astype(np.float64) - points) ** 2
        beyond = np.abs(points) > kind.high * step
        result[0, index] = np.mean(np.where(beyond, 0, squares), 0) @ shares
        result[1, index] = np.mean(np.where(beyond, squares, 0), 0) @ shares
    return result[0], result[1]
