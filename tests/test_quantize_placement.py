"""Where values are quantized: around layers, through what lies between them, and nowhere else."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.quantization.placement import fused_output, place
from onnxslim_lab.quantization.static_layers import why_not_static

VNNI = find_profile("onnxruntime-x86-vnni")
HEAD = '<ir_version: 8, opset_import: ["": 17]>'
WEIGHTS = "<float[4,4,1,1] w, float[4,4,1,1] v, float[4] b>"


def graph_of(body, *, shape="1,4,8,8", outputs="float[N,C,H,W] y", weights=WEIGHTS):
    model = onnx.parser.parse_model(f"{HEAD} g (float[{shape}] x) => ({outputs}) {weights} {{ {body} }}")
    random = np.random.default_rng(0)
    for value in model.graph.value_info:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(
            numpy_helper.from_array(np.float32(random.normal(size=sizes)), value.name)
        )
    del model.graph.value_info[:]
    return Graph.load(model)


def placed(graph, *, without=(), by_codes=True):
    layers = [
        layer
        for layer in find_layers(graph)[0]
        if not why_not_static(layer, VNNI) and layer.node.output[0] not in without
    ]
    return place(graph, layers, VNNI.operators, by_codes=by_codes)


def test_conv_is_quantized_on_both_sides_and_its_relu_vanishes():
    found = placed(graph_of("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)"))
    assert set(found.roots) == {"x", "r", "y"}
    assert found.made == {"r", "y"}


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Gemm(x, w, b)"])
def test_products_give_float(body):
    found = placed(graph_of(body, shape="3,4", outputs="float[3,4] y", weights="<float[4,4] w, float[4] b>"))
    assert set(found.roots) == {"x"}
    assert not found.made


@pytest.mark.parametrize("bounds", ["", "0.5", "-1.0"])
def test_a_clip_vanishes_only_when_zero_is_within(bounds):
    low = f"lo = Constant<value_float = {bounds}>()" if bounds else ""
    name = "lo" if bounds else ""
    graph = graph_of(f"{low} hi = Constant<value_float = 6.0>() a = Conv(x, w) y = Clip(a, {name}, hi)")
    conv = next(node for node in graph.nodes if node.op_type == "Conv")
    assert fused_output(graph, conv) == ("a" if bounds == "0.5" else "y")


def test_relu_with_another_reader_does_not_vanish():
    graph = graph_of("a = Conv(x, w) r = Relu(a) c = Conv(r, v) y = Add(a, c)")
    found = placed(graph)
    assert "a" in found.roots
    assert found.roots["r"] == "a"
    assert [node.op_type for node in found.coded.values()] == ["Relu"]
    assert not placed(graph, by_codes=False).coded


def test_what_moves_values_shares_a_grid():
    found = placed(
        graph_of(
            "a = Conv(x, w) m = MaxPool<kernel_shape = [2, 2]>(a) t = Transpose<perm = [0,1,3,2]>(m) y = Conv(t, v)"
        )
    )
    assert {found.roots[value] for value in ("a", "m", "t")} == {"a"}


def test_an_elementwise_operator_between_layers_works_on_codes():
    found = placed(graph_of("a = Conv(x, w) c = Conv(a, v) s = Add(a, c) r = Relu(s) y = Conv(r, w)"))
    assert "r" in found.made
    assert "s" not in found.roots


def test_no_island_at_the_end():
    found = placed(graph_of("a = Conv(x, w) c = Conv(a, v) y = Add(a, c)"))
    assert "y" not in found.roots


def test_no_requantization_of_a_large_float_value():
    graph = graph_of("a = Conv(x, w) f = Tanh(a) s = Add(a, f) y = Conv(s, v)")
    found = placed(graph)
    assert "f" not in found.roots, "the float operand would be rounded for nothing"
    assert "s" in found.roots
    assert "s" not in found.made


def test_a_small_gate_is_quantized():
    body = "a = Conv(x, w) p = GlobalAveragePool(a) q = Conv(p, v) e = Erf(q) s = Mul(a, e) y = Conv(s, w)"
    found = placed(graph_of(body))
    assert {"p", "e", "s"} <= set(found.roots)
    assert "s" in found.made


@pytest.mark.parametrize("operator", ["Softmax", "Erf", "Tanh"])
def test_float_operators_are_not_surrounded(operator):
    found = placed(graph_of(f"a = Conv(x, w) e = {operator}(a) y = Identity(e)"))
    assert set(found.roots) == {"x", "a"}


def test_concat_inputs_take_its_grid_unless_read_elsewhere():
    body = "a = Conv(x, w) c = Conv(x, v) s = Concat<axis = 0>(a, c) y = Conv(s, w)"
    found = placed(graph_of(body))
    assert {found.roots[value] for value in ("a", "c", "s")} == {"s"}
    found = placed(graph_of(body.replace("y =", "u = Conv(a, v) z =") + " y = Concat<axis = 0>(u, z)"))
    assert found.roots["a"] == "a"
    assert found.roots["c"] == "s"


def test_a_final_concat_of_outputs_stays_float():
    found = placed(graph_of("a = Conv(x, w) c = Conv(x, v) e = Sigmoid(c) y = Concat<axis = 1>(a, e)"))
    assert set(found.roots) == {"x", "a", "c"}


def test_layers_left_float_take_nothing_with_them():
    body = "a = Conv(x, w) r = Relu(a) c = Conv(r, v) y = Conv(c, w)"
    found = placed(graph_of(body), without=("c",))
    assert set(found.roots) == {"x", "r", "c", "y"}
    assert "c" not in found.made, "a float Conv gives float"


def test_constants_between_layers_are_quantized():
    found = placed(
        graph_of(
            "a = Conv(x, w) s = Add(a, k) y = Conv(s, v)",
            weights="<float[4,4,1,1] w, float[4,4,1,1] v, float[4,1,1] k>",
        )
    )
    assert found.constants == ["k"]
    assert "k" not in found.roots


def test_hard_swish_is_a_gate_only_when_nothing_else_reads_its_input():
    body = "a = Conv(x, w) h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(a) m = Mul(a, h) y = Conv(m, v)"
    found = placed(graph_of(body))
    assert len(found.gates) == 1
    assert {"a", "h", "m"} <= found.made
    assert not placed(graph_of(body.replace("y = Conv(m, v)", "n = Conv(m, v) y = Add(n, a)"))).gates
    assert not placed(graph_of(body.replace("beta = 0.5", "beta = 0.25"))).gates


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("y = ConvTranspose(x, w)", "<float[4,4,1,1] w>", "no ConvTranspose"),
        ("y = MatMul(w, x)", "<float[8,8] w>", "left operand"),
        (
            "s = Constant<value_ints = [64, 4]>() r = Reshape(x, s) y = Gemm<alpha = 2.0>(r, w)",
            "<float[4,4] w>",
            "alpha",
        ),
        (
            "s = Constant<value_ints = [4, 64]>() r = Reshape(x, s) y = Gemm<transA = 1>(r, w)",
            "<float[4,4] w>",
            "transposed",
        ),
    ],
)
def test_layers_that_have_no_kernel_on_codes(body, weights, reason):
    graph = graph_of(body, weights=weights)
    (layer,) = find_layers(graph)[0]
    assert reason in why_not_static(layer, VNNI)
