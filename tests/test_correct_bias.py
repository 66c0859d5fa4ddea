"""correct-bias: means come back to the original's, in float and quantized biases, and outputs never get worse."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from passes_helper import load, random_feed, runner
from test_quantize import context_of, feeds_of, model_of, sqnr

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.engine import optimize
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import compare_outputs, errors_by_feed
from onnxslim_lab.passes.correct_bias import CorrectBias, agreed, is_better
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.recipe import Recipe
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.target_check import target_report

QUICK = settings(
    max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
GEMM = "g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {%s}%s> { p = Abs(x) y = Gemm(p, w%s) }"


def context(original, count=12):
    feeds = [random_feed(original, seed, {}) for seed in range(count)]
    return Context(calibration=Calibration(runner(), Dataset(feeds)), original=original)


def correct(before, after, **options):
    """Correct the second model after the first; return it, its outcome, and the two mean errors by channel."""
    original, graph = load(before), load(after)
    given_context = context(original)
    feeds = given_context.calibration.data.feeds
    wanted = np.concatenate([run["y"] for run in runner().run(original, feeds)])

    def shift():
        found = np.concatenate([run["y"] for run in runner().run(graph, feeds)])
        return np.abs((wanted - found).reshape(-1, wanted.shape[-1]).mean(0)).max()

    worse = shift()
    outcome = CorrectBias(**options).run(graph, given_context)
    onnx.checker.check_model(graph.to_model())
    return graph, outcome, worse, shift()


def test_float_bias_is_moved():
    bias = ", float[2] b = {1, 2}"
    graph, outcome, before, after = correct(GEMM % ("1,2,3,4", bias, ", b"), GEMM % ("1,2,3,3", bias, ", b"))
    assert after < before / 3
    assert len(outcome.changes) == 1
    assert graph.constant("b")[0] == pytest.approx(1, abs=0.01)
    assert graph.constant("b")[1] == pytest.approx(2.8, abs=0.15)  # the mean of |x| is 0.8


def test_missing_bias_is_made():
    graph, _, before, after = correct(GEMM % ("1,2,3,4", "", ""), GEMM % ("1,2,3,3", "", ""))
    assert after < before / 3
    assert len(next(node for node in graph.nodes if node.op_type == "Gemm").input) == 3


def test_matmul_gets_an_add_and_its_output_keeps_its_name():
    text = "g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {%s}> { p = Abs(x) y = MatMul(p, w) }"
    graph, _, before, after = correct(text % "1,2,3,4", text % "1,2,3,3")
    assert after < before / 3
    assert graph.producer("y").op_type == "Add"


def test_an_add_of_a_constant_after_matmul_is_the_bias():
    text = """g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {%s}, float[2] b = {1, 2}>
        { p = Abs(x) h = MatMul(p, w) y = Add(b, h) }"""
    graph, _, before, after = correct(text % "1,2,3,4", text % "1,2,3,3")
    assert after < before / 3
    assert [node.op_type for node in graph.nodes] == ["Abs", "MatMul", "Add"]


CONV = """g (float[8,2] x) => (float[8,2] y)
    <float[2,2%s] w = {%s}, float[2%s] b = {1, 2}, int64[1] last = {2}>
    { p = Abs(x) u = Unsqueeze(p, last) %s y = Squeeze(c, last) }"""


TURNED = "t = Transpose<perm = [0,2,1]>(u) m = MatMul(t, w)"


@pytest.mark.parametrize(
    ("adds", "place", "operators"),
    [
        ("v = Transpose<perm = [0,2,1]>(m) c = Add(v, b)", ",1", ["Transpose", "Add"]),
        ("s = Sum(m, b) c = Transpose<perm = [0,2,1]>(s)", "", ["Sum", "Transpose"]),
    ],
)
def test_the_bias_of_a_convolution_written_as_a_product_is_beside_its_transpose(adds, place, operators):
    before = CONV % (",1", "1,2,3,4", "", "c = Conv(u, w, b)")
    graph, outcome, worse, after = correct(before, CONV % ("", "1,3,2,3", place, f"{TURNED} {adds}"))
    assert after < worse / 3
    kept = ["Abs", "Unsqueeze", "Transpose", "MatMul", *operators, "Squeeze"]
    assert [node.op_type for node in graph.nodes] == kept
    assert graph.constant("b").size == 2
    assert len(outcome.changes) == 1


QDQ = """g (float[8,2] x) => (float[8,2] y)
    <int8[2,2] w = {1,2,3,3}, float s = {1}, float sx = {0.02}, uint8 zx = {0} %s>
    { p = Abs(x) q = QuantizeLinear(p, sx, zx) d = DequantizeLinear(q, sx, zx)
      v = DequantizeLinear(w, s) %s }"""


def test_int32_bias_behind_dequantize():
    bias = ", int32[2] b = {50, 100}, float sb = {0.02}"
    after = QDQ % (bias, "c = DequantizeLinear(b, sb) y = Gemm(d, v, c)")
    graph, _, before, shift = correct(GEMM % ("1,2,3,4", ", float[2] b = {1, 2}", ", b"), after)
    assert shift < before / 3
    assert graph.constant("b").dtype == np.int32
    assert graph.constant("b")[1] == pytest.approx(140, abs=8)


def test_quantized_layer_without_bias_gets_an_int32_one():
    graph, _, before, after = correct(GEMM % ("1,2,3,4", "", ""), QDQ % ("", "y = Gemm(d, v)"))
    assert after < before / 3
    gemm = next(node for node in graph.nodes if node.op_type == "Gemm")
    maker = graph.producer(gemm.input[2])
    assert maker.op_type == "DequantizeLinear"
    assert graph.constant(maker.input[0]).dtype == np.int32
    assert graph.constant(maker.input[1]) == pytest.approx([0.02, 0.02])


def test_nothing_is_kept_that_makes_outputs_worse():
    """The mean of h is wrong, but only its sign counts, which a corrected mean would turn."""
    text = """g (float[8,1] x) => (float[8,1] y) <float[1,1] w = {%s}, float[1] t = {%s}>
        { p = Abs(x) h = Gemm(p, w) k = Add(h, t) y = Sign(k) }"""
    graph, outcome, _, _ = correct(text % ("1", "0.001"), text % ("1.5", "0.001"))
    assert not outcome.changes
    assert any("does not lower the error" in refusal.reason for refusal in outcome.refusals)
    assert len(next(node for node in graph.nodes if node.op_type == "Gemm").input) == 2


@pytest.mark.parametrize("parts", [1, 2, 16])
def test_a_shift_is_taken_from_the_layer_that_has_it_however_many_are_judged_at_once(parts):
    text = """g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {2, 1, 1, 2}, float[2] b = {%s}, float[2] c = {0, 1},
        float[2] d = {1, 0}> { h = Gemm(x, w, b) g = Gemm(h, w, c) y = Gemm(g, w, d) }"""
    graph, outcome, before, after = correct(text % "1,2", text % "1,3", parts=parts)
    assert after < 1e-4 * before
    assert graph.constant("b") == pytest.approx([1, 2], abs=1e-4)
    assert len(outcome.changes) == 1, "what the first layer lacked is not added to those behind it again"


def test_layers_without_a_counterpart_are_refused():
    before = GEMM % ("1,2,3,4", "", "")
    text = """g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {1,2,3,3}, float[2,2] u = {1,0,0,1}>
        { p = Abs(x) k = Gemm(p, u) y = Gemm(k, w) }"""
    _, outcome, _, _ = correct(before, text)
    assert any("no value k" in refusal.reason for refusal in outcome.refusals)
    other = """g (float[8,2] x) => (float[8,2] y) <float[2,3] k = {1,2,3,4,5,6}, float[2,2] w = {1,2,3,4}>
        { p = Abs(x) y = Gemm(p, w) k2 = Gemm(p, k) }"""
    three = """g (float[8,2] x) => (float[8,2] y) <float[2,2] k = {1,2,3,4}, float[2,2] w = {1,2,3,3}>
        { p = Abs(x) k2 = Gemm(p, k) y = Gemm(k2, w) }"""
    _, outcome, _, _ = correct(other, three)
    assert any("number of channels" in refusal.reason for refusal in outcome.refusals)


def test_without_data_or_original_it_is_an_error():
    with pytest.raises(ParameterError, match="calibration data and the original"):
        CorrectBias().run(load(GEMM % ("1,2,3,4", "", "")), Context())


def test_unrelated_shifts_count_for_nothing():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 1000))
    assert np.abs(agreed([first, second])).max() < 0.3
    assert agreed([first, first]) == pytest.approx(first)


@QUICK
@given(seed=st.integers(0, 1000), parts=st.integers(1, 4))
def test_outputs_judged_never_get_worse(seed, parts):
    random = np.random.default_rng(seed)

    def text(noise):
        shapes = {"w": (3, 4), "v": (4, 4), "u": (4, 2)}
        own = np.random.default_rng(seed + 1)
        stored = []
        for name, shape in shapes.items():
            values = own.normal(size=shape) + noise * random.normal(size=shape)
            numbers = ", ".join(f"{number:.4f}" for number in values.reshape(-1))
            stored.append(f"float[{shape[0]},{shape[1]}] {name} = {{{numbers}}}")
        return (
            f"g (float[8,3] x) => (float[8,2] y) <{', '.join(stored)}> "
            "{ a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) d = Relu(c) y = MatMul(d, u) }"
        )

    original, graph = load(text(0)), load(text(0.2))
    given_context = context(original)
    judged = given_context.calibration.data.feeds[3::4]

    def error():
        pairs = zip(runner().run(original, judged), runner().run(graph, judged), strict=True)
        return sum(float(((one["y"] - two["y"]) ** 2).sum()) for one, two in pairs)

    before = error()
    outcome = CorrectBias(parts=parts).run(graph, given_context)
    assert error() <= before * (1 + 1e-5)
    assert bool(outcome.changes) == (error() < before)


QUANTIZED = {
    "static": {"weights": "int4"},
    "tensor": {"weights": "int4", "granularity": "tensor"},
    "qdq weight-only": {"mode": "weight-only", "weights": "int4", "format": "qdq"},
    "decoded weight-only": {"mode": "weight-only", "weights": "int4"},
    "dynamic": {"mode": "dynamic"},
}


def quantized(name):
    """Return a float model, and it quantized: convolutions with wide biases, a product with and one without."""
    body = """a = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(a) c = Conv(r, v, d) g = GlobalAveragePool(c)
        f = Flatten(g) m = MatMul(f, k) n = Add(m, e) t = Tanh(n) h = Gemm(t, u) y = Tanh(h)"""
    sizes = {"w": (32, 4, 3, 3), "b": (32,), "v": (32, 32, 1, 1), "d": (32,), "k": (32, 64), "e": (64,)}
    original = model_of(body, sizes | {"u": (64, 48)}, outputs="float[N,48] y")
    feeds = feeds_of((2, 4, 8, 8), 16)
    given_context = context_of(feeds)
    given_context.original, given_context.allow_opset_raise = original, True
    result = original.copy()
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", **QUANTIZED[name])
    step.run(result, given_context)
    return original, result, given_context


@pytest.mark.parametrize("name", QUANTIZED)
def test_after_quantize_outputs_get_better_on_other_data(name):
    original, result, given_context = quantized(name)
    other = feeds_of((2, 4, 8, 8), 16, seed=77)
    before = sqnr(original, result, other)
    outcome = CorrectBias().run(result, given_context)
    onnx.checker.check_model(result.to_model())
    reasons = {refusal.reason for refusal in outcome.refusals}
    allowed = {"correcting it does not lower the error of the outputs clearly"}
    if name == "dynamic":
        assert "MatMulInteger has integer outputs: correct it as QDQ" in reasons
        return
    assert reasons <= allowed
    assert outcome.changes
    assert sqnr(original, result, other) > before + 0.5


def test_corrected_layers_still_run_on_codes():
    """Biases stay int32 on the grid of the sums, whose scales are a product of two constants."""
    _, result, given_context = quantized("static")
    profile = find_profile("onnxruntime-x86-vnni")
    before = target_report(result, profile)
    assert any(node.op_type == "Mul" for node in result.nodes)
    outcome = CorrectBias().run(result, given_context)
    after = target_report(result, profile)
    assert len(outcome.changes) >= 2
    assert (after.integer, after.groups) == (before.integer, before.groups)
    assert [item.kind for item in after.findings] == [item.kind for item in before.findings]


@pytest.mark.parametrize(
    "steps",
    [
        ["quantize:weights=int4,rounding=nearest,ranges=minmax"],
        ["prune:sparsity=0.6", "correct-bias", "quantize:rounding=nearest,ranges=minmax"],
    ],
    ids=["quantize", "after and before"],
)
def test_a_real_network_gets_better(steps, zoo, zoo_feeds):
    feeds, other = zoo_feeds("lenet5", 16, 0), zoo_feeds("lenet5", 48, 99)
    original = Graph.load(zoo("lenet5"))

    def error(parts):
        recipe = Recipe.of(parts, allow_opset_raise=True, verify="off")
        found = optimize(original, recipe=recipe, data=Dataset(feeds, source="digits"))
        return sqnr(original, found.graph, other)

    assert error([*steps, "correct-bias"]) > error([part for part in steps if part != "correct-bias"])


def test_a_gain_that_one_feed_has_by_chance_is_not_kept():
    """One held back feed gains much, the others lose a little: the next feeds would as likely lose."""
    before = np.array([1.0, 1.0, 1.0, 1.0])
    assert not is_better(before, np.array([0.2, 1.05, 1.05, 1.05]))
    assert is_better(before, np.array([0.8, 0.85, 0.8, 0.9]))
    assert is_better(before[:1], np.array([0.9]))
    assert not is_better(before, np.array([0.5, 0.5, 0.5, np.inf]))
    assert is_better(np.array([np.inf, 1.0]), np.array([1.0, 1.0]))


def test_errors_by_feed_add_up_to_noise_over_signal():
    rng = np.random.default_rng(0)
    feeds = [{"y": rng.normal(size=(2, 3)), "z": rng.normal(size=4), "n": np.arange(3)} for _ in range(5)]
    noisy = [{name: value if name == "n" else value + 0.1 for name, value in feed.items()} for feed in feeds]
    found = errors_by_feed(feeds, noisy)
    wanted = [10 ** (-one.sqnr_db / 10) for one in compare_outputs(feeds, noisy) if one.floating]
    assert found.shape == (5,)
    assert found.sum() == pytest.approx(np.mean(wanted))
    assert np.isinf(errors_by_feed(feeds, [*noisy[:4], {"y": np.zeros(1)}])[4])
    assert errors_by_feed(
        [{"n": np.arange(3)}] * 2, [{"n": np.arange(3)}, {"n": np.zeros(3, int)}]
    ).tolist() == [0, 2]
