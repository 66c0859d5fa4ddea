"""Layers: rows(x) times the matrix is the node's output, for every kind; what is no layer says why."""

import itertools
import time

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from passes_helper import load, runner

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.macs import model_macs, parameters

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def random_array(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def single(op_type, x, weight, others=(), slot=1, outputs=1, **attributes):
    """A model of one node with its weight at `slot`; x of None keeps the other input out."""
    names = ["x"]
    names.insert(slot, "w")
    initializers = [numpy_helper.from_array(weight, "w")]
    for i, other in enumerate(others):
        names.append(f"c{i}")
        initializers.append(numpy_helper.from_array(other, f"c{i}"))
    outs = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, outs, "node", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Graph.load(model)


def assert_product(graph, x):
    """The layer's rows times its matrix equal onnxruntime's output, and writing the matrix changes nothing."""
    (layer,), refusals = find_layers(graph)
    assert not refusals
    (result,) = runner().run(graph, [{"x": x}], optimization="off")
    y = result["y0"]
    rows, matrix = layer.rows(x), layer.matrix
    assert matrix.shape == layer.shape
    product = rows @ matrix.swapaxes(1, 2) * np.float32(layer.kind.scale)
    bias = layer.bias_rows(y.shape)
    product = product if bias is None else product + bias
    np.testing.assert_allclose(layer.output_rows(y), product, rtol=1e-4, atol=1e-4)
    stored = layer.weight_graph.constant(layer.weight)
    np.testing.assert_array_equal(layer.with_matrix(matrix), stored)
    assert layer.parameters == stored.size
    return layer


@st.composite
def convolutions(draw, transposed=False):
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = st.integers(1, 3)
    kernel = [draw(sizes) for _ in range(rank)]
    strides = [draw(sizes) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    attributes = {"strides": strides, "dilations": dilations, "group": groups}
    padding = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding.startswith("SAME"):  # onnxruntime pads dilated and strided kernels otherwise: keep them out
        attributes["dilations"] = [1] * rank
        strides[:] = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
    if padding == "NOTSET":
        attributes["pads"] = [
            draw(st.integers(0, (k - 1) * d)) for k, d in 2 * list(zip(kernel, dilations, strict=True))
        ]
    else:
        attributes["auto_pad"] = padding
    channels, out = groups * draw(sizes), groups * draw(sizes)
    if transposed and draw(st.booleans()) and padding == "NOTSET":
        attributes["output_padding"] = [draw(st.integers(0, max(s, 1) - 1)) for s in strides]
    seed = draw(st.integers(0, 1000))
    x = random_array(seed, draw(st.integers(1, 2)), channels, *(draw(st.integers(5, 7)) for _ in range(rank)))
    shape = (channels, out // groups, *kernel) if transposed else (out, channels // groups, *kernel)
    bias = (random_array(seed + 1, out),) if draw(st.booleans()) else ()
    return x, random_array(seed + 2, *shape), bias, attributes


@QUICK
@given(convolutions())
def test_conv(case):
    x, weight, bias, attributes = case
    assert_product(single("Conv", x, weight, bias, **attributes), x)


@QUICK
@given(convolutions(transposed=True))
def test_conv_transpose(case):
    x, weight, bias, attributes = case
    assert_product(single("ConvTranspose", x, weight, bias, **attributes), x)


def test_conv_transpose_with_output_shape():
    x, weight = random_array(0, 1, 2, 5, 5), random_array(1, 2, 3, 3, 3)
    assert_product(single("ConvTranspose", x, weight, output_shape=[9, 10], strides=[2, 2]), x)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize("bias", [(), (4,), (3, 1), (3, 4)])
def test_gemm(left, own, other, bias):
    a_shape, b_shape = (3, 5), (5, 4)
    weight_shape, x_shape = (a_shape, b_shape) if left else (b_shape, a_shape)
    weight = random_array(0, *weight_shape[:: -1 if own else 1])
    x = random_array(1, *x_shape[:: -1 if other else 1])
    trans = {"transA": own, "transB": other} if left else {"transA": other, "transB": own}
    others = (random_array(2, *bias),) if bias else ()
    graph = single("Gemm", x, weight, others, slot=0 if left else 1, alpha=0.5, beta=2.0, **trans)
    assert assert_product(graph, x).macs() == 3 * 4 * 5


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "left", "groups"),
    [
        ((3, 5), (5, 4), False, 1),
        ((2, 6, 3, 5), (5, 4), False, 1),
        ((2, 3, 5), (2, 5, 4), False, 2),
        ((3, 5), (2, 5, 4), False, 2),
        ((7, 2, 3, 5), (2, 5, 4), False, 2),
        ((1, 6, 3, 5), (2, 1, 5, 4), False, 2),
        ((6, 3, 5), (2, 6, 5, 4), False, 12),
        ((3, 5), (5,), False, 1),
        ((5,), (5, 4), False, 1),
        ((5,), (5,), False, 1),
        ((5, 4), (3, 5), True, 1),
        ((7, 5, 4), (3, 5), True, 1),
        ((7, 2, 5, 4), (2, 3, 5), True, 2),
        ((7, 5, 4), (5,), True, 1),
        ((5,), (2, 3, 5), True, 2),
    ],
)
def test_matmul(x_shape, weight_shape, left, groups):
    x = random_array(1, *x_shape)
    graph = single("MatMul", x, random_array(0, *weight_shape), slot=0 if left else 1)
    assert assert_product(graph, x).groups == groups


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("index_shape", [(), (4,), (2, 3)])
def test_gather(axis, index_shape):
    x = np.random.default_rng(0).integers(-3, 3, index_shape)
    layer = assert_product(single("Gather", x, random_array(1, 3, 4, 5), slot=0, axis=axis), x)
    assert layer.shape[2] == (3, 4, 5)[axis]
    assert layer.macs() == 0


@pytest.mark.parametrize(
    ("equation", "x_shape", "weight_shape", "slot"),
    [
        ("bik,kj->bij", (2, 3, 5), (5, 4), 1),
        ("bshd,hde->bse", (2, 3, 4, 5), (4, 5, 6), 1),
        ("bsd,dhe->bhse", (2, 3, 4), (4, 5, 6), 1),
        ("gij,bgj->big", (3, 4, 5), (2, 3, 5), 1),
        ("oi,bi->bo", (3, 5), (4, 5), 0),
        ("ij,jk", (3, 5), (5, 4), 1),
    ],
)
def test_einsum(equation, x_shape, weight_shape, slot):
    x = random_array(1, *x_shape)
    assert_product(single("Einsum", x, random_array(0, *weight_shape), slot=slot, equation=equation), x)


@pytest.mark.parametrize("equation", ["ii,ij->ij", "ij,kl->il", "...j,jk->...k"])
def test_einsum_that_is_no_product_is_refused(equation):
    x = random_array(1, 3, 3)
    graph = single("Einsum", x, random_array(0, 3, 3), equation=equation)
    layers, refusals = find_layers(graph)
    assert not layers
    assert "is not a matrix product" in refusals[0].reason


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrent_rows_of_both_weights(direction):
    directions, hidden = 1 + (direction != "forward"), 3
    x, start = random_array(0, 1, 2, 4), random_array(1, directions, 2, hidden)
    w, r = random_array(2, directions, hidden, 4), random_array(3, directions, hidden, hidden)
    b = random_array(4, directions, 2 * hidden)
    graph = single("RNN", x, w, (r, b), hidden_size=hidden, direction=direction)
    node = graph.nodes[0]
    graph.set_constant("h", start)
    graph.set_inputs(node, [*node.input, "", "h"])
    (w_layer, r_layer), _ = find_layers(graph)
    assert (w_layer.role, r_layer.role, w_layer.groups) == ("W", "R", directions)
    (result,) = runner().run(graph, [{"x": x}], optimization="off")
    gates = w_layer.rows(x) @ w_layer.matrix.swapaxes(1, 2) + w_layer.bias_rows(())
    gates = gates + r_layer.rows(start[None]) @ r_layer.matrix.swapaxes(1, 2) + r_layer.bias_rows(())
    np.testing.assert_allclose(r_layer.output_rows(result["y0"]), np.tanh(gates), rtol=1e-5, atol=1e-6)
    assert w_layer.macs() == 2 * w.size


CHAIN = """
g (float[n,3] x) => (float[n,a,b] y)
<float16[2,6] w = {1,2,3,4,5,6,7,8,9,10,11,12}, int64[3] s = {0,-1,3}, int64[1] axes = {0}>
{
  i = Identity(w)
  c = Cast<to = 1>(i)
  r = Reshape(c, s)
  t = Transpose<perm = [2, 0, 1]>(r)
  u = Unsqueeze(t, axes)
  q = Squeeze(u, axes)
  f = Flatten<axis = 1>(q)
  y = MatMul(x, f)
}
"""


def test_weight_behind_views_is_read_and_written():
    graph = load(CHAIN)
    (layer,), _ = find_layers(graph)
    stored = graph.constant("w")
    assert layer.weight == "w"
    assert layer.matrix.dtype == np.float16
    expected = stored.astype(np.float32).reshape(2, 2, 3).transpose(2, 0, 1).reshape(3, 4)
    np.testing.assert_array_equal(layer.matrix[0].T, expected)
    layer.set(layer.with_matrix(layer.matrix * 2))
    np.testing.assert_array_equal(graph.constant("w"), stored * 2)
    assert graph.constant("w").dtype == np.float16


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("q = DequantizeLinear(i8, s) y = MatMul(x, q)", "already quantized: it comes out of Dequantize"),
        ("q = Cast<to = 1>(i8) y = MatMul(x, q)", "stored as int8"),
        ("q = Mul(w, w) y = MatMul(x, q)", "computed from constants, by Mul"),
        (
            "h = Cast<to = 10>(w) q = Cast<to = 1>(h) y = MatMul(x, q)",
            "rounded by a Cast from float to float16",
        ),
        ("q = ConstantOfShape(two) y = MatMul(x, q)", "ConstantOfShape"),
        ("y = MatMul(x, v)", "callers may override"),
        ("y = Conv(x, x)", "not constant: 'x' is an input of the graph"),
    ],
)
def test_what_is_no_layer_says_why(lines, reason):
    graph = load(f"""
    g (float[3,3] x, float[3,3] v) => (float[a,b] y)
    <float[3,3] w = {{1,2,3,4,5,6,7,8,9}}, float[3,3] v = {{1,2,3,4,5,6,7,8,9}}, float s = {{0.5}},
     int8[3,3] i8 = {{1,2,3,4,5,6,7,8,9}}, int64[2] two = {{3,3}}>
    {{ {lines} }}
    """)
    layers, refusals = find_layers(graph)
    assert not layers
    assert reason in refusals[0].reason


