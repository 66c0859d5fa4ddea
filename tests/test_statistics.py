"""statistics: tallies, histograms and Gram matrices as pure arithmetic; they merge and ignore batches."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.layer_views.convolutions import ConvKind, ConvTransposeKind
from onnxslim_lab.layer_views.kinds import GatherKind, GemmKind
from onnxslim_lab.layer_views.products import MatMulKind
from onnxslim_lab.statistics import Channels, Gram, Histogram, ValueStatistics
from onnxslim_lab.statistics.values import edge, place_of
from onnxslim_lab.worker.grams import GramTally, pack_kind, row_blocks, unpack_kind
from onnxslim_lab.worker.tally import Tally

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def measured(*arrays, samples=None):
    tally = Tally(histogram=True, axis=1)
    for array in arrays:
        tally.add(array, len(array) if samples is None else samples)
    return ValueStatistics.of(tally.state())


def same(first, second):
    """Whether two statistics agree: exactly where that is promised, to rounding where sums are taken."""
    exact = ("count", "nonfinite", "low", "high", "samples")
    assert [getattr(first, name) for name in exact] == [getattr(second, name) for name in exact]
    np.testing.assert_allclose(first.average_low, second.average_low, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(first.average_high, second.average_high, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(first.histogram.places, second.histogram.places)
    np.testing.assert_array_equal(first.histogram.filled_counts, second.histogram.filled_counts)
    for name in ("count", "low", "high"):
        np.testing.assert_array_equal(getattr(first.channels, name), getattr(second.channels, name))
    scale = 1e-9 * (1 + np.abs(first.channels.mean_square))
    assert (np.abs(first.channels.mean - second.channels.mean) <= scale + 1e-9).all()
    np.testing.assert_allclose(first.channels.mean_square, second.channels.mean_square, rtol=1e-6)


ARRAYS = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(3), st.integers(1, 4)), elements=FLOATS)
SANE = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.just(3), st.just(2)),
    elements=st.floats(-100, 100, width=32) | st.just(np.nan) | st.just(np.inf),
)


@given(ARRAYS)
@settings(max_examples=60, deadline=None)
def test_a_tally_is_what_numpy_says(array):
    with np.errstate(all="ignore"):
        found = measured(array)
    finite = array[np.isfinite(array)]
    assert found.count == array.size
    assert found.nonfinite == array.size - finite.size
    assert found.empty == (not finite.size)
    assert found.histogram.total == finite.size
    if finite.size:
        assert (found.low, found.high) == (finite.min(), finite.max())
        lows = [row[np.isfinite(row)].min() for row in array if np.isfinite(row).any()]
        np.testing.assert_allclose(found.average_low, np.mean(lows, dtype=np.float64), rtol=1e-6, atol=1e-30)
        assert found.samples == len(lows)
    for channel in range(3):
        values = array[:, channel].astype(np.float64)
        values = values[np.isfinite(values)]
        assert found.channels.count[channel] == values.size
        if values.size:
            assert found.channels.low[channel] == values.min()
            np.testing.assert_allclose(found.channels.mean[channel], values.mean(), rtol=1e-6, atol=1e-6)


@given(SANE, st.data())
@settings(max_examples=60, deadline=None)
def test_splitting_the_batches_changes_nothing(array, data):
    cuts = sorted(data.draw(st.lists(st.integers(1, len(array)), max_size=3)))
    parts = [part for part in np.split(array, cuts) if len(part)]
    same(measured(array), measured(*parts))


@given(SANE, SANE, SANE)
@settings(max_examples=40, deadline=None)
def test_merging_is_associative_and_the_same_as_adding(a, b, c):
    first, second, third = (measured(part) for part in (a, b, c))
    left = first.merge(second).merge(third)
    same(left, first.merge(second.merge(third)))
    same(left, measured(a, b, c))
    same(first.merge(second), second.merge(first))


def test_merging_keeps_only_what_both_have():
    plain = Tally()
    plain.add(np.ones((2, 3), np.float32))
    merged = measured(np.ones((2, 3, 1), np.float32)).merge(ValueStatistics.of(plain.state()))
    assert merged.count == 12
    assert merged.histogram is None
    assert merged.channels is None


def test_nothing_finite_is_empty_and_merges():
    nothing = measured(np.full((1, 3, 1), np.nan, np.float32))
    assert nothing.empty
    assert nothing.nonfinite == 3
    assert nothing.low > nothing.high
    something = measured(np.ones((1, 3, 1), np.float32))
    same(nothing.merge(something).merge(nothing), something.merge(nothing).merge(nothing))
    assert nothing.merge(something).low == 1
    with pytest.raises(ParameterError, match="empty"):
        nothing.histogram.quantile(0.5)


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=FINITE), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_quantiles_are_numpys_within_one_bin(values, q):
    tally = Tally(histogram=True)
    tally.add(values)
    histogram = ValueStatistics.of(tally.state()).histogram
    found = histogram.quantile(q)
    near = [np.quantile(values.astype(np.float64), q, method=how) for how in ("lower", "higher")]
    widths = [max(abs(value) / 128, 1e-40) for value in near]
    assert min(near) - 1.01 * widths[0] - 1e-40 <= found <= max(near) + 1.01 * widths[1] + 1e-40


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=FINITE))
@settings(max_examples=60, deadline=None)
def test_every_element_is_within_the_edges_of_its_bin(values):
    tally = Tally(histogram=True)
    tally.add(values)
    histogram = ValueStatistics.of(tally.state()).histogram
    edges, counts = histogram.edges, histogram.counts
    assert (np.diff(edges) > 0).all()
    assert len(edges) == len(counts) + 1
    assert counts.sum() == values.size
    low, high, filled = histogram.filled
    for value in values:
        assert ((low <= value) & (value <= high)).any()
    assert filled.sum() == values.size
    assert (histogram.centers > edges[:-1]).all()


def test_bins_span_all_of_float32_in_order():
    codes = np.array([0x7F7F, 0x0080, 0x0000, 0x8000, 0x8080, 0xFF7F], np.uint16)
    assert (np.diff(place_of(codes)) < 0).all()
    most = np.finfo(np.float32).max
    places = place_of(codes)
    assert edge(places[:1] + 1)[0] == 2.0**128 > float(most)
    assert edge(places[-1:])[0] == -(2.0**128)
    assert edge(place_of(np.array([0], np.uint16)))[0] == 0


@pytest.mark.parametrize(
    "kind", [np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint16, np.int64, bool]
)
def test_every_real_type_counts(kind):
    array = np.array([[0, 1], [1, 1]]).astype(kind)
    tally = Tally(histogram=True, axis=1)
    tally.add(array, samples=2)
    found = ValueStatistics.of(tally.state())
    assert (found.low, found.high, found.average_low, found.count) == (0, 1, 0.5, 4)
    assert found.histogram.total == 4
    assert found.channels.mean.tolist() == [0.5, 1]


def test_a_finite_float64_beyond_float32_stays_finite():
    tally = Tally(histogram=True)
    tally.add(np.array([1e300, 1.0]))
    found = ValueStatistics.of(tally.state())
    assert (found.high, found.nonfinite, found.histogram.total) == (1e300, 0, 2)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0)])
def test_an_array_without_elements_adds_nothing(shape):
    tally = Tally(histogram=True, axis=1)
    tally.add(np.ones((1, 2, 3), np.float32))
    before = ValueStatistics.of(tally.state())
    tally.add(np.ones(shape, np.float32), samples=shape[0])
    same(ValueStatistics.of(tally.state()), before)
    gram = GramTally(ConvKind((4, 2, 1), 1, (1,), (1,), (0, 0)), full=True)
    gram.add(np.ones(shape, np.float32))
    assert gram.count == 0


def test_texts_are_refused():
    with pytest.raises(TypeError, match="not real numbers"):
        Tally().add(np.array(["a"], object))


def test_an_index_that_some_runs_lack_counts_where_it_is():
    tally = Tally(axis=1)
    tally.add(np.array([[1.0, 2]], np.float32))
    tally.add(np.array([[3.0, 4, 5]], np.float32))
    channels = ValueStatistics.of(tally.state()).channels
    assert channels.count.tolist() == [2, 2, 1]
    assert channels.high.tolist() == [3, 4, 5]
    one = Channels(1, *(np.ones(1) for _ in range(5)))
    assert channels.merge(one).count.tolist() == [3, 2, 1]
    with pytest.raises(ParameterError, match="axis 1"):
        channels.merge(Channels(0, *(np.ones(1) for _ in range(5))))


def test_samples_that_cannot_be_told_apart_weigh_as_many():
    tally = Tally()
    tally.add(np.array([1.0, 2, 3], np.float32), samples=2)  # three elements of two samples
    tally.add(np.array([5.0], np.float32), samples=1)
    found = ValueStatistics.of(tally.state())
    assert found.samples == 3
    assert found.average_low == pytest.approx((1 + 1 + 5) / 3)


def test_the_axis_of_the_samples_is_taken():
    tally = Tally()
    tally.add(np.array([[1.0, 10], [3, 30]], np.float32), samples=2, axis=1)
    assert ValueStatistics.of(tally.state()).average_high == 16.5


KINDS = {
    "conv": (ConvKind((4, 3, 3, 3), 1, (1, 1), (1, 1), (1, 1, 1, 1)), (2, 3, 7, 6)),
    "strided": (ConvKind((4, 3, 3, 2), 1, (2, 3), (1, 2), (1, 0, 2, 1)), (3, 3, 9, 11)),
    "depthwise": (ConvKind((6, 1, 3, 3), 6, (1, 1), (1, 1), (0, 0, 0, 0), "SAME_UPPER"), (2, 6, 5, 5)),
    "depthwise, strided": (
        ConvKind((10, 1, 3, 5), 5, (2, 1), (1, 2), (1, 0, 2, 3)),
        (2, 5, 9, 11),
    ),
    "pointwise": (ConvKind((4, 3, 1, 1), 2, (1, 1), (1, 1), (0, 0, 0, 0)), (2, 6, 5, 4)),
    "sequence": (ConvKind((4, 3, 5), 1, (1,), (1,), (2, 2)), (2, 3, 8)),
    "transposed": (ConvTransposeKind((3, 4, 3, 3), 1, (2, 2), (1, 1), (1, 1, 1, 1)), (2, 3, 4, 4)),
    "gemm": (GemmKind((5, 4)), (3, 5)),
    "matmul": (MatMulKind((5, 4)), (2, 3, 5)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("full", [True, False])
def test_a_gram_matrix_is_the_product_of_the_rows(name, full):
    kind, shape = KINDS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows = kind.rows(x).astype(np.float64)
    tally = GramTally(unpack_kind(pack_kind(kind)), full=full)
    tally.add(x)
    gram = Gram(tally.matrix, tally.total, tally.count)
    np.testing.assert_allclose(gram.diagonal, (rows**2).sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gram.mean, rows.mean(1), rtol=1e-4, atol=1e-6)
    assert gram.count == rows.shape[1]
    assert gram.full == full
    if full:
        np.testing.assert_allclose(gram.xtx, rows.swapaxes(1, 2) @ rows, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ParameterError, match="diagonal"):
            _ = gram.xtx


@pytest.mark.parametrize("name", KINDS)
def test_rows_come_in_blocks_and_are_all_there(name):
    kind, shape = KINDS[name]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    blocks = list(row_blocks(kind, x, block=1))
    whole = np.sort(kind.rows(x).reshape(kind.shape[0], -1, kind.shape[2]), axis=1)
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks, axis=1), axis=1), whole)
    if name == "conv":
        assert len(blocks) == 2 * 7


def test_a_lookup_counts_its_entries():
    tally = GramTally(GatherKind((5, 2)), full=False)
    tally.add(np.array([[0, 3], [-1, 3]], np.int64))
    assert tally.matrix.tolist() == [[1, 0, 0, 2, 1]]
    assert tally.count == 4


def test_rows_that_are_not_finite_are_left_out():
    tally = GramTally(MatMulKind((2, 1)), full=True)
    tally.add(np.array([[1, 2], [np.nan, 1], [3, np.inf], [4, 5]], np.float32))
    assert (tally.count, tally.nonfinite) == (2, 2)
    assert tally.matrix.tolist() == [[[17, 22], [22, 29]]]


def test_gram_matrices_merge():
    first, second = (Gram(np.full((1, 2, 2), n), np.full((1, 2), n), int(n)) for n in (1.0, 2.0))
    assert first.merge(second).matrix.sum() == 12
    assert first.merge(second).count == 3
    with pytest.raises(ParameterError, match="do not merge"):
        first.merge(Gram(np.zeros((1, 2)), np.zeros((1, 2)), 0))


def test_a_quantile_is_a_fraction():
    with pytest.raises(ParameterError, match="between 0 and 1"):
        Histogram(np.zeros(1, np.int64), np.ones(1, np.int64)).quantile(2)
