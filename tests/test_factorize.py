"""factorize: what it writes, what it refuses and why, what it predicts; every place a weight can be."""

import tracemalloc

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from passes_helper import assert_equal_outputs, runner
from pydantic import ValidationError
from test_layers import random_array, single

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.passes.factorize import Factorize
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.statistics import Calibration


def thin(seed, out, inputs, rank, dtype=np.float32):
    """A matrix of exactly this rank."""
    left, right = random_array(seed, out, rank), random_array(seed + 1, rank, inputs)
    return (left @ right / np.sqrt(rank * inputs)).astype(dtype)


def context(feeds, *, random=False):
    return Context(calibration=Calibration(runner(), Dataset(feeds, None, "test", random=random)))


def correlated(seed, count, *shape):
    """Feeds whose last axis is correlated: what makes whitening worth while."""
    mix = random_array(99, shape[-1], shape[-1]) * np.logspace(0, -2, shape[-1], dtype=np.float32)
    return [{"x": random_array(seed + n, *shape) @ mix.T} for n in range(count)]


def run(graph, feeds):
    return [result[graph.outputs[0]] for result in runner().run(graph, feeds, optimization="off")]


def model_bytes(graph):
    return len(graph.to_model().SerializeToString())


MLP = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 32] x) => (float[N, 16] y) { h = Gemm<transB = 1>(x, fc1, b1) r = Relu(h) y = MatMul(r, fc2) }"""


def parsed(text, **constants):
    """A model from text, its initializers from arrays."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return Graph.load(model)


def mlp(ranks=(4, 3)):
    graph = parsed(MLP, fc1=thin(0, 24, 32, ranks[0]), b1=random_array(5, 24), fc2=thin(2, 24, 16, ranks[1]))
    graph.nodes[0].name = "fc1"
    return graph


def test_two_nodes_take_the_place_of_one_with_readable_names():
    graph = mlp()
    before = model_bytes(graph)
    original = graph.copy()
    outcome = Factorize(rank=4).run(graph)
    assert [node.op_type for node in graph.nodes] == ["Gemm", "Gemm", "Relu", "MatMul", "MatMul"]
    assert set(graph.initializers) == {"fc1_v", "fc1_u", "b1", "fc2_v", "fc2_u"}
    first, second = graph.nodes[:2]
    assert (first.name, second.name) == ("fc1/v", "fc1")
    assert list(second.input)[1:] == ["fc1_u", "b1"]
    assert graph.constant("fc1_v").shape == (4, 32)
    assert graph.constant("fc2_v").shape == (24, 4)
    assert_equal_outputs(original, graph, dims={"N": 5}, relative=1e-4)
    one = outcome.changes[0]
    assert (one.bytes_before, one.bytes_after) == (24 * 32 * 4, 4 * (24 + 32) * 4)
    assert (one.detail["parameters before"], one.detail["parameters after"]) == (768, 224)
    assert one.detail["energy"] == pytest.approx(1)
    assert one.weights == ("fc1",)
    assert model_bytes(graph) < before - 2000
    onnx.checker.check_model(graph.to_model(), full_check=True)


