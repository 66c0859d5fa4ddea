"""Ranges from histograms against plain searches on the raw elements."""

import numpy as np
import pytest

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.quantization.numerics import Grid, dequantize, grid_of, quantize
from onnxslim_lab.quantization.range_entropy import divergence
from onnxslim_lab.quantization.ranges import METHODS, choose_range, expected_error
from onnxslim_lab.quantization.types import QUANT_TYPES
from onnxslim_lab.statistics import Histogram, ValueStatistics

INT8, UINT8, INT4 = QUANT_TYPES["int8"], QUANT_TYPES["uint8"], QUANT_TYPES["int4"]


def statistics_of(*samples):
    x = np.concatenate([np.asarray(sample, np.float32).ravel() for sample in samples])
    codes, counts = np.unique(x.view(np.uint32) >> 16, return_counts=True)
    lows, highs = [float(np.min(s)) for s in samples], [float(np.max(s)) for s in samples]
    return ValueStatistics(
        x.size,
        0,
        min(lows),
        max(highs),
        float(np.mean(lows)),
        float(np.mean(highs)),
        len(samples),
        Histogram.of(codes, counts),
    )


def values(name, size=6000, seed=0):
    rng = np.random.default_rng(seed)
    x = {
        "normal": rng.normal(0, 1, size),
        "heavy": rng.standard_t(2, size),
        "relu": np.maximum(rng.normal(0, 2, size), 0),
        "relu6": np.clip(rng.normal(3, 4, size), 0, 6),
        "skewed": np.concatenate([rng.gamma(0.5, 2, size), rng.normal(0, 0.05, size)]),
        "outlier": np.concatenate([rng.normal(0, 1, size), [300.0]]),
        "offset": rng.normal(20, 1, size),
    }[name]
    return x.astype(np.float32)


NAMES = ["normal", "heavy", "relu", "relu6", "skewed", "outlier", "offset"]


def actual_error(x, kind, low, high, symmetric):
    scale, zero = grid_of(low, high, kind, symmetric=symmetric)
    grid = Grid(kind, scale, zero)
    return float(np.mean((dequantize(quantize(x, grid), grid).astype(np.float64) - x) ** 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "symmetric"),
    [
        (INT8, True),
        (UINT8, False),
        (INT4, True),
        (QUANT_TYPES["uint4"], False),
        (QUANT_TYPES["float8e4m3fn"], True),
    ],
    ids=str,
)
def test_expected_error_is_the_actual_one(name, kind, symmetric):
    x = values(name)
    for share in (1.0, 0.6, 0.1):
        low, high = min(0.0, share * float(x.min())), share * float(x.max())
        found = sum(expected_error(statistics_of(x), kind, low, high, symmetric=symmetric))
        assert found == pytest.approx(actual_error(x, kind, low, high, symmetric), rel=0.08)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "symmetric"),
    [(INT8, True), (UINT8, False), (INT4, True), (QUANT_TYPES["uint4"], False)],
    ids=str,
)
def test_mse_finds_the_best_range(name, kind, symmetric):
    x = values(name)
    low, high = choose_range(statistics_of(x), kind, "mse", symmetric=symmetric)
    assert low <= 0 <= high
    found = actual_error(x, kind, low, high, symmetric)
    least = np.inf
    highs = np.geomspace(1e-3, 1, 60) * float(np.abs(x).max() if symmetric else x.max())
    lows = [0.0] if symmetric or x.min() >= 0 else np.geomspace(1e-3, 1, 15) * float(x.min())
    for top in highs[:: 1 if len(lows) == 1 else 3]:
        for bottom in lows:
            least = min(least, actual_error(x, kind, -top if symmetric else bottom, top, symmetric))
    assert found <= 1.03 * least


@pytest.mark.parametrize("name", NAMES)
def test_percentile_minmax_and_average(name):
    x = values(name)
    low, high = choose_range(statistics_of(x), UINT8, "percentile", symmetric=False, percentile=99.0)
    step = max(abs(low), abs(high)) / 64
    assert low == pytest.approx(min(0, np.percentile(x, 0.5)), abs=step)
    assert high == pytest.approx(max(0, np.percentile(x, 99.5)), abs=step)
    low, high = choose_range(statistics_of(x), INT8, "percentile", symmetric=True, percentile=99.0)
    assert high == -low == pytest.approx(np.percentile(np.abs(x), 99.0), rel=1 / 64)
    full = choose_range(statistics_of(x), UINT8, "minmax", symmetric=False)
    assert full == (min(0.0, x.min()), x.max())
    parts = np.array_split(x, 7)
    low, high = choose_range(statistics_of(*parts), UINT8, "average", symmetric=False)
    assert low == pytest.approx(min(0.0, np.mean([p.min() for p in parts])))
    assert high == pytest.approx(np.mean([p.max() for p in parts]))


