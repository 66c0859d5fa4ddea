"""Weights that come as codes times a scale: quantized as float ones are, or left as they came."""

import numpy as np
import pytest
from test_quantize import context_of, feeds_of, quantized, sqnr

from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.weight_codes import decode_codes, restore_codes


def coded(order=("f", "s"), reader="MatMul(x, w)"):
    random = np.random.default_rng(0)
    graph = Graph.parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 16] x) => (float[N, 8] y) <int8[1] c = {{0}}, float[1] s = {{0}}>
        {{ f = Cast<to = 1>(c) w = Mul({", ".join(order)}) y = {reader} }}"""
    )
    codes = random.integers(-127, 128, (16, 8)).astype(np.int8)
    codes[0] = 127
    graph.set_constant("c", codes)
    graph.set_constant("s", (0.001 + 0.01 * random.random((1, 8))).astype(np.float32))
    return graph


@pytest.mark.parametrize("order", [("f", "s"), ("s", "f")])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_they_run_on_codes_and_the_codes_are_the_old_ones(order, mode):
    graph, feeds = coded(order), feeds_of((4, 16))
    result, outcome = quantized(graph, feeds, mode=mode)
    assert {"Cast", "Mul"}.isdisjoint(node.op_type for node in result.nodes) or mode == "dynamic"
    old = graph.constant("c")
    kept = [result.constant(name) for name in result.initializers]
    assert any(array.shape == old.shape and np.array_equal(array, old) for array in kept)
    assert any("w" in change.weights for change in outcome.changes)
    assert sqnr(graph, result, feeds) > 35


def test_what_is_not_quantized_keeps_its_codes():
    graph = coded()
    before = graph.to_model()
    step = Quantize(mode="weight-only", exclude=("w",))
    step.run(graph, context_of(feeds_of((4, 16))))
    assert [node.op_type for node in graph.nodes] == ["Cast", "Mul", "MatMul"]
    assert np.array_equal(graph.constant("c"), Graph.load(before).constant("c"))
    assert len(graph.to_model().SerializeToString()) <= len(before.SerializeToString()) + 16, (
        "but for the names of the nodes"
    )


def test_decoding_and_restoring_leaves_the_model_as_it_was():
    graph = coded()
    decoded = decode_codes(graph)
    assert [one.value for one in decoded] == ["w"]
    assert "c" not in graph.initializers
    assert np.array_equal(graph.constant("w"), decoded[0].array)
    assert restore_codes(graph, decoded) == 1
    assert [node.op_type for node in graph.nodes] == ["Cast", "Mul", "MatMul"]
    assert restore_codes(graph, decoded) == 0, "once"


def test_what_no_layer_reads_stays():
    graph = coded(reader="Identity(w)")
    assert decode_codes(graph) == []
