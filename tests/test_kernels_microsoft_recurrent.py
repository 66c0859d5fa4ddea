"""DynamicQuantizeLSTM against onnxruntime: by hand, and as its quantizer writes it."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
from kernel_checks import MS, both, codes, floats
from onnx import helper, numpy_helper
from test_kernels_models import quantization, reference

from onnxslim_lab.runtime import Interpreter

STEPS, BATCH, INPUTS, HIDDEN = 6, 2, 5, 8


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("everything", [False, True])
def test_dynamic_quantize_lstm(direction, per_column, dtype, everything):
    rng = np.random.default_rng(len(direction) + 2 * per_column + everything)
    count = 2 if direction == "bidirectional" else 1
    columns = (count, 4 * HIDDEN) if per_column else (count,)
    scales = [rng.uniform(0.002, 0.01, columns).astype(np.float32) for _ in range(2)]
    zero = 128 if dtype == np.uint8 else 0  # onnxruntime takes no other for int8
    zeros = [np.full(columns, zero, dtype) for _ in range(2)]
    weights = [codes(rng, (count, rows, 4 * HIDDEN), dtype) for rows in (INPUTS, HIDDEN)]
    states = [floats(rng, count, BATCH, HIDDEN) for _ in range(2)]
    optional = [
        floats(rng, count, 8 * HIDDEN),
        np.array([STEPS, 3], np.int32),
        *states,
        floats(rng, count, 3 * HIDDEN),
    ]
    inputs = [floats(rng, STEPS, BATCH, INPUTS), *weights, *(optional if everything else [None] * 5)]
    inputs += [scales[0], zeros[0], scales[1], zeros[1]]
    attributes = {"direction": direction, "hidden_size": HIDDEN} | ({"clip": 2.0} if everything else {})
    want, have = both("DynamicQuantizeLSTM", inputs, attributes, 3, MS, None)
    for wanted, got in zip(want, have, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_the_quantizer_writes(tmp_path, per_channel):
    rng = np.random.default_rng(1)
    shapes = {"W": (2, 4 * HIDDEN, INPUTS), "R": (2, 4 * HIDDEN, HIDDEN), "B": (2, 8 * HIDDEN)}
    constants = [numpy_helper.from_array(floats(rng, *shape), name) for name, shape in shapes.items()]
    node = helper.make_node(
        "LSTM", ["x", *shapes], ["y", "h", "c"], hidden_size=HIDDEN, direction="bidirectional"
    )
    values = [helper.make_tensor_value_info(name, 1, None) for name in "xyhc"]
    values[0] = helper.make_tensor_value_info("x", 1, [None, BATCH, INPUTS])
    graph = helper.make_graph([node], "g", values[:1], values[1:], constants)
    source, target = str(tmp_path / "lstm.onnx"), str(tmp_path / "quantized.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), source)
    logging.disable(logging.WARNING)
    quantization.quantize_dynamic(source, target, op_types_to_quantize=["LSTM"], per_channel=per_channel)
    logging.disable(logging.NOTSET)
    feed = {"x": floats(rng, STEPS, BATCH, INPUTS)}
    want, have = reference(target, feed), Interpreter(target).run(feed)
    for name, wanted in want.items():
        np.testing.assert_allclose(have[name], wanted, rtol=1e-4, atol=1e-5)
