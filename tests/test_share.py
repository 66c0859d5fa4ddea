import doctest
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper, numpy_helper
from pydantic import ValidationError

from onnxslim_lab.base import Context
from onnxslim_lab.clustering import histogram, scale_of
from onnxslim_lab.codebook import share_values, squares
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.floats import sort_key
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes import share
from onnxslim_lab.passes.prune import Prune
from onnxslim_lab.passes.share import Share

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def draw(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def pruned(shape, density, seed=0):
    values = draw(shape, seed)
    values[np.abs(values) < np.quantile(np.abs(values), 1 - density)] = 0
    return values


def lloyd(values, size):
    """Plain Lloyd's iteration from evenly spaced centres over all values; zero is a fixed centre."""
    points = np.sort(values[values != 0].astype(np.float64))
    zero = points.size < values.size
    centres = np.linspace(points.min(), points.max(), size - zero)
    centres = np.sort(np.append(centres, 0.0)) if zero else centres
    for _ in range(2000):
        index = np.searchsorted((centres[1:] + centres[:-1]) / 2, points)
        counts = np.bincount(index, minlength=size)
        sums = np.bincount(index, weights=points, minlength=size)
        moved = np.where((counts > 0) & (centres != 0), sums / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return float(np.sum((points - centres[index]) ** 2)) / values.size


def nearest(values, codebook):
    distance = np.abs(values.reshape(-1, 1).astype(np.float64) - codebook.astype(np.float64))
    return distance.min(axis=1)


def model_of(*weights):
    nodes, inputs, outputs, tensors = [], [], [], []
    for number, weight in enumerate(weights):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(weight.dtype))
        inputs.append(helper.make_tensor_value_info(f"x{number}", kind, ["n", weight.shape[0]]))
        outputs.append(helper.make_tensor_value_info(f"y{number}", kind, ["n", weight.shape[1]]))
        nodes.append(
            helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"y{number}"], name=f"layer{number}")
        )
        tensors.append(numpy_helper.from_array(weight, f"w{number}"))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


# ---------------------------------------------------------------- arrays


def test_doctests():
    assert doctest.testmod(share).failed == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("density", [1.0, 0.1])
