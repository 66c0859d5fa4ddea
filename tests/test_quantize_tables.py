"""Tables that a Gather looks up for layers on codes: stored in codes, and rounded once."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from passes_helper import runner
from test_quantize import context_of, model_of, types_of

from onnxslim_lab.passes.quantize import Quantize

BODY = "e = Gather(E, i) f = Gather(F, j) c = Concat<axis = -1>(e, f) r = Relu(c) y = MatMul(r, w)"
SIZES = {"E": (50, 6), "F": (9, 2), "w": (8, 5)}
INPUTS, OUTPUTS = "int64[N,7] i, int64[N,7] j", "float[N,7,5] y"


def feeds_of(seed=0, count=4):
    random = np.random.default_rng(seed)
    return [
        {"i": random.integers(50, size=(3, 7)), "j": random.integers(9, size=(3, 7))} for _ in range(count)
    ]


def graph_of(body=BODY, outputs=OUTPUTS):
    return model_of(body, SIZES, inputs=INPUTS, outputs=outputs)


def quantized(graph, **options):
    result = graph.copy()
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax", **options)
    outcome = step.run(result, context_of(feeds_of()))
    onnx.checker.check_model(result.to_model(), full_check=True)
    return result, outcome


@pytest.mark.parametrize("written", ["qdq", "qoperator"])
def test_they_are_stored_on_the_grid_of_what_reads_them_and_change_nothing(written):
    graph = graph_of()
    result, outcome = quantized(graph, format=written)
    tables = [change for change in outcome.changes if "looked up in codes" in change.what]
    assert {change.where for change in tables} == {"E", "F"}
    assert sum(change.bytes_after for change in tables) == 50 * 6 + 9 * 2
    sizes = sorted(result.constant(n).size for n, t in types_of(result).items() if t == TensorProto.UINT8)
    assert sizes[-2:] == [18, 300]
    assert all(result.constant(n).size < 8 for n, t in types_of(result).items() if t == TensorProto.FLOAT)
    gathers = [node.output[0] for node in graph.nodes if node.op_type == "Gather"]
    other, _ = quantized(graph, format=written, exclude=tuple(gathers))
    assert {"E", "F"} <= set(other.initializers), "what is excluded stays float"
    for first, second in zip(
        runner().run(result, feeds_of(5)), runner().run(other, feeds_of(5)), strict=True
    ):
        assert np.array_equal(first["y"], second["y"]), "the codes are those that are looked up"


@pytest.mark.parametrize(
    "body",
    [
        BODY + " z = Gather(E, j)",  # another lookup in the same table
        BODY.replace("c = Concat<axis = -1>(e, f)", "t = Tanh(e) c = Concat<axis = -1>(t, f)")
        + " z = Identity(e)",
    ],
)
def test_those_that_something_else_reads_keep_scales_of_their_own(body):
    graph = graph_of(body, OUTPUTS + ", float[N,7,6] z")
    result, outcome = quantized(graph)
    assert "E" not in {change.where for change in outcome.changes if "looked up in codes" in change.what}
    assert any("only looks its weight up" in refusal.reason for refusal in outcome.refusals)
    kinds = [t for n, t in types_of(result).items() if result.constant(n).size == 300]
    assert kinds == [TensorProto.INT8]


def test_they_are_stored_alone_when_no_layer_on_codes_reads_them():
    graph = graph_of()
    result, outcome = quantized(graph, op_types=("Gather",))
    assert not [change for change in outcome.changes if "looked up in codes" in change.what]
    kinds = [t for n, t in types_of(result).items() if result.constant(n).size == 300]
    assert kinds == [TensorProto.INT8]


def test_those_with_nan_are_not():
    graph = graph_of()
    table = np.array(graph.constant("E"))
    table[49] = np.nan  # a row that the data never looks up
    graph.set_constant("E", table)
    feeds = [{name: value % 9 for name, value in feed.items()} for feed in feeds_of()]
    result = graph.copy()
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax")
    outcome = step.run(result, context_of(feeds))
    assert "E" not in {change.where for change in outcome.changes if "looked up in codes" in change.what}
    assert np.isnan(result.constant("E")[49]).all(), "nothing is lost"
