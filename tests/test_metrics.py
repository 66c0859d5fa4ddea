"""metrics.py and accuracy.py: output errors and task metrics on plain arrays."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim_lab.accuracy import agreement, find_metric, topk
from onnxslim_lab.errors import DataError, ParameterError
from onnxslim_lab.metrics import compare_outputs


def one(a, b):
    (error,) = compare_outputs([{"y": a}], [{"y": b}])
    return error


def test_figures_of_a_small_difference():
    error = one(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert error.max_abs == 0.5
    assert error.relative == 0.125
    assert error.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert error.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25)))
    assert (error.mismatches, error.nonfinite, error.structure, error.count) == (0, 0, "", 2)


def test_equal_outputs():
    error = one(np.array([1.0, np.nan, np.inf, -np.inf]), np.array([1.0, np.nan, np.inf, -np.inf]))
    assert error.equal
    assert error.sqnr_db == np.inf
    assert error.cosine == error.worst_slice == 1


def test_relative_is_the_worst_feed_not_the_average():
    big, small = np.array([1000.0, 1.0]), np.array([0.001, 0.0])
    (error,) = compare_outputs([{"y": big}, {"y": small}], [{"y": big}, {"y": small * 2}])
    assert error.relative == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0], [1.0, np.nan]),
        ([1.0, np.nan], [1.0, 2.0]),
        ([np.inf, 1.0], [-np.inf, 1.0]),
        ([1.0], [np.inf]),
    ],
)
def test_nan_and_infinity_on_one_side_are_never_averaged_away(a, b):
    error = one(np.array(a * 1000), np.array(b * 1000))
    assert error.nonfinite == 1000
    assert error.relative == error.max_abs == np.inf
    assert error.cosine == 0
    assert error.sqnr_db == -np.inf
    assert not error.equal


def test_all_zero_outputs():
    assert one(np.zeros(3), np.zeros(3)).equal
    assert one(np.zeros(3), np.full(3, 1e-9)).relative == 1
    assert one(np.ones(3), np.zeros(3)).cosine == 0
    assert one(np.ones(3), np.zeros(3)).relative == 1


def test_a_detector_whose_scores_are_all_zero_is_found_by_slices():
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.random((1, 4, 500)) * 320, rng.random((1, 18, 500))], axis=1)
    broken = reference.copy()
    broken[:, 7] = 0
    error = one(reference, broken)
    assert error.cosine > 0.9999
    assert error.worst_slice == 0
    assert error.worst_slice_at == "axis 1, index 7"
    assert one(reference, reference * 1.001).worst_slice > 0.999999


def test_slices_of_rounding_noise_and_of_few_values_do_not_count():
    reference = np.tile([1.0, 1e-9], (16, 1))
    assert one(reference, reference * [1, -1]).worst_slice > 0.999
    assert one(np.array([[5.0, 0.01]]), np.array([[5.0, -0.01]])).worst_slice > 0.999


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_small_floats_are_compared_in_float64(kind):
    a, b = np.array([240, 2.0], kind), np.array([224, 2.0], kind)
    error = one(np.tile(a, 20_000), np.tile(b, 20_000))
    assert error.floating
    assert error.max_abs == 16
    assert np.isfinite(error.sqnr_db)


def test_integers_booleans_strings():
    error = one(np.array([2**63, 5], np.uint64), np.array([2**63 - 1, 5], np.uint64))
    assert (error.mismatches, error.max_abs, error.floating) == (1, 1, False)
    assert one(np.array([1, -2], ml_dtypes.int4), np.array([1, 3], ml_dtypes.int4)).mismatches == 1
    assert one(np.array([True, False]), np.array([True, True])).mismatches == 1
    assert one(np.array(["a", "b"], object), np.array(["a", "c"], object)).mismatches == 1
    assert one(np.array(["a"], object), np.array(["a"], object)).equal


def test_sequences_maps_and_optionals():
    maps = [{"cat": 0.9, "dog": 0.1}, {"cat": 0.2, "dog": 0.8}] * 8
    error = one(maps, [{**m, "dog": 0.0} for m in maps])
    assert error.max_abs == 0.8
    assert error.worst_slice == 0
    assert error.worst_slice_at == "['dog']"
    assert one([np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)]).equal
    assert "on one side only" in one([np.ones(2)], [np.ones(2), np.ones(2)]).structure
    assert "present on one side only" in one(None, np.ones(2)).structure or one(None, np.ones(2)).mismatches
    assert one(None, None).equal
    assert one([{1: 0.5}], [{2: 0.5}]).relative == np.inf


def test_differences_of_structure():
    assert one(np.ones((2, 3)), np.ones((3, 2))).structure == "shape (2, 3) became (3, 2)"
    assert "type float64 became int64" in one(np.ones(2), np.ones(2, np.int64)).structure
    missing, new = compare_outputs([{"y": np.ones(1)}], [{"z": np.ones(1)}])
    assert (missing.structure, new.structure) == ("the output is missing", "the output is new")
    assert missing.relative == np.inf
    with pytest.raises(DataError, match="2 feeds of outputs with 1"):
        compare_outputs([{}, {}], [{}])


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=4), elements=st.floats(-100, 100, width=32))
)
def test_figures_stay_in_range(a):
    b = a + np.float32(0.5)
    error = one(a, b)
    assert error.relative >= 0
    assert -1 <= error.worst_slice <= error.cosine <= 1
    assert one(a, a).equal


LOGITS = np.array([[1.0, 2, 3], [3, 2, 1], [0, 0, 0], [np.nan, 1, 2]])


def test_topk_breaks_ties_like_argmax_and_nan_misses():
    outputs = [{"y": LOGITS[:2]}, {"y": LOGITS[2:]}]
    assert topk(outputs, np.array([2, 0, 0, 2]), 1).tolist() == [True, True, True, False]
    assert topk(outputs, np.array([2, 1, 1, 2]), 1).tolist() == [True, False, False, False]
    assert topk(outputs, np.array([1, 1, 1, 2]), 2).tolist() == [True, True, True, False]


def test_topk_checks_labels():
    outputs = [{"y": LOGITS}]
    with pytest.raises(DataError, match="2 labels for 4 decisions"):
        topk(outputs, np.array([1, 2]))
    with pytest.raises(DataError, match=r"labels range from 0 to 3; the model has 3 classes"):
        topk(outputs, np.array([0, 1, 2, 3]))
    with pytest.raises(DataError, match="class indices"):
        topk(outputs, np.array([0.5] * 4))
    with pytest.raises(ParameterError, match=r"no output 'yy'; did you mean 'y'\?"):
        topk(outputs, np.zeros(4, int), output="yy")
    with pytest.raises(ParameterError, match="none of the outputs has scores"):
        topk([{"y": np.ones((3, 1))}], np.zeros(3, int))


def test_agreement():
    assert agreement([{"y": LOGITS}], [{"y": LOGITS[:, ::-1]}]).tolist() == [False, False, True, False]
    assert agreement([{"y": LOGITS}], [{"y": LOGITS * 2}]).tolist() == [True, True, True, False]
    maps = [{"a": 0.2, "b": 0.8}, {"a": 0.9, "b": 0.1}]
    swapped = [{"b": 0.6, "a": 0.4}, {"b": 0.7, "a": 0.3}]
    assert agreement([{"y": maps}], [{"y": swapped}]).tolist() == [True, False]
    labels = np.array(["x", "y"], object)
    assert agreement([{"l": labels}], [{"l": labels}]).tolist() == [True, True]


def test_metrics_by_name():
    assert find_metric("top5").proportion
    assert find_metric("agreement@y").paired
    with pytest.raises(ParameterError, match=r"no metric 'agrement'; did you mean 'agreement'\?"):
        find_metric("agrement")
    with pytest.raises(ParameterError, match=r"'math:sqr': 'math' has no 'sqr'; did you mean 'sqrt'\?"):
        find_metric("math:sqr")
    with pytest.raises(ParameterError, match=r"cannot import module 'no_such_module'"):
        find_metric("no_such_module:f")
    with pytest.raises(DataError, match="top1 needs labels"):
        find_metric("top1").measure([{"y": LOGITS}], None, None)


@pytest.mark.parametrize("value", ["nan", "[1.0, float('nan')]", "'text'", "None", "[[1]]", "[]"])
def test_bad_values_of_a_users_metric_are_refused(tmp_path, monkeypatch, value):
    name = f"bad_metric_{abs(hash(value))}"
    (tmp_path / f"{name}.py").write_text(
        f"from math import nan\ndef f(outputs, labels):\n    return {value}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"NaN or infinite|must return a number"):
        find_metric(f"{name}:f").measure([{}], None, None)
