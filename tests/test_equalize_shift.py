"""equalize, shifts of channels: where they go, that nothing changes, and what keeps a value where it is."""

import numpy as np
import onnx
import pytest
from passes_helper import assert_equal_outputs, assert_settled
from test_quantize import context_of, feeds_of, model_of, sqnr

from onnxslim_lab.equalization.shifts import find_streams
from onnxslim_lab.layers import find_layers
from onnxslim_lab.passes.equalize import Equalize
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.statistics import Want

BOTTLENECKS = """r = Relu(x) a = Conv(r, w, b) t = Conv(a, v, d) e = Relu(t) c = Conv(e, u, f) s = Add(a, c)
    y = Conv<group = 2>(s, z)"""
SIZES = {
    "w": (6, 4, 1, 1),
    "b": (6,),
    "v": (8, 6, 3, 3),
    "d": (8,),
    "u": (6, 8, 1, 1),
    "f": (6,),
    "z": (4, 3, 1, 1),
}
PADDED = BOTTLENECKS.replace("Conv(a, v, d)", "Conv<pads = [1,1,1,1]>(a, v, d)")


def bottlenecks(body, offset=20.0, seed=0):
    """A residual block between linear layers; the channels of its values lie far from each other."""
    graph = model_of(body, SIZES, outputs="float[N,M,H,W] y", seed=seed)
    random = np.random.default_rng(seed)
    for name in ("b", "f"):
        graph.set_constant(name, random.uniform(-offset, offset, SIZES[name]).astype(np.float32))
    graph.infer()
    return graph


FLAT = BOTTLENECKS.replace("Conv(a, v, d)", "Conv(a, v1, d)")
SIZES["v1"] = (8, 6, 1, 1)


def shifted(graph, feeds, **options):
    result = graph.copy()
    outcome = Equalize(**options).run(result, context_of(feeds))
    onnx.checker.check_model(result.to_model())
    assert_equal_outputs(graph, result, relative=1e-4)
    return result, outcome


def ranges(graph, feeds, values):
    statistics = context_of(feeds).calibration.collect(
        graph, [Want(graph, value, axis=1) for value in values]
    )
    found = {value: statistics[graph, value].channels for value in values}
    return {value: (channels.low, channels.high) for value, channels in found.items()}


def test_what_layers_make_is_centred_and_sums_move_along():
    graph, feeds = bottlenecks(FLAT), feeds_of()
    result, outcome = shifted(graph, feeds)
    before, after = (ranges(one, feeds, ["a", "c", "s"]) for one in (graph, result))
    for name in ("a", "c"):
        low, high = after[name]
        np.testing.assert_allclose(low, -high, atol=1e-4)
    assert np.ptp(before["s"][1]) > 2 * np.ptp(after["s"][1])
    (change,) = [change for change in outcome.changes if change.what.startswith("centred")]
    assert change.detail["noise"] < 0.5
    assert_settled(Equalize(), result, context_of(feeds))


def test_biases_take_what_the_formula_says():
    graph, feeds = bottlenecks(FLAT), feeds_of()
    result, _ = shifted(graph, feeds, alpha=0.0, mode="activations")
    assert find_streams(graph, find_layers(graph)[0])[0].sums == {"a": (), "c": (), "s": ("a", "c")}
    found = ranges(graph, feeds, ["a", "c"])
    centre = {name: (low + high) / 2 for name, (low, high) in found.items()}
    moved = graph.copy()
    both = centre["a"] + centre["c"]
    flat = {name: graph.constant(name).astype(np.float64)[:, :, 0, 0] for name in ("v1", "z")}
    moved.set_constant("b", (graph.constant("b") - centre["a"]).astype(np.float32))
    moved.set_constant("f", (graph.constant("f") - centre["c"]).astype(np.float32))
    moved.set_constant("d", (graph.constant("d") + flat["v1"] @ centre["a"]).astype(np.float32))
    groups = np.concatenate([flat["z"][:2] @ both[:3], flat["z"][2:] @ both[3:]])
    Equalize(alpha=0.0, mode="activations", shift=False).run(moved, context_of(feeds))
    for name in ("b", "f", "d"):
        np.testing.assert_allclose(result.constant(name), moved.constant(name), rtol=1e-4, atol=1e-4)
    (last,) = [node for node in result.nodes if node.output[0] == "y"]
    np.testing.assert_allclose(result.constant(last.input[2]), groups, rtol=1e-4, atol=1e-4)


