"""Tallies: statistics of one value that grow feed by feed, in the child process or in ours.

Imports numpy only, as the child does. A tally never keeps an activation; what it keeps does not depend
on how many feeds it saw.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BINS = 1 << 16  # one for each bfloat16 number: sign, exponent and 7 bits of the mantissa of a float32
_BLOCK = 1 << 18  # elements counted at a time: their indices fit the cache
_HIGH_HALF = 1 if sys.byteorder == "little" else 0
_FIRST_NONFINITE = 0x7F80


@dataclass
class Extremes:
    """Counts and the least and greatest finite elements, per sample, of one array.

    Attributes:
        count: Elements.
        nonfinite: Those that are NaN or infinite.
        lows, highs: Of each sample; inf and -inf for a sample without finite elements.
        weight: Samples that each entry stands for: more than one where they cannot be told apart.
    """

    count: int
    nonfinite: int
    lows: list[float]
    highs: list[float]
    weight: int = 1

    def clipped(self, low: float, high: float) -> Extremes:
        """Return what Clip(low, high) makes of these; finite bounds turn infinite elements into finite ones."""
        some = [one <= two for one, two in zip(self.lows, self.highs, strict=True)]
        lows = [
            min(max(at, low), high) if is_some else at for at, is_some in zip(self.lows, some, strict=True)
        ]
        highs = [
            min(max(at, low), high) if is_some else at for at, is_some in zip(self.highs, some, strict=True)
        ]
        return Extremes(self.count, self.nonfinite, lows, highs, self.weight)


def real(array: Array) -> Array:
    """Return an array of a dtype that numpy reduces fast: float32, float64 or an integer type.

    Raises:
        TypeError: The array holds no real numbers.
    """
    if array.dtype.kind in "iu" or array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if array.dtype == np.float16 or array.dtype.kind == "V":  # float16, bfloat16, float8, int4 ...
        return array.astype(np.float32)
    raise TypeError(f"it holds {array.dtype} values, not real numbers")


def by_sample(array: Array, samples: int, axis: int | None) -> tuple[Array, int]:
    """Return (entries, elements) and the samples that each entry stands for.

    Args:
        array: The value in one run.
        samples: Samples in the feed of that run.
        axis: Where the samples are; None when not known: along the first axis if it can be split.
    """
    if not array.size:
        return array.reshape(1, 0), max(samples, 1)
    if axis is not None and axis < array.ndim and array.shape[axis] == samples:
        return np.moveaxis(array, axis, 0).reshape(samples, -1), 1
    if array.ndim and samples and array.shape[0] % samples == 0:
        return array.reshape(samples, -1), 1
    return array.reshape(1, -1), max(samples, 1)


def extremes(array: Array, samples: int = 1, axis: int | None = None) -> Extremes:
    """Return the extremes of an array that `real` gave."""
    rows, weight = by_sample(array, samples, axis)
    if not rows.size:
        return Extremes(0, 0, [], [], weight)
    lows, highs = rows.min(axis=1), rows.max(axis=1)  # NaN spreads, so that finite ones tell all
    nonfinite = 0
    if array.dtype.kind == "f" and not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        finite = np.isfinite(rows)
        nonfinite = int(rows.size - np.count_nonzero(finite))
        lows = rows.min(axis=1, initial=np.inf, where=finite)
        highs = rows.max(axis=1, initial=-np.inf, where=finite)
    return Extremes(int(rows.size), nonfinite, _floats(lows), _floats(highs), weight)


def _floats(array: Array) -> list[float]:
    found: list[float] = array.astype(np.float64).tolist()
    return found


def count_bins(array: Array, counts: Array) -> None:
    """Add the finite elements of an array that `real` gave to the counts (BINS,), in place."""
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.dtype != np.float32:
            if block.dtype == np.float64:  # finite ones beyond float32 count in the outermost bins
                most = np.finfo(np.float32).max
                block = np.where(np.isfinite(block), np.clip(block, -most, most), block)
            block = block.astype(np.float32)
        codes = block.view(np.uint16)[_HIGH_HALF::2]
        counts += np.bincount(codes, minlength=BINS)
    counts[_FIRST_NONFINITE : BINS // 2] = 0
    counts[BINS // 2 + _FIRST_NONFINITE :] = 0


class ChannelTally:
    """Statistics for each index of one axis; an index that some runs lack counts in those that have it."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = np.zeros(0, np.int64)
        self.low = np.zeros(0)
        self.high = np.zeros(0)
        self.sum = np.zeros(0)
        self.square = np.zeros(0)

    def grow(self, size: int) -> None:
        """Make room for `size` indices."""
        more = size - len(self.count)
        if more > 0:
            self.count = np.concatenate([self.count, np.zeros(more, np.int64)])
            self.low = np.concatenate([self.low, np.full(more, np.inf)])
            self.high = np.concatenate([self.high, np.full(more, -np.inf)])
            self.sum = np.concatenate([self.sum, np.zeros(more)])
            self.square = np.concatenate([self.square, np.zeros(more)])

    def add(self, array: Array, *, finite: bool) -> None:
        """Add an array; `finite` says that all its elements are.

        Raises:
            ValueError: It has no such axis.
        """
        if not -array.ndim <= self.axis < array.ndim:
            raise ValueError(f"axis {self.axis} does not exist in shape {list(array.shape)}")
        axis = self.axis % array.ndim
        size = array.shape[axis]
        self.grow(size)
        if not array.size:
            return
        outer = int(np.prod(array.shape[:axis]))
        split = array.reshape(outer, size, -1)
        here = slice(0, size)
        step = max(1, (1 << 20) // max(1, size * split.shape[2]))
        for start in range(0, outer, step):  # float64 copies of a block only
            block = split[start : start + step].astype(np.float64)
            kept: Any = True
            count = block.shape[0] * block.shape[2]
            if not finite:
                kept = np.isfinite(block)
                count = np.count_nonzero(kept, axis=(0, 2))
                block = np.where(kept, block, 0.0)
            low = block.min(axis=(0, 2), initial=np.inf, where=kept)
            high = block.max(axis=(0, 2), initial=-np.inf, where=kept)
            self.count[here] += count
            self.low[here] = np.minimum(self.low[here], low)
            self.high[here] = np.maximum(self.high[here], high)
            self.sum[here] += block.sum(axis=(0, 2))
            self.square[here] += np.einsum("oci,oci->c", block, block)

    def state(self) -> dict[str, Any]:
        """Return what it holds, by name."""
        return {name: getattr(self, name) for name in ("axis", "count", "low", "high", "sum", "square")}


@dataclass
class Tally:
    """The statistics of one value so far."""

    histogram: bool = False
    axis: int | None = None
    runs: int = 0
    count: int = 0
    nonfinite: int = 0
    low: float = np.inf
    high: float = -np.inf
    samples: int = 0
    low_sum: float = 0.0
    high_sum: float = 0.0
    bins: Array | None = None
    channels: ChannelTally | None = None

    def __post_init__(self) -> None:
        """Make room for what was asked for."""
        if self.histogram:
            self.bins = np.zeros(BINS, np.int64)
        if self.axis is not None:
            self.channels = ChannelTally(self.axis)

    def add(self, array: Array, samples: int = 1, axis: int | None = None) -> Extremes:
        """Add the value of one run, as `by_sample` takes it, and return its extremes.

        Raises:
            TypeError: The array holds no real numbers.
            ValueError: It lacks the axis of the channels.
        """
        array = real(array)
        found = extremes(array, samples, axis)
        self.take(found)
        if self.bins is not None:
            count_bins(array, self.bins)
        if self.channels is not None:
            self.channels.add(array, finite=not found.nonfinite)
        return found

    def take(self, found: Extremes) -> None:
        """Add extremes alone."""
        self.runs += 1
        self.count += found.count
        self.nonfinite += found.nonfinite
        weight = found.weight
        for low, high in zip(found.lows, found.highs, strict=True):
            if low <= high:
                self.low = min(self.low, low)
                self.high = max(self.high, high)
                self.samples += weight
                self.low_sum += low * weight
                self.high_sum += high * weight

    def state(self) -> dict[str, Any]:
        """Return what it holds, ready to be sent; the nonempty bins only."""
        names = ("runs", "count", "nonfinite", "low", "high", "samples", "low_sum", "high_sum")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.bins is not None:
            codes = np.flatnonzero(self.bins)
            state["codes"], state["counts"] = codes.astype(np.uint16), self.bins[codes]
        if self.channels is not None:
            state["channels"] = self.channels.state()
        return state
