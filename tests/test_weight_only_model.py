"""Weight-only quantization of whole models: what is folded first, fills, tables by what the outputs notice."""

import numpy as np
import onnx
import pytest
from passes_helper import HEADER, runner
from test_quantize_weight_only import build

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.passes.strip import Strip
from onnxslim_lab.quantization.weight_fill import refill, spread_fills
from onnxslim_lab.quantization.weight_metric import Spread, table_metric
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.second_opinion import second_opinion
from onnxslim_lab.selection import find_targets
from onnxslim_lab.statistics import Calibration

LSTM = """(float[4, 2, 24] x) => (float[4, 1, 2, 40] y) {
    w = Concat <axis = 1> (w1, w2) r = Concat <axis = 1> (r1, r2) y = LSTM <hidden_size = 40> (x, w, r) }"""
PARTS = {"w1": (1, 80, 24), "w2": (1, 80, 24), "r1": (1, 80, 40), "r2": (1, 80, 40)}


def run(graph, feeds):
    return np.concatenate([out["y"].reshape(-1) for out in runner().run(graph, feeds)]).astype(np.float64)


@pytest.mark.parametrize("mode", ["weight-only", "dynamic"])
def test_weights_that_constants_make_are_quantized(mode):
    graph = build(LSTM, PARTS)
    feeds = [{"x": np.random.default_rng(0).standard_normal((4, 2, 24)).astype(np.float32)}]
    expected = run(graph, feeds)
    before = graph.file_bytes()
    outcome = Quantize(mode=mode, weights="int8").run(graph, Context())
    assert graph.file_bytes() < 0.4 * before, outcome
    assert np.linalg.norm(run(graph, feeds) - expected) < 0.02 * np.linalg.norm(expected)


def test_patterns_are_checked_before_folding_and_kept_after_it():
    text = "(float[5, 64] x) => (float[5, 64] y) { v = Identity (w) [one] h = MatMul (x, v) [two] y = MatMul (h, u) }"
    graph = build(text, {"w": (64, 64), "u": (64, 64)})
    with pytest.raises(ParameterError, match="matches no layer"):
        Quantize(mode="weight-only", include=("none",)).run(graph.copy(), Context())
    outcome = Quantize(mode="weight-only", exclude=("one",)).run(graph, Context())
    assert {name for change in outcome.changes for name in change.weights} == {"u"}


def test_named_operators_stay_what_they_are():
    text = "(float[5, 64] x) => (float[5, 64] y) { i = Identity (x) h = MatMul (i, w) y = Add (h, b) }"
    graph = build(text, {"w": (64, 64), "b": (64,)})
    outcome = Quantize(mode="weight-only", op_types=("MatMul",)).run(graph, Context())
    assert [change.weights for change in outcome.changes if change.weights] == [("w",)]


FILLED = (
    HEADER
    + """g (float[1, 3, 16, 16] x) => (float[1, N, K, K] y) <int64[4] s = {32, 3, 3, 3}, int64[1] t = {32}>
{ w = ConstantOfShape <value = float[1] {0.5}> (s) b = ConstantOfShape <value = float[1] {0.25}> (t)
  y = Conv (x, w, b) }"""
)


def test_filled_weights_say_why_they_stay():
    graph = Graph.parse(FILLED)
    before = graph.file_bytes()
    outcome = Quantize(mode="weight-only", weights="int8").run(graph, Context())
    assert "ConstantOfShape makes its 864 weights from one value" in " ".join(
        r.reason for r in outcome.refusals
    )
    assert graph.file_bytes() <= before