def test_quantization_gains():
    graph, feeds = bottlenecks(FLAT), feeds_of()
    found = []
    for shift in (False, True):
        result, _ = shifted(graph, feeds, shift=shift)
        Quantize(target="onnxruntime-x86-vnni", ranges="minmax").run(result, context_of(feeds))
        found.append(sqnr(graph, result, feeds))
    assert found[1] > found[0] + 3


def test_a_normalization_in_front_of_products():
    body = """n = LayerNormalization(x, g, h) p = MatMul(n, w) q = Add(p, b) k = MatMul(n, v) l = Add(c, k)
        y = Mul(q, l)"""
    sizes = {"g": (8,), "h": (8,), "w": (8, 6), "b": (6,), "v": (8, 6), "c": (6,)}
    graph = model_of(body, sizes, inputs="float[N,5,8] x", outputs="float[N,5,6] y")
    graph.set_constant("h", np.linspace(-30, 30, 8).astype(np.float32))
    graph.infer()
    result, outcome = shifted(graph, feeds_of((2, 5, 8)))
    assert any(change.what.startswith("centred") for change in outcome.changes)
    assert np.abs(result.constant("h")).max() < 3


@pytest.mark.parametrize(
    "body",
    [
        PADDED,  # zeros around a shifted value are no zeros of the value
        FLAT.replace("e = Relu(t)", "m = Relu(a) o = Add(t, o8) e = Relu(o)"),
        FLAT.replace("Conv(a, v1, d)", "MaxPool<kernel_shape = [1,1]>(a)"),
    ],
    ids=["padding", "a Relu reads it too", "a pool reads it"],
)
def test_values_that_something_else_reads_stay(body):
    sizes = SIZES | {"o8": (1,)}
    if "MaxPool" in body:
        sizes = sizes | {"u": (6, 6, 1, 1)}
    graph = model_of(
        body, sizes, outputs="float[N,M,H,W] y" + (", float[N,K,I,J] m" if " m = " in body else "")
    )
    graph.infer()
    assert not find_streams(graph, find_layers(graph)[0])


def test_an_output_of_the_graph_and_narrow_floats_stay():
    graph = model_of(FLAT, SIZES, outputs="float[N,M,H,W] y, float[N,K,I,J] s")
    graph.infer()
    assert not find_streams(graph, find_layers(graph)[0])
    half = model_of(FLAT, SIZES, inputs="float16[N,4,8,8] x", outputs="float16[N,M,H,W] y", dtype=np.float16)
    half.infer()
    assert not find_streams(half, find_layers(half)[0])


def test_a_value_made_by_something_else_is_not_shifted_but_its_sum_is():
    body = "r = Relu(x) a = Conv(r, w, b) s = Add(r, a) t = Relu(r) y = Conv(s, u)"
    graph = model_of(body, {"w": (4, 4, 1, 1), "b": (4,), "u": (5, 4, 1, 1)}, outputs="float[N,M,H,W] y")
    graph.set_constant("b", np.float32([-40, 10, 20, 40]))
    graph.infer()
    (stream,) = find_streams(graph, find_layers(graph)[0])
    assert stream.sums == {"a": (), "s": ("a",)}
    result, _ = shifted(graph, feeds_of())
    assert np.abs(result.constant("b")).max() < 10


def test_a_bias_that_others_read_too_keeps_its_values():
    graph = bottlenecks(FLAT.replace("Conv(e, u, f)", "Conv(e, u, b)"))
    result, outcome = shifted(graph, feeds_of())
    assert any(change.what.startswith("centred") for change in outcome.changes)
    names = {node.input[2] for node in result.nodes if node.output[0] in ("a", "c")}
    assert len(names) == 2
