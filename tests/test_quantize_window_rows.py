"""Convolutions whose windows are rows as Gemm: that they compute the same, keep their names, and where they stay."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_quantize import context_of, feeds_of, model_of, quantized, sqnr

from onnxslim_lab.base import Context
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.correct_bias import CorrectBias
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.rewriting.window_rows import write_gemms

ASKED = {"ranges": "minmax"}
CHAIN = "a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) "
SIZES = {"w": (6, 4, 3), "b": (6,), "v": (5, 6, 1)}
SHAPES = {"inputs": "float[N,4,3] x", "outputs": "float[N,5,1] y"}


def kinds(graph):
    return [node.op_type for node in graph.nodes]


def written(graph):
    """Return a copy with what can be Gemm written so, and how many that were."""
    result = graph.copy()
    result.infer()
    count = write_gemms(result)
    Simplify().run(result, Context())
    onnx.checker.check_model(result.to_model(), full_check=True)
    return result, count


def same(graph, result, feeds):
    run = context_of(feeds).calibration.runner.run
    for one, other in zip(run(graph, feeds), run(result, feeds), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.shape == other[name].shape
            assert np.allclose(value, other[name], atol=1e-5 * max(1.0, np.abs(value).max(initial=0)))


def test_a_chain_goes_on_without_the_axis():
    graph = model_of(CHAIN, SIZES, **SHAPES)
    result, count = written(graph)
    assert count == 2
    assert kinds(result) == ["Transpose", "Flatten", "Gemm", "Relu", "Gemm", "Unsqueeze"]
    assert [node.name for node in result.nodes if node.op_type == "Gemm"] == ["a", "y"], (
        "what they were called by"
    )
    same(graph, result, feeds_of((2, 4, 3)))


def test_the_axis_comes_where_a_transpose_would_move_it():
    body = CHAIN.replace("y =", "c =") + "d = Relu(c) y = Transpose<perm = [0, 2, 1]>(d)"
    graph = model_of(body, SIZES, inputs=SHAPES["inputs"], outputs="float[N,1,5] y")
    result, _ = written(graph)
    assert kinds(result)[-3:] == ["Gemm", "Relu", "Reshape"], "the Relu fuses with the Gemm"
    same(graph, result, feeds_of((2, 4, 3)))


@pytest.mark.parametrize(
    ("body", "shape", "size"),
    [
        (
            "t = Transpose<perm = [0, 2, 1]>(x) c = Conv(t, w, b) s = Sigmoid(c) y = Flatten(s)",
            "N,5,4",
            (3, 5, 4),
        ),
        (
            "t = Transpose<perm = [1, 2, 0]>(x) c = Conv(t, w, b) s = Sigmoid(c) y = Flatten(s)",
            "T,1,4",
            (5, 1, 4),
        ),
        ("t = Transpose<perm = [0, 2, 1]>(x) y = Conv(t, w)", "N,7,4", (2, 7, 4)),
    ],
)
def test_one_channel_of_what_has_the_channels_last(body, shape, size):
    used = {name: size for name, size in {"w": (1, 4, 1), "b": (1,)}.items() if name in body.split("Conv")[1]}
    outputs = "float[N,1,7] y" if "Flatten" not in body else "float[P,Q] y"
    graph = model_of(body, used, inputs=f"float[{shape}] x", outputs=outputs)
    result, count = written(graph)
    assert count == 1
    assert "Transpose" not in kinds(result)
    assert kinds(result)[:2] == ["Reshape", "Gemm"]
    same(graph, result, feeds_of(size, count=2))


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("t = Transpose<perm = [0, 2, 1]>(x) y = Conv(t, w)", "N,T,4"),  # as many sizes unknown
        ("t = Transpose<perm = [1, 2, 0]>(x) y = Conv(t, w)", "5,3,4"),  # images between the places
        ("t = Transpose<perm = [2, 0, 1]>(x) y = Conv(t, w)", "4,5,3"),
        ("t = Transpose<perm = [0, 2, 1]>(x) y = Conv(t, v)", "N,7,4"),  # a Transpose back would be needed
    ],
)
def test_channels_that_would_be_moved_stay(body, shape):
    used = {"w": (1, 4, 1)} if "w)" in body else {"v": (2, 4, 1)}
    if shape == "4,5,3":
        used = {"w": (1, 5, 1)}
    graph = model_of(body, used, inputs=f"float[{shape}] x", outputs="float[A,B,C] y")
    assert written(graph)[1] == 0


@pytest.mark.parametrize(
    ("body", "inputs", "outputs"),
    [
        ("y = Conv<pads = [1, 0]>(x, w)", "float[N,4,3] x", "float[N,6,2] y"),  # two windows
        ("y = Conv(x, w)", "float[N,4,T] x", "float[N,6,U] y"),  # of unknown length
        ("y = Conv(x, w) z = Conv(x, w)", "float[N,4,3] x", "float[N,6,1] y, float[N,6,1] z"),  # shared
        ("y = Conv<group = 2>(x, u)", "float[N,4,3] x", "float[N,6,1] y"),
        ("y = Conv<strides = [2]>(x, t)", "float[N,4,3] x", "float[N,6,1] y"),  # does not see all
    ],
)
def test_other_convolutions_stay(body, inputs, outputs):
    sizes = {"w": (6, 4, 3), "u": (6, 2, 3), "t": (6, 4, 2)}
    used = {name: size for name, size in sizes.items() if f", {name})" in body}
    result, count = written(model_of(body, used, inputs=inputs, outputs=outputs))
    assert count == 0
    assert "Gemm" not in kinds(result)


def test_what_something_else_reads_keeps_its_axis():
    graph = model_of(
        CHAIN + "z = Identity(r)", SIZES, inputs=SHAPES["inputs"], outputs="float[N,5,1] y, float[N,6,1] z"
    )
    result, count = written(graph)
    assert count == 2
    same(graph, result, feeds_of((2, 4, 3)))


@settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(["", "Relu", "Tanh", "LeakyRelu"]), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_random_chains_compute_the_same(layers, length, batch, turned):
    body, sizes, value, channels, taps = "", {}, "x", 3, length
    for number, (out, activation, biased) in enumerate(layers):
        sizes[f"w{number}"] = (out, channels, taps)
        if biased:
            sizes[f"b{number}"] = (out,)
        body += f"c{number} = Conv({value}, w{number}{f', b{number}' if biased else ''}) "
        value = f"c{number}"
        if activation:
            body += f"a{number} = {activation}({value}) "
            value = f"a{number}"
        channels, taps = out, 1
    last = "Transpose<perm = [0, 2, 1]>" if turned else "Identity"
    shape = f"N,1,{channels}" if turned else f"N,{channels},1"
    graph = model_of(
        f"{body} y = {last}({value})", sizes, inputs=f"float[N,3,{length}] x", outputs=f"float[{shape}] y"
    )
    result, count = written(graph)
    assert count == len(layers)
    same(graph, result, feeds_of((batch, 3, length), count=2))


def test_quantized_and_excluded_under_their_names():
    graph, feeds = model_of(CHAIN, SIZES, **SHAPES), feeds_of((4, 4, 3), count=12)
    result, outcome = quantized(graph, feeds, **ASKED)
    assert any(
        "2 convolutions whose windows are rows became Gemm" in change.what for change in outcome.changes
    )
    assert sqnr(graph, result, feeds_of((4, 4, 3), seed=5)) > 25
    for name, weight in (("a", "w"), ("y", "v")):
        part, outcome = quantized(graph, feeds, **ASKED, exclude=name)
        assert any(refusal.where == name and "excluded" in refusal.reason for refusal in outcome.refusals)
        assert part.constant_type(weight)[0] == 1, "float"


def test_the_bias_of_a_gemm_is_corrected_towards_the_convolution_s():
    graph, feeds = model_of(CHAIN, SIZES, **SHAPES), feeds_of((8, 4, 3), count=32)
    result, _ = quantized(graph, feeds, **ASKED)
    context = context_of(feeds)
    object.__setattr__(context, "original", Graph.load(graph.to_model()))
    outcome = CorrectBias().run(result, context)
    assert not [refusal for refusal in outcome.refusals if "no value" in refusal.reason]
