"""Exact tests and bounds on the drop of a proportion between two models judged on the same samples.

Of n samples, `lost` are right with the baseline only and `gained` with the candidate only; the drop is
P(lost) - P(gained), and how often the two differ at all, psi = P(lost) + P(gained), is not known.

The test of "the drop is at least d" orders the outcomes by Tango's score statistic (Statistics in Medicine 17,
1998, 891) and sums exact multinomial probabilities. Over psi it takes the worst case within a Clopper-Pearson
interval and adds the chance that the interval misses (Berger and Boos, JASA 89, 1994, 1012), so that at no psi
a drop at the limit passes more often than it may. Probabilities grow as losses become gains with psi as it is,
so that the worst drop of the null hypothesis is the limit itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Side = Literal["below", "above"]
"""What is to be shown of the drop: that it is below a limit, or above it."""

MISSED = 0.04  # share of the error probability that is spent on the interval of psi
_POINTS = 33  # values of psi tried; the interval is some six standard deviations wide
_TAIL = 1e-9  # probability of gains beyond the summed ones; it counts as error
_NOTHING = 1e-15  # a chance that need not be summed
_STEPS = 24  # of the search for a bound


@dataclass(frozen=True)
class Counts:
    """What paired samples showed.

    Attributes:
        samples: All of them.
        lost: Right with the baseline only.
        gained: Right with the candidate only.
    """

    samples: int
    lost: int
    gained: int

    @property
    def drop(self) -> float:
        """The observed drop."""
        return (self.lost - self.gained) / self.samples


def score(lost: npt.ArrayLike, gained: npt.ArrayLike, samples: int, drop: float) -> Float64:
    """Return Tango's score statistic: how many standard errors the observed drop is above a true one.

    >>> float(score(12, 2, 50, 0.0).round(4))
    2.6726
    """
    b, c = np.asarray(lost, float), np.asarray(gained, float)
    n = float(samples)
    linear = (2 * n - b + c) * drop - b - c
    root = np.sqrt(np.maximum(linear * linear + 8 * n * c * drop * (1 - drop), 0.0))
    only_gained = (root - linear) / (4 * n)  # most likely P(gained) at that drop
    variance = n * np.maximum(2 * only_gained + drop * (1 - drop), 0.0)
    distance = b - c - n * drop
    certain = np.asarray(np.sign(distance) * 1e9)
    found: Float64 = np.divide(distance, np.sqrt(variance), out=certain, where=variance > 0)
    return found


def _reach(level: float, gains: Float64, samples: int, drop: float, side: Side) -> Float64:
    """Return for each number of gains the most losses with a statistic of at most `level`.

    For "above": one less than the fewest losses with a statistic of at least `level`. -1 where there are none.
    """
    low, high = np.full(len(gains), -1.0), samples - gains
    while np.any(low < high):
        middle = np.ceil((low + high) / 2)
        found = score(middle, gains, samples, drop)
        inside = found <= level if side == "below" else found < level
        low, high = np.where(inside, middle, low), np.where(inside, high, middle - 1)
    return low


def tail(level: float, samples: int, drop: float, discordant: Float64, side: Side) -> Float64:
    """Return the probability of a statistic at or beyond `level` at a true drop, for each psi.

    Args:
        level: Of the statistic.
        samples: All of them.
        drop: The true drop.
        discordant: Values of psi, each at least |drop| and at most 1; (points,).
        side: Which tail: "below" sums statistics of at most `level`.

    Returns:
        Probabilities (points,), never too small: what is not summed counts in full.
    """
    from scipy.special import betainc, gammaln, ndtri, xlog1py, xlogy  # noqa: PLC0415 - not before it is needed

    gained = np.clip((discordant - drop) / 2, 0.0, 1.0)
    reach = 1.0 - ndtri(_TAIL)
    spread = reach * np.sqrt(samples * gained * (1 - gained)) + reach * reach / 2
    first, last = (samples * gained - spread).min(), (samples * gained + spread).max()
    gains = np.arange(max(0.0, np.floor(first)), min(float(samples), np.ceil(last)) + 1)
    rest = samples - gains
    ways = gammaln(samples + 1) - gammaln(gains + 1) - gammaln(rest + 1)
    chance = np.exp(ways + xlogy(gains, gained[:, None]) + xlog1py(rest, -gained[:, None]))
    counted = chance > _NOTHING
    most = np.broadcast_to(_reach(level, gains, samples, drop, side), chance.shape)[counted]
    lost = np.clip((discordant + drop) / 2 / np.maximum(1 - gained, 1e-300), 0.0, 1.0)
    lost, rest = (
        np.broadcast_to(lost[:, None], chance.shape)[counted],
        np.broadcast_to(rest, chance.shape)[counted],
    )
    above = betainc(np.maximum(most, 0.0) + 1, np.maximum(rest - most, 1.0), lost)  # more losses than that
    above = np.where(most < 0, 1.0, np.where(most >= rest, 0.0, above))
    inner = above if side == "above" else 1.0 - above
    summed = np.zeros_like(chance)
    summed[counted] = chance[counted] * inner
    total: Float64 = np.minimum(summed.sum(axis=1) + _TAIL, 1.0)
    return total


def discordance(count: int, samples: int, missed: float) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of psi that misses it with at most this probability."""
    return lower_share(count, samples, missed / 2), upper_share(count, samples, missed / 2)


