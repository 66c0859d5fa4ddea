"""fuse-batchnorm: before and after as text, random layers by execution, and what is refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from passes_helper import assert_equal_outputs, check, load

from onnxslim_lab.base import Context
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.fuse_batchnorm import FuseBatchnorm

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
STATISTICS = "float[2] s = {2, 3}, float[2] b = {1, -1}, float[2] m = {0.5, 4}, float[2] v = {4, 9}"
CONV = f"float[2,1,1,1] w = {{1, 2}}, float[2] c = {{10, 20}}, {STATISTICS}"
# scale 2/2 = 1 and 3/3 = 1 with epsilon 0; shift 1 - 0.5 and -1 - 4
NORM = "BatchNormalization<epsilon = 0.0>"


def refused(before, reason, **options):
    outcome = check(FuseBatchnorm(), before, None, **options)
    assert any(reason in refusal.reason for refusal in outcome.refusals), outcome.refusals


def test_into_conv():
    check(
        FuseBatchnorm(),
        f"g (float[n,1,4,4] x) => (float[n,2,4,4] y) <{CONV}> {{ h = Conv(x, w, c) y = {NORM}(h, s, b, m, v) }}",
        """g (float[n,1,4,4] x) => (float[n,2,4,4] y)
        <float[2,1,1,1] w = {1, 2}, float[2] c = {10.5, 15}> { y = Conv(x, w, c) }""",
    )


def test_into_conv_without_bias_keeps_the_output_name():
    graph = load(f"""g (float[n,1,4,4] x) => (float[n,2,4,4] y)
        <{CONV}> {{ h = Conv(x, w) k = {NORM}(h, s, b, m, v) y = Relu(k) }}""")
    check(
        FuseBatchnorm(),
        graph,
        """g (float[n,1,4,4] x) => (float[n,2,4,4] y)
        <float[2,1,1,1] w = {1, 2}, float[2] c = {10, 20}, float[2] t = {0.5, -5}>
        { k = Conv(x, w, t) y = Relu(k) }""",
    )
    FuseBatchnorm().run(graph)
    assert [node.output[0] for node in graph.nodes] == ["k", "y"]


def test_into_matmul_and_add():
    check(
        FuseBatchnorm(),
        f"""g (float[n,3] x) => (float[n,2] y) <float[3,2] w = {{1,2,3,4,5,6}}, float[2] a = {{1, 2}}, {STATISTICS}>
        {{ p = MatMul(x, w) h = Add(a, p) y = {NORM}(h, s, b, m, v) }}""",
        """g (float[n,3] x) => (float[n,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] a = {1.5, -3}>
        { p = MatMul(x, w) y = Add(a, p) }""",
    )


def test_into_matmul_leaves_an_add():
    check(
        FuseBatchnorm(),
        f"""g (float[n,3] x) => (float[n,2] y) <float[3,2] w = {{1,2,3,4,5,6}}, {STATISTICS}>
        {{ h = MatMul(x, w) y = {NORM}(h, s, b, m, v) }}""",
        """g (float[n,3] x) => (float[n,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] a = {0.5, -5}>
        { p = MatMul(x, w) y = Add(p, a) }""",
    )


def test_into_the_conv_after_it():
    check(
        FuseBatchnorm(),
        f"""g (float[n,2,4,4] x) => (float[n,1,3,3] y) <float[1,2,2,2] w = {{1,1,1,1,2,2,2,2}}, float[1] c = {{7}},
        {STATISTICS}> {{ h = {NORM}(x, s, b, m, v) y = Conv(h, w, c) }}""",
        """g (float[n,2,4,4] x) => (float[n,1,3,3] y) <float[1,2,2,2] w = {1,1,1,1,2,2,2,2}, float[1] c = {-31}>
        { y = Conv(x, w, c) }""",
    )


def test_two_in_a_row_become_one():
    check(
        FuseBatchnorm(),
        f"""g (float[n,2,4] x) => (float[n,2,4] y) <{STATISTICS}, float[2] s2 = {{4, 6}}, float[2] b2 = {{1, 1}}>
        {{ h = {NORM}(x, s, b, m, v) y = {NORM}(h, s2, b2, m, v) }}""",
        """g (float[n,2,4] x) => (float[n,2,4] y) <float[2] s = {4, 6}, float[2] b = {2, -9},
        float[2] m = {0.5, 4}, float[2] v = {4, 9}> { y = BatchNormalization<epsilon = 0.0>(x, s, b, m, v) }""",
    )


def test_in_a_body_with_a_captured_weight():
    outcome = check(
        FuseBatchnorm(),
        f"""g (float[n,1,4,4] x, bool q) => (float[n,2,4,4] y) <{CONV}> {{
        y = If(q) <then_branch = t () => (float[n,2,4,4] k) {{ h = Conv(x, w, c) k = {NORM}(h, s, b, m, v) }},
                   else_branch = e () => (float[n,2,4,4] z) {{ z = Concat<axis = 1>(x, x) }}> }}""",
        """g (float[n,1,4,4] x, bool q) => (float[n,2,4,4] y) <float[2,1,1,1] w = {1, 2}> {
        y = If(q) <then_branch = t () => (float[n,2,4,4] k) <float[2] c = {10.5, 15}> { k = Conv(x, w, c) },
                   else_branch = e () => (float[n,2,4,4] z) { z = Concat<axis = 1>(x, x) }> }""",
    )
    assert len(outcome.changes) == 1


def test_in_a_function():
    text = f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[n,1,4,4] x) => (float[n,2,4,4] y) {{ y = local.f(x) }}
    <domain: "local", opset_import: ["" : 17]>
    f (x) => (y) {{
      w = Constant<value = float[2,1,1,1] {{1, 2}}>() s = Constant<value = float[2] {{2, 3}}>()
      b = Constant<value = float[2] {{1, -1}}>() m = Constant<value = float[2] {{0.5, 4}}>()
      v = Constant<value = float[2] {{4, 9}}>() h = Conv(x, w) y = {NORM}(h, s, b, m, v) }}"""
    check(
        FuseBatchnorm(),
        text,
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[n,1,4,4] x) => (float[n,2,4,4] y) { y = local.f(x) }
    <domain: "local", opset_import: ["" : 17]>
    f (x) => (y) { w = Constant<value = float[2,1,1,1] {1, 2}>() t = Constant<value = float[2] {0.5, -5}>()
      y = Conv(x, w, t) }""",
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"h = Conv(x, w, c) k = {NORM}(h, s, b, m, v) y = Add(h, k)", "Conv before it has other readers"),
        (
            f"h = Conv(x, w, c) o = Conv(x, w) k = {NORM}(h, s, b, m, v) y = Add(o, k)",
            "used by other nodes too",
        ),
        (f"h = Conv(x, w, c) y = {NORM}(h, e, b, m, v)", "its parameters are not constant"),
        (f"h = Conv(x, w, c) y = {NORM}(h, s, b, m, z)", "is not finite"),
        (
            f"h = Concat<axis = 1>(x, x) k = {NORM}(h, s, b, m, v) y = Conv<pads = [1,1,0,0]>(k, u)",
            "padded border",
        ),
        (f"h = Concat<axis = 1>(x, x) k = {NORM}(h, s, b, m, v) y = Relu(k)", "Relu after it is no layer"),
        (f"q = Add(w, w) h = Conv(x, q, c) y = {NORM}(h, s, b, m, v)", "computed from constants, by Add"),
        (f"h = Conv(x, w, c) y = {NORM}(h, huge, b, m, v)", "leave the range"),
    ],
)
def test_refused(body, reason):
    refused(
        f"""g (float[n,1,4,4] x, float[2] e) => (float[n,2,a,a] y)
        <{CONV}, float[2] z = {{-1, 1}}, float[2] huge = {{3e38, 1}}, float[2,2,2,2] u =
        {{1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}}>
        {{ {body} }}""",
        reason,
        run=False,
    )


def test_training_mode_is_refused():
    refused(
        f"""g (float[n,1,4,4] x) => (float[n,2,4,4] y) <{CONV}>
        {{ h = Conv(x, w, c) y, mo, vo = BatchNormalization<training_mode = 1>(h, s, b, m, v) }}""",
        "training mode",
    )


def model_of(nodes, arrays, x_shape, dtype=np.float32, opset=17):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x_shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(array, dtype), name) for name, array in arrays.items()],
    )
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


@st.composite
def layers(draw):
    """A random Conv, ConvTranspose, Gemm or MatMul (+ Add) with a BatchNormalization after or before it."""
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    op_type = draw(st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]))
    after, bias, opset = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([9, 13, 17]))
    attributes = {}
    if op_type in ("Conv", "ConvTranspose"):
        rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
        kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
        pads = [draw(st.integers(0, k - 1)) if draw(st.booleans()) else 0 for k in 2 * kernel]
        attributes = {
            "group": groups,
            "pads": pads,
            "strides": [draw(st.integers(1, 2)) for _ in range(rank)],
        }
        shape = (channels, out // groups) if op_type == "ConvTranspose" else (out, channels // groups)
        shape, x_shape = (*shape, *kernel), [2, channels, *[5] * rank]
    else:
        channels, out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        shape, x_shape = (channels, out), [3, channels]
        if op_type == "Gemm":
            attributes = {
                "alpha": 0.5,
                "beta": 1.5,
                "transA": draw(st.integers(0, 1)),
                "transB": draw(st.integers(0, 1)),
            }
            shape = shape[::-1] if attributes["transB"] else shape
            bias = True if opset < 11 else bias
        if attributes.get("transA") and after:
            x_shape = x_shape[::-1]
        elif attributes.get("transA"):
            attributes["transA"] = 0
    size = out if after else channels
    arrays = {"w": random.normal(size=shape), "c": random.normal(size=out)}
    arrays |= {name: random.normal(size=size) for name in ("s", "b", "m")}
    arrays["v"] = random.uniform(0.1, 4, size)
    if op_type == "MatMul":
        nodes = [helper.make_node("MatMul", ["i", "w"], ["o"])]
        nodes += [helper.make_node("Add", ["o", "c"], ["p"])] if bias else []
        last = "p" if bias else "o"
    else:
        nodes, last = (
            [helper.make_node(op_type, ["i", "w", *(["c"] if bias else [])], ["o"], **attributes)],
            "o",
        )
    norm = helper.make_node("BatchNormalization", [last if after else "x", *"sbmv"], ["y" if after else "i"])
    nodes = [*nodes, norm] if after else [norm, *nodes]
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "x" if after and name == "i" else "y" if not after and name == last else name
    return model_of(nodes, arrays, x_shape, opset=opset)


@QUICK
@given(layers())
def test_random_layers_compute_the_same(graph):
    result = graph.copy()
    outcome = FuseBatchnorm().run(result)
    assert len(result.nodes) <= len(graph.nodes)
    assert bool(outcome.changes) != bool(outcome.refusals)
    if outcome.changes:
        assert not any(node.op_type == "BatchNormalization" for node in result.nodes)
        assert_equal_outputs(graph, result, relative=2e-5)


def test_float16_variances_of_ten_million():
    """The statistics fit float16 no more once squared, but the folded weight does."""
    random = np.random.default_rng(0)
    arrays = {"w": random.normal(size=(4, 3, 3, 3)) * 100, "s": np.full(4, 50.0), "b": np.ones(4)}
    arrays |= {"m": np.full(4, 6e4), "v": np.full(4, 6e4)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", *"sbmv"], ["y"]),
    ]
    graph = model_of(nodes, arrays, [1, 3, 5, 5], np.float16)
    outcome = FuseBatchnorm().run(graph)
    assert outcome.changes
    scale = 50 / np.sqrt(np.float64(np.float16(6e4)) + 1e-5)
    expected = np.asarray(arrays["w"], np.float16).astype(np.float64) * scale
    np.testing.assert_allclose(graph.constant("w"), expected, rtol=1e-3, atol=1e-7)


def test_float16_weights_that_would_overflow_or_vanish_are_refused():
    for scale, reason in ((6e4, "leave the range"), (1e-7, "lose precision")):
        arrays = {"w": np.full((1, 1, 1), 2.1), "s": [scale], "b": [0], "m": [0], "v": [1]}
        nodes = [
            helper.make_node("Conv", ["x", "w"], ["h"]),
            helper.make_node("BatchNormalization", ["h", *"sbmv"], ["y"], epsilon=0.0),
        ]
        graph = model_of(nodes, arrays, [1, 1, 5], np.float16)
        outcome = FuseBatchnorm().apply(graph, Context())
        assert reason in outcome.refusals[0].reason


def test_a_weight_stored_narrower_than_used_is_refused():
    arrays = {"s": [2], "b": [0], "m": [0], "v": [1]}
    nodes = [
        helper.make_node("Cast", ["w"], ["k"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "k"], ["h"]),
        helper.make_node("BatchNormalization", ["h", *"sbmv"], ["y"]),
    ]
    model = model_of(nodes, {**arrays, "w": [[[0]]]}, [1, 1, 5])
    model.set_constant("w", np.ones((1, 1, 1), np.float16))
    outcome = FuseBatchnorm().apply(model, Context())
    assert "narrower type" in outcome.refusals[0].reason