@pytest.mark.parametrize("method", ["svd", "qr", "whitened"])
@pytest.mark.parametrize("rank", [2, 5])
def test_the_predicted_output_error_is_the_measured_one(method, rank):
    text = MLP.replace("r = Relu(h) y = MatMul(r, fc2)", "y = Add(h, b1)")
    graph = parsed(text, fc1=random_array(0, 16, 32), b1=np.zeros(16, np.float32))
    feeds = correlated(3, 12, 7, 32)
    original = graph.copy()
    outcome = Factorize(method=method, error=0.999).run(graph.copy(), context(feeds))
    assert outcome.changes
    measured = Calibration(runner(), Dataset(feeds, None, "test", random=False))
    step = Factorize(method=method, rank=rank)
    (change,) = step.run(graph, Context(calibration=measured)).changes
    whole, cut = (np.concatenate(run(model, feeds)).astype(np.float64) for model in (original, graph))
    error = np.linalg.norm(whole - cut) / np.linalg.norm(whole)
    assert change.detail["output error"] == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("conv", ["channel", "spatial", "tucker"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_predicted_error_of_every_conv_form_is_the_measured_one(conv, groups):
    x = [{"x": feed["x"]} for feed in correlated(0, 4, 2, 8, 9, 9)]
    graph = single("Conv", x[0]["x"], random_array(1, 16, 8 // groups, 3, 3), group=groups, pads=[1, 1, 1, 1])
    original = graph.copy()
    (change,) = Factorize(conv=conv, energy=0.6, multiple=1).run(graph, context(x)).changes
    whole, cut = (np.concatenate(run(model, x)).astype(np.float64) for model in (original, graph))
    error = np.linalg.norm(whole - cut) / np.linalg.norm(whole)
    assert change.detail["output error"] == pytest.approx(error, rel=0.01)
    assert change.detail["form"] == conv
    assert error**2 <= 0.4 + 1e-6
    assert len(graph.nodes) == (3 if conv == "tucker" else 2)


def test_whitening_loses_less_and_data_that_is_random_does_not_count():
    feeds = correlated(0, 20, 16, 32)
    losses = {}
    for method, random in (("svd", False), ("auto", False), ("auto", True)):
        graph = mlp((24, 16))
        step = Factorize(method=method, rank=6, include="fc1")
        original = graph.copy()
        (change,) = step.run(graph, context(feeds, random=random)).changes
        losses[method, random] = np.linalg.norm(
            np.concatenate(run(graph, feeds)) - np.concatenate(run(original, feeds))
        )
        assert change.detail["method"] == ("whitened" if (method, random) == ("auto", False) else "svd")
        assert ("output error" in change.detail) is not random
    assert losses["auto", False] < 0.8 * losses["svd", False]
    assert losses["auto", True] == pytest.approx(losses["svd", False], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"energy": 0.9999}, "energy"), ({"error": 0.01, "method": "svd"}, "error")],
)
def test_ranks_by_energy_and_by_error_find_the_rank_there_is(settings, what):
    graph = mlp()
    outcome = Factorize(**settings).run(graph, context(correlated(0, 8, 8, 32)))
    assert {change.where: change.detail["rank"] for change in outcome.changes} == {"fc1": 4, "y": 3}, what


def test_refusals_tell_the_break_even_rank_and_the_rank_needed():
    graph = mlp((24, 16))
    outcome = Factorize(rank=14).run(graph)
    assert not outcome.changes
    assert "rank 14 saves nothing" in outcome.refusals[0].reason
    assert "24 x 32 matrix pay below rank out*in/(out+in) = 13.7" in outcome.refusals[0].reason
    outcome = Factorize(energy=0.9999).run(graph)
    assert not outcome.changes
    assert "energy 0.9999 needs rank 2" in outcome.refusals[0].reason
    tiny = single("MatMul", random_array(0, 2, 2), random_array(1, 2, 2))
    assert "rank 1 saves nothing" in Factorize().run(tiny).refusals[0].reason


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_a_budget_goes_where_the_loss_is_smallest(of, budget):
    graph = mlp((24, 2))
    outcome = Factorize(budget=budget, budget_of=of, multiple=1).run(graph)
    ranks = {change.where: change.detail["rank"] for change in outcome.changes}
    whole = 24 * 32 + 24 * 16
    left = sum(graph.constant(name).size for name in graph.initializers if name != "b1")
    assert budget * whole - 60 <= left <= budget * whole
    assert ranks["y"] == 2, "the layer of rank 2 loses nothing"


def test_a_budget_of_macs_skips_what_cannot_be_counted_or_measured():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[4, 32] x, bool c) => (float[4, 24] y, float[4, 24] z)
    { y = MatMul(x, a) z = If(c) <then_branch = t () => (float[4, 24] p) { n = Neg(x) p = MatMul(n, b) },
                                  else_branch = e () => (float[4, 24] q) { q = MatMul(x, a) }> }"""
    graph = parsed(text, a=random_array(0, 32, 24), b=random_array(1, 32, 24))
    feeds = [{"x": random_array(n, 4, 32), "c": np.bool_(False)} for n in range(9)]
    step = Factorize(budget=0.6, budget_of="macs", method="whitened", multiple=1)
    outcome = step.run(graph, context(feeds))
    assert [change.where for change in outcome.changes] == ["y"]
    assert "no feed reaches it" in next(r.reason for r in outcome.refusals if r.where == "p")
    lookup = single("Gather", np.zeros(5, np.int64), random_array(0, 60, 24), slot=0)
    (refusal,) = Factorize(budget=0.6, budget_of="macs", embeddings=True).run(lookup).refusals
    assert "none or not known" in refusal.reason


def test_overrides_include_and_exclude():
    graph = mlp((24, 16))
    outcome = Factorize(rank=6, overrides="fc1:3").run(graph)
    assert [change.detail["rank"] for change in outcome.changes] == [3, 6]
    outcome = Factorize(rank=6, exclude="fc1").run(mlp())
    assert [change.where for change in outcome.changes] == ["y"]
    with pytest.raises(ParameterError, match="matches no layer"):
        Factorize(include="fc9").run(mlp())


def test_ranks_are_multiples_where_the_layer_is_large():
    graph = single("MatMul", random_array(0, 4, 96), random_array(1, 96, 96))
    (change,) = Factorize(energy=0.8).run(graph).changes
    assert change.detail["rank"] % 8 == 0


DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("cast", [False, True])
def test_every_float_type(dtype, cast):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    used = TensorProto.FLOAT if cast and kind != TensorProto.DOUBLE else kind
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "m")]
    weight = thin(0, 20, 24, 3).astype(dtype)
    if used != kind:
        nodes[0].input[1] = "wide"
        nodes.insert(0, helper.make_node("Cast", ["w"], ["wide"], to=used))
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "g",
        [value("x", used, [4, 20])],
        [value("y", used, [4, 24])],
        [numpy_helper.from_array(weight, "w")],
    )
    graph = Graph.load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    x = random_array(7, 4, 20).astype(helper.tensor_dtype_to_np_dtype(used))
    original = graph.copy()
    (change,) = Factorize(rank=4).run(graph).changes
    assert set(graph.initializers) == {"w_u", "w_v"}
    assert {graph.constant_type(name)[0] for name in graph.initializers} == {kind}
    assert change.bytes_after == 4 * 44 * np.dtype(dtype).itemsize
    onnx.checker.check_model(graph.to_model(), full_check=True)
    wanted, found = (
        Interpreter(model).run({"x": x}, ["y"])["y"].astype(np.float64) for model in (original, graph)
    )
    # two roundings of half precision, relative to the largest output
    unit = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(found, wanted, atol=max(8 * unit, 1e-6) * np.abs(wanted).max())


BODY = """<ir_version: 8, opset_import: ["" : 17]>
g (bool c, float[4, 20] x) => (float[4, 24] y) <float[20, 24] w = {WEIGHT}>
{ y = If(c) <then_branch = t () => (float[4, 24] a) { a = MatMul(x, w) },
             else_branch = e () => (float[4, 24] b) { m = MatMul(x, w) b = Neg(m) }> }"""
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[4, 20] x) => (float[4, 24] y) { y = own.f(x) }
<domain: "own", opset_import: ["" : 17]>
f (x) => (y) { w = Constant<value = float[20, 24] {WEIGHT}>() v = Transpose<perm = [0, 1]>(w) y = MatMul(x, v) }"""


