"""The gate's bounds: exact where they say so, never on the wrong side more often than they may."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import beta, binom, multinomial

from onnxslim_lab.gate.bounds import (
    bca,
    judge_drop,
    judge_mean_drop,
    judge_median,
    judge_relative_drop,
    judge_resampled_drop,
    judge_share,
)
from onnxslim_lab.gate.paired import (
    Counts,
    discordance,
    drop_bound,
    lower_share,
    p_value,
    score,
    tail,
    upper_share,
)


def outcomes(samples):
    return [(a, b) for a in range(samples + 1) for b in range(samples + 1 - a)]


def chance(samples, lost, gained, drop, psi):
    rates = [(psi + drop) / 2, (psi - drop) / 2]
    return float(multinomial.pmf([lost, gained, samples - lost - gained], samples, [*rates, 1 - sum(rates)]))


@pytest.mark.parametrize("side", ["below", "above"])
@pytest.mark.parametrize(
    ("samples", "drop", "psi"), [(9, 0.2, 0.5), (14, 0.05, 0.06), (11, -0.1, 0.4), (6, 0.0, 1.0)]
)
def test_tail_is_the_sum_over_all_outcomes(samples, drop, psi, side):
    for level in (-2.0, -0.7, 0.3, 1.6):
        inside = [
            (a, b)
            for a, b in outcomes(samples)
            if (
                score(a, b, samples, drop) <= level
                if side == "below"
                else score(a, b, samples, drop) >= level
            )
        ]
        wanted = sum(chance(samples, a, b, drop, psi) for a, b in inside)
        found = tail(level, samples, drop, np.array([psi]), side)
        assert found == pytest.approx(wanted, abs=2e-8)
        assert found >= wanted - 1e-12


def test_score_rises_with_losses_and_falls_with_gains():
    for drop in (0.0, 0.02, 0.3, -0.1):
        table = score(np.arange(21)[:, None], np.arange(21)[None, :], 40, drop)
        assert (np.diff(table, axis=0) > -1e-12).all()
        assert (np.diff(table, axis=1) < 1e-12).all()


def test_score_is_mcnemars_at_no_drop():
    assert score(15, 5, 100, 0.0) == pytest.approx((15 - 5) / math.sqrt(20))
    assert score(0, 0, 100, 0.0) == 0


@pytest.mark.parametrize(("samples", "limit"), [(20, 0.1), (30, 0.05), (40, 0.02)])
def test_false_passes_and_false_failures_stay_within_alpha(samples, limit):
    """Summed over all outcomes, for every frequency of disagreement: no simulation."""
    alpha = 0.1
    passes, fails = [], []
    for a, b in outcomes(samples):
        counts = Counts(samples, a, b)
        if a + b > 20:
            passes.append((a, b))  # too rare below to matter: counted as wrong both ways
            fails.append((a, b))
            continue
        if p_value(counts, limit, "below", alpha) <= alpha:
            passes.append((a, b))
        if p_value(counts, limit, "above", alpha) <= alpha:
            fails.append((a, b))
    assert (0, 0) not in passes or (1 - limit) ** samples <= alpha
    for psi in np.linspace(limit, 0.25, 9):
        assert sum(chance(samples, a, b, limit, psi) for a, b in passes) <= alpha
        assert sum(chance(samples, a, b, limit, psi) for a, b in fails) <= alpha


def test_the_bound_is_where_the_test_turns():
    for counts in (Counts(200, 4, 3), Counts(500, 40, 12), Counts(1000, 0, 0), Counts(300, 2, 30)):
        for side, sign in (("below", 1), ("above", -1)):
            bound = drop_bound(counts, side, 0.05)
            assert sign * (bound - counts.drop) > 0
            assert p_value(counts, bound, side, 0.05) <= 0.05
            error = math.sqrt(counts.lost + counts.gained + 1) / counts.samples
            assert p_value(counts, bound - sign * error / 50, side, 0.05) > 0.05


def test_sides_mirror():
    there, back = Counts(400, 30, 10), Counts(400, 10, 30)
    assert drop_bound(there, "below", 0.05) == pytest.approx(-drop_bound(back, "above", 0.05), abs=1e-5)


def test_shares_are_clopper_pearson():
    assert lower_share(95, 100, 0.05) == pytest.approx(beta.ppf(0.05, 95, 6))
    assert upper_share(95, 100, 0.05) == pytest.approx(beta.ppf(0.95, 96, 5))
    assert (lower_share(0, 9, 0.05), upper_share(9, 9, 0.05)) == (0.0, 1.0)
    low, high = discordance(7, 50, 0.01)
    assert binom.sf(6, 50, low) == pytest.approx(0.005)
    assert binom.cdf(7, 50, high) == pytest.approx(0.005)


def test_drop_verdicts():
    assert judge_drop(Counts(1000, 3, 3), 0.01, 0.05).status == "pass"
    assert judge_drop(Counts(1000, 30, 2), 0.01, 0.05).status == "fail"
    small = judge_drop(Counts(100, 0, 0), 0.01, 0.05)
    assert small.status == "undecided"
    assert 298 <= small.needed <= 310
    assert judge_drop(Counts(small.needed, 0, 0), 0.01, 0.05).status == "pass"
    near = judge_drop(Counts(1000, 12, 1), 0.01, 0.05)
    assert near.status == "undecided"
    assert near.needed > 10_000
    assert judge_drop(Counts(1000, 12, 2), 0.01, 0.05).needed is None


def test_relative_drop_is_the_absolute_one_of_the_baselines_value():
    counts = Counts(5000, 20, 18)
    found = judge_relative_drop(counts, 4000, 0.01, 0.05)
    assert found.status == "pass"
    assert found.bound > judge_drop(counts, 0.008, 0.05).bound / 0.8
    assert judge_relative_drop(Counts(5000, 300, 20), 4000, 0.01, 0.05).status == "fail"
    assert judge_relative_drop(Counts(100, 0, 10), 0, 0.01, 0.05).status == "undecided"


def test_share_verdicts():
    assert judge_share(999, 1000, 0.99, 0.05).status == "pass"
    assert judge_share(950, 1000, 0.99, 0.05).status == "fail"
    some = judge_share(299, 300, 0.99, 0.05)
    assert some.status == "undecided"
    assert lower_share(round(299 / 300 * some.needed), some.needed, 0.05) >= 0.99


def test_mean_verdicts():
    random = np.random.default_rng(0)
    before = random.random(400)
    noise = random.normal(0, 0.05, 400)
    assert judge_mean_drop(before, before + noise, 0.02, 0.05, 0).status == "pass"
    assert judge_mean_drop(before, before + noise - 0.05, 0.02, 0.05, 0).status == "fail"
    close = judge_mean_drop(before, before + noise - 0.018, 0.02, 0.05, 0)
    assert close.status == "undecided"
    assert close.needed > 400
    same = judge_mean_drop(before[:50], before[:50], 0.01, 0.05, 0)
    assert same.status == "undecided", "50 samples that do not differ show nothing about 1 in 50"
    assert judge_mean_drop(before, before, 0.01, 0.05, 0).status == "pass"


def test_bca_covers_a_skewed_mean():
    random = np.random.default_rng(1)
    outside = sum(bca(random.exponential(size=60), 0.05, seed)[1] < 1.0 for seed in range(120))
    assert outside <= 16  # a percentile interval misses about one in ten here


def test_numbers_without_samples_take_resamples():
    drops = np.random.default_rng(0).normal(0.01, 0.002, 300)
    assert judge_resampled_drop(drops, 0.02, 0.05, 40).status == "pass"
    assert judge_resampled_drop(drops, 0.002, 0.05, 40).status == "fail"
    assert judge_resampled_drop(drops, 0.011, 0.05, 40).needed > 40
    assert judge_resampled_drop(None, 0.02, 0.05, 4).status == "undecided"


def test_median_bound_is_exact():
    random = np.random.default_rng(2)
    values = random.lognormal(0, 1, (4000, 30))
    bounds = [judge_median(row, 1e9, 0.05).bound for row in values]
    missed = np.mean(np.array(bounds) < 1.0)
    assert 0.02 < missed < 0.06
    assert judge_median(np.ones(3), 2.0, 0.05).status == "undecided"
    assert judge_median(np.ones(5), 2.0, 0.05).status == "pass"
    assert judge_median(np.full(20, 3.0), 2.0, 0.05).status == "fail"
    mixed = judge_median(np.array([1.0] * 11 + [3.0] * 9), 2.0, 0.05)
    assert mixed.status == "undecided"
    assert mixed.needed > 20


def test_every_verdict_is_reached_by_more_samples():
    for lost, gained in itertools.product((0, 2, 9), (0, 1, 5)):
        found = judge_drop(Counts(150, lost, gained), 0.02, 0.05)
        if found.needed is not None:
            grown = Counts(found.needed, round(lost / 150 * found.needed), round(gained / 150 * found.needed))
            assert judge_drop(grown, 0.02, 0.05).status != "undecided"
