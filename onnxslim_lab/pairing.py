"""Paired timing: two things run in turn, their ratio with a confidence interval, and a verdict that may be none.

Runs in turn see the same clock rates and neighbours, so that the ratio of a pair is steadier than either time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxslim_lab.base import Progress, silent

Float64 = npt.NDArray[np.float64]
Timed = Callable[[int, int], float]
"""Runs feed number a so many times in a row and returns the seconds of all of them."""

_BLOCK = 0.01  # seconds that a timed block lasts at least: shorter ones measure the clock and the caches
_LONGEST = 1000  # runs in a block
_RESAMPLES = 4000

Verdict = Literal["faster", "slower", "undecided"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Seconds of one run, measured in turn.

    Attributes:
        first, second: Seconds, (pairs,) each.
        block: Runs that each of them is the mean of.
    """

    first: Float64
    second: Float64
    block: int


@dataclass(frozen=True)
class Ratio:
    """The second's time over the first's: median over the pairs, with its 95 % confidence interval."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """What can be said of the second: nothing when the interval contains 1."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "undecided"


def measure_pairs(
    first: Timed,
    second: Timed,
    *,
    pairs: int,
    warmup: int,
    feeds: int = 1,
    progress: Progress = silent,
) -> Pairs:
    """Time two things in turn, now one first, now the other.

    Args:
        first: What to time.
        second: What to compare it with.
        pairs: How many times each is timed.
        warmup: Runs of each, for every feed, that are not timed.
        feeds: Feeds there are; pair i takes feed i modulo this.
        progress: Told how many pairs are done.
    """
    for feed in range(feeds):
        for timed in (first, second):
            timed(feed, max(1, warmup))
    quickest = min(timed(0, 1) for timed in (first, second))
    block = min(_LONGEST, max(1, math.ceil(_BLOCK / max(quickest, 1e-9))))
    seconds = np.zeros((pairs, 2))
    for pair in range(pairs):
        progress(pair, pairs, "timing in turn")
        order = ((0, first), (1, second))
        for column, timed in order if pair % 2 == 0 else order[::-1]:
            seconds[pair, column] = timed(pair % feeds, block) / block
    return Pairs(seconds[:, 0], seconds[:, 1], block)


def ratio_of(pairs: Pairs, seed: int = 0) -> Ratio:
    """Return the median of the pairs' ratios with its 95 % interval: a bootstrap over the pairs.

    >>> ratio_of(Pairs(np.ones(9), np.full(9, 2.0), 1)).verdict
    'slower'
    """
    ratios = pairs.second / pairs.first
    chosen = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))
