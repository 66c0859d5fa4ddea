"""fuse-activation: spelt-out activations by text and by execution."""

import numpy as np
import pytest
from passes_helper import check

from onnxslim_lab.passes.fuse_activation import FuseActivation

SIX = "float t = {3}, float z = {0}, float s = {6}, float e = {8}, float d = {0.125}"
FEEDS = [{"x": np.linspace(-9, 9, 24, dtype=np.float32).reshape(4, 6)}]


def model(lines, constants="", version=17):
    head = f'<ir_version: 10, opset_import: ["" : {version}]> g (float[4,6] x) => (float[4,6] y)'
    return f"{head} {f'<{constants}>' if constants else ''} {{ {lines} }}"


def used(lines):
    """Return the constants of SIX that the lines read: others would stay unused in the model."""
    return ", ".join(part for part in SIX.split(", ") if f" {part.split()[1]}" in lines.replace("(", " "))


def fuses(lines, after, version=17, constants=None):
    known = used(lines) if constants is None else constants
    check(FuseActivation(), model(lines, known, version), model(after, "", version), feeds=FEEDS)


def stays(lines, version=17, constants=None):
    check(
        FuseActivation(),
        model(lines, used(lines) if constants is None else constants, version),
        None,
        feeds=FEEDS,
    )


@pytest.mark.parametrize(
    "lines",
    [
        "a = Add(x, t) c = Clip(a, z, e) y = Mul(c, d)",
        "a = Add(t, x) c = Clip(a, z, e) y = Mul(d, c)",
        "a = Add(x, t) c = Clip(a, z, e) y = Div(c, e)",
    ],
)
def test_hard_sigmoid(lines):
    fuses(lines, "y = HardSigmoid<alpha = 0.125, beta = 0.375>(x)")


def test_hard_sigmoid_without_a_shift():
    fuses("c = Clip(x, z, e) y = Div(c, e)", "y = HardSigmoid<alpha = 0.125, beta = 0.0>(x)")


@pytest.mark.parametrize(
    "lines",
    [
        "a = Add(x, t) c = Clip(a, z, s) m = Mul(x, c) y = Div(m, s)",
        "a = Add(x, t) c = Clip(a, z, s) h = Div(c, s) y = Mul(h, x)",
        "a = Add(x, t) c = Clip(a, z, s) m = Mul(c, x) y = Mul(m, r)",
    ],
)
def test_hard_swish(lines):
    fuses(
        lines,
        "y = HardSwish(x)",
        constants=used(lines) + (", float r = {0.16666667}" if " r)" in lines else ""),
    )


def test_hard_swish_before_opset_14():
    fuses(
        "a = Add(x, t) c = Clip(a, z, e) m = Mul(x, c) y = Div(m, e)",
        "h = HardSigmoid<alpha = 0.125, beta = 0.375>(x) y = Mul(x, h)",
        version=13,
    )


@pytest.mark.parametrize(
    "lines",
    [
        "a = Add(x, t) c = Clip(a, z, e) y = Div(c, s)",  # 8 / 6 is not 1
        "a = Add(x, t) c = Clip(a, t, s) y = Div(c, s)",  # does not begin at zero
        "a = Add(x, t) c = Clip(a, z, s) m = Mul(a, c) y = Div(m, s)",  # a times the gate of x
        "a = Add(x, t) c = Clip(a, z, s) h = Div(c, s) y = Mul(h, c)",  # the clipped value is read twice
        "h = HardSigmoid<alpha = 0.2>(x) y = Mul(x, h)",  # other constants than HardSwish
    ],
)
def test_near_misses_stay(lines):
    stays(lines)


def test_mish():
    fuses("s = Softplus(x) t = Tanh(s) y = Mul(x, t)", "y = Mish(x)", version=18, constants="")
    stays("s = Softplus(x) t = Tanh(s) y = Mul(x, t)", version=17, constants="")
    stays("s = Softplus(x) t = Tanh(s) y = Mul(s, t)", version=18, constants="")


ERF = "float q = {1.4142135}, float i = {0.70710677}, float o = {1}, float h = {0.5}"


@pytest.mark.parametrize(
    "lines",
    [
        "a = Div(x, q) e = Erf(a) p = Add(e, o) m = Mul(x, p) y = Mul(m, h)",
        "a = Mul(x, i) e = Erf(a) p = Add(o, e) m = Mul(p, h) y = Mul(x, m)",
        "a = Mul(x, i) e = Erf(a) p = Add(o, e) m = Mul(x, h) y = Mul(m, p)",
    ],
)
def test_gelu(lines):
    constants = ", ".join(
        part for part in ERF.split(", ") if f" {part.split()[1]})" in lines or f"({part.split()[1]}," in lines
    )
    fuses(lines, "y = Gelu(x)", version=20, constants=constants)
    stays(lines, version=19, constants=constants)


def test_gelu_tanh():
    fuses(
        """a = Pow(x, k) b = Mul(a, c) d = Add(x, b) e = Mul(d, r) t = Tanh(e) p = Add(t, o) m = Mul(x, p)
        y = Mul(m, h)""",
        'y = Gelu<approximate = "tanh">(x)',
        version=20,
        constants="float k = {3}, float c = {0.044715}, float r = {0.7978846}, float o = {1}, float h = {0.5}",
    )


def test_gelu_of_another_value_stays():
    lines = "a = Div(x, q) e = Erf(a) p = Add(e, o) m = Mul(a, p) y = Mul(m, h)"
    stays(lines, version=20, constants="float q = {1.4142135}, float o = {1}, float h = {0.5}")


def test_clips_in_a_row():
    check(
        FuseActivation(),
        model("r = Relu(x) y = Clip(r, , s)", "float s = {6}"),
        model("y = Clip(x, z, s)", "float s = {6}, float z = {0}"),
        feeds=FEEDS,
    )
    check(
        FuseActivation(),
        model("a = Clip(x, z, s) y = Clip(a, t, e)", used("( z, s, t, e")),
        model("y = Clip(x, t, s)", used("( t, s")),
        feeds=FEEDS,
    )
    stays("a = Clip(x, s, e) y = Clip(a, z, t)")  # bounds that exclude each other
    stays("a = Relu(x) b = Clip(a, z, s) y = Add(a, b)")


def test_clip_attributes_before_opset_11():
    check(
        FuseActivation(),
        model("r = Relu(x) y = Clip<max = 6.0>(r)", "", 10),
        model("y = Clip<max = 6.0, min = 0.0>(x)", "", 10),
        feeds=FEEDS,
    )
