"""The entropy criterion: the range whose quantized distribution diverges least from the one seen.

Migacz 2017, "8-bit inference with TensorRT", on the logarithmic histogram resampled to linear bins.
"""

from __future__ import annotations

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.quantization.range_errors import Bins
from onnxslim_lab.quantization.types import QuantType

_BINS_PER_LEVEL = 16  # 2,048 linear bins for 128 levels, as in TensorRT
_SHARES = np.linspace(1, 1 / _BINS_PER_LEVEL, 128)  # of the full range


def least_divergence(
    bins: Bins, full: tuple[float, float], kind: QuantType, *, symmetric: bool
) -> tuple[float, float]:
    """Return the range of least divergence among shares of the full one.

    Elements equal to zero are left out: zero is exact on every grid, and the peak that a Relu leaves there
    would count as a loss of every wider range.

    Args:
        bins: (lower ends, upper ends, shares), each (bins,).
        full: Range of all elements, with 0 in it.
        kind: Type of the codes; more than 8 bits and float8 keep the full range.
        symmetric: Whether the grid will be; the histogram is that of magnitudes then.
    """
    if kind.bits > 8 or kind.floating or full == (0.0, 0.0):
        return full
    low, high, shares = bins
    tiny = np.finfo(np.float32).tiny
    some = np.maximum(np.abs(low), np.abs(high)) > tiny
    low, high, shares = low[some], high[some], shares[some]
    levels = 1 << kind.bits - symmetric
    if symmetric:
        low, high = np.minimum(np.abs(low), np.abs(high)), np.maximum(np.abs(low), np.abs(high))
        full = (0.0, full[1])
    count = levels * _BINS_PER_LEVEL
    linear = resample(low, high, shares, np.linspace(*full, count + 1))
    zero = round(-full[0] / (full[1] - full[0]) * count)
    best, least = 1.0, np.inf
    for share in _SHARES:
        first, last = round(zero * (1 - share)), round(zero + (count - zero) * share)
        loss = divergence(linear, first, last, levels)
        if loss < least:
            best, least = float(share), loss
    return (-full[1] * best, full[1] * best) if symmetric else (full[0] * best, full[1] * best)


def resample(low: Array, high: Array, shares: Array, edges: Array) -> Array:
    """Return the shares of bins [low, high], which may overlap, in the bins between `edges` (ascending).

    >>> resample(np.array([0.0]), np.array([1.0]), np.array([1.0]), np.array([0.0, 0.25, 1.0]))
    array([0.25, 0.75])
    """
    width = np.diff(edges)[0]
    result = np.zeros(len(edges) - 1)
    wide = high - low > width
    place = np.searchsorted(edges, (low[~wide] + high[~wide]) / 2, side="right") - 1
    np.add.at(result, np.clip(place, 0, len(result) - 1), shares[~wide])
    for start, end, share in zip(low[wide], high[wide], shares[wide], strict=True):
        upto = (np.clip(edges, start, end) - start) / (end - start)
        result += np.diff(upto) * share
    return result


def divergence(shares: Array, first: int, last: int, levels: int) -> float:
    """Return the divergence of a linear histogram from its bins first..last merged to `levels` levels.

    What lies outside is added to the outermost bins of the distribution (it is clipped there) but not to
    its quantized form, which is spread evenly over the filled bins of each level.
    """
    inside = shares[first:last]
    actual = inside.copy()
    actual[0] += shares[:first].sum()
    actual[-1] += shares[last:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    filled = actual > 0
    sums = np.bincount(level, inside, levels)
    often = np.bincount(level[filled], minlength=levels)
    coarse = (sums / np.maximum(often, 1))[level][filled]
    kept = actual[filled] / actual.sum()
    coarse = np.maximum(coarse / max(coarse.sum(), 1e-300), 1e-9)
    return float(np.sum(kept * np.log(kept / coarse)))
