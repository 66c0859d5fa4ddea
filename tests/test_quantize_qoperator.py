"""Operators on codes: each gives what the operator between DequantizeLinear and QuantizeLinear gave."""

import copy
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from passes_helper import runner
from qdq_graphs import QdqModel
from runtime_helper import agrees
from test_quantize import CONVS, SIZES, context_of, feeds_of, model_of, quantized, sqnr

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.qoperator import write_operators

FORMATS = ("qoperator", "microsoft")
STEPS = {
    "conv": "{y} = Conv<pads = [1,1,1,1]>({x}, w, b)",
    "bare": "{y} = Conv({x}, v)",
    "relu": "{y}r = Conv({x}, v, b) {y} = Relu({y}r)",
    "clip": "{y}r = Conv({x}, v) {y} = Clip({y}r, low, six)",
    "leaky": "{y} = LeakyRelu({x})",
    "sigmoid": "{y} = Sigmoid({x})",
    "rectify": "{y} = Relu({x})",
    "add": "{y} = Add({x}, {old})",
    "sum": "{y}r = Add({x}, {old}) {y} = Relu({y}r)",
    "mul": "{y} = Mul({x}, {old})",
    "concat": "{y}c = Concat<axis = 1>({x}, {old}) {y} = Conv({y}c, u)",
    "pool": "{y} = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>({x})",
    "average": "{y} = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>({x})",
    "mean": "{y}m = GlobalAveragePool({x}) {y} = Add({y}m, {x})",
    "turn": "{y} = Transpose<perm = [0,1,3,2]>({x})",
    "resize": '{y}z = Resize<mode = "nearest">({x}, , two) {y} = MaxPool<kernel_shape = [2,2], strides = [2,2]>({y}z)',
    "split": "{y}p, {y}q = Split<axis = 1>({x}) {y} = Concat<axis = 1>({y}q, {y}p)",
    "matmul": "{y} = MatMul({x}, m)",
    "biased": "{y}r = MatMul({x}, m) {y} = Add({y}r, e)",
}
CONSTANTS = """low = Constant<value_float = -0.5>() six = Constant<value_float = 0.7>()
    two = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>()"""
WEIGHTS = {"w": (4, 4, 3, 3), "v": (4, 4, 1, 1), "u": (4, 8, 1, 1), "b": (4,), "m": (6, 6), "e": (6,)}


def operators(graph):
    return Counter(node.op_type for part in graph.walk() for node in part.nodes)


def written(graph, form):
    result = graph.copy()
    return result, write_operators(result, microsoft=form == "microsoft")


def probe(proto, fed, wanted):
    """Return a model with other outputs, where readers of the codes in `fed` are given them instead."""
    made = copy.deepcopy(proto)
    for node in made.graph.node:
        node.input[:] = [f"{name}_fed" if name in fed else name for name in node.input]
    for name, codes in fed.items():
        kind = helper.np_dtype_to_tensor_dtype(codes.dtype)
        made.graph.input.append(helper.make_tensor_value_info(f"{name}_fed", kind, None))
    del made.graph.output[:]
    del made.graph.value_info[:]
    made.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    return made