@pytest.mark.parametrize("elements", [3000, 40_000])
def test_the_loss_is_that_of_lloyd_on_all_values(bits, density, elements):
    values = pruned(elements, density)
    result = share_values(values, 2**bits)
    error, _ = squares(values, result.values)
    assert error <= 1.01 * lloyd(values, 2**bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_better_than_evenly_spaced_values(bits):
    values = draw(30_000)
    grid = np.linspace(values.min(), values.max(), 2**bits)
    uniform = float(np.mean(nearest(values[:5000], grid) ** 2))
    for init in ("linear", "density", "random"):
        error, _ = squares(values, share_values(values, 2**bits, init=init).values)
        assert error < uniform


@given(
    arrays.arrays(
        np.float32, st.integers(1, 300), elements=st.one_of(st.sampled_from([0.0, -0.0, 1.0]), finite)
    ),
    st.integers(1, 5),
    st.sampled_from(["linear", "density", "random"]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_contract_on_any_values(values, bits, init, reserve):
    result = share_values(values, 2**bits, init=init, reserve_zero=reserve)
    if result is None:
        assert np.unique(values).size <= 2**bits
        return
    assert np.unique(values).size > 2**bits
    assert (result.values.dtype, result.values.shape) == (values.dtype, values.shape)
    np.testing.assert_array_equal(np.unique(result.values), result.codebook)
    assert result.codebook.size <= 2**bits
    assert not result.values[values == 0].any()
    assert result.codebook.min() >= values.min()
    assert result.codebook.max() <= values.max() or reserve
    gap = np.abs(values.astype(np.float64) - result.values)
    np.testing.assert_array_equal(gap, nearest(values, result.codebook))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [2000, 300_000])
def test_entries_are_the_means_of_their_members(dtype, elements):
    values = draw(elements, dtype=dtype)
    result = share_values(values, 16)
    assert result.values.dtype == values.dtype
    step = float(ml_dtypes.finfo(dtype).eps)
    for entry in result.codebook:
        members = values[result.values == entry].astype(np.float64)
        assert float(entry) == pytest.approx(members.mean(), rel=2 * step, abs=1e-3)


def test_the_same_seed_gives_the_same_bits():
    values = draw(200_000)
    for init in ("linear", "random"):
        first, second = (share_values(values, 64, init=init, seed=3).values for _ in range(2))
        assert first.tobytes() == second.tobytes()
    other = share_values(values, 64, init="random", seed=4).values
    assert other.tobytes() != first.tobytes()


def test_zero_is_an_entry_when_there_are_zeros_or_on_request():
    values = draw(2000) + 5
    assert 0 not in share_values(values, 16).codebook
    dense = np.append(values, np.float32(0))
    assert 0 in share_values(dense, 16).codebook
    near = draw(2000)
    assert 0 in share_values(near, 16, reserve_zero=True).codebook


def test_values_symmetric_about_zero_lose_no_entry():
    half = np.abs(draw(5000))
    values = np.concatenate([half, -half, [0]]).astype(np.float32)
    assert share_values(values, 16).codebook.size == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_ranges(dtype):
    largest, tiny = float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).smallest_subnormal)
    for scale in (largest / 8, tiny * 1000):
        values = (np.clip(draw(3000, dtype=np.float64), -4, 4) * scale).astype(dtype)
        values[:100] = 0
        if np.unique(values).size <= 16:
            continue
        result = share_values(values, 16)
        assert np.isfinite(result.values.astype(np.float64)).all()
        assert not result.values[:100].any()
        error, power = squares(
            (values / scale).astype(np.float64), (result.values / scale).astype(np.float64)
        )
        assert error < 0.03 * power


def test_one_outlier_does_not_take_the_codebook():
    values = draw(300_000)
    values[7] = 1e30
    result = share_values(values, 16)
    error, _ = squares(np.delete(values, 7), np.delete(result.values, 7))
    assert error < 0.02
    assert result.values[7] == np.float32(1e30)


def test_values_that_differ_in_their_last_bits_only():
    values = 1 + np.arange(20_000) * 1e-14
    result = share_values(values, 16)
    error, _ = squares(values - 1, result.values - 1)
    assert error < 1.05 * (20_000e-14 / 16) ** 2 / 12


def test_the_histogram_keeps_mass_and_order():
    values = draw(400_000)
    values[::3] = 0
    points, counts = histogram(values, scale_of(values), 4096, least=64)
    assert counts.sum() == np.count_nonzero(values)
    assert (np.diff(points) > 0).all()
    assert np.dot(points, counts) == pytest.approx(values.sum(dtype=np.float64), rel=1e-9)


@given(arrays.arrays(np.float32, st.integers(2, 50), elements=finite))
def test_sort_keys_sort(values):
    ascending = np.sort(values)
    for kind in (np.float32, np.float64):
        assert (np.diff(sort_key(ascending.astype(kind))) >= 0).all() or 0 in values


def test_millions_of_weights_take_seconds():
    values = draw(4_000_000)
    started = time.perf_counter()
    share_values(values, 16)
    assert time.perf_counter() - started < 20  # 0.5 s on an idle machine


# ---------------------------------------------------------------- the pass


def test_the_change_says_what_was_lost():
    weight = draw((40, 50))
    model = model_of(weight)
    (change,) = Share(bits=3).run(model).changes
    result = model.constant("w0")
    error = float(np.mean((result.astype(np.float64) - weight) ** 2))
    assert change.detail["mse"] == pytest.approx(error)
    assert change.detail["sqnr_db"] == pytest.approx(
        10 * np.log10(np.mean(weight.astype(np.float64) ** 2) / error)
    )
    assert change.detail["codebook"] == np.unique(result).size == 8
    assert (change.bytes_before, change.bytes_after) == (8000, 8000)