def text_of(template):
    numbers = ", ".join(f"{value:.6f}" for value in thin(0, 20, 24, 3).reshape(-1))
    return template.replace("WEIGHT", numbers)


def test_bodies_share_the_factors_of_a_captured_weight():
    graph = Graph.parse(text_of(BODY))
    original = graph.copy()
    (change,) = Factorize(rank=3).run(graph).changes
    assert change.detail["layers"] == 2
    assert set(graph.initializers) == {"w_u", "w_v"}
    for truth in (True, False):
        assert_equal_outputs(
            original, graph, [{"c": np.bool_(truth), "x": random_array(1, 4, 20)}], relative=1e-3
        )


def test_functions_keep_their_constants_and_lose_the_old_one():
    graph = Graph.parse(text_of(FUNCTION))
    original = graph.copy()
    step = Factorize(rank=3)
    (change,) = step.run(graph, context([{"x": random_array(n, 4, 20)} for n in range(12)])).changes
    assert change.detail["method"] == "whitened"
    (function,) = graph.functions.values()
    assert sorted(node.op_type for node in function.nodes) == ["Constant", "Constant", "MatMul", "MatMul"]
    assert_equal_outputs(original, graph, relative=1e-3)


def test_a_constant_node_is_removed_with_its_views():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[4, 20] x) => (float[4, 24] y)
    { w = Constant<value = float[24, 20] {WEIGHT}>() s = Constant<value = int64[2] {24, 20}>()
      r = Reshape(w, s) t = Transpose<perm = [1, 0]>(r) y = MatMul(x, t) }"""
    graph = Graph.parse(text_of(text))
    original = graph.copy()
    assert Factorize(rank=4).run(graph).changes
    assert [node.op_type for node in graph.nodes] == ["MatMul", "MatMul"]
    assert set(graph.initializers) == {"w_u", "w_v"}
    assert original.producer("w") is not None
    assert runner().load_seconds(graph) > 0


def tied():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (int64[N] x) => (float[N, 40] y)
    { e = Gather(table, x) h = Relu(e) t = Transpose<perm = [1, 0]>(table) y = MatMul(h, t) }"""
    return parsed(text, table=thin(0, 40, 16, 3))


