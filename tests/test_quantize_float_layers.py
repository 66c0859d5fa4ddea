"""Layers that stay float: what is known beforehand of the weights that their file will have."""

import numpy as np
import pytest
from test_quantize import context_of, feeds_of, model_of

from onnxslim_lab.base import Outcome
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization import float_weights
from onnxslim_lab.quantization.float_weights import round_in_float
from onnxslim_lab.quantization.numerics import dequantize
from onnxslim_lab.quantization.static import plan_static, scheme_of


@pytest.mark.parametrize("spared", [False, True])
def test_they_are_tried_with_the_weights_of_their_codes_but_for_the_smallest(monkeypatch, spared):
    monkeypatch.setattr(float_weights, "_SPARE", 0.5 if spared else 0.0)
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 64), "v": (64, 8)},
        inputs="float[N,16] x",
        outputs="float[N,8] y",
    )
    step = Quantize(target="onnxruntime-x86-vnni", ranges="minmax")
    planned = plan_static(graph, step, scheme_of(step), context_of(feeds_of((4, 16))), Outcome())
    plan = planned.plan
    result = plan.model.copy()
    round_in_float(result, [layer.name for layer in plan.layers], plan)
    codes = {layer.layer.weight: dequantize(*plan.rounded[layer.name]) for layer in plan.layers}
    assert np.array_equal(result.constant("w"), codes["w"])
    assert np.array_equal(result.constant("v"), graph.constant("v") if spared else codes["v"])
    assert not np.array_equal(codes["v"], graph.constant("v"))