def plain_entropy(x, levels, bins):
    """Migacz's loop as the slides write it, on a linear histogram of the nonzero magnitudes."""
    x = np.abs(x[x != 0])
    counts, edges = np.histogram(x, bins, (0, x.max()))
    best = (np.inf, 0)
    for last in range(levels, bins + 1, bins // 128):
        reference = counts[:last].astype(float)
        outside = counts[last:].sum()
        quantized = np.zeros(last)
        present = reference.copy()
        present[-1] += outside
        for level in range(levels):
            cells = [i for i in range(last) if i * levels // last == level]
            filled = [i for i in cells if present[i] > 0]
            for i in filled:
                quantized[i] = sum(reference[c] for c in cells) / len(filled)
        p, q = present / present.sum(), quantized / max(quantized.sum(), 1e-300)
        some = p > 0
        loss = np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-9)))
        best = min(best, (loss, last))
    return edges[best[1]], best[0]


@pytest.mark.parametrize("name", ["normal", "heavy", "relu", "skewed", "outlier"])
def test_entropy_agrees_with_the_plain_loop(name):
    x = values(name)
    low, high = choose_range(statistics_of(x), INT4, "entropy", symmetric=True)
    assert low == -high
    plain, least = plain_entropy(x, 8, 128)
    counts, edges = np.histogram(np.abs(x[x != 0]), 128, (0, np.abs(x).max()))
    last = int(np.argmin(np.abs(edges - high)))
    assert divergence(counts / counts.sum(), 0, last, 8) <= least + 0.03  # other cuts may be about as good
    assert divergence(counts / counts.sum(), 0, int(np.argmin(np.abs(edges - plain))), 8) == pytest.approx(
        least
    )


def test_entropy_leaves_outliers_out_and_keeps_uniform():
    x = values("outlier")
    assert choose_range(statistics_of(x), INT8, "entropy", symmetric=True)[1] < 30
    even = np.linspace(-3, 5, 40001).astype(np.float32)
    low, high = choose_range(statistics_of(even), UINT8, "entropy", symmetric=False)
    assert low == pytest.approx(-3, rel=0.02)
    assert high == pytest.approx(5, rel=0.02)
    wide = QUANT_TYPES["int16"]
    assert choose_range(statistics_of(x), wide, "entropy", symmetric=True)[1] == 300


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_auto_is_no_worse_than_any(name, symmetric):
    x = values(name)
    known = statistics_of(x)
    kind = INT8 if symmetric else UINT8
    errors = {
        method: sum(
            expected_error(
                known, kind, *choose_range(known, kind, method, symmetric=symmetric), symmetric=symmetric
            )
        )
        for method in METHODS
    }
    assert errors["auto"] <= min(errors.values()) * 1.0001


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [INT8, UINT8, QUANT_TYPES["uint16"], QUANT_TYPES["float8e4m3fn"]], ids=str)
def test_degenerate(method, symmetric, kind):
    nothing = ValueStatistics(3, 3, np.inf, -np.inf, 0.0, 0.0, 0)
    assert choose_range(nothing, kind, method, symmetric=symmetric) == (0.0, 0.0)
    for x in ([0.0, 0.0], [7.0], [-1e-42, 1e-42], [3e38, -3e38], [-2.0, -2.0, -2.0]):
        low, high = choose_range(statistics_of(x), kind, method, symmetric=symmetric)
        assert low <= 0 <= high
        assert np.isfinite([low, high]).all()
        scale, _ = grid_of(low, high, kind, symmetric=symmetric)
        assert np.isfinite(scale)
    constant = choose_range(statistics_of([7.0] * 9), kind, method, symmetric=symmetric)
    assert actual_error(np.float32([7.0]), kind, *constant, symmetric) < 0.07


def test_errors_name_the_choice():
    known = statistics_of([1.0, 2.0])
    with pytest.raises(ParameterError, match="did you mean 'entropy'"):
        choose_range(known, INT8, "entropi", symmetric=True)
    with pytest.raises(ParameterError, match="percentile 101"):
        choose_range(known, INT8, "percentile", symmetric=True, percentile=101)
    bare = ValueStatistics(2, 0, 1.0, 2.0, 1.0, 2.0, 1)
    with pytest.raises(ParameterError, match="histogram"):
        choose_range(bare, INT8, "mse", symmetric=True)