def lower_share(count: int, samples: int, alpha: float) -> float:
    """Return the one-sided lower Clopper-Pearson bound of a proportion.

    >>> round(lower_share(100, 100, 0.05), 4)
    0.9705
    """
    from scipy.special import betaincinv  # noqa: PLC0415 - not before it is needed

    return float(betaincinv(count, samples - count + 1, alpha)) if count else 0.0


def upper_share(count: int, samples: int, alpha: float) -> float:
    """Return the one-sided upper Clopper-Pearson bound of a proportion."""
    return 1.0 - lower_share(samples - count, samples, alpha)


def p_value(counts: Counts, drop: float, side: Side, alpha: float) -> float:
    """Return the exact p-value of the hypothesis that the drop is not on that side of `drop`.

    Args:
        counts: What was observed.
        drop: The limit, in (-1, 1).
        side: "below" tests that the drop is at least the limit.
        alpha: The level it is meant for; a share of it, `MISSED`, is spent on the interval of psi.
    """
    missed = MISSED * alpha
    low, high = discordance(counts.lost + counts.gained, counts.samples, missed)
    low = max(low, abs(drop))
    if high <= low:  # no psi of the interval allows such a drop
        if high < abs(drop):
            return missed
        high = low
    level = float(score(counts.lost, counts.gained, counts.samples, drop))
    level += 1e-9 if side == "below" else -1e-9  # ties count
    points = np.linspace(low, high, _POINTS)
    found = tail(level, counts.samples, drop, points, side)
    best = int(found.argmax())
    near = np.linspace(points[max(0, best - 1)], points[min(_POINTS - 1, best + 1)], 9)
    worst = max(float(found[best]), float(tail(level, counts.samples, drop, near, side).max()))
    return min(1.0, worst + missed)


def drop_bound(counts: Counts, side: Side, alpha: float) -> float:
    """Return the one-sided bound on the drop: the upper one ("below") or the lower one ("above").

    The bound is where the p-value falls to alpha, from outside, to a hundredth of a standard error.

    >>> round(drop_bound(Counts(1000, 0, 0), "below", 0.05), 3)
    0.003
    """
    from scipy.special import ndtri  # noqa: PLC0415 - not before it is needed

    sign = 1.0 if side == "below" else -1.0
    error = math.sqrt(counts.lost + counts.gained + 1) / counts.samples

    def excess(drop: float) -> float:  # nearly linear in the drop
        return float(ndtri(alpha) - ndtri(p_value(counts, drop, side, alpha)))

    inside, below = counts.drop, float(ndtri(alpha))
    outside, above = inside, below
    while above < 0:
        inside, below = outside, above
        outside = counts.drop + sign * error * 2
        if abs(outside) >= 1:
            return sign
        above, error = excess(outside), error * 2
    for _ in range(_STEPS):
        if abs(outside - inside) < error / 400:
            break
        share = below / (below - above)
        middle = inside + (outside - inside) * min(0.95, share + 0.02)
        found = excess(middle)
        if found < 0:
            inside, below = middle, found
        else:
            outside, above = middle, found
    return outside
