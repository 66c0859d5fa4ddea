"""Products on codes with a Relu behind them whose result stays float: onnxruntime runs them on codes."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from test_quantize import feeds_of, model_of, quantized, sqnr


def optimized(graph, folder):
    """Return the operators that onnxruntime runs, Gemm on codes as QGemm."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    data = graph.to_model().SerializeToString()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(
        node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    )


@pytest.mark.parametrize(
    "body",
    ["a = Gemm(x, w, b) r = Relu(a) y = Tanh(r)", "m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = Tanh(r)"],
)
def test_a_product_before_a_float_relu_runs_on_codes(body, tmp_path):
    graph = model_of(body, {"w": (64, 32), "b": (32,)}, inputs="float[4,64] x", outputs="float[4,32] y")
    feeds = feeds_of((4, 64))
    result, _ = quantized(graph, feeds)
    (leaky,) = [node for node in result.nodes if node.op_type == "LeakyRelu"]
    assert leaky.attribute[0].f == 0
    operators = optimized(result, tmp_path)
    assert operators["QGemm"] == 1
    assert not operators["FusedGemm"]
    assert sqnr(graph, result, feeds) > 30
    assert np.isfinite(sqnr(graph, result, feeds))


def test_a_relu_behind_a_float_product_stays():
    body = "c = Gemm(x, v) t = Tanh(c) a = Gemm(t, w, b) r = Relu(a) y = Tanh(r)"
    sizes = {"v": (64, 64), "w": (64, 32), "b": (32,)}
    graph = model_of(body, sizes, inputs="float[4,64] x", outputs="float[4,32] y")
    result, _ = quantized(graph, feeds_of((4, 64)), exclude="w")
    assert [node.op_type for node in result.nodes].count("Relu") == 1