def test_filled_weights_are_computed_with_on_codes_and_do_not_grow():
    graph = Graph.parse(FILLED)
    feeds = [
        {"x": np.random.default_rng(n).uniform(0, 1, (1, 3, 16, 16)).astype(np.float32)} for n in range(4)
    ]
    expected = run(graph, feeds)
    calibration = Calibration(runner(), Dataset(feeds, None, "random", random=True))
    Quantize(mode="static").run(graph, Context(allow_opset_raise=True, calibration=calibration))
    made = [node for node in graph.nodes if node.op_type == "ConstantOfShape"]
    assert {graph.consumers(node.output[0])[0].op_type for node in made} == {"DequantizeLinear"}
    assert graph.file_bytes() < 2000  # 864 codes and 32 scales alone would be 1 kB more
    onnx.checker.check_model(graph.to_model())
    assert np.linalg.norm(run(graph, feeds) - expected) < 0.01 * np.linalg.norm(expected)


def test_spreading_and_refilling_is_exact():
    graph = Graph.parse(FILLED)
    original = graph.copy()
    assert spread_fills(graph) == 2
    assert graph.is_constant("w")
    assert refill(graph) == 2
    feeds = [{"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}]
    assert np.array_equal(run(graph, feeds), run(original, feeds))
    assert graph.file_bytes() < 1000


TABLE = "(int64[2, 6] x) => (float[2, 6, 8] y) { e = Gather (table, x) h = MatMul (e, w) y = Tanh (h) }"


def table_model():
    """A table of which what follows notices some directions 100 times more than others."""
    graph = build(TABLE, {"table": (60, 32), "w": (32, 8)})
    weights = graph.constant("w").copy()
    weights[8:] = weights[:8].repeat(3, 0) * 0.5
    graph.set_constant("w", weights)
    return graph


def table_feeds(count, seed):
    random = np.random.default_rng(seed)
    return [{"x": random.integers(-60, 60, (2, 6))} for _ in range(count)]


def context_of(feeds):
    return Context(
        allow_opset_raise=True, calibration=Calibration(runner(), Dataset(feeds, None, "x", random=False))
    )


def test_the_metric_of_a_table_is_the_gram_matrix_of_what_follows():
    graph = build(TABLE.replace("y = Tanh (h)", "y = Identity (h)"), {"table": (60, 32), "w": (32, 8)})
    layers = next(t.layers for t in find_targets(graph, Outcome(), step="t") if t.is_lookup)
    found = table_metric(graph, layers, context_of(table_feeds(16, 0)))
    weights = graph.constant("w").astype(np.float64)
    wanted = weights @ weights.T
    np.testing.assert_allclose(
        np.diagonal(found) / np.trace(found), np.diagonal(wanted) / np.trace(wanted), rtol=0.5, atol=0.005
    )
    rest = ~np.eye(32, dtype=bool)
    assert np.corrcoef(found[rest], wanted[rest])[0, 1] > 0.95


def test_a_metric_is_trusted_as_far_as_its_samples_agree():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 40))
    truth = truth @ truth.T
    distances = []
    for noise in (0.0, 5.0, 80.0):
        samples = [truth + (e + e.T) * noise for e in rng.normal(size=(8, 40, 40))]
        spread = Spread(40)
        for sample in samples:
            spread.add(sample)
        found, plain = spread.shrunk(), sum(samples)
        np.testing.assert_array_equal(np.diagonal(found), np.diagonal(plain))
        rest = ~np.eye(40, dtype=bool)
        variance = np.var(samples, axis=0, ddof=1)[rest].sum() * 8
        kept = max(1 - variance / np.sum(plain[rest] ** 2), 0)
        np.testing.assert_allclose(found[rest], kept * plain[rest], rtol=1e-6, atol=1e-6)
        distances.append([np.linalg.norm((m / 8 - truth)[rest]) for m in (found, plain)])
    assert distances[0] == pytest.approx([0, 0], abs=1e-6)
    assert distances[2][0] < 0.7 * distances[2][1], "noise is worth less than nothing"


def test_of_one_sample_half_is_trusted():
    spread = Spread(2)
    spread.add(np.array([[2.0, 1.0], [1.0, 3.0]]))
    assert spread.shrunk().tolist() == [[2, 0.5], [0.5, 3]]