def test_tied_embeddings_share_their_factors_transposed():
    graph = tied()
    assert "embeddings=true" in Factorize(rank=3).run(graph).refusals[0].reason
    original = graph.copy()
    feeds = [{"x": np.random.default_rng(n).integers(0, 40, 6)} for n in range(3)]
    (change,) = Factorize(rank=3, embeddings=True).run(graph, context(feeds)).changes
    assert change.detail["layers"] == 2
    assert set(graph.initializers) == {"table_u", "table_v"}
    assert change.bytes_after == 3 * 56 * 4
    assert sum(node.op_type == "Transpose" for node in graph.nodes) == 2
    assert_equal_outputs(original, graph, [{"x": np.arange(40)}], relative=1e-3)


def test_a_lookup_keeps_the_entries_that_come_up_best():
    graph = single("Gather", np.zeros(5, np.int64), random_array(0, 60, 24), slot=0)
    original = graph.copy()
    feeds = [{"x": np.random.default_rng(n).integers(0, 10, 5)} for n in range(30)]
    (change,) = Factorize(rank=6, embeddings=True).run(graph, context(feeds)).changes
    errors = []
    for part in (np.arange(10), np.arange(10, 60)):
        one, two = (
            np.concatenate([run(m, [{"x": part[i : i + 5]}])[0] for i in range(0, len(part), 5)])
            for m in (original, graph)
        )
        errors.append(np.linalg.norm(one - two) / np.linalg.norm(one))
    assert errors[0] < 0.7 * errors[1]
    whole, cut = (np.concatenate(run(model, feeds)) for model in (original, graph))
    assert change.detail["output error"] == pytest.approx(
        np.linalg.norm(whole - cut) / np.linalg.norm(whole), rel=0.01
    )


