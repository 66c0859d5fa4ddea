"""Static quantization: what is written, that it computes the same, and what is left alone."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from passes_helper import runner

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.output_loss import output_loss
from onnxslim_lab.statistics import Calibration

CONVS = """a = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(a) c = Conv(r, v, d) s = Add(c, x) t = Relu(s)
    p = GlobalAveragePool(t) f = Flatten(p) y = Gemm<transB = 1>(f, u, e)"""
SIZES = {"w": (8, 4, 3, 3), "b": (8,), "v": (4, 8, 1, 1), "d": (4,), "u": (5, 4), "e": (5,)}
HEAD = 'ir_version: 8, opset_import: ["": {opset}]'


def model_of(
    body, sizes, *, inputs="float[N,4,8,8] x", outputs="float[N,5] y", opset=17, seed=0, dtype=np.float32
):
    model = onnx.parser.parse_model(
        f"<{HEAD.format(opset=opset)}> g ({inputs}) => ({outputs}) {{ {body} }}".replace("$", "{")
    )
    random = np.random.default_rng(seed)
    for name, shape in sizes.items():
        values = random.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
        model.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
    return Graph.load(model)


def feeds_of(shape=(2, 4, 8, 8), count=6, seed=1, name="x", dtype=np.float32):
    random = np.random.default_rng(seed)
    return [{name: random.normal(size=shape).astype(dtype)} for _ in range(count)]


def context_of(feeds):
    return Context(calibration=Calibration(runner(), Dataset(feeds, None, "made", True)))


def quantized(graph, feeds, **options):
    result = graph.copy()
    outcome = Quantize(target="onnxruntime-x86-vnni", **options).run(result, context_of(feeds))
    return result, outcome


def sqnr(graph, result, feeds):
    pairs = zip(runner().run(graph, feeds), runner().run(result, feeds), strict=True)
    power = error = 0.0
    for first, second in pairs:
        for name, value in first.items():
            power += float(np.sum(np.square(value, dtype=np.float64)))
            error += float(np.sum(np.square(value - second[name], dtype=np.float64)))
    return 10 * np.log10(power / error)


def types_of(graph):
    return {name: graph.constant_type(name)[0] for name in graph.initializers}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_convolutions(rounding):
    graph = model_of(CONVS, SIZES)
    result, outcome = quantized(graph, feeds_of(), rounding=rounding)
    onnx.checker.check_model(result.to_model(), full_check=True)
    assert sqnr(graph, result, feeds_of(seed=9)) > 28
    assert all("slower than float" in refusal.reason for refusal in outcome.refusals)
    kinds = types_of(result)
    assert not [name for name in SIZES if name in kinds], "the float originals are gone"
    scales = [result.constant_type(n)[1] for n, kind in kinds.items() if kind == TensorProto.FLOAT]
    assert max(np.prod(shape) for shape in scales) <= 8


def test_gptq_is_better_than_nearest_on_correlated_inputs():
    graph = model_of("y = MatMul(x, w)", {"w": (32, 24)}, inputs="float[N,32] x", outputs="float[N,24] y")
    random = np.random.default_rng(0)
    mix = random.normal(size=(4, 32))
    feeds = [{"x": (random.normal(size=(64, 4)) @ mix).astype(np.float32)} for _ in range(8)]
    results = [quantized(graph, feeds, rounding=rounding)[0] for rounding in ("nearest", "gptq")]
    assert sqnr(graph, results[1], feeds) > sqnr(graph, results[0], feeds) + 0.5


def test_bias_is_int32_on_the_grid_of_the_sums():
    result, _ = quantized(model_of(CONVS, SIZES), feeds_of(), rounding="nearest")
    convs = [node for node in result.nodes if node.op_type == "Conv"]
    for node in convs:
        scale = [result.constant(result.producer(value).input[1]) for value in node.input]
        np.testing.assert_array_equal(scale[2], scale[0] * scale[1])
        assert result.constant_type(result.producer(node.input[2]).input[0])[0] == TensorProto.INT32


def test_the_bias_added_behind_a_matmul_is_quantized_too():
    graph = model_of(
        "m = MatMul(x, w) y = Add(m, b)",
        {"w": (16, 8), "b": (8,)},
        inputs="float[3,16] x",
        outputs="float[3,8] y",
    )
    result, _ = quantized(graph, feeds_of((3, 16)))
    assert sorted(types_of(result).values()).count(TensorProto.INT32) == 1
    assert sqnr(graph, result, feeds_of((3, 16), seed=5)) > 30


def test_a_bias_too_large_for_int32_widens_the_scale():
    graph = model_of("y = Conv(x, w, b)", {"w": (2, 4, 1, 1), "b": (2,)}, outputs="float[N,M,H,W] y")
    weight = np.zeros((2, 4, 1, 1), np.float32)
    weight[0], weight[1] = 1e-9, 0.5
    graph.set_constant("w", weight)
    graph.set_constant("b", np.float32([3.0, 0.25]))
    result, _ = quantized(graph, feeds_of(), rounding="nearest")
    assert sqnr(graph, result, feeds_of(seed=4)) > 30


def test_relu_disappears_where_the_grid_saturates():
    result, _ = quantized(model_of(CONVS, SIZES), feeds_of())
    assert "Relu" not in {node.op_type for node in result.nodes}


def test_excluded_layers_stay_float():
    graph = model_of(CONVS, SIZES)
    result, outcome = quantized(graph, feeds_of(), exclude="v")
    assert np.array_equal(result.constant("v"), graph.constant("v"))
    assert any("excluded by pattern 'v'" in refusal.reason for refusal in outcome.refusals)
    conv = next(node for node in result.nodes if node.op_type == "Conv" and node.input[1] == "v")
    assert result.producer(conv.input[0]).op_type == "DequantizeLinear"


@pytest.mark.parametrize("field", ["include", "exclude", "op_types"])
def test_what_matches_nothing_is_an_error(field):
    with pytest.raises(ParameterError, match="nothing*"):
        quantized(model_of(CONVS, SIZES), feeds_of(), **{field: "nothing*"})


def test_no_data_is_an_error():
    with pytest.raises(ParameterError, match="needs calibration data"):
        Quantize().run(model_of(CONVS, SIZES))


def test_operators_can_be_chosen():
    result, outcome = quantized(model_of(CONVS, SIZES), feeds_of(), op_types="Gemm")
    assert {"w", "v"} <= set(result.initializers)
    assert "u" not in result.initializers
    assert sum("not among op_types" in refusal.reason for refusal in outcome.refusals) == 2


def test_batch_normalization_is_fused_and_the_opset_raised():
    graph = model_of(
        "c = Conv(x, w) y = BatchNormalization(c, s, b, m, q)",
        {"w": (4, 4, 1, 1), "s": (4,), "b": (4,), "m": (4,), "q": (4,)},
        outputs="float[N,4,8,8] y",
        opset=11,
    )
    graph.set_constant("q", np.float32([1, 2, 3, 4]))
    result, outcome = quantized(graph, feeds_of())
    assert "BatchNormalization" not in {node.op_type for node in result.nodes}
    assert result.opset() == 13
    assert any("opset raised from 11 to 13" in change.what for change in outcome.changes)
    assert sqnr(graph, result, feeds_of(seed=3)) > 28


def test_weights_in_constant_nodes_and_in_branches():
    branch = "then_branch = one () => (float[N,4] p) ${ p = MatMul(x, w) }, else_branch = two () => (float[N,4] q) ${ q = MatMul(x, v) }"
    branch = branch.replace("$", "")
    graph = model_of(
        f"k = ReduceSum<keepdims = 0>(x) z = Constant<value_float = 0.0>() g = Greater(k, z) y = If(g)<{branch}>",
        {"w": (8, 4), "v": (8, 4)},
        inputs="float[N,8] x",
        outputs="float[N,4] y",
    )
    feeds = feeds_of((3, 8), 12)
    result, _ = quantized(graph, feeds)
    assert {"w", "v"}.isdisjoint(result.initializers)
    assert sqnr(graph, result, feeds) > 30


def test_a_branch_that_data_never_takes_has_its_weights_quantized_alone():
    branch = "then_branch = one () => (float[N,64] p) { p = MatMul(x, w) }, else_branch = two () => (float[N,64] q) { n = Tanh(x) q = MatMul(n, v) }"
    graph = model_of(
        f"k = ReduceSum<keepdims = 0>(x) z = Constant<value_float = 0.0>() g = Greater(k, z) y = If(g)<{branch}>",
        {"w": (64, 64), "v": (64, 64)},
        inputs="float[N,64] x",
        outputs="float[N,64] y",
    )
    feeds = [{"x": np.abs(feed["x"])} for feed in feeds_of((3, 64))]
    result, outcome = quantized(graph, feeds)
    assert any("not taken" in refusal.reason for refusal in outcome.refusals)
    assert {"w", "v"}.isdisjoint(result.initializers)
    below = [{"x": -feed["x"]} for feed in feeds]
    assert sqnr(graph, result, below) > 30


def test_a_shared_weight_is_stored_once():
    graph = model_of(
        "a = MatMul(x, w) r = Relu(a) y = MatMul(r, w)",
        {"w": (16, 16)},
        inputs="float[N,16] x",
        outputs="float[N,16] y",
    )
    result, _ = quantized(graph, feeds_of((3, 16)))
    stored = [
        n for n, kind in types_of(result).items() if kind == TensorProto.INT8 and result.constant(n).ndim == 2
    ]
    assert len(stored) == 1


def test_values_of_unknown_shape_and_opsets_in_any_order():
    graph = model_of(
        "a = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v)", SIZES, outputs="float[N,4,8,8] y"
    )
    model = graph.to_model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    del model.opset_import[:]
    model.opset_import.extend(
        [onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("", 17)]
    )
    graph = Graph.load(model)
    result, outcome = quantized(graph, feeds_of())
    assert len([change for change in outcome.changes if "runs on codes" in change.what]) == 2
    assert sqnr(graph, result, feeds_of(seed=2)) > 28


def test_float16_scales_have_the_type_of_their_tensors():
    graph = model_of(
        "y = MatMul(x, w)",
        {"w": (16, 8)},
        inputs="float16[N,16] x",
        outputs="float16[N,8] y",
        dtype=np.float16,
    )
    feeds = feeds_of((3, 16), dtype=np.float16)
    result, _ = quantized(graph, feeds)
    assert result.opset() >= 19
    assert TensorProto.FLOAT not in types_of(result).values()
    assert sqnr(graph, result, feeds) > 30


def test_hard_swish_runs_on_codes():
    graph = model_of("a = Conv(x, w, b) h = HardSwish(a) y = Conv(h, v)", SIZES, outputs="float[N,4,6,6] y")
    result, _ = quantized(graph, feeds_of())
    kinds = {node.op_type for node in result.nodes}
    assert "Clip" in kinds
    assert not kinds & {"HardSwish", "HardSigmoid"}
    assert sqnr(graph, result, feeds_of(seed=2)) > 28


def test_recurrent_weights_are_quantized_and_activations_stay_float():
    graph = model_of(
        "y, h = LSTM<hidden_size = 8>(x, w, r)",
        {"w": (1, 32, 16), "r": (1, 32, 8)},
        inputs="float[5,1,16] x",
        outputs="float[5,1,1,8] y",
    )
    feeds = feeds_of((5, 1, 16))
    result, outcome = quantized(graph, feeds)
    assert {"w", "r"}.isdisjoint(result.initializers)
    assert any("activations stay float" in refusal.reason for refusal in outcome.refusals)
    assert sqnr(graph, result, feeds) > 30


def test_sensitivity_leaves_the_worst_layer_float():
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 64), "v": (64, 8)},
        inputs="float[N,16] x",
        outputs="float[N,8] y",
    )
    bad = np.array(graph.constant("v"))
    bad[0] = 100.0  # a row of outliers: the others lose their bits
    graph.set_constant("v", bad)
    feeds = feeds_of((4, 16))
    result, outcome = quantized(graph, feeds, float_macs=0.4, float_until=60, rounding="nearest")
    assert {"v", "w"}.isdisjoint(result.initializers)
    assert result.producer("v").op_type in ("Mul", "Reshape"), "decoded at load"
    assert TensorProto.INT16 in types_of(result).values(), "8 bits would be noticed"
    products = [node for node in result.nodes if node.op_type == "MatMul"]
    assert [result.producer(node.input[0]).op_type for node in products] == ["DequantizeLinear", "Tanh"]
    (left,) = [refusal for refusal in outcome.refusals if "stays float" in refusal.reason]
    assert "of the output error that all cause together" in left.reason
    assert sqnr(graph, result, feeds) > sqnr(graph, quantized(graph, feeds, rounding="nearest")[0], feeds)


def test_weights_of_layers_left_float_are_stored_in_the_type_of_the_others():
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 256), "v": (256, 8)},
        inputs="float[N,16] x",
        outputs="float[N,8] y",
    )
    feeds = feeds_of((4, 16))
    for feed in feeds:
        feed["x"][0, 0] = 1000.0  # of activations: the weights are easy
    result, outcome = quantized(graph, feeds, float_macs=0.7, float_until=60, rounding="nearest")
    assert result.producer("w").op_type in ("Mul", "Reshape")
    kinds = types_of(result)
    sizes = {name: np.prod(result.constant_type(name)[1]) for name in kinds}
    assert max(sizes[name] for name in kinds if kinds[name] == TensorProto.FLOAT) <= 256, "scales"
    assert all(not change.weights for change in outcome.changes if "decoded" in change.what)


def test_restoring_nothing_useful_leaves_nothing_float():
    graph = model_of(CONVS, SIZES)
    _, outcome = quantized(graph, feeds_of(), float_macs=0.0001)
    assert any("no layer stays float" in refusal.reason for refusal in outcome.refusals)


@pytest.mark.parametrize("kind", ["int8", "uint16"])
def test_other_activation_types(kind):
    graph = model_of(CONVS, SIZES)
    result, _ = quantized(graph, feeds_of(), activations=kind)
    onnx.checker.check_model(result.to_model())
    assert sqnr(graph, result, feeds_of(seed=2)) > 26


def test_per_tensor_weights_have_one_scale():
    result, _ = quantized(model_of(CONVS, SIZES), feeds_of(), granularity="tensor", rounding="nearest")
    for node in result.nodes:
        if node.op_type in ("Conv", "Gemm"):
            source = result.producer(node.input[1])
            assert result.constant(source.input[1]).shape == ()
            assert attribute(source, "axis") is None


def test_onnxruntime_runs_every_layer_on_codes():
    graph = model_of(CONVS, SIZES)
    result, _ = quantized(graph, feeds_of())
    layers = [node for node in result.nodes if node.op_type in ("Conv", "Gemm")]
    assert all(
        result.producer(value).op_type == "DequantizeLinear" for node in layers for value in node.input
    )


def test_a_quantized_model_is_left_alone():
    graph = model_of(CONVS, SIZES)
    once, _ = quantized(graph, feeds_of())
    twice, outcome = quantized(once, feeds_of())
    assert not outcome.changes
    assert twice.to_model().SerializeToString() == once.to_model().SerializeToString()
    assert all("already quantized" in refusal.reason for refusal in outcome.refusals)


@pytest.mark.parametrize("options", [{"granularity": "block"}, {"rounding": "codebook"}])
def test_what_static_quantization_does_not_do_is_an_error(options):
    with pytest.raises(ValueError, match="mode static has no"):
        Quantize(**options)


def test_learned_rounding_is_no_worse():
    graph = model_of(CONVS, SIZES)
    results = [quantized(graph, feeds_of(), rounding=rounding)[0] for rounding in ("nearest", "adaround")]
    assert sqnr(graph, results[1], feeds_of()) > sqnr(graph, results[0], feeds_of()) - 0.5


def test_scales_of_wide_biases_are_a_product_of_constants():
    graph = model_of(
        "y = Gemm(x, w, b)", {"w": (16, 64), "b": (64,)}, inputs="float[3,16] x", outputs="float[3,64] y"
    )
    feeds = feeds_of((3, 16))
    result, _ = quantized(graph, feeds)
    (product,) = [node for node in result.nodes if node.op_type == "Mul"]
    assert all(result.is_constant(value) for value in product.input)
    assert sqnr(graph, result, feeds) > 30
    other = graph.copy()
    Quantize(target="tensorrt").run(other, context_of(feeds))
    assert "Mul" not in {node.op_type for node in other.nodes}


def test_the_loss_of_distributions_sees_improbable_classes():
    want = [{"y": np.float32([[0.98, 0.01, 0.01]])}]
    near, far = ([{"y": np.float32([[0.98, low, 0.02 - low]])}] for low in (0.009, 1e-5))
    squares = [{name: value * 2 for name, value in one[0].items()} for one in (want, near, far)]
    assert output_loss(want, far) > 50 * output_loss(want, near)
    assert output_loss(squares[:1], squares[2:]) < 1e-3 < output_loss(want, far)


@pytest.mark.parametrize("form", ["qdq", "qoperator", "microsoft"])
def test_channels_of_equal_scales_share_one(form):
    body = "a = Conv(x, w, b) r = Relu(a) f = Flatten(r) y = Gemm(f, v, c)"
    graph = model_of(body, {"w": (8, 4, 1, 1), "b": (8,), "v": (512, 5), "c": (5,)})
    for name in "wbvc":
        graph.set_constant(name, np.full_like(graph.constant(name), 0.02))
    feeds = feeds_of()
    result, _ = quantized(graph, feeds, format=form, rounding="nearest")
    scales = [array for array in map(result.constant, result.initializers) if array.dtype == np.float32]
    assert {array.size for array in scales} <= {1} or form != "qdq"
    assert sqnr(graph, result, feeds) > 35


def test_a_model_of_ir_3_gets_the_ir_of_its_new_opset_and_inputs_that_are_fed_alone():
    proto = model_of(CONVS, SIZES, opset=9).to_model()
    proto.ir_version = 3
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims)
        for one in proto.graph.initializer
    )
    graph, feeds = Graph.load(proto), feeds_of()
    result, _ = quantized(graph, feeds, ranges="minmax")
    made = result.to_model()
    onnx.checker.check_model(made, full_check=True)
    assert made.ir_version == 7
    assert [value.name for value in made.graph.input] == ["x"]
    assert sqnr(graph, result, feeds) > 25
