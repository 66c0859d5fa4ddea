"""fuse-linear: taps of a kernel that meet padding alone are dropped, as text, at random and on a real model."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from passes_helper import assert_equal_outputs, assert_settled, check

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.passes.fuse_linear import FuseLinear
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.rewriting.kernel_axes import KernelAxis

QUICK = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
W3 = "float[1,1,3] w = {1, 2, 3}"


@pytest.mark.parametrize(
    ("size", "conv", "result"),
    [
        (1, "kernel_shape = [3], pads = [1, 1]", ("kernel_shape = [1], pads = [0, 0]", "2")),
        (1, "pads = [1, 1]", ("pads = [0, 0]", "2")),
        (2, "pads = [1, 1], strides = [2]", ("pads = [0, 0], strides = [2]", "2, 3")),
        (2, "pads = [2, 1]", ("pads = [2, 1]", "1, 2, 3")),
        (1, "dilations = [2], pads = [2, 3]", ("dilations = [2], pads = [0, 1]", "2")),
        (1, "dilations = [2], pads = [3, 2]", ("dilations = [2], pads = [1, 0]", "2")),
        (1, "pads = [2, 2]", ("pads = [2, 2]", "1, 2, 3")),
        (1, "pads = [3, 0], strides = [4]", ("pads = [1, 0], strides = [4]", "3")),
    ],
)
def test_along_one_axis(size, conv, result):
    options, taps = result
    check(
        FuseLinear(),
        f"g (float[n,1,{size}] x) => (float[n,1,a] y) <{W3}> {{ y = Conv<{conv}>(x, w) }}",
        f"g (float[n,1,{size}] x) => (float[n,1,a] y) <float[1,1,{len(taps.split(','))}] w = {{{taps}}}>"
        f" {{ y = Conv<{options}>(x, w) }}"
        if taps != "1, 2, 3"
        else None,
    )


def test_along_two_axes():
    outcome = check(
        FuseLinear(),
        """g (float[n,1,1,4] x) => (float[n,2,a,b] y) <float[2,1,3,3] w = {1,2,3,4,5,6,7,8,9,
        11,12,13,14,15,16,17,18,19}, float[2] c = {1, 2}> { y = Conv<pads = [1,1,1,1]>(x, w, c) }""",
        """g (float[n,1,1,4] x) => (float[n,2,a,b] y) <float[2,1,1,3] w = {4,5,6,14,15,16}, float[2] c = {1, 2}>
        { y = Conv<pads = [0,1,0,1]>(x, w, c) }""",
    )
    assert [(change.what, change.weights) for change in outcome.changes] == [
        ("dropped 6 of 9 taps that read padding alone", ("w",))
    ]


def test_along_the_axis_whose_size_is_known():
    check(
        FuseLinear(),
        """g (float[n,1,m,1] x) => (float[n,1,a,b] y) <float[1,1,3,3] w = {1,2,3,4,5,6,7,8,9}>
        { y = Conv<pads = [1,1,1,1]>(x, w) }""",
        """g (float[n,1,m,1] x) => (float[n,1,a,b] y) <float[1,1,3,1] w = {2,5,8}>
        { y = Conv<pads = [1,0,1,0]>(x, w) }""",
    )


@pytest.mark.parametrize(
    ("pads", "left"), [("0, 1", "0, 0"), ("0, 2", "0, 1"), ("1, 3", "1, 2"), ("2, 2", None), ("2, 1", None)]
)
def test_padding_that_no_window_reads_goes_where_the_ends_become_no_less_equal(pads, left):
    size = {"0, 1": 4, "0, 2": 5, "1, 3": 5, "2, 2": 5, "2, 1": 4}[pads]
    head = f"g (float[n,1,{size}] x) => (float[n,1,a] y) <float[1,1,2] w = {{1, 2}}>"
    check(
        FuseLinear(),
        f"{head} {{ y = Conv<pads = [{pads}], strides = [2]>(x, w) }}",
        left and f"{head} {{ y = Conv<pads = [{left}], strides = [2]>(x, w) }}",
    )


@pytest.mark.parametrize(
    ("dims", "weights", "lines"),
    [
        ("n,1,1", W3, "h = Conv<pads = [1,1]>(x, w) k = Conv<pads = [1,1]>(x, w) y = Add(h, k)"),
        ("n,1,m", W3, "y = Conv<pads = [1,1]>(x, w)"),
        ("n,1,1", W3, 'y = Conv<auto_pad = "SAME_UPPER">(x, w)'),
        ("n,1,1", "float[1,1,3] w = {inf, 2, 3}", "y = Conv<pads = [1,1]>(x, w)"),
        ("n,1,1", "float[1,1,3] w = {1, 2, nan}", "y = Conv<pads = [1,1]>(x, w)"),
        ("n,1,3", W3, 'y = Conv<auto_pad = "VALID">(x, w)'),
        ("n,1,1", "float[1,1,3] v = {1, 2, 3}", "w = Exp(v) y = Conv<pads = [1,1]>(x, w)"),
        (
            "n,1,1",
            "int8[1,1,3] v = {1, 2, 3}, float s = {2}",
            "w = DequantizeLinear(v, s) y = Conv<pads = [1,1]>(x, w)",
        ),
    ],
)
def test_convs_that_stay(dims, weights, lines):
    text = f"g (float[{dims}] x) => (float[n,1,a] y) <{weights}> {{ {lines} }}"
    check(FuseLinear(), text, None, run="inf" not in weights, dims={"m": 1})


def test_a_weight_that_is_an_output_stays():
    check(
        FuseLinear(),
        f"g (float[n,1,1] x) => (float[n,1,1] y, float[1,1,3] w) <{W3}> {{ y = Conv<pads = [1,1]>(x, w) }}",
        None,
        run=False,
    )


def test_a_weight_of_the_graph_around_stays():
    check(
        FuseLinear(),
        f"""g (float[n,1,1] x, bool c) => (float[n,1,1] y) <{W3}> {{
        h = Relu(x)
        y = If(c) <then_branch = t () => (float[n,1,1] a) {{ a = Conv<pads = [1,1]>(h, w) }},
                   else_branch = e () => (float[n,1,1] b) {{ b = Identity(h) }}> }}""",
        None,
    )


def test_a_declared_size_of_an_inner_value_is_not_believed():
    text = f"""g (float[n,1,m] x) => (float[n,1,a] y) <{W3}>
    {{ h = Relu(x) y = Conv<pads = [1,1]>(h, w) }}"""
    graph = Graph.parse('<ir_version: 8, opset_import: ["" : 17]>' + text)
    model = graph.to_model()
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 1, 1]))
    check(FuseLinear(), model, None, dims={"m": 3})


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("data_type", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_types_stay(data_type, opset):
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    graph = _model([("x", (2, 1, 1), data_type)], np.ones((1, 1, 3), dtype), {"pads": [1, 1]}, opset)
    result = graph.copy()
    FuseLinear().run(result)
    assert result.constant_type("w")[:2] == (data_type, (1, 1, 1))
    if data_type != TensorProto.DOUBLE:  # onnxruntime has no Conv of it
        assert_equal_outputs(graph, result)


def test_reads_agree_with_a_search():
    for taps, stride, dilation, before, after, length in itertools.product(
        range(1, 4), (1, 2, 4), (1, 3), range(3), range(3), range(1, 4)
    ):
        axis = KernelAxis(taps, stride, dilation, before, after)
        for tap in range(taps):
            places = [o * stride - before + tap * dilation for o in range(axis.count(length))]
            assert axis.is_read(tap, length) == any(0 <= place < length for place in places)


def _model(inputs, weight, attributes, opset=17):
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info(name, data_type, shape) for name, shape, data_type in inputs],
        [helper.make_tensor_value_info("y", inputs[0][2], None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


@st.composite
def convs(draw):
    """A Conv of one or two axes, some sizes so small that much of the kernel meets padding."""
    rank, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 5)) for _ in range(rank)]
    attributes = {
        "strides": [draw(st.integers(1, 4)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 3)) for _ in range(rank)],
        "pads": [draw(st.integers(0, 6)) for _ in range(2 * rank)],
        "group": group,
    }
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    pads = attributes["pads"]
    sizes = []
    for axis in range(rank):
        span = attributes["dilations"][axis] * (kernel[axis] - 1) + 1
        least = max(1, span - pads[axis] - pads[rank + axis])
        sizes.append(draw(st.integers(least, max(least, 6))))
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    weight = random.normal(size=(2 * group, 2, *kernel)).astype(np.float32)
    return _model([("x", (2, 2 * group, *sizes), TensorProto.FLOAT)], weight, attributes)


@QUICK
@given(convs())
def test_random_convs_compute_the_same(graph):
    result = graph.copy()
    FuseLinear().run(result)
    assert_settled(FuseLinear(), result)
    assert_equal_outputs(graph, result, relative=1e-6)


def test_random_convs_lose_taps_where_all_meet_padding():
    graph = _model(
        [("x", (1, 1, 1, 1), TensorProto.FLOAT)], np.ones((1, 1, 5, 5), np.float32), {"pads": [2] * 4}
    )
    outcome = FuseLinear().run(graph)
    assert [change.what for change in outcome.changes] == ["dropped 24 of 25 taps that read padding alone"]


def test_silero_loses_taps(zoo, zoo_feeds):
    name = "silero_vad_16k_sequence"
    original = Graph.load(zoo(name))
    result = original.copy()
    Simplify().run(result)
    convs = {node.name: node for node in result.nodes if node.op_type == "Conv"}
    taps = {key: result.constant_type(node.input[1])[1][2] for key, node in convs.items()}
    assert taps["/encoder.2/Conv"] == 2
    assert taps["/encoder.3/Conv"] == 1
    assert attribute(convs["/encoder.3/Conv"], "pads") == [0, 0]
    assert_equal_outputs(original, result, list(zoo_feeds(name, 3, 0)))
