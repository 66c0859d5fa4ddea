"""What is known of one value: range, histogram, statistics per channel. All of it merges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.worker.tally import BINS

Array = NDArray[Any]

_MIDDLE = BINS // 2  # codes from here on are negative numbers
_MOST = 0x7F80  # codes of finite numbers of one sign


def place_of(codes: Array) -> Array:
    """Return the place of each code on the number line: bin `place` lies between edges place, place + 1."""
    codes = codes.astype(np.int64)
    return np.where(codes < _MIDDLE, codes + _MOST, _MIDDLE + _MOST - 1 - codes)


def edge(places: Array) -> Array:
    """Return the edges at the given places, float64: the bfloat16 numbers in order, with zero once."""
    steps = np.asarray(places, np.int64) - _MOST
    halves = np.minimum(np.abs(steps), _MOST).astype(np.uint32) << 16
    sizes = halves.view(np.float32).astype(np.float64)
    sizes = np.where(np.abs(steps) >= _MOST, 2.0**128, sizes)
    return np.where(steps < 0, -sizes, sizes)


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often each magnitude occurs: bins between neighbouring bfloat16 numbers, 128 to an octave.

    The bins are the same for every value and every run, so that histograms merge exactly. `counts` and
    `edges` span the bins that are not empty; a range with both signs has the many bins near zero between
    them, for which `filled` is shorter.

    Attributes:
        places: Places of the nonempty bins, in order.
        filled_counts: Elements in each of these, int64.
    """

    places: Array
    filled_counts: Array

    @classmethod
    def of(cls, codes: Array, counts: Array) -> Histogram:
        """Return the histogram of bfloat16 codes that occur so often."""
        places = place_of(codes)
        order = np.argsort(places)
        return cls(places[order], np.asarray(counts, np.int64)[order])

    @property
    def total(self) -> int:
        """Number of elements."""
        return int(self.filled_counts.sum())

    @property
    def filled(self) -> tuple[Array, Array, Array]:
        """The nonempty bins: (lower edges, upper edges, counts)."""
        return edge(self.places), edge(self.places + 1), self.filled_counts

    @cached_property
    def counts(self) -> Array:
        """Elements in every bin from the first nonempty one to the last, int64 (bins,)."""
        if not len(self.places):
            return np.zeros(0, np.int64)
        counts = np.zeros(int(self.places[-1] - self.places[0]) + 1, np.int64)
        counts[self.places - self.places[0]] = self.filled_counts
        return counts

    @cached_property
    def edges(self) -> Array:
        """Edges of these bins, float64 (bins + 1,), increasing."""
        if not len(self.places):
            return np.zeros(1)
        return edge(np.arange(self.places[0], self.places[-1] + 2))

    @property
    def centers(self) -> Array:
        """Middles of these bins, float64 (bins,)."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    def quantile(self, q: float) -> float:
        """Return the value below which the fraction q of the elements lies, to within one bin.

        Raises:
            ParameterError: q is not in [0, 1], or the histogram is empty.
        """
        if not 0 <= q <= 1:
            raise ParameterError(f"a quantile is a fraction between 0 and 1, not {q:g}")
        if not len(self.places):
            raise ParameterError("the histogram is empty: no finite element was seen")
        sums = np.cumsum(self.filled_counts)
        rank = q * (sums[-1] - 1) + 0.5  # numpy's ranks, elements in the middle of their share of a bin
        index = int(np.searchsorted(sums, rank))
        low, high, counts = (part[index] for part in self.filled)
        share = (rank - (sums[index] - counts)) / counts
        return float(low + (high - low) * min(max(share, 0.0), 1.0))

    def merge(self, other: Histogram) -> Histogram:
        """Return the histogram of both."""
        places, where = np.unique(np.concatenate([self.places, other.places]), return_inverse=True)
        counts = np.zeros(len(places), np.int64)
        np.add.at(counts, where, np.concatenate([self.filled_counts, other.filled_counts]))
        return Histogram(places, counts)


@dataclass(frozen=True, eq=False)
class Channels:
    """Statistics of the finite elements at each index of one axis.

    Attributes:
        axis: The axis.
        count: Finite elements, int64.
        low, high: Least and greatest, float64; inf and -inf where there are none.
        mean, mean_square: Their means, float64; 0 where there are none.
    """

    axis: int
    count: Array
    low: Array
    high: Array
    mean: Array
    mean_square: Array

    def merge(self, other: Channels) -> Channels:
        """Return the statistics of both.

        Raises:
            ParameterError: They are along different axes.
        """
        if self.axis != other.axis:
            raise ParameterError(f"statistics along axis {self.axis} do not merge with axis {other.axis}")
        size = max(len(self.count), len(other.count))
        first, second = (_padded(part, size) for part in (self, other))
        count = first.count + second.count
        share = np.divide(second.count, count, out=np.zeros(size), where=count > 0)
        return Channels(
            self.axis,
            count,
            np.minimum(first.low, second.low),
            np.maximum(first.high, second.high),
            first.mean + (second.mean - first.mean) * share,
            first.mean_square + (second.mean_square - first.mean_square) * share,
        )


def _padded(channels: Channels, size: int) -> Channels:
    """Return the statistics with indices without elements at the end."""
    more = (0, size - len(channels.count))
    return Channels(
        channels.axis,
        np.pad(channels.count, more),
        np.pad(channels.low, more, constant_values=np.inf),
        np.pad(channels.high, more, constant_values=-np.inf),
        np.pad(channels.mean, more),
        np.pad(channels.mean_square, more),
    )


@dataclass(frozen=True, eq=False)
class ValueStatistics:
    """What was seen of one value.

    Attributes:
        count: Elements.
        nonfinite: Those that are NaN or infinite; they count in nothing else.
        low, high: Least and greatest finite element; inf and -inf (see `empty`) where there is none.
        average_low, average_high: Means over the samples of the least and the greatest element of each; NaN
            where they were not asked for.
        samples: Samples with a finite element; 0 where no averages were asked for.
        histogram: Of all finite elements, if asked for.
        channels: Statistics along an axis, if asked for.
    """

    count: int
    nonfinite: int
    low: float
    high: float
    average_low: float
    average_high: float
    samples: int
    histogram: Histogram | None = None
    channels: Channels | None = None

    @property
    def empty(self) -> bool:
        """Whether no finite element was seen."""
        return self.count == self.nonfinite

    @classmethod
    def of(cls, state: dict[str, Any]) -> ValueStatistics:
        """Return the statistics that the state of a Tally holds."""
        samples = state["samples"]
        histogram = Histogram.of(state["codes"], state["counts"]) if "codes" in state else None
        found = state.get("channels")
        channels = None
        if found:
            count = np.maximum(found["count"], 1)
            channels = Channels(
                found["axis"],
                found["count"],
                found["low"],
                found["high"],
                found["sum"] / count,
                found["square"] / count,
            )
        return cls(
            state["count"],
            state["nonfinite"],
            state["low"],
            state["high"],
            state["low_sum"] / samples if samples else 0.0,
            state["high_sum"] / samples if samples else 0.0,
            samples,
            histogram,
            channels,
        )

    def merge(self, other: ValueStatistics) -> ValueStatistics:
        """Return the statistics of both; histograms and channels that only one has are left out."""
        samples = self.samples + other.samples
        share = other.samples / samples if samples else 0.0
        histogram = self.histogram.merge(other.histogram) if self.histogram and other.histogram else None
        channels = self.channels.merge(other.channels) if self.channels and other.channels else None
        return ValueStatistics(
            self.count + other.count,
            self.nonfinite + other.nonfinite,
            min(self.low, other.low),
            max(self.high, other.high),
            self.average_low + (other.average_low - self.average_low) * share,
            self.average_high + (other.average_high - self.average_high) * share,
            samples,
            histogram,
            channels,
        )
