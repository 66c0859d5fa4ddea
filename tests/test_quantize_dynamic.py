"""Dynamic quantization: integer products, shared inputs, both formats, and what only stores its weights."""

import numpy as np
import onnx
import pytest
from passes_helper import runner
from test_quantize_weight_only import LAYERS, Step, build, feed

from onnxslim_lab.base import Context
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.dynamic import apply_dynamic
from onnxslim_lab.runtime import Interpreter

ALLOWED = Context(allow_opset_raise=True)

ATTENTION = """(float[2, 6, 48] x) => (float[2, 6, 48] q, float[2, 6, 48] k, float[2, 6, 48] v) {
  q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
}"""


def compare(graph, result, feeds):
    """Return the largest relative error of the outputs on onnxruntime; the NumPy runtime must agree with it."""
    first = runner().run(graph, [feeds], optimization="off")[0]
    worst = 0.0
    for level in ("off", "all"):
        second = runner().run(result, [feeds], optimization=level)[0]
        ours = Interpreter(result).run(feeds)
        for name, value in first.items():
            size = np.linalg.norm(value)
            assert second[name].shape == value.shape
            assert np.linalg.norm(second[name] - ours[name]) / size < 1e-2
            worst = max(worst, float(np.linalg.norm(second[name] - value) / size))
    return worst


def operators(graph):
    return [node.op_type for node in graph.nodes]


@pytest.mark.parametrize("format_", ["auto", "microsoft"])
@pytest.mark.parametrize(
    "layer", ["MatMul", "Gemm", "Gemm alpha", "Gemm scalar C", "shared", "MatMul behind Transpose"]
)
@pytest.mark.parametrize(
    ("kind", "symmetric", "granularity"), [("int8", None, "channel"), ("uint8", None, "tensor")]
)
def test_products_run_on_integers(layer, granularity, format_, kind, symmetric):
    text, weights, shape = LAYERS[layer]
    graph = build(text, weights)
    result = graph.copy()
    outcome = apply_dynamic(result, Step(kind, granularity, symmetric=symmetric, format=format_), ALLOWED)
    assert [name for change in outcome.changes for name in change.weights] == ["w"]
    assert not outcome.refusals
    found = operators(result)
    wanted = "DynamicQuantizeMatMul" if format_ == "microsoft" else "MatMulInteger"
    assert wanted in found
    assert not {"MatMul", "Gemm", "Transpose"} & set(found)
    onnx.checker.check_model(result.to_model(), full_check=True)
    assert result.file_bytes() < 0.5 * graph.file_bytes()
    assert compare(graph, result, feed(graph, shape)) < 0.03


@pytest.mark.parametrize("format_", ["auto", "microsoft"])
def test_layers_that_read_one_value_share_its_quantization(format_):
    graph = build(ATTENTION, {"wq": (48, 48), "wk": (48, 48), "wv": (48, 48)})
    result = graph.copy()
    apply_dynamic(result, Step(format=format_), ALLOWED)
    assert operators(result).count("DynamicQuantizeLinear") == 1
    assert operators(result).count("MatMulIntegerToFloat" if format_ == "microsoft" else "MatMulInteger") == 3
    assert compare(graph, result, feed(graph, (2, 6, 48))) < 0.02


def test_a_convolution_only_stores_its_weights_unless_it_is_asked_for():
    text, weights, shape = LAYERS["Conv"]
    graph = build(text, weights)
    stored, asked = graph.copy(), graph.copy()
    outcome = apply_dynamic(stored, Step(), ALLOWED)
    assert "2 to 8 times slower" in outcome.refusals[0].reason
    assert "Conv" in operators(stored)
    assert stored.file_bytes() < 0.4 * graph.file_bytes()
    apply_dynamic(asked, Step(op_types=("Conv",)), ALLOWED)
    assert "ConvInteger" in operators(asked)
    assert max(compare(graph, result, feed(graph, shape)) for result in (stored, asked)) < 0.03


def test_convolution_with_bias_and_groups():
    text = "(float[1, 80, 8] x) => (float[1, 24, 4] y) { y = Conv <group = 2, strides = [2], pads = [1, 1]> (x, w, b) }"
    graph = build(text, {"w": (24, 40, 3), "b": (24,)})
    result = graph.copy()
    apply_dynamic(result, Step(op_types=("Conv",)), ALLOWED)
    assert compare(graph, result, feed(graph, (1, 80, 8))) < 0.03


@pytest.mark.parametrize(
    "layer", ["LSTM", "Gather", "MatMul batch", "MatMul left", "Einsum", "ConvTranspose"]
)
def test_other_layers_store_their_weights(layer):
    text, weights, shape = LAYERS[layer]
    graph = build(text, weights)
    result = graph.copy()
    outcome = apply_dynamic(result, Step(), ALLOWED)
    assert "only its weights" in outcome.refusals[0].reason
    assert outcome.changes
    assert result.file_bytes() < 0.6 * graph.file_bytes()
    assert compare(graph, result, feed(graph, shape)) < 0.03


def test_bodies_share_nothing_across_graphs():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[5, 64] x, bool c) => (float[5, 64] y) {
      h = If (c) <
        then_branch = t () => (float[5, 64] p) { p = MatMul (x, w) },
        else_branch = e () => (float[5, 64] r) { r = MatMul (x, v) }
      >
      y = MatMul (h, w)
    }"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name in ("w", "v"):
        values = random.standard_normal((64, 64)).astype(np.float32) / 8
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    graph = Graph.load(model)
    result = graph.copy()
    outcome = apply_dynamic(result, Step(), ALLOWED)
    assert len(outcome.changes) == 2
    onnx.checker.check_model(result.to_model(), full_check=True)
    assert result.file_bytes() < 0.5 * graph.file_bytes()
    for branch in (True, False):
        feeds = {"x": random.standard_normal((5, 64)).astype(np.float32), "c": np.array(branch)}
        assert compare(graph, result, feeds) < 0.03


def test_old_opsets_are_raised_only_when_allowed():
    text, weights, shape = LAYERS["MatMul"]
    graph = build(text, weights, opset=9)
    raised, kept = graph.copy(), graph.copy()
    apply_dynamic(raised, Step(), ALLOWED)
    assert raised.opset() >= 11
    assert "MatMulInteger" in operators(raised)
    outcome = apply_dynamic(kept, Step(), Context())
    assert kept.opset() == 9
    assert "allow raising it" in outcome.refusals[-1].reason
    assert outcome.changes
    assert max(compare(graph, result, feed(graph, shape)) for result in (raised, kept)) < 0.03


def test_types_and_roundings_that_products_cannot_have():
    graph = build(*LAYERS["MatMul"][:2])
    with pytest.raises(ParameterError, match="int8 or uint8"):
        apply_dynamic(graph, Step("int4"), ALLOWED)
    with pytest.raises(ParameterError, match="mode=weight-only"):
        apply_dynamic(graph, Step(rounding="codebook"), ALLOWED)


def test_weights_keep_to_seven_bits_where_products_saturate():
    graph = build(*LAYERS["MatMul"][:2])
    apply_dynamic(graph, Step(target="onnxruntime-x86"), ALLOWED)
    codes = next(graph.constant(name) for name in graph.initializers if graph.constant(name).dtype == np.int8)
    assert np.abs(codes.astype(int)).max() <= 64
