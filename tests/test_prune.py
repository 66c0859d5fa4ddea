import doctest

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from onnxslim_lab.base import Context
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.floats import kth_magnitude, magnitude_bits
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes import prune
from onnxslim_lab.passes.prune import Prune
from onnxslim_lab.second_order import magnitude
from onnxslim_lab.second_order.magnitude import pattern_mask, smallest_in_rows, zero_below, zero_smallest

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-45, -1e-45, 3e38, np.inf, -np.inf, 1e-40])
floats32 = st.one_of(few_values, st.floats(width=32, allow_nan=False))


def matrices(elements=floats32, dtype=np.float32):
    return arrays.arrays(dtype, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=elements)


def reference(values, k):
    """L1 unstructured pruning in one line of NumPy: stable sort by magnitude, the first k are zeroed."""
    result = values.reshape(-1).copy()
    result[np.argsort(np.abs(result.astype(np.float64)), kind="stable")[:k]] = 0
    return result.reshape(values.shape)


def model_of(*weights, names=None):
    """Return a chain-free model: one MatMul of its own for each weight (2-D)."""
    nodes, inputs, outputs, tensors = [], [], [], []
    for number, weight in enumerate(weights):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(weight.dtype))
        inputs.append(helper.make_tensor_value_info(f"x{number}", kind, ["n", weight.shape[0]]))
        outputs.append(helper.make_tensor_value_info(f"y{number}", kind, ["n", weight.shape[1]]))
        name = names[number] if names else f"layer{number}"
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"y{number}"], name=name))
        tensors.append(numpy_helper.from_array(weight, f"w{number}"))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def weights_of(model):
    return [model.constant(name) for name in model.initializers]