def test_pruned_zeros_stay_and_take_an_entry():
    model = model_of(draw((100, 100)))
    Prune(sparsity=0.9).run(model)
    before = model.constant("w0").copy()
    Share(bits=4).run(model)
    after = model.constant("w0")
    assert np.unique(after).size == 16
    np.testing.assert_array_equal(after == 0, before == 0)


def test_rows_have_codebooks_of_their_own():
    weight = draw((200, 10)) * np.logspace(0, 3, 10, dtype=np.float32)
    whole, apart = model_of(weight), model_of(weight)
    (one,) = Share(bits=3).run(whole).changes
    (many,) = Share(bits=3, rows=4).run(apart).changes
    assert (one.detail["codebooks"], many.detail["codebooks"]) == (1, 3)
    assert many.detail["mse"] < one.detail["mse"]
    result = apart.constant("w0")  # rows of the (out, in) matrix are columns of MatMul's weight
    for columns in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert np.unique(result[:, columns]).size <= 8
    assert result.shape == weight.shape
    np.testing.assert_allclose(result, weight, atol=1500)


def test_overrides_set_the_bits():
    model = model_of(draw((50, 50)), draw((50, 50), 1), draw((50, 50), 2))
    outcome = Share(bits=2, overrides="layer1:5", exclude=["w2"]).run(model)
    assert [np.unique(model.constant(f"w{i}")).size for i in range(2)] == [4, 32]
    assert [change.detail["bits"] for change in outcome.changes] == [2, 5]
    assert [refusal.where for refusal in outcome.refusals] == ["layer2"]


def test_a_second_run_changes_nothing():
    model = model_of(draw((50, 50)))
    assert len(Share().run(model).changes) == 1
    again = Share().run(model)
    assert again.changes == []
    assert "nothing to share" in again.refusals[0].reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_has_no_mean_is_refused(bad):
    weight = draw((50, 50))
    weight[3, 3] = bad
    model = model_of(weight)
    outcome = Share().run(model)
    assert outcome.changes == []
    assert "NaN or infinite" in outcome.refusals[0].reason
    np.testing.assert_array_equal(model.constant("w0"), weight)


def test_hostile_weights_are_refused():
    model = model_of(
        np.zeros((60, 60), np.float32),
        np.zeros((0, 3), np.float32),
        np.full((60, 60), 3, np.float32),
        draw((2, 2)),
    )
    outcome = Share().run(model)
    assert outcome.changes == []
    assert len(outcome.refusals) == 4
    assert "would take" in outcome.refusals[-1].reason


def test_integers_and_biases_are_left_alone():
    text = """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 2] x) => (float[1, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {0.1}, float[2] b = {1, 2}>
        { d = DequantizeLinear(q, s)
          [quantized] h = MatMul(x, d)
          y = Add(h, b) }
    """
    outcome = Share().run(Graph.parse(text))
    assert outcome.changes == []
    assert [refusal.where for refusal in outcome.refusals] == ["quantized"]


def test_a_shared_weight_is_done_once():
    weight = draw((30, 30))
    model = model_of(weight, weight)
    model.set_input(model.nodes[1], 1, "w0")
    assert len(Share().run(model).changes) == 1


def test_progress_ends_at_the_total():
    seen = []
    Share().run(model_of(draw((30, 30))), Context(progress=lambda done, total, _: seen.append((done, total))))
    assert seen == [(1, 1)]


def test_a_misspelt_pattern_is_an_error():
    with pytest.raises(ParameterError, match=r"share: include pattern 'layr0' .*'layer0'"):
        Share(include="layr0").run(model_of(draw((4, 4))))


@pytest.mark.parametrize(
    "parameters",
    [{"bits": 0}, {"bits": 9}, {"rows": 0}, {"init": "kmeans"}, {"overrides": "a:9"}, {"bit": 3}],
)
def test_parameters_that_make_no_sense_are_refused(parameters):
    with pytest.raises(ValidationError):
        Share(**parameters)
