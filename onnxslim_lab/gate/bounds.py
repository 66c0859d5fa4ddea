"""Verdicts on statistical figures: one-sided bounds on paired samples, and how many more would decide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxslim_lab.gate.paired import Counts, Side, drop_bound, lower_share, p_value, upper_share
from onnxslim_lab.gate.result import Status
from onnxslim_lab.intervals import RESAMPLES, bootstrap_means

Float64 = npt.NDArray[np.float64]

MOST_NEEDED = 10**8  # samples; more are no answer
DIFFERING = 10  # fewer samples that differ show the bootstrap nothing of the tail
_RELATIVE = 0.1  # share of the error probability spent on the baseline's own value
EXACT_DROP = "exact unconditional test on discordant pairs (Tango score, Berger-Boos)"
EXACT_SHARE = "Clopper-Pearson"
EXACT_MEDIAN = "order statistics of the pairs (sign test)"


@dataclass(frozen=True)
class Judged:
    """A verdict on a statistical figure.

    Attributes:
        status: Pass when the bound keeps the limit, fail when the bound to the other side breaks it.
        bound: The one that decided; the one that must keep the limit when nothing is decided.
        needed: Samples at which it would be decided if the rates stay as they are; None when never.
        method: How the bound was made.
    """

    status: Status
    bound: float
    needed: int | None
    method: str


def judge_drop(counts: Counts, limit: float, alpha: float) -> Judged:
    """Judge the drop of right answers from paired samples.

    >>> judge_drop(Counts(1000, 0, 0), 0.01, 0.05).status
    'pass'
    """
    if p_value(counts, limit, "below", alpha) <= alpha:
        return Judged("pass", drop_bound(counts, "below", alpha), None, EXACT_DROP)
    if counts.drop > limit and p_value(counts, limit, "above", alpha) <= alpha:
        return Judged("fail", drop_bound(counts, "above", alpha), None, EXACT_DROP)
    side: Side = "above" if counts.drop > limit else "below"

    def decided(samples: int) -> bool:
        grown = Counts(
            samples,
            round(counts.lost / counts.samples * samples),
            round(counts.gained / counts.samples * samples),
        )
        return p_value(grown, limit, side, alpha) <= alpha

    needed = None if math.isclose(counts.drop, limit) else fewest(decided, counts.samples)
    return Judged("undecided", drop_bound(counts, "below", alpha), needed, EXACT_DROP)


def judge_relative_drop(counts: Counts, right: int, limit: float, alpha: float) -> Judged:
    """Judge the drop as a share of the baseline's value.

    The baseline's own value is bounded with a tenth of the error probability, the drop with the rest: the
    bound holds whatever the two have to do with each other.

    Args:
        counts: Paired samples.
        right: Samples that the baseline has right.
        limit: Largest share of the baseline's value that may be lost.
        alpha: Error probability.
    """
    spent = _RELATIVE * alpha
    least = lower_share(right, counts.samples, spent)
    most = upper_share(right, counts.samples, spent)
    if not least:
        return Judged("undecided", math.inf, None, f"{EXACT_DROP}; the baseline is never right")
    good = judge_drop(counts, limit * least, alpha - spent)
    method = f"{EXACT_DROP}; baseline's value by {EXACT_SHARE}, {_RELATIVE:.0%} of the error"
    if good.status == "pass":
        return Judged("pass", good.bound / least, None, method)
    bad = judge_drop(counts, limit * most, alpha - spent) if limit * most < 1 else good
    if bad.status == "fail":
        return Judged("fail", bad.bound / most, None, method)
    return Judged("undecided", good.bound / least, good.needed or bad.needed, method)


def judge_share(hits: int, samples: int, least: float, alpha: float) -> Judged:
    """Judge a proportion that must be at least so large.

    >>> judge_share(100, 100, 0.99, 0.05)
    Judged(status='undecided', bound=0.9704869503929601, needed=299, method='Clopper-Pearson')
    """
    low, high = lower_share(hits, samples, alpha), upper_share(hits, samples, alpha)
    if low >= least:
        return Judged("pass", low, None, EXACT_SHARE)
    if high < least:
        return Judged("fail", high, None, EXACT_SHARE)
    share = hits / samples

    def decided(count: int) -> bool:
        if share >= least:
            return lower_share(round(share * count), count, alpha) >= least
        return upper_share(round(share * count), count, alpha) < least

    needed = None if math.isclose(share, least) else fewest(decided, samples)
    return Judged("undecided", low, needed, EXACT_SHARE)


def judge_mean_drop(before: Float64, after: Float64, limit: float, alpha: float, seed: int) -> Judged:
    """Judge the drop of a mean over the same samples: BCa bootstrap (Efron, JASA 82, 1987) of the differences.

    Where fewer than ten samples differ, resampling sees nothing of what is rare: the bound is then the upper
    Clopper-Pearson bound of how many differ, times the range of all values, zero among them.

    Args:
        before: The baseline's metric of each sample, (samples,).
        after: The candidate's, (samples,).
        limit: Largest drop.
        alpha: Error probability.
        seed: Of the bootstrap.
    """
    drops = before - after
    count, observed = len(drops), float(drops.mean())
    differing = int(np.count_nonzero(drops))
    if differing < DIFFERING:
        values = np.concatenate([before, after])
        reach = float(max(values.max() - values.min(), np.abs(values).max()))
        high = upper_share(differing, count, alpha) * reach
        method = f"Clopper-Pearson on the {differing} samples that differ, times the range of the values"

        def rare(samples: int) -> bool:
            return upper_share(round(differing / count * samples), samples, alpha) * reach <= limit

        if high <= limit:
            return Judged("pass", high, None, method)
        return Judged("undecided", high, fewest(rare, count) if observed < limit else None, method)
    low, high = bca(drops, alpha, seed)
    method = f"paired bootstrap, BCa, {RESAMPLES} resamples, seed {seed}"
    if high <= limit:
        return Judged("pass", high, None, method)
    if low > limit:
        return Judged("fail", low, None, method)
    distance = abs(limit - observed)
    width = (high if observed <= limit else 2 * observed - low) - observed
    needed = math.ceil(count * (width / distance) ** 2) if distance else MOST_NEEDED
    return Judged("undecided", high, needed if needed < MOST_NEEDED else None, method)


def judge_resampled_drop(drops: Float64 | None, limit: float, alpha: float, samples: int) -> Judged:
    """Judge the drop of a metric that gives one number, from its values on resampled feeds."""
    if drops is None:
        method = "no bound: the metric gives one number and there are too few feeds to resample"
        return Judged("undecided", math.inf, None, method)
    low, high = (float(value) for value in np.quantile(drops, [alpha, 1 - alpha]))
    method = f"paired bootstrap over feeds, percentile, {len(drops)} resamples"
    if high <= limit:
        return Judged("pass", high, None, method)
    if low > limit:
        return Judged("fail", low, None, method)
    middle = float(np.median(drops))
    distance = abs(limit - middle)
    needed = math.ceil(samples * ((high - low) / 2 / distance) ** 2) if distance else MOST_NEEDED
    return Judged("undecided", high, needed if samples < needed < MOST_NEEDED else None, method)


def bca(values: Float64, alpha: float, seed: int) -> tuple[float, float]:
    """Return the one-sided lower and upper bias-corrected and accelerated bounds of the mean."""
    from scipy.special import ndtr, ndtri  # noqa: PLC0415 - not before it is needed

    means = bootstrap_means(values, seed)
    mean = float(values.mean())
    below = (np.count_nonzero(means < mean) + np.count_nonzero(means == mean) / 2) / len(means)
    bias = float(ndtri(min(max(below, 1 / len(means)), 1 - 1 / len(means))))
    centred = values - mean
    energy = float((centred**2).sum())
    skew = float((centred**3).sum()) / (6 * energy**1.5) if energy else 0.0
    ends = []
    for z in (float(ndtri(alpha)), float(ndtri(1 - alpha))):
        place = ndtr(bias + (bias + z) / max(1 - skew * (bias + z), 0.05))
        ends.append(float(np.quantile(means, place)))
    return ends[0], ends[1]


def judge_median(values: Float64, limit: float, alpha: float) -> Judged:
    """Judge a median that must be at most so large, by order statistics.

    >>> judge_median(np.arange(1.0, 101.0), 70.0, 0.05).status
    'pass'
    """
    ordered = np.sort(values)
    count = len(ordered)
    rank = _rank(count, alpha)
    if rank < 0:
        return Judged("undecided", math.inf, _pairs(alpha), EXACT_MEDIAN)
    low, high = float(ordered[rank]), float(ordered[count - 1 - rank])
    if high <= limit:
        return Judged("pass", high, None, EXACT_MEDIAN)
    if low > limit:
        return Judged("fail", low, None, EXACT_MEDIAN)
    share = float(np.mean(ordered <= limit))
    share = max(share, 1 - share)

    def decided(pairs: int) -> bool:
        return round(share * pairs) > pairs - 1 - _rank(pairs, alpha)

    return Judged("undecided", high, fewest(decided, count) if share > 0.5 else None, EXACT_MEDIAN)


def _rank(count: int, alpha: float) -> int:
    """Return the greatest rank, from 0, that bounds the median from below; -1 when none does."""
    from scipy.special import betainc  # noqa: PLC0415 - not before it is needed

    ranks = np.arange(count // 2 + 1, dtype=float)
    sure = (
        betainc(np.maximum(count - ranks, 1.0), ranks + 1, 0.5) <= alpha
    )  # so few or fewer below the median
    return int(np.count_nonzero(sure)) - 1


def _pairs(alpha: float) -> int:
    return math.ceil(-math.log2(alpha))


def fewest(decided: Callable[[int], bool], samples: int) -> int | None:
    """Return about the fewest samples above `samples` that decide; None beyond `MOST_NEEDED`."""
    low, high = samples, samples + 1
    while not decided(high):
        low, high = high, math.ceil(high * 1.5)
        if high > MOST_NEEDED:
            return None
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high