def draw(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---------------------------------------------------------------- arrays


def test_doctests():
    assert doctest.testmod(prune).failed == 0
    assert doctest.testmod(magnitude).failed == 0


@given(matrices(), st.data())
def test_the_smallest_are_zeroed_and_ties_go_in_order(values, data):
    k = data.draw(st.integers(0, values.size))
    np.testing.assert_array_equal(zero_smallest(values, k), reference(values, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_type_keeps_its_dtype(dtype):
    values = draw(5000, dtype=dtype)
    result = zero_smallest(values, 2500)
    assert result.dtype == values.dtype
    np.testing.assert_array_equal(result, reference(values, 2500))


def test_float64_magnitudes_are_told_apart_beyond_float32():
    values = 1 + np.arange(1000)[::-1] * 1e-15
    np.testing.assert_array_equal(zero_smallest(values, 300), reference(values, 300))


def test_float16_subnormals_are_ranked():
    values = np.arange(1, 900, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(zero_smallest(values, 500), reference(values, 500))


@given(matrices(), st.booleans(), st.data())
def test_selection_over_pieces_equals_a_sort(values, wide, data):
    k = data.draw(st.integers(1, values.size))
    flat = values.reshape(-1)
    cut = data.draw(st.integers(0, flat.size))
    key, ties = kth_magnitude(lambda: [flat[:cut], flat[cut:]], k, wide=wide)
    keys = magnitude_bits(flat, wide=wide)
    assert key == np.sort(keys)[k - 1]
    assert ties == k - np.count_nonzero(keys < key)
    order = np.argsort(np.abs(flat.astype(np.float64)), kind="stable")
    assert (np.diff(keys[order].astype(object)) >= 0).all()


@given(matrices(), st.data())
def test_rows_lose_their_smallest(values, data):
    k = data.draw(st.integers(0, values.shape[1]))
    mask = smallest_in_rows(values, k)
    expected = np.zeros_like(mask)
    np.put_along_axis(expected, np.argsort(np.abs(values), axis=1, kind="stable")[:, :k], values=True, axis=1)
    np.testing.assert_array_equal(mask, expected)


@given(matrices(), st.integers(2, 6), st.data())
def test_patterns_hold_in_every_group(values, group, data):
    keep = data.draw(st.integers(1, group - 1))
    mask = pattern_mask(values, keep, group)
    columns = values.shape[1]
    for start in range(0, columns, group):
        part = slice(start, min(start + group, columns))
        width = part.stop - part.start
        assert (mask[:, part].sum(axis=1) == max(0, width - keep)).all()
        kept = np.where(mask[:, part], np.inf, np.abs(values[:, part])).min(axis=1)
        lost = np.where(mask[:, part], np.abs(values[:, part]), 0).max(axis=1)
        assert (lost <= kept).all()


def test_threshold_is_compared_exactly():
    values = np.array([0.1, -0.1, 0.05, 0.2], np.float32)  # float32(0.1) is above 0.1
    np.testing.assert_array_equal(zero_below(values, 0.1), np.array([0.1, -0.1, 0, 0.2], np.float32))


# ---------------------------------------------------------------- the pass


@given(st.lists(matrices(), min_size=1, max_size=4), st.floats(0, 0.99))
@settings(max_examples=50)
def test_global_scope_is_one_threshold_over_all_weights(weights, sparsity):
    model = model_of(*weights)
    Prune(sparsity=sparsity).run(model)
    flat = np.concatenate([weight.reshape(-1) for weight in weights])
    expected = reference(flat, round(sparsity * flat.size))
    np.testing.assert_array_equal(np.concatenate([w.reshape(-1) for w in weights_of(model)]), expected)


def test_global_scope_over_blocks_and_types():
    weights = [
        draw((300, 1000)),
        draw((40, 50), 1, np.float16),
        draw((600, 1000), 2),
        draw((9, 9), 3, np.float64),
    ]
    model = model_of(*weights)
    Prune(sparsity=0.777).run(model)
    flat = np.concatenate([weight.reshape(-1).astype(np.float64) for weight in weights])
    pruned = weights_of(model)
    assert [weight.dtype for weight in pruned] == [weight.dtype for weight in weights]
    result = np.concatenate([weight.reshape(-1).astype(np.float64) for weight in pruned])
    np.testing.assert_array_equal(result, reference(flat, round(0.777 * flat.size)))


def test_layer_scope_row_scope_and_defaults():
    weights = [draw((6, 10)), 100 * draw((8, 5), 1)]
    layer, row, default = model_of(*weights), model_of(*weights), model_of(*weights)
    Prune(sparsity=0.9, scope="layer").run(layer)
    assert [np.count_nonzero(weight == 0) for weight in weights_of(layer)] == [54, 36]
    Prune(sparsity=0.5, scope="row").run(row)
    for weight in weights_of(row):  # a row of the matrix is a column of MatMul's weight
        assert (np.count_nonzero(weight == 0, axis=0) == len(weight) // 2).all()
    Prune().run(default)
    assert sum(np.count_nonzero(weight == 0) for weight in weights_of(default)) == 50


def test_pattern_runs_along_the_inputs_of_a_convolution():
    weight = draw((4, 3, 3, 3))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = Graph.load(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]))
    outcome = Prune(pattern="2:4").run(model)
    (result,) = weights_of(model)
    rows = result.reshape(4, 27)
    assert (np.count_nonzero(rows[:, :24].reshape(-1, 4), axis=1) == 2).all()
    assert (np.count_nonzero(rows[:, 24:], axis=1) == 2).all()
    assert outcome.changes[0].nonzeros_after == 4 * 14


def test_overrides_leave_the_common_pool():
    weights = [draw((10, 10)), draw((10, 10), 1), draw((10, 10), 2)]
    model = model_of(*weights)
    outcome = Prune(sparsity=0.5, overrides="layer1:0.9;layer2:0").run(model)
    assert [np.count_nonzero(weight == 0) for weight in weights_of(model)] == [50, 90, 0]
    assert [refusal.where for refusal in outcome.refusals] == ["layer2"]


def test_overrides_apply_beside_a_threshold():
    model = model_of(draw((10, 10)), draw((10, 10), 1))
    Prune(threshold=0.01, overrides={"layer1": 0.9}).run(model)
    assert np.count_nonzero(weights_of(model)[1] == 0) == 90


def test_the_change_says_what_was_done():
    model = model_of(draw((10, 10)))
    (change,) = Prune(sparsity=0.3).run(model).changes
    assert (change.where, change.weights) == ("layer0", ("w0",))
    assert (change.bytes_before, change.bytes_after) == (400, 400)
    assert (change.nonzeros_before, change.nonzeros_after) == (100, 70)
    assert change.detail["sparsity"] == pytest.approx(0.3)


def test_a_second_run_changes_nothing():
    model = model_of(draw((10, 10)), draw((20, 10), 1))
    step = Prune(sparsity=0.8, scope="layer")
    assert len(step.run(model).changes) == 2
    again = step.run(model)
    assert again.changes == []
    assert all("nothing to zero" in refusal.reason for refusal in again.refusals)


def test_zeros_that_are_there_count_as_pruned():
    weight = draw((10, 10))
    weight[:4] = 0
    model = model_of(weight)
    (change,) = Prune(sparsity=0.5).run(model).changes
    assert (change.nonzeros_before, change.nonzeros_after) == (60, 50)


def test_a_shared_weight_is_pruned_once():
    model = Graph.parse("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 2] x) => (float[1, 2] z) <float[2, 2] w = {1, 2, 3, 4}>
        { [a] y = MatMul(x, w)
          t = Transpose(w)
          [b] z = MatMul(y, t) }
    """)
    outcome = Prune().run(model)
    assert [change.detail["layers"] for change in outcome.changes] == [2]
    np.testing.assert_array_equal(model.constant("w"), [[0, 0], [3, 4]])


EMBEDDING = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64[n] i) => (float[n, 2] y, float[n, 3] z) <float[3, 2] e = {1, 2, 3, 4, 5, 6}>
{ [look] y = Gather(e, i)
  t = Transpose(e)
  [tied] z = MatMul(y, t) }
"""


def test_embeddings_are_pruned_only_on_request_even_when_tied():
    model = Graph.parse(EMBEDDING)
    outcome = Prune().run(model)
    assert outcome.changes == []
    assert "embeddings=true" in outcome.refusals[0].reason
    Prune(embeddings=True).run(model)
    assert np.count_nonzero(model.constant("e")) == 3


def test_biases_and_integers_are_left_alone():
    model = Graph.parse("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {0.001, 0.002}, int8[2, 2] q = {1, 2, 3, 4}, float s = {0.1}>
        { [gemm] h = Gemm(x, w, b)
          d = DequantizeLinear(q, s)
          [quantized] y = MatMul(h, d) }
    """)
    outcome = Prune().run(model)
    assert [change.where for change in outcome.changes] == ["gemm"]
    np.testing.assert_array_equal(model.constant("b"), np.float32([0.001, 0.002]))
    np.testing.assert_array_equal(model.constant("q"), np.int8([[1, 2], [3, 4]]))
    assert [refusal.where for refusal in outcome.refusals] == ["quantized"]


def test_nan_is_refused_and_stays_out_of_the_pool():
    bad = draw((4, 5))
    bad[1, 1] = np.nan
    model = model_of(bad, draw((10, 10), 1))
    outcome = Prune(sparsity=0.5).run(model)
    assert "NaN" in outcome.refusals[0].reason
    first, second = weights_of(model)
    np.testing.assert_array_equal(first, bad)
    assert np.count_nonzero(second == 0) == 50


def test_infinities_are_the_largest_of_all():
    weight = np.array([[np.inf, 1, -np.inf, 2], [3, 4, 5, 6]], np.float32)
    model = model_of(weight)
    Prune(sparsity=0.75).run(model)
    assert sorted(weights_of(model)[0][weights_of(model)[0] != 0]) == [-np.inf, np.inf]


def test_hostile_weights_are_refused_or_done():
    model = model_of(np.zeros((3, 3), np.float32), np.zeros((0, 3), np.float32), np.ones((1, 1), np.float32))
    outcome = Prune(sparsity=0.2, scope="layer").run(model)
    assert outcome.changes == []
    assert len(outcome.refusals) == 3


def test_a_model_without_layers_is_fine_and_a_pattern_then_an_error():
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float x) => (float y) { y = Relu(x) }'
    assert Prune().run(Graph.parse(text)).changes == []
    with pytest.raises(ParameterError, match="matches no layer"):
        Prune(include=["conv*"]).run(Graph.parse(text))


def test_progress_ends_at_the_total():
    seen = []
    model = model_of(draw((4, 4)), draw((4, 4), 1))
    Prune().run(model, Context(progress=lambda done, total, _: seen.append((done, total))))
    assert seen[-1] == (2, 2)


@pytest.mark.parametrize(
    "parameters",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": float("nan")},
        {"sparsity": 0.5, "threshold": 0.1},
        {"threshold": 0},
        {"threshold": float("inf")},
        {"threshold": 0.1, "scope": "row"},
        {"pattern": "4:2"},
        {"pattern": "2:2"},
        {"pattern": "0:4"},
        {"pattern": "all"},
        {"pattern": "2:4", "sparsity": 0.5},
        {"pattern": "2:4", "scope": "layer"},
        {"pattern": "2:4", "overrides": {"a": 0.5}},
        {"overrides": {"a": 1.0}},
        {"sparsty": 0.5},
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters):
    with pytest.raises(ValidationError):
        Prune(**parameters)


@pytest.mark.zoo
def test_lenet_at_92_percent(zoo):
    model = Graph.load(zoo("lenet300"))
    outcome = Prune(sparsity=0.92, scope="layer").run(model)
    for change in outcome.changes:
        weight = model.constant(change.weights[0])
        assert np.count_nonzero(weight == 0) == round(0.92 * weight.size)