def test_a_weight_that_something_else_reads_stays():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[20, 24] x) => (float[20, 24] y)
    { m = MatMul(x, w) s = Add(m, w) y = Relu(s) }"""
    graph = parsed(text.replace("float[20, 24] x", "float[20, 20] x"), w=thin(0, 20, 24, 3))
    (refusal,) = Factorize(rank=3).run(graph).refusals
    assert "also read by a Add" in refusal.reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value):
    weight = random_array(0, 20, 24)
    weight[3, 4] = value
    graph = single("MatMul", random_array(0, 4, 20), weight)
    (refusal,) = Factorize(rank=3).run(graph).refusals
    assert "NaN or infinite" in refusal.reason


def test_zero_and_empty_weights():
    graph = single("MatMul", random_array(0, 4, 20), np.zeros((20, 24), np.float32))
    (change,) = Factorize(energy=0.9).run(graph).changes
    assert change.detail["rank"] == 1
    assert not run(graph, [{"x": random_array(0, 4, 20)}])[0].any()
    empty = single("MatMul", random_array(0, 4, 0), np.zeros((0, 24), np.float32))
    assert "no elements" in Factorize().run(empty).refusals[0].reason


def test_other_operators_are_refused_by_name():
    graph = single("ConvTranspose", random_array(0, 1, 8, 5, 5), random_array(1, 8, 16, 3, 3))
    assert "ConvTranspose cannot be written as two" in Factorize().run(graph).refusals[0].reason


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_inputs_that_tell_nothing(value):
    graph = mlp()
    silent = context([{"x": np.full((2, 32), value, np.float32)}])
    step = Factorize(rank=3, include="fc1")
    assert (
        "all zero"
        in step.model_copy(update={"method": "whitened"}).run(graph.copy(), silent).refusals[-1].reason
    )
    (change,) = step.run(graph.copy(), silent).changes
    assert change.detail["method"] == "svd"
    with pytest.raises(ParameterError, match="needs calibration data"):
        Factorize(method="whitened").run(graph)
    with pytest.raises(ParameterError, match="needs calibration data"):
        Factorize(error=0.1).run(graph)


def test_strides_and_pads_go_where_they_belong():
    x = random_array(0, 1, 8, 11, 12)
    graph = single(
        "Conv", x, random_array(1, 16, 8, 3, 5), strides=[2, 1], pads=[1, 2, 0, 1], dilations=[2, 1]
    )
    (change,) = Factorize(conv="spatial", rank=6).run(graph).changes
    first, second = graph.nodes
    assert attribute(first, "kernel_shape") == [3, 1]
    assert attribute(second, "kernel_shape") == [1, 5]
    assert (attribute(first, "strides"), attribute(second, "strides")) == ([2, 1], [1, 1])
    assert (attribute(first, "pads"), attribute(second, "pads")) == ([1, 0, 0, 0], [0, 2, 0, 1])
    assert (attribute(first, "dilations"), attribute(second, "dilations")) == ([2, 1], [1, 1])
    assert change.detail["form"] == "spatial"


def test_a_depthwise_conv_is_parted_into_rows_and_columns():
    x = random_array(0, 1, 6, 8, 8)
    weight = np.einsum("cr,cs->crs", random_array(1, 6, 3), random_array(2, 6, 3))[:, None]
    graph = single("Conv", x, weight, group=6, pads=[1, 1, 1, 1])
    original = graph.copy()
    (change,) = Factorize(energy=0.999).run(graph).changes
    assert (change.detail["form"], change.detail["parameters after"]) == ("spatial", 36)
    assert_equal_outputs(original, graph, [{"x": x}], relative=1e-4)


@pytest.mark.parametrize(("settings", "most"), [({"budget": 0.5}, 6.5), ({"rank": 20}, 3.5)])
def test_memory_is_a_few_copies_of_the_matrix(settings, most):
    size = 700
    graph = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 700] x) => (float[N, 700] y) { y = MatMul(x, w) }""",
        w=random_array(0, size, size),
    )
    data = context(correlated(3, 4, 300, size))
    tracemalloc.start()
    outcome = Factorize(method="whitened", **settings).run(graph, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome.changes
    assert peak < most * 8 * size * size, peak / (8 * size * size)


def test_external_data_and_files(tmp_path):
    graph = mlp()
    graph.save(tmp_path / "a.onnx", external=True)
    loaded = Graph.load(tmp_path / "a.onnx")
    Factorize(rank=4).run(loaded)
    loaded.save(tmp_path / "b.onnx", external=True)
    assert_equal_outputs(graph, Graph.load(tmp_path / "b.onnx"), dims={"N": 3}, relative=1e-4)
    sizes = [sum(file.stat().st_size for file in tmp_path.glob(f"{name}.*")) for name in "ab"]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(
    "parameters",
    [
        {"rank": 0},
        {"rank": 4, "energy": 0.9},
        {"energy": 0.0},
        {"error": 1.0},
        {"budget": 1.0},
        {"budget": 0.5, "error": 0.1},
        {"rank": 3, "budget_of": "macs"},
        {"overrides": {"a": 0}},
        {"method": "pca"},
        {"multiple": 0},
        {"ranks": 3},
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters):
    with pytest.raises(ValidationError):
        Factorize(**parameters)