def test_products_without_a_weight_are_not_mentioned():
    graph = load("g (float[3,3] x) => (float[3,3] y) <float[2,2] w = {1,2,3,4}, int64[1] i = {0}> {"
                 " a = MatMul(x, x) k = MatMul(w, w) z = Gather(w, i) y = Gemm(a, x) }")  # fmt: skip
    assert find_layers(graph) == ([], [])


def test_an_exposed_weight_is_refused():
    graph = load("""g (float[2,2] x) => (float[2,2] y, float[2,2] t) <float[2,2] w = {1,2,3,4}> {
        t = Transpose(w) y = MatMul(x, w) }""")
    assert "also an output" in find_layers(graph)[1][0].reason


SHARED = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[2,2] x, bool c) => (float[2,2] y)
<float[2,2] w = {1,2,3,4}>
{
  t = Transpose(w)
  a = MatMul(x, t)
  b = If(c) <then_branch = g1 () => (float[2,2] p) { p = Gemm(a, w) },
             else_branch = g2 () => (float[2,2] q) { q = Mul(a, w) }>
  y = local.f(b)
}
<domain: "local", opset_import: ["" : 17]>
f (x) => (y) { k = Constant<value = float[2,2] {1,0,0,1}>() y = MatMul(x, k) }
"""


def test_bodies_functions_and_sharers():
    graph = load(SHARED)
    found = [layer for inner in graph.walk() for layer in find_layers(inner)[0]]
    assert [layer.op_type for layer in found] == ["MatMul", "Gemm", "MatMul"]
    assert [layer.weight for layer in found] == ["w", "w", "k"]
    assert found[1].weight_graph is graph
    assert found[1].graph.parent is graph
    assert [sorted(node.op_type for node in layer.sharers) for layer in found] == [
        ["Gemm", "Mul"],
        ["MatMul", "Mul"],
        [],
    ]
    found[2].set(found[2].with_matrix(np.ones((1, 2, 2))))
    assert found[2].graph.constant("k").sum() == 4
    onnx.checker.check_model(graph.to_model())


def test_macs_and_parameters_of_a_model():
    graph = load("""g (float[n,3,h,h] x) => (float[n,a] y)
    <float[4,3,3,3] w, float[4] b = {0,0,0,0}, float[400,10] v, int64[2] s = {0,-1}> {
      w = ConstantOfShape(s) y = Identity(x) }""".replace("w = ConstantOfShape(s) y = Identity(x)", """
      c = Conv<pads = [1,1,1,1]>(x, w, b) r = Flatten(c) y = MatMul(r, v)""").replace(
        "float[4,3,3,3] w,", "float[4,3,3,3] w = {" + ",".join("1" * 108) + "},").replace(
        "float[400,10] v,", "float[400,10] v = {" + ",".join("1" * 4000) + "},"))  # fmt: skip
    counted = model_macs(graph, {"h": 10}, default=2)
    assert counted.assumed == {"n": 2, "h": 10}
    assert counted.total == 2 * 100 * 108 + 2 * 4000
    assert counted.unknown == 0
    assert parameters(graph) == 108 + 4 + 4000


def test_a_long_chain_takes_milliseconds():
    names = [f"v{i}" for i in range(1001)]
    nodes = [helper.make_node("MatMul", [a, f"w{a}"], [b]) for a, b in itertools.pairwise(names)]
    weights = [numpy_helper.from_array(np.eye(2, dtype=np.float32), f"w{a}") for a in names[:-1]]
    ends = [helper.make_tensor_value_info(n, 1, [2, 2]) for n in (names[0], names[-1])]
    graph = Graph.load(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)))
    start = time.perf_counter()
    layers, _ = find_layers(graph)
    assert len(layers) == 1000
    assert time.perf_counter() - start < 1
