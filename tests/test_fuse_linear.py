"""fuse-linear: before and after as text, random chains by execution, and what is refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from passes_helper import assert_equal_outputs, check

from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.fuse_linear import FuseLinear

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
W = "float[2,1,1,1] w = {1, 2}, float[2] c = {10, 20}"


def conv(lines, extra, weights, result="y = Conv(x, w, c)"):
    """Check lines around a Conv of one channel to two against a Conv with the given weight and bias."""
    check(
        FuseLinear(),
        f"g (float[n,1,4,4] x) => (float[n,2,4,4] y) <{W}, {extra}> {{ {lines} }}",
        f"g (float[n,1,4,4] x) => (float[n,2,4,4] y) <{weights}> {{ {result} }}",
    )


@pytest.mark.parametrize(
    ("node", "constant", "weight", "bias"),
    [
        ("Mul(h, k)", "float k = {3}", "3, 6", "30, 60"),
        ("Mul(k, h)", "float[2,1,1] k = {3, -1}", "3, -2", "30, -20"),
        ("Div(h, k)", "float[1,2,1,1] k = {2, 4}", "0.5, 0.5", "5, 5"),
        ("Add(h, k)", "float[2,1,1] k = {3, 4}", "1, 2", "13, 24"),
        ("Sub(h, k)", "float[2,1,1] k = {3, 4}", "1, 2", "7, 16"),
        ("Sub(k, h)", "float[2,1,1] k = {3, 4}", "-1, -2", "-7, -16"),
        ("Neg(h)", "float k = {0}", "-1, -2", "-10, -20"),
    ],
)
def test_after_a_conv(node, constant, weight, bias):
    unused = ", float k = {0}" if node == "Neg(h)" else ""
    conv(
        f"h = Conv(x, w, c) y = {node}",
        constant,
        f"float[2,1,1,1] w = {{{weight}}}, float[2] c = {{{bias}}}{unused}",
    )


@pytest.mark.parametrize(
    ("node", "constant", "weight", "bias"),
    [
        ("Mul(x, k)", "float k = {3}", "3, 6", "10, 20"),
        ("Div(x, k)", "float[1,1,1,1] k = {2}", "0.5, 1", "10, 20"),
        ("Sub(x, k)", "float k = {3}", "1, 2", "7, 14"),
        ("Sub(k, x)", "float k = {3}", "-1, -2", "13, 26"),
    ],
)
def test_before_a_conv(node, constant, weight, bias):
    conv(
        f"h = {node} y = Conv(h, w, c)",
        constant,
        f"float[2,1,1,1] w = {{{weight}}}, float[2] c = {{{bias}}}",
    )


def test_normalization_of_images_before_a_conv():
    conv(
        "a = Sub(x, k) d = Div(a, q) y = Conv(d, w, c)",
        "float[1,1,1] k = {3}, float[1,1,1] q = {2}",
        "float[2,1,1,1] w = {0.5, 1}, float[2] c = {8.5, 17}",
    )


MATMUL = "float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1, 2}"


@pytest.mark.parametrize(
    ("lines", "constants", "result"),
    [
        ("h = MatMul(x, w) y = Add(h, b)", MATMUL, "y = Gemm(x, w, b)"),
        ("h = MatMul(x, w) y = Add(b, h)", MATMUL, "y = Gemm(x, w, b)"),
        ("h = Gemm<alpha = 0.5>(x, w) y = Sum(h, b)", MATMUL, "y = Gemm<alpha = 0.5>(x, w, b)"),
    ],
)
def test_product_and_sum_become_gemm(lines, constants, result):
    check(
        FuseLinear(),
        f"g (float[n,3] x) => (float[n,2] y) <{constants}> {{ {lines} }}",
        f"g (float[n,3] x) => (float[n,2] y) <{constants}> {{ {result} }}",
    )


def test_a_computed_addend_of_the_same_shape():
    check(
        FuseLinear(),
        f"g (float[n,3] x, float[n,2] z) => (float[n,2] y) <{MATMUL}> {{ h = MatMul(x, w) k = Relu(z) y = Add(k, h) o = Add(b, b) }}",
        f"g (float[n,3] x, float[n,2] z) => (float[n,2] y) <{MATMUL}> {{ k = Relu(z) y = Gemm(x, w, k) o = Add(b, b) }}",
    )


@pytest.mark.parametrize(
    "head",
    [
        "g (float[2,n,3] x, float[2] z) => (float[2,n,2] y)",  # Gemm is 2-D only
        "g (float[n,3] x, float[n,2] z) => (float[n,2] y, float[n,2] h)",  # the product is an output
        "g (float[1,3] x, float[n,2] z) => (float[n,2] y)",  # the sum is larger than the product
        "g (float[n,3] x, float[m,2] z) => (float[a,2] y)",  # m may be n, or 1, or not
    ],
)
def test_sums_that_are_no_gemm(head):
    check(FuseLinear(), f"{head} <{MATMUL}> {{ h = MatMul(x, w) y = Add(h, z) o = Add(b, b) }}", None,
          dims={"n": 2, "m": 1})  # fmt: skip


def test_integer_products_stay():
    check(FuseLinear(), "g (int32[n,2] x) => (int32[n,2] y) <int32[2,2] w = {1,2,3,4}, int32[2] b = {1,2}>"
          " { h = MatMul(x, w) y = Add(h, b) }", None)  # fmt: skip


def test_affine_around_a_gemm():
    check(
        FuseLinear(),
        """g (float[n,3] x) => (float[n,2] y) <float[2,3] w = {1,2,3,4,5,6}, float[2] c = {1, 2}, float[2] k = {2, 3},
        float[3] q = {1, 2, 4}> { a = Mul(x, q) h = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(a, w, c) y = Mul(h, k) }""",
        """g (float[n,3] x) => (float[n,2] y) <float[2,3] w = {2, 8, 24, 12, 30, 72}, float[2] c = {4, 12}>
        { y = Gemm<alpha = 0.5, transB = 1>(x, w, c) }""",
    )


def test_affine_around_a_batched_matmul():
    check(
        FuseLinear(),
        """g (float[n,2,3] x) => (float[n,2,2] y) <float[3,2] w = {1,2,3,4,5,6}, float[2] k = {2, 3}, float[2] b = {1, 1}>
        { h = MatMul(x, w) a = Add(h, b) y = Mul(a, k) }""",
        """g (float[n,2,3] x) => (float[n,2,2] y) <float[3,2] w = {2,6,6,12,10,18}, float[2] b = {2, 3}>
        { h = MatMul(x, w) y = Add(h, b) }""",
    )


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("h = Conv(x, w, c) k = Mul(h, t) y = Add(h, k)", "other readers"),
        ("h = Conv(x, w, c) k = Conv(x, w) m = Mul(h, t) y = Add(m, k)", "used by other nodes too"),
        ("a = Add(x, t) y = Conv<pads = [1,1,0,0], kernel_shape = [1,1]>(a, w, c)", "padded border"),
        ("h = Conv(x, w, c) y = Mul(h, row)", "does not scale or shift output channels"),
        ("h = Conv(x, w) y = Add(h, t)", "more bytes than it saves"),
        ("h = ConvTranspose(x, u) y = Mul(h, huge)", "leave the range"),
    ],
)
def test_refused(lines, reason):
    wide = ", ".join(["1"] * 128)
    text = f"""g (float[n,1,4,4] x) => (float[n,a,b,d] y) <float[128,1,1,1] w = {{{wide}}}, float[128] c = {{{wide}}},
    float t = {{3}}, float[4] row = {{1, 2, 3, 4}}, float[1,2,1,1] u = {{4, 2}}, float huge = {{3e38}}> {{ {lines} }}"""
    outcome = check(FuseLinear(), text, None, run=False)
    assert any(reason in refusal.reason for refusal in outcome.refusals), outcome.refusals


@pytest.mark.parametrize("node", ["Div(h, z)", "Mul(h, nan)", "Div(z, h)"])
def test_zero_divisors_and_nan_stay(node):
    check(FuseLinear(), f"""g (float[n,1,4,4] x) => (float[n,2,4,4] y)
    <{W}, float z = {{0}}, float[1] nan = {{nan}}> {{ h = Conv(x, w, c) y = {node} }}""", None, run=False)  # fmt: skip


def test_a_shift_that_enlarges_the_result_stays():
    check(FuseLinear(), f"""g (float[n,1,4,4] x) => (float[3,n,2,4,4] y) <{W}, float[3,1,1,1,1] k = {{1, 2, 3}}>
    {{ h = Conv(x, w, c) y = Mul(h, k) }}""", None)  # fmt: skip


def test_a_scale_that_makes_the_channels_stays():
    check(FuseLinear(), """g (float[n,1,4,4] x) => (float[n,1,4,4] y) <float[1,2,1,1] w = {1, 2}, float[2,1,1] k = {3, 4}>
    { h = Mul(x, k) y = Conv(h, w) }""", None)  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "result", "constant"),
    [
        ("a = Mul(x, p) y = Mul(a, q)", "y = Mul(x, k)", "3, 8"),
        ("a = Div(x, p) y = Mul(q, a)", "y = Mul(x, k)", "3, 2"),
        ("a = Add(x, p) y = Sub(a, q)", "y = Add(x, k)", "-2, -2"),
        ("a = Neg(x) y = Mul(a, q)", "y = Mul(x, k)", "-3, -4"),
    ],
)
def test_two_in_a_row_become_one(lines, result, constant):
    unused = "" if "p)" in lines else ", float[2] p = {1, 2}"
    check(
        FuseLinear(),
        f"g (float[n,2] x) => (float[n,2] y) <float[2] p = {{1, 2}}, float[2] q = {{3, 4}}> {{ {lines} }}",
        f"g (float[n,2] x) => (float[n,2] y) <float[2] k = {{{constant}}}{unused}> {{ {result} }}",
    )


def test_constants_whose_product_is_larger_stay():
    check(FuseLinear(), """g (float[n,2,2] x) => (float[n,2,2] y) <float[64,1] p = {%s}, float[1,64] q = {%s}>
    { a = Mul(x, p) y = Mul(a, q) }""".replace("2,2", "64,64") % (", ".join(["2"] * 64), ", ".join(["3"] * 64)),
          None, run=False)  # fmt: skip


def test_scale_and_shift_go_into_batchnorm():
    check(
        FuseLinear(),
        """g (float[n,2,4] x) => (float[n,2,4] y) <float[2] s = {2, 3}, float[2] b = {1, -1}, float[2] m = {0.5, 4},
        float[2] v = {4, 9}, float[2,1] k = {2, 4}, float[2,1] t = {1, 1}>
        { h = BatchNormalization<epsilon = 0.0>(x, s, b, m, v) a = Mul(h, k) y = Add(a, t) }""",
        """g (float[n,2,4] x) => (float[n,2,4] y) <float[2] s = {4, 12}, float[2] b = {3, -3}, float[2] m = {0.5, 4},
        float[2] v = {4, 9}> { y = BatchNormalization<epsilon = 0.0>(x, s, b, m, v) }""",
    )


def test_scale_and_shift_before_batchnorm_go_into_it():
    check(
        FuseLinear(),
        """g (float[n,2,4] x) => (float[n,2,4] y) <float[2] s = {2, 3}, float[2] b = {1, -1}, float[2] m = {0.5, 4},
        float[2] v = {4, 9}, float[2,1] k = {2, 4}, float[2,1] t = {1, 1}>
        { h = Mul(x, k) a = Add(h, t) y = BatchNormalization<epsilon = 0.0>(a, s, b, m, v) }""",
        """g (float[n,2,4] x) => (float[n,2,4] y) <float[2] s = {4, 12}, float[2] b = {2.5, 12}, float[2] m = {0.5, 4},
        float[2] v = {4, 9}> { y = BatchNormalization<epsilon = 0.0>(x, s, b, m, v) }""",
    )  # 1 * (2 x + 1 - 0.5) + 1 = 2 (x - 0.5) + 2.5;  1 * (4 x + 1 - 4) - 1 = 4 (x - 4) + 12


@pytest.mark.parametrize(
    ("lines", "result"),
    [
        ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", "y = Gemm<transB = 1>(x, w)"),
        ("t = Transpose<perm = [1, 0]>(x) h = MatMul(v, t) y = Transpose<perm = [1, 0]>(h)", "y = Gemm<transB = 1>(x, v)"),
        ("h = Gemm(x, v) k = Gemm<transA = 1>(h, h) y = Transpose<perm = [1, 0]>(k)", "h = Gemm(x, v) y = Gemm<transA = 1>(h, h)"),
    ],
)  # fmt: skip
def test_transposes_go_into_gemm(lines, result):
    v = "float[2,3] w = {1,2,3,4,5,6}" if "(w)" in lines else "float[3,3] v = {1,2,3,4,5,6,7,8,9}"
    head = f"g (float[n,3] x) => (float[a,b] y) <{v}>"
    check(FuseLinear(), f"{head} {{ {lines} }}", f"{head} {{ {result} }}")


@pytest.mark.parametrize(
    ("reader", "result"),
    [
        ("y = Conv(p, w)", "y = Conv<pads = [1,2,0,1]>(x, w)"),
        ("y = Conv<pads = [1,0,1,1]>(p, w)", "y = Conv<pads = [2,2,1,2]>(x, w)"),
        ('y = Conv<auto_pad = "VALID">(p, w)', "y = Conv<pads = [1,2,0,1]>(x, w)"),
        ("y = AveragePool<kernel_shape = [3,3]>(p)", "y = AveragePool<count_include_pad = 1, kernel_shape = [3,3], pads = [1,2,0,1]>(x)"),
        ("a = Conv(p, w) b = Conv(p, w) y = Add(a, b)", "a = Conv<pads = [1,2,0,1]>(x, w) b = Conv<pads = [1,2,0,1]>(x, w) y = Add(a, b)"),
    ],
)  # fmt: skip
def test_pad_goes_into_pads(reader, result):
    head = "g (float[n,1,6,6] x) => (float[n,a,b,d] y) <float[1,1,2,2] w = {1, 2, 3, 4}"
    used = "w" in reader.replace("kernel_shape", "")
    head = head if used else head + ", float o = {1}"
    check(
        FuseLinear(),
        f"{head}, int64[8] q = {{0,0,1,2,0,0,0,1}}> {{ p = Pad(x, q) {reader} }}",
        f"{head}> {{ {result} }}",
    )


def test_pad_by_axes_and_lowest_value_before_maxpool():
    check(
        FuseLinear(),
        """<ir_version: 9, opset_import: ["" : 18]> g (float[n,1,6,6] x) => (float[n,1,a,b] y)
        <int64[2] q = {1, 1}, float z = {-inf}, int64[1] axes = {-1}>
        { p = Pad(x, q, z, axes) y = MaxPool<kernel_shape = [2,2]>(p) }""",
        """<ir_version: 9, opset_import: ["" : 18]> g (float[n,1,6,6] x) => (float[n,1,a,b] y)
        { y = MaxPool<kernel_shape = [2,2], pads = [0,1,0,1]>(x) }""",
    )


def test_zeros_before_maxpool_only_after_relu():
    text = """g (float[n,1,6,6] x) => (float[n,1,a,b] y) <int64[8] q = {0,0,1,1,0,0,1,1}> {
    r = %s(x) p = Pad(r, q) y = MaxPool<kernel_shape = [3,3], strides = [2,2]>(p) }"""
    result = """g (float[n,1,6,6] x) => (float[n,1,a,b] y) {
    r = Relu(x) y = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1], strides = [2,2]>(r) }"""
    check(FuseLinear(), text % "Relu", result)
    check(FuseLinear(), text % "Neg", None)


@pytest.mark.parametrize(
    "lines",
    [
        "p = Pad(x, q, one) y = Conv(p, w)",
        'p = Pad<mode = "reflect">(x, q) y = Conv(p, w)',
        "p = Pad(x, q) h = Conv(p, w) s = ReduceSum<keepdims = 1>(p) y = Add(h, s)",
        "p = Pad(x, channel) y = MaxPool<kernel_shape = [1,1]>(p)",
        "p = Pad(x, cut) y = Conv(p, w)",
        'p = Pad(x, q) y = Conv<auto_pad = "SAME_UPPER">(p, w)',
        "p = Pad(x, q) y = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(p)",
        "p = Pad(x, q) y = AveragePool<kernel_shape = [1,1]>(p)",
        "p = Pad(x, q) y = AveragePool<kernel_shape = [3,3], ceil_mode = 1>(p)",
    ],
)
def test_pads_that_stay(lines):
    check(FuseLinear(), f"""g (float[n,1,6,6] x) => (float[n,a,b,d] y) <float[1,1,2,2] w = {{1, 2, 3, 4}},
    int64[8] q = {{0,0,1,1,0,0,1,1}}, int64[8] channel = {{0,1,0,0,0,1,0,0}}, int64[8] cut = {{0,0,-1,0,0,0,0,0}},
    float one = {{1}}> {{ {lines} }}""", None)  # fmt: skip


def test_a_scalar_goes_back_through_linear_nodes():
    heads = "int64[4] h = {0, 0, 2, 1}, float[2] q = {1, 2}, float[2,2] v = {1, 2, 3, 4}"
    lines = """a = MatMul(x, w) b = Add(a, c) d = Reshape(b, h) e = Transpose<perm = [0, 2, 1, 3]>(d) f = MatMul(x, v)
    g = Add(f, q) i = Reshape(g, h) k = Transpose<perm = [0, 2, 3, 1]>(i)"""
    check(
        FuseLinear(),
        f"""g (float[n,5,2] x) => (float[n,2,5,5] y) <float[2,2] w = {{1, 2, 3, 4}}, float[2] c = {{2, 4}}, {heads},
        float s = {{2}}> {{ {lines} m = MatMul(e, k) y = Div(m, s) }}""",
        f"""g (float[n,5,2] x) => (float[n,2,5,5] y) <float[2,2] w = {{0.5, 1, 1.5, 2}}, float[2] c = {{1, 2}}, {heads}>
        {{ {lines} y = MatMul(e, k) }}""",
    )


@pytest.mark.parametrize(("number", "goes"), [("2", True), ("-2", False)])
def test_only_a_positive_scalar_passes_relu(number, goes):
    before = f"g (float[n,1,4,4] x) => (float[n,2,a,b] y) <{W}, float k = {{{number}}}>"
    check(
        FuseLinear(),
        f"{before} {{ h = Conv(x, w, c) r = Relu(h) p = MaxPool<kernel_shape = [2,2]>(r) y = Mul(p, k) }}",
        """g (float[n,1,4,4] x) => (float[n,2,a,b] y) <float[2,1,1,1] w = {2, 4}, float[2] c = {20, 40}>
        { h = Conv(x, w, c) r = Relu(h) y = MaxPool<kernel_shape = [2,2]>(r) }"""
        if goes
        else None,
    )


@pytest.mark.parametrize(
    "lines",
    [
        "h = Conv(x, w, c) r = Sigmoid(h) y = Mul(r, k)",  # not linear
        "h = Conv(x, w, c) r = Relu(h) m = Mul(r, k) y = Add(m, r)",  # another reader on the way
    ],
)
def test_a_scalar_that_cannot_go_back_stays(lines):
    check(
        FuseLinear(), f"g (float[n,1,4,4] x) => (float[n,2,4,4] y) <{W}, float k = {{2}}> {{ {lines} }}", None
    )


def test_a_scale_passes_the_shift_before_a_padded_conv():
    conv_of = "Conv<kernel_shape = [1,1], pads = [1,1,1,1]>"
    check(
        FuseLinear(),
        f"""g (float[n,1,4,4] x) => (float[n,2,6,6] y) <{W}, float[1] k = {{2}}, float[1] t = {{6}}>
        {{ r = Relu(x) m = Mul(r, k) a = Add(m, t) y = {conv_of}(a, w, c) }}""",
        f"""g (float[n,1,4,4] x) => (float[n,2,6,6] y) <float[2,1,1,1] w = {{2, 4}}, float[2] c = {{10, 20}},
        float[1] t = {{3}}> {{ r = Relu(x) a = Add(r, t) y = {conv_of}(a, w, c) }}""",
    )


@pytest.mark.parametrize(
    "lines",
    [
        "s = Add(x, k) y = Conv<pads : ints = @p>(s, w, c)",
        "s = Mul(x, k) y = Conv<pads : ints = @p>(s, w, c)",
        "s = Pad(x, q) y = Conv<pads : ints = @p>(s, w, c)",
    ],
)
def test_attributes_of_a_functions_caller_are_not_known(lines):
    names = {
        "k": "float {2}",
        "w": "float[2,1,1,1] {1, 2}",
        "c": "float[2] {1, 2}",
        "q": "int64[8] {0,0,1,1,0,0,1,1}",
    }
    constants = " ".join(f"{n} = Constant<value = {v}>()" for n, v in names.items() if f" {n}" in lines)
    check(FuseLinear(), f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[n,1,4,4] x) => (float[n,2,a,b] y) {{ y = local.f<p = [1,1,1,1]>(x) }}
    <domain: "local", opset_import: ["" : 17]>
    f <p>(x) => (y) {{ {constants} {lines} }}""", None)  # fmt: skip