def run(proto, feed, outputs):
    options = {"outputs": outputs, "optimization": "off"}
    inferred = onnx.shape_inference.infer_shapes(proto)
    kinds = {value.name: value.type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    for value in proto.graph.output:
        value.type.CopyFrom(kinds[value.name])
    return runner().run(Graph.load(proto), [feed], **options)[0]


def assert_one_step(pairs, result, feed):
    """Assert that every operator, given the codes of the QDQ form, makes them up to one step."""
    before, after = pairs.to_model(), result.to_model()
    made = {name for node in after.graph.node for name in node.output}
    quantizers = [node for node in before.graph.node if node.op_type in ("QuantizeLinear", "Clip")]
    common = [node.output[0] for node in quantizers if node.output[0] in made]
    ends = [value.name for value in after.graph.output]
    theirs = run(probe(before, {}, common), feed, common) if common else {}
    ours = run(probe(after, theirs, common), {**feed, **{f"{k}_fed": v for k, v in theirs.items()}}, common)
    for name in common:
        assert np.abs(theirs[name].astype(int) - ours[name].astype(int)).max() <= 1, name
    final = runner().run(pairs, [feed], optimization="off")[0]
    given_codes = {**feed, **{f"{k}_fed": v for k, v in theirs.items()}}
    for name, value in run(probe(after, theirs, ends), given_codes, ends).items():
        np.testing.assert_allclose(value, final[name], rtol=1e-4, atol=1e-5 * max(1, np.abs(value).max()))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=7),
    activations=st.sampled_from(["uint8", "int8"]),
    granularity=st.sampled_from(["channel", "tensor"]),
    form=st.sampled_from(FORMATS),
)
def test_every_operator_gives_what_it_gave_between_pairs(steps, activations, granularity, form):
    body, x, old = [CONSTANTS, "i = Conv(x, v, b)"], "i", "i"
    for number, step in enumerate([*steps, "bare"]):
        body.append(STEPS[step].format(y=f"y{number}", x=x, old=old))
        x, old = f"y{number}", x
    graph = model_of(
        " ".join(body), WEIGHTS, inputs="float[2,4,6,6] x", outputs=f"float[a,b,c,d] {x}", opset=13
    )
    feeds = feeds_of((2, 4, 6, 6), 2)
    pairs, _ = quantized(
        graph,
        feeds,
        activations=activations,
        granularity=granularity,
        rounding="nearest",
        ranges="minmax",
    )
    result, outcome = written(pairs, form)
    assert not outcome.refusals
    assert not operators(result)["Conv"]
    assert not operators(result)["MatMul"]
    assert result.file_bytes() <= pairs.file_bytes()
    assert_one_step(pairs, result, feeds[0])


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("qoperator", {"QLinearConv": 2, "MatMulInteger": 1}),
        ("microsoft", {"QLinearConv": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    ],
)
def test_the_pass_writes_operators_that_both_runtimes_run(form, wanted):
    graph, feeds = model_of(CONVS, SIZES), feeds_of()
    result, outcome = quantized(graph, feeds, format=form, ranges="minmax", rounding="nearest")
    assert operators(result) & Counter(wanted) == Counter(wanted)
    assert not {"Conv", "Gemm", "Relu"} & set(operators(result))
    assert any("2 QLinearConv" in change.what for change in outcome.changes)
    onnx.checker.check_model(result.to_model())
    assert sqnr(graph, result, feeds) > 26
    assert agrees(result, feeds[0], runner())
    pairs, _ = quantized(graph, feeds, format="qdq", ranges="minmax", rounding="nearest")
    assert result.file_bytes() < pairs.file_bytes()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize(
    "layer", ["h = MatMul(x, w)", "p = MatMul(x, w) h = Add(p, b)", "h = Gemm<transB=1>(x, t, b)"]
)
def test_products_with_zero_points_by_column(layer, weights, form):
    text = f"{layer} r = Relu(h) y = MatMul(r, v)"
    sizes = {"w": (6, 6), "b": (6,), "v": (6, 3), "t": (6, 6)}
    sizes = {name: size for name, size in sizes.items() if f"{name})" in text or f"{name}," in text}
    graph = model_of(text, sizes, inputs="float[N,6] x", outputs="float[N,3] y")
    feeds = feeds_of((5, 6), 3)
    pairs, _ = quantized(graph, feeds, weights=weights, symmetric=False, rounding="nearest", ranges="minmax")
    result, outcome = written(pairs, form)
    assert not outcome.refusals
    assert not {"MatMul", "Gemm", "Relu"} & set(operators(result)) - {"Relu"}
    assert_one_step(pairs, result, feeds[0])
    assert agrees(result, feeds[0], runner())


