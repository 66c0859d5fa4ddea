"""Models that other tools stumble over: every mode quantizes all their layers or says of each why not."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from passes_helper import runner
from test_quantize import context_of, feeds_of, model_of, sqnr

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.passes.quantize import Quantize

VNNI = "onnxruntime-x86-vnni"
MODES = ["static", "dynamic", "weight-only"]
SQUARE = {"w": (64, 64), "v": (64, 64)}
IO = {"inputs": "float[N,64] x", "outputs": "float[N,64] y"}
CHAIN = "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)"


def quantized(graph, feeds, mode, **options):
    """Quantize a copy; assert that every layer is either changed or refused, and that the result runs.

    Layers of functions are told under the names they get where they are called.
    """
    result, context = graph.copy(), context_of(feeds)
    context.allow_opset_raise = True
    outcome = Quantize(**({"mode": mode, "target": VNNI} | options)).run(result, context)
    told = {change.where for change in outcome.changes} | {refusal.where for refusal in outcome.refusals}
    named = {name for change in outcome.changes for name in change.weights}
    for part in graph.walk():
        for layer in find_layers(part)[0]:
            own = {layer.name, layer.node.name, layer.weight}
            inlined = part.is_function and any(name.startswith(layer.name) for name in told)
            assert told & own or layer.weight in named or inlined, layer.name
    runner().run(result, feeds)
    return result, outcome


def assert_all_quantized(graph, mode, feeds=None, **options):
    """Assert that no weight of a kilobyte is left float, and that the outputs are close."""
    feeds = feeds or feeds_of((3, 64))
    result, outcome = quantized(graph, feeds, mode, **options)
    for part in result.walk():
        for layer in find_layers(part)[0]:
            maker = part.producer(layer.node.input[layer.slot])
            large = layer.parameters >= 1024
            assert not large or (maker is not None and maker.op_type != "Constant"), layer.name
    assert sqnr(graph, result, feeds) > 25
    return result, outcome


def reload(model):
    return Graph.load(model.SerializeToString())


@pytest.mark.parametrize("mode", MODES)
def test_excluded_nodes_stay_float(mode):
    """Their weight stays float, and they compute exactly what they computed, given what they now read."""
    graph = model_of("a = MatMul(x, w) r = Relu(a) h = MatMul(r, v) y = Tanh(h)", SQUARE, **IO)
    result, outcome = quantized(graph, feeds_of((3, 64)), mode, exclude="v")
    assert np.array_equal(result.constant("v"), graph.constant("v"))
    assert [refusal.reason for refusal in outcome.refusals if refusal.where == "h"] == [
        "excluded by pattern 'v'"
    ]
    node = next(node for node in result.nodes if node.op_type == "MatMul" and node.input[1] == "v")
    assert result.producer(node.input[0]).op_type == "Relu"
    assert "w" not in result.initializers


CONVS = "a = Conv(x, w, b) r = Relu(a) c = {op}(r, v, d) s = {after} e = Conv(s, u) y = Relu(e)"
CONV_SIZES = {"w": (8, 4, 3, 3), "b": (8,), "v": (8, 8, 3, 3), "d": (8,), "u": (8, 8, 3, 3)}


def optimized(graph, path):
    """Return the operators that onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        graph.to_model().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    "after", ["Relu(c)", "Identity(c)", "Clip(c, lo, hi)", "MaxPool<kernel_shape = [2,2]>(c)"]
)
def test_onnxruntime_does_not_quantize_excluded_nodes_itself(op, after, tmp_path):
    """It quantizes float weights between DequantizeLinear and QuantizeLinear, per tensor, when it loads."""
    body = "lo = Constant<value_float = -0.5>() hi = Constant<value_float = 0.7>() "
    graph = model_of(
        body + CONVS.format(op=op, after=after),
        CONV_SIZES,
        inputs="float[N,4,16,16] x",
        outputs="float[N,8,H,W] y",
    )
    feeds = feeds_of((1, 4, 16, 16))
    result, _ = quantized(graph, feeds, "static", exclude="c")
    kinds = optimized(result, tmp_path / "o.onnx")
    assert kinds.count("QLinearConv") == 2
    assert op in kinds or "FusedConv" in kinds
    plain = runner().run(result, feeds, optimization="off")
    fast = runner().run(result, feeds)
    for one, two in zip(plain, fast, strict=True):
        assert np.abs(one["y"] - two["y"]).max() < 0.02 * np.abs(one["y"]).max()
    assert np.array_equal(result.constant("v"), graph.constant("v"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", ["include", "exclude", "op_types"])
def test_a_pattern_that_matches_nothing_is_an_error(mode, field):
    graph = model_of(CHAIN, SQUARE, **IO)
    with pytest.raises(ParameterError, match="nothing*"):
        Quantize(mode=mode, **{field: "nothing*"}).run(graph, context_of(feeds_of((3, 64))))
    with pytest.raises(ParameterError, match="wx"):  # one of several, too
        Quantize(mode=mode, include=("w", "wx")).run(graph, context_of(feeds_of((3, 64))))


@pytest.mark.parametrize("mode", MODES)
def test_without_shapes(mode):
    model = model_of(CHAIN, SQUARE, **IO).to_model()
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    assert_all_quantized(reload(model), mode)


@pytest.mark.parametrize("mode", MODES)
def test_convolutions_without_shapes(mode):
    sizes = {"w": (32, 4, 3, 3), "b": (32,), "v": (32, 32, 1, 1)}
    body = "a = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v)"
    model = model_of(body, sizes, outputs="float[N,32,8,8] y").to_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    assert_all_quantized(reload(model), mode, feeds_of())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("opset", [11, 17])
def test_opset_import_in_any_order(mode, opset):
    model = model_of(CHAIN, SQUARE, **IO, opset=opset).to_model()
    del model.opset_import[:]
    imports = [("com.microsoft", 1), ("ai.onnx.ml", 3), ("", opset)]
    model.opset_import.extend(helper.make_opsetid(*pair) for pair in imports)
    assert_all_quantized(reload(model), mode)


@pytest.mark.parametrize("mode", MODES)
def test_optional_inputs_left_out(mode):
    body = """hi = Constant<value_float = 2.0>() shape = Constant<value_ints = [3,64,1,1]>()
        scales = Constant<value_floats = [1.0,1.0,2.0,2.0]>() c = Clip(x, , hi) a = Gemm(c, w) r = Relu(a)
        s = Reshape(r, shape) z = Resize<mode = "nearest">(s, , scales) g = GlobalAveragePool(z) f = Flatten(g)
        y = Gemm(f, v)"""
    graph = model_of(body, SQUARE, inputs="float[3,64] x", outputs="float[3,64] y")
    model = graph.to_model()
    next(node for node in model.graph.node if node.op_type == "Gemm").input.append("")
    assert_all_quantized(reload(model), mode)


@pytest.mark.parametrize("mode", MODES)
def test_recurrent_layers_with_optional_inputs_left_out(mode):
    random = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array((random.normal(size=shape) / 8).astype(np.float32), name)
        for name, shape in (("w", (1, 128, 32)), ("r", (1, 128, 32)), ("h", (1, 2, 32)), ("v", (32, 64)))
    ]
    nodes = [
        helper.make_node("LSTM", ["x", "w", "r", "", "", "h"], ["", "last"], hidden_size=32, name="lstm"),
        helper.make_node("MatMul", ["last", "v"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [5, 2, 32])],
        [helper.make_tensor_value_info("y", 1, [1, 2, 64])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert_all_quantized(reload(model), mode, feeds_of((5, 2, 32)))


FUNCTION = """
<opset_import: ["": 17], domain: "own">
block (p) => (q) {{ k = Constant<value = float[64,64] {{{values}}}>() m = MatMul(p, k) q = Relu(m) }}
"""


@pytest.mark.parametrize("mode", MODES)
def test_functions(mode):
    values = np.random.default_rng(0).normal(size=(64, 64)) / 8
    text = '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[N,64] x) => (float[N,64] y) '
    text += "{ a = own.block(x) y = own.block(a) }"
    model = onnx.parser.parse_model(
        text + FUNCTION.format(values=", ".join(f"{v:.4f}" for v in values.ravel()))
    )
    result, _ = assert_all_quantized(reload(model), mode)
    assert result.to_model().ByteSize() < 0.6 * model.ByteSize()


@pytest.mark.parametrize("mode", MODES)
def test_branches_that_read_outer_weights(mode):
    branches = (
        "then_branch = one () => (float[N,64] p) { p = MatMul(x, w) }, "
        "else_branch = two () => (float[N,64] q) { n = Tanh(x) q = MatMul(n, v) }"
    )
    body = f"k = ReduceSum<keepdims = 0>(x) z = Constant<value_float = 0.0>() g = Greater(k, z) y = If(g)<{branches}>"
    assert_all_quantized(model_of(body, SQUARE, **IO), mode, feeds_of((3, 64), 12))


@pytest.mark.parametrize("mode", MODES)
def test_loop_bodies(mode):
    random = np.random.default_rng(0)
    body = onnx.parser.parse_graph(
        "body (int64 i, bool c, float[N,64] h) => (bool d, float[N,64] t) "
        "{ d = Identity(c) m = MatMul(h, w) t = Tanh(m) }"
    )
    weights = [
        numpy_helper.from_array((random.normal(size=(64, 64)) / 8).astype(np.float32), name) for name in "wv"
    ]
    counts = [
        helper.make_tensor("n", TensorProto.INT64, [], [3]),
        helper.make_tensor("go", TensorProto.BOOL, [], [True]),
    ]
    nodes = [
        helper.make_node("Loop", ["n", "go", "x"], ["h"], body=body),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    io = [[helper.make_tensor_value_info(name, 1, ["N", 64])] for name in "xy"]
    graph = helper.make_graph(nodes, "g", *io, [*weights, *counts])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert_all_quantized(reload(model), mode)


@pytest.mark.parametrize("mode", MODES)
def test_weights_in_constant_nodes(mode):
    model = model_of(CHAIN, SQUARE, **IO).to_model()
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    result, _ = assert_all_quantized(reload(model), mode)
    assert result.to_model().ByteSize() < 0.5 * model.ByteSize()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_and_the_others_quantized(mode, value):
    graph = model_of("a = MatMul(x, w) t = Tanh(a) y = MatMul(x, v)", SQUARE, **IO)
    model = graph.to_model()
    spoilt = graph.constant("w").copy()
    spoilt[0, 0] = value
    model.graph.output.append(helper.make_tensor_value_info("t", 1, ["N", 64]))
    next(t for t in model.graph.initializer if t.name == "w").CopyFrom(numpy_helper.from_array(spoilt, "w"))
    feeds = feeds_of((3, 64))
    result, outcome = quantized(reload(model), feeds, mode)
    reasons = [refusal.reason for refusal in outcome.refusals if refusal.where in ("a", "w")]
    assert any("NaN" in reason or "not finite" in reason for reason in reasons), reasons
    assert np.array_equal(result.constant("w"), spoilt, equal_nan=True)
    assert "v" not in result.initializers


def test_values_behind_a_weight_that_is_not_finite_are_said_to_be_so():
    graph = model_of("a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", SQUARE, **IO)
    graph.set_constant("w", np.full((64, 64), np.nan, np.float32))
    _, outcome = quantized(graph, feeds_of((3, 64)), "static")
    reasons = [refusal.reason for refusal in outcome.refusals]
    assert any("'r' is not finite on the calibration data" in reason for reason in reasons), reasons
    assert not any("never computes" in reason for reason in reasons)


def test_biases_that_are_not_finite_keep_their_layer_in_float():
    graph = model_of("a = Gemm(x, w, b) t = Tanh(a) y = Gemm(t, v)", SQUARE | {"b": (64,)}, **IO)
    graph.set_constant("b", np.full(64, np.inf, np.float32))
    _, outcome = quantized(graph, feeds_of((3, 64)), "static")
    assert any("infinite" in refusal.reason or "not finite" in refusal.reason for refusal in outcome.refusals)


@pytest.mark.parametrize("mode", MODES)
def test_tensors_without_elements(mode):
    body = "a = MatMul(x, w) n = MatMul(x, e) c = Concat<axis = 1>(a, n) y = MatMul(c, v)"
    graph = model_of(body, SQUARE | {"e": (64, 0)}, **IO)
    assert_all_quantized(graph, mode)


@pytest.mark.parametrize("mode", MODES)
def test_feeds_without_elements(mode):
    graph = model_of(CHAIN, SQUARE, **IO)
    feeds = [{"x": np.zeros((0, 64), np.float32)}, *feeds_of((3, 64))]
    result, _ = quantized(graph, feeds, mode)
    assert {"w", "v"}.isdisjoint(result.initializers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(mode, dtype):
    name = {np.float16: "float16", np.float64: "double"}[dtype]
    graph = model_of(CHAIN, SQUARE, inputs=f"{name}[N,64] x", outputs=f"{name}[N,64] y", dtype=dtype)
    feeds = feeds_of((3, 64), dtype=dtype)
    result, _ = assert_all_quantized(graph, mode, feeds)
    assert runner().run(result, feeds[:1])[0]["y"].dtype == dtype