def test_tables_are_rounded_so_that_the_outputs_change_less():
    graph = table_model()
    feeds = table_feeds(12, 99)
    expected = run(graph, feeds)
    errors = {}
    for rounding in ("nearest", "gptq"):
        result = graph.copy()
        step = Quantize(
            mode="weight-only",
            weights="uint4",
            granularity="block",
            rounding=rounding,
            symmetric=False,
            op_types="Gather",
        )
        step.run(result, context_of(table_feeds(16, 0)))
        errors[rounding] = np.linalg.norm(run(result, feeds) - expected)
    assert errors["gptq"] < 0.6 * errors["nearest"]


def test_random_models_and_functions_have_no_metric():
    text = TABLE.replace("y = Tanh (h)", "n = RandomNormalLike (h) y = Add (h, n)")
    graph = build(text, {"table": (60, 32), "w": (32, 8)})
    layers = next(t.layers for t in find_targets(graph, Outcome(), step="t") if t.is_lookup)
    assert table_metric(graph, layers, context_of(table_feeds(2, 0))) is None
    assert table_metric(graph, layers, Context()) is None


@pytest.mark.parametrize("format_", ["auto", "microsoft"])
def test_engines_agree_but_for_inputs_rounded_by_onnxruntime(format_):
    graph = build("(float[5, 512] x) => (float[5, 64] y) { y = MatMul (x, w) }", {"w": (512, 64)})
    Quantize(mode="weight-only", weights="int8", format=format_).run(graph, Context())
    feeds = [{"x": np.random.default_rng(3).standard_normal((5, 512)).astype(np.float32)}]
    given = runner().run(graph, feeds)
    verdict = second_opinion(graph, feeds, given, runner(), 1e-4)
    assert verdict.status == "passed", verdict.reason
    assert "rounds the inputs of 1 products to 8 bits" in verdict.reason
    wrong = [{"y": given[0]["y"] * np.float32(1.5)}]
    assert second_opinion(graph, feeds, wrong, runner(), 1e-4).status == "failed"


def test_channels_are_decoded_in_the_stored_shape():
    graph = build(
        "(float[1, 40, 6, 6] x) => (float[1, 64, 4, 4] y) { y = Conv (x, w) }", {"w": (64, 40, 3, 3)}
    )
    Quantize(mode="weight-only", weights="int8").run(graph, Context())
    assert sorted(node.op_type for node in graph.nodes) == ["Cast", "Cast", "Conv", "Mul"]
    scales = [graph.constant(name) for name in graph.initializers if graph.constant(name).dtype == np.float16]
    assert [scale.shape for scale in scales] == [(64, 1, 1, 1)]
    result = Interpreter(graph).run({"x": np.ones((1, 40, 6, 6), np.float32)})["y"]
    assert np.isfinite(result).all()


def test_stripped_files_of_few_bits_are_small():
    graph = build(
        "(float[5, 512] x) => (float[5, 512] y) { h = MatMul (x, w) y = MatMul (h, v) }",
        {"w": (512, 512), "v": (512, 512)},
    )
    before = graph.file_bytes()
    for weights, granularity, most in (("int8", "channel", 0.26), ("int4", "block", 0.16)):
        result = graph.copy()
        Quantize(mode="weight-only", weights=weights, granularity=granularity).run(result, Context())
        Strip(names=True).run(result)
        assert result.file_bytes() < most * before


def test_inputs_whose_squares_overflow_are_rounded_to_nearest_and_said_so():
    graph = build("(float[5, 64] x) => (float[5, 64] y) { y = MatMul (x, w) }", {"w": (64, 64)})
    feeds = [{"x": np.full((5, 64), 1e30, np.float32)}]
    results = [graph.copy(), graph.copy()]
    for result, rounding in zip(results, ("gptq", "nearest"), strict=True):
        step = Quantize(mode="weight-only", weights="int4", granularity="block", rounding=rounding)
        outcome = step.run(result, context_of(feeds))
        said = any("squares of its inputs overflow" in refusal.reason for refusal in outcome.refusals)
        assert said == (rounding == "gptq")
    assert results[0].to_model() == results[1].to_model()