def test_a_product_whose_output_is_quantized_is_a_qlinear_matmul():
    model = QdqModel((3, 4))
    product = model.node("MatMul", model.qdq("x"), model.weight((4, 5), axis=1))
    model.output(model.qdq(product, scale=0.02))
    pairs = Graph.load(model.model())
    result, _ = written(pairs, "qoperator")
    assert operators(result) == {"QuantizeLinear": 1, "QLinearMatMul": 1, "DequantizeLinear": 1}
    assert_one_step(pairs, result, feeds_of((3, 4), 1)[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_whose_output_stays_float(groups):
    model = QdqModel()
    made = model.conv(model.qdq("x"), groups=groups)
    model.output(made, model.node("Softmax", made))
    pairs = Graph.load(model.model())
    result, outcome = written(pairs, "qoperator")
    assert operators(result)["ConvInteger"] == 1
    assert operators(result)["DequantizeLinear"] == 0
    assert not outcome.refusals
    assert_one_step(pairs, result, feeds_of((1, 4, 8, 8), 1)[0])


@pytest.mark.parametrize(
    ("kind", "weight", "reason"),
    [("int16", "int8", "multiplies int16"), ("int8", "uint8", "no int8 by uint8"), ("uint8", "int4", "int4")],
)
def test_layers_without_a_form_keep_their_pairs(kind, weight, reason):
    model = QdqModel()
    model.output(model.qdq(model.conv(model.qdq("x", kind), weight), kind))
    result, outcome = written(Graph.load(model.model()), "microsoft")
    assert reason in outcome.refusals[0].reason
    assert operators(result) == operators(Graph.load(model.model()))


def test_zero_points_that_differ_by_channel_are_refused():
    graph, feeds = model_of(CONVS, SIZES), feeds_of()
    result, outcome = quantized(graph, feeds, weights="uint8", symmetric=False, format="qoperator")
    assert sum("differ by channel" in refusal.reason for refusal in outcome.refusals) == 2
    assert operators(result)["Conv"] == 2
    assert sqnr(graph, result, feeds) > 26


def test_a_bias_in_other_units_is_refused():
    model = QdqModel()
    made = model.node("Conv", model.qdq("x"), model.weight((4, 4, 1, 1), axis=0), model.bias(4, 0.5))
    model.output(model.qdq(made))
    _, outcome = written(Graph.load(model.model()), "qoperator")
    assert "its bias is not int32" in outcome.refusals[0].reason


@pytest.mark.parametrize("form", FORMATS)
def test_layers_in_branches_read_codes_of_the_graph_around(form):
    branch = """then_branch = one () => (float[N,4] p) { p = MatMul(x, w) },
        else_branch = two () => (float[N,4] q) { q = MatMul(x, v) }"""
    graph = model_of(
        f"k = ReduceSum<keepdims = 0>(x) z = Constant<value_float = 0.0>() g = Greater(k, z) y = If(g)<{branch}>",
        {"w": (8, 4), "v": (8, 4)},
        inputs="float[N,8] x",
        outputs="float[N,4] y",
    )
    feeds = feeds_of((3, 8), 12)
    result, _ = quantized(graph, feeds, format=form)
    assert operators(result)["MatMul"] == 0
    assert sqnr(graph, result, feeds) > 30


@pytest.mark.parametrize("form", FORMATS)
def test_layers_in_functions(form):
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
    g (float[2,4,6,6] x) => (float[2,4,6,6] y) { y = own.f(x) }
    <domain: "own", opset_import: ["": 17]>
    f (x) => (y) { w = Constant<value = float[4,4,1,1] {WEIGHT}>() a = Conv(x, w) r = Relu(a) y = Conv(r, w) }"""
    weight = ", ".join(f"{value:.3f}" for value in np.random.default_rng(0).normal(size=16))
    graph = Graph.parse(text.replace("WEIGHT", weight))
    feeds = feeds_of((2, 4, 6, 6))
    result, _ = quantized(graph, feeds, format=form)
    assert operators(result)["QLinearConv"] == 2
    assert sqnr(graph, result, feeds) > 26


def test_a_target_that_does_not_run_the_format_is_an_error():
    with pytest.raises(ParameterError, match="tensorrt does not run format=microsoft; choose qdq"):
        Quantize(target="tensorrt", format="microsoft").run(model_of(CONVS, SIZES), context_of(feeds_of()))


@pytest.mark.parametrize(("zero", "clips"), [(-128, 0), (0, 1)])
@pytest.mark.parametrize("op_type", ["Relu", "Clip"])
def test_an_activation_vanishes_only_where_the_range_implies_it(op_type, zero, clips):
    model = QdqModel()
    conv = model.conv(model.qdq("x", "int8"))
    bounds = [model.constant(np.float32(0))] if op_type == "Clip" else []
    model.output(model.qdq(model.node(op_type, conv, *bounds), "int8", zero=zero, scale=0.01))
    pairs = Graph.load(model.model())
    result, _ = written(pairs, "qoperator")
    wanted = {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1, "Clip": clips}
    assert operators(result) == Counter(wanted)
    assert_one_step(pairs, result, feeds_of((1, 4, 8, 8), 1)[0])


@pytest.mark.parametrize("scale", [0.05, 0.02])
def test_values_are_moved_as_codes_only_between_equal_grids(scale):
    model = QdqModel()
    model.output(model.qdq(model.node("MaxPool", model.qdq("x"), kernel_shape=[2, 2]), scale=scale))
    pairs = Graph.load(model.model())
    result, _ = written(pairs, "microsoft")
    assert operators(result)["DequantizeLinear"] == (1 if scale == 0.05 else 2)
    assert_one_step(pairs, result, feeds_of((1, 4, 8, 8), 1)[0])


@pytest.mark.zoo
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["lenet5", "ppocrv2_cls", "efficientnet_lite0"])
def test_real_models_give_what_they_gave_between_pairs(name, form, zoo, zoo_feeds):
    feeds = zoo_feeds(name, 2)
    pairs, _ = quantized(Graph.load(zoo(name)), feeds, rounding="nearest", ranges="minmax")
    result, outcome = written(pairs, form)
    assert not outcome.refusals
    assert not {"Conv", "Gemm"} & set(operators(result))
    assert result.file_bytes() < pairs.file_bytes()
    assert_one_step(pairs, result, feeds[0])
