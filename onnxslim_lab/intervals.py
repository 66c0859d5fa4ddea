"""95 % confidence intervals of proportions and means, alone and in pairs."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

RESAMPLES = 10_000
_Z = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927).

    >>> [round(x, 4) for x in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    share, z2 = hits / count, _Z * _Z
    centre = share + z2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    low, high = (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)
    return (0.0 if hits == 0 else low), (1.0 if hits == count else high)


def newcombe(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired proportions, first minus second.

    Newcombe, Statistics in Medicine 17 (1998) 2635, method 10.

    Args:
        both: Samples that both have right.
        first: Samples that only the first has right.
        second: Samples that only the second has right.
        neither: Samples that both have wrong.

    >>> [round(x, 4) for x in newcombe(36, 12, 2, 0)]
    [0.0569, 0.3404]
    """
    count = both + first + second + neither
    p1, p2 = (both + first) / count, (both + second) / count
    low1, high1 = wilson(both + first, count)
    low2, high2 = wilson(both + second, count)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = 0.0
    if product:
        raw = both * neither - first * second
        phi = (max(raw - count / 2, 0.0) if raw > 0 else raw) / math.sqrt(product)
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    difference = (first - second) / count
    return difference - math.sqrt(max(down, 0.0)), difference + math.sqrt(max(up, 0.0))


def mcnemar(first: int, second: int) -> float:
    """Return the two-sided exact p-value that discordant pairs fall either way equally often.

    >>> mcnemar(0, 5)
    0.0625
    """
    count = first + second
    tail = sum(math.comb(count, i) for i in range(min(first, second) + 1))
    return float(min(1.0, 2 * tail / 2**count))


def bootstrap_mean(values: Float64, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean by resampling the samples (Efron 1979)."""
    low, high = np.quantile(bootstrap_means(values, seed), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_means(values: Float64, seed: int = 0) -> Float64:
    """Return the means of resampled samples, (RESAMPLES,)."""
    generator = np.random.default_rng(seed)
    count = len(values)
    means = np.empty(RESAMPLES)
    step = max(1, 4_000_000 // count)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        means[start:stop] = values[generator.integers(0, count, (stop - start, count))].mean(axis=1)
    return means
