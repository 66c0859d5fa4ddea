"""The range of an activation that a quantized type shall cover, from its streaming statistics.

- minmax: all that was seen.
- percentile: without the outermost `100 - percentile` per cent, half of them at each end.
- entropy: least Kullback-Leibler divergence between the distribution and its quantized form (Migacz 2017,
  "8-bit inference with TensorRT"). Types of more than 8 bits and float8 keep all that was seen: their codes
  outnumber what a histogram tells apart.
- mse: least expected squared error, rounding and clipping together, both ends searched.
- average: mean over the samples of the least and the greatest element.
- auto: of all these, the one of least expected squared error. Statistics of one value cannot tell more; a
  caller that can run the model should compare the output errors of the candidates instead.

Histograms have logarithmic bins, 128 to an octave; elements are taken as evenly spread within a bin.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.range_entropy import least_divergence
from onnxslim_lab.quantization.range_errors import Bins, coarse, errors, spread
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.statistics import Histogram, ValueStatistics

Range = tuple[float, float]
Method = Literal["auto", "minmax", "percentile", "entropy", "mse", "average"]
METHODS: tuple[Method, ...] = get_args(Method)

_SHARES = 2.0 ** -np.arange(0, 12, 0.25)  # of the full range, coarse search
_UNSEEN = 4.0  # times the range over the elements seen
_INSIDE = np.linspace(-1, 1, 33)  # fine search, in units of a coarse step


def choose_range(
    statistics: ValueStatistics,
    kind: QuantType,
    method: Method,
    *,
    symmetric: bool,
    percentile: float = 99.99,
    reduce_range: bool = False,
) -> Range:
    """Return (low, high) to make a grid of with `grid_of`; low <= 0 <= high, and low = -high when symmetric.

    Args:
        statistics: Of the value; with a histogram, except for "minmax" and "average".
        kind: Type of the codes.
        method: One of METHODS.
        symmetric: Whether the grid will be.
        percentile: For "percentile" and as a candidate of "auto": of the elements covered.
        reduce_range: One bit less for 8-bit types, as for `grid_of`.

    Raises:
        ParameterError: The method does not exist, the percentile is not in (0, 100], or there is no histogram.
    """
    if method not in METHODS:
        raise ParameterError(f"ranges: {quote(method)} is no way to choose a range{suggest(method, METHODS)}")
    if not 0 < percentile <= 100:
        raise ParameterError(f"ranges: percentile {percentile:g} is not above 0 and at most 100")
    if statistics.empty:
        return 0.0, 0.0
    full = _closed(statistics.low, statistics.high, symmetric)
    if method == "minmax":
        return full
    if method == "average":
        if not statistics.samples:
            raise ParameterError("ranges: average needs the averages; collect with Want(average=True)")
        low = max(statistics.average_low, statistics.low)
        return _closed(low, min(statistics.average_high, statistics.high), symmetric)
    if statistics.histogram is None:
        raise ParameterError(f"ranges: {method} needs a histogram; collect with Want(histogram=True)")
    if method == "percentile":
        return _percentile(statistics.histogram, full, percentile, symmetric)
    bins = spread(statistics)
    if method == "entropy":
        return least_divergence(bins, full, kind, symmetric=symmetric)
    if method == "mse":
        return _least_error(bins, full, kind, symmetric, reduce_range)
    names: tuple[Method, ...] = ("mse", "minmax", "percentile", "entropy", "average")
    ranges = [
        choose_range(
            statistics, kind, name, symmetric=symmetric, percentile=percentile, reduce_range=reduce_range
        )
        for name in names
    ]
    ends = np.array(ranges)
    rounding, clipping = errors(bins, kind, ends, symmetric=symmetric, reduce_range=reduce_range)
    return ranges[int(np.argmin(rounding + clipping))]


def allow_for_unseen(ends: Range, statistics: ValueStatistics) -> Range:
    """Return a range with room for what more data would show; of many elements next to none.

    Of n elements spread evenly, the least and the greatest stay short of the true ends by 1/n of the range
    on average; bells and longer tails fall short by more, hence a few times that. It matters to values that
    each sample has one or a few of: 12 % at 32 elements, 0.01 % at 40,000. An end at 0 is not moved.
    """
    low, high = ends
    room = _UNSEEN * (high - low) / max(statistics.count, 1)
    return (low - room if low < 0 else low), (high + room if high > 0 else high)


def expected_error(
    statistics: ValueStatistics,
    kind: QuantType,
    low: float,
    high: float,
    *,
    symmetric: bool,
    reduce_range: bool = False,
) -> tuple[float, float]:
    """Return the mean squared error of an element quantized to the grid of [low, high], in two parts.

    Returns:
        (rounding, clipping): what elements within the grid and what those beyond its ends add to the mean.

    Raises:
        ParameterError: There is no histogram.
    """
    if statistics.histogram is None:
        raise ParameterError("ranges: the expected error needs a histogram")
    if statistics.empty:
        return 0.0, 0.0
    ends = np.array([[low, high]])
    parts = errors(spread(statistics), kind, ends, symmetric=symmetric, reduce_range=reduce_range)
    return float(parts[0][0]), float(parts[1][0])


def _closed(low: float, high: float, symmetric: bool) -> Range:
    """Return the range with 0 in it, widened to be symmetric when asked."""
    if symmetric:
        most = max(-low, high, 0.0)
        return -most, most
    return min(float(low), 0.0), max(float(high), 0.0)


def _percentile(histogram: Histogram, full: Range, percentile: float, symmetric: bool) -> Range:
    if not symmetric:
        tail = (1 - percentile / 100) / 2
        low, high = histogram.quantile(tail), histogram.quantile(1 - tail)
        return _closed(max(low, full[0]), min(high, full[1]), symmetric=False)
    lower, upper, counts = histogram.filled
    outer = np.maximum(np.abs(lower), np.abs(upper))
    order = np.argsort(outer, kind="stable")
    sums = np.cumsum(counts[order])
    rank = percentile / 100 * (sums[-1] - 1) + 0.5
    index = int(np.searchsorted(sums, rank))
    inner = np.minimum(np.abs(lower), np.abs(upper))[order][index]
    share = 1 - (sums[index] - rank) / counts[order][index]
    most = min(inner + (outer[order][index] - inner) * share, full[1])
    return -float(most), float(most)


def _least_error(bins: Bins, full: Range, kind: QuantType, symmetric: bool, reduce_range: bool) -> Range:
    """Return the range of least expected squared error: both ends together, then in turn, coarse to fine."""

    def best(ends: Array) -> Array:
        parts = errors(bins, kind, ends, symmetric=symmetric, reduce_range=reduce_range)
        return np.asarray(ends[int(np.argmin(parts[0] + parts[1]))])

    bins = coarse(bins)
    whole = np.asarray(full)
    ends = best(whole * _SHARES[:, None])
    if not symmetric and full[0] < 0 < full[1]:
        for _ in range(2):
            for side in (0, 1):
                trials = np.repeat(ends[None], len(_SHARES) + 1, 0)
                trials[1:, side] = whole[side] * _SHARES
                ends = best(trials)
    fine = 2.0 ** (0.25 * _INSIDE)
    sides = [[0, 1]] if symmetric else [[0, 1], [0], [1]]
    for _ in range(1 if symmetric else 2):
        for ends_moved in sides:
            trials = np.repeat(ends[None], len(fine) + 1, 0)
            trials[1:, ends_moved] *= fine[:, None]
            ends = best(np.clip(trials, full[0], full[1]))
    return float(ends[0]), float(ends[1])