@st.composite
def chains(draw):
    """Elementwise constants in any order around one layer, some per channel, some scalar."""
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul3", "none"]))
    channels, out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    spatial = 2 if kind.startswith("Conv") else 0
    shapes = {"Conv": (out, channels, 2, 2), "ConvTranspose": (channels, out, 2, 2)}
    arrays = {"w": random.normal(size=shapes.get(kind, (channels, out)))}
    attributes = {"pads": [draw(st.integers(0, 1))] * 4} if spatial else {}
    nodes, value = [], "x"

    def elementwise(count, width):
        nonlocal value
        for _ in range(count):
            name, result = f"k{len(nodes)}", f"v{len(nodes)}"
            shape = draw(st.sampled_from([(), (1,), (width, *[1] * spatial), (1, width, *[1] * spatial)]))
            shape = (width,) if kind == "MatMul3" and len(shape) == 2 else shape
            arrays[name] = random.uniform(0.5, 2, shape)
            operands = [value, name] if draw(st.booleans()) else [name, value]
            op_type = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
            operands = [value, name] if op_type == "Div" else operands
            nodes.append(helper.make_node(op_type, operands, [result]))
            value = result

    elementwise(draw(st.integers(0, 3)), channels)
    if kind != "none":
        bias = ["c"] if draw(st.booleans()) and kind in ("Conv", "ConvTranspose", "Gemm") else []
        arrays["c"] = random.normal(size=out)
        nodes.append(helper.make_node(kind.rstrip("3"), [value, "w", *bias], ["h"], **attributes))
        value = "h"
        elementwise(draw(st.integers(0, 3)), out)
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    x_shape = [2, channels, *[4] * spatial] if kind != "MatMul3" else [2, 3, channels]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, x_shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.float32(array), name) for name, array in arrays.items()],
    )
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@QUICK
@given(chains())
def test_random_chains_compute_the_same(graph):
    result = graph.copy()
    outcome = FuseLinear().run(result)
    assert len(result.nodes) + len(outcome.changes) <= len(graph.nodes) + sum(
        "untransposed" in change.what for change in outcome.changes
    )
    assert_equal_outputs(graph, result, relative=2e-5)
