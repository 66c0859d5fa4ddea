"""fuse-layernorm: the spelt-out form by text and by execution."""

import pytest
from passes_helper import check

from onnxslim_lab.passes.fuse_layernorm import FuseLayernorm

VECTORS = "float[3] s = {1, 2, 3}, float[3] b = {4, 5, 6}"
CONSTANTS = f"{VECTORS}, float e = {{0.001}}, float two = {{2}}"
BODY = """m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) q = Pow(d, two) v = ReduceMean<axes = [-1]>(q) w = Add(v, e)
r = Sqrt(w) n = Div(d, r) k = Mul(n, s) y = Add(k, b)"""


def model(lines, constants, version=17):
    head = f'<ir_version: 8, opset_import: ["" : {version}]> g (float[n,2,3] x) => (float[n,2,3] y)'
    return f"{head} <{constants}> {{ {lines} }}"


def test_all_nine_nodes():
    check(
        FuseLayernorm(),
        model(BODY, CONSTANTS),
        model("y = LayerNormalization<axis = -1, epsilon = 0.001>(x, s, b)", VECTORS),
    )


def test_square_by_mul_and_scale_of_full_rank_without_bias():
    lines = BODY.replace("Pow(d, two)", "Mul(d, d)").replace(" k = Mul(n, s) y = Add(k, b)", " y = Mul(s, n)")
    check(
        FuseLayernorm(),
        model(lines, "float[1,1,3] s = {1, 2, 3}, float e = {0.001}"),
        model("y = LayerNormalization<axis = -1, epsilon = 0.001>(x, s)", "float[3] s = {1, 2, 3}"),
    )


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("axes = [-1]>(x)", "axes = [1]>(x)", "not over the last axis"),
        ("axes = [-1]>(q)", "axes = [1]>(q)", "not over the last axis"),
        ("Pow(d, two)", "Pow(d, e)", ""),
        ("Div(d, r)", "Div(x, r)", ""),
        ("Add(k, b)", "Add(k, d)", "other readers"),
        ("Mul(n, s)", "Mul(n, e)", "constant vector"),
        ("Mul(n, s)", "Add(n, s)", "needs a scale"),
    ],
)
def test_refused(old, new, reason):
    outcome = check(FuseLayernorm(), model(BODY.replace(old, new), CONSTANTS), None)
    assert any(reason in refusal.reason for refusal in outcome.refusals) or not reason


def test_older_opsets_have_no_layer_normalization():
    outcome = check(FuseLayernorm(), model(BODY, CONSTANTS, 16), None)
    assert "opset 17" in outcome.refusals[0].reason
