from __future__ import annotations

import pytest
from passes_helper import assert_equal_outputs, check, load

from onnxslim_lab.passes.cancel_transposes import CancelTransposes

PASS = CancelTransposes()
TO, BACK = "perm=[0,2,3,1]", "perm=[0,3,1,2]"


def graph(body: str, *, constants: str = "", y: str = "float[N,3,4,5] y") -> str:
    return f"g (float[N,3,4,5] x) => ({y}) <{constants}> {{ a = Exp(x) {body} y = Neg(z) }}"


@pytest.mark.parametrize(
    ("between", "moved", "constants", "turned"),
    [
        ("c = Relu(b)", "z = Relu(a)", "", ""),
        ("c = Add(b, k)", "z = Add(a, k)", "float[3] k = {1, 2, 3}", "float[3,1,1] k = {1, 2, 3}"),
        ("c = Mul(k, b)", "z = Mul(k, a)", "float[4,1,1] k = {1, 2, 3, 4}", "float[4,1] k = {1, 2, 3, 4}"),
        ("c = Sub(b, k)", "z = Sub(a, k)", "float[1] k = {2}", "float[1] k = {2}"),
        ("d = Relu(b) e = Exp(b) c = Add(d, e)", "d = Relu(a) e = Exp(a) z = Add(d, e)", "", ""),
        ("c = Softmax(b)", "z = Softmax<axis=1>(a)", "", ""),
        (
            "d = ReduceMean<axes=[1,2]>(b) c = Sub(b, d)",
            "d = ReduceMean<axes=[2,3]>(a) z = Sub(a, d)",
            "",
            "",
        ),
        (
            "c = Clip(b, k, l)",
            "z = Clip(a, k, l)",
            "float k = {0}, float l = {1}",
            "float k = {0}, float l = {1}",
        ),
    ],
)
def test_between_a_pair(between: str, moved: str, constants: str, turned: str) -> None:
    check(
        PASS,
        graph(f"b = Transpose<{TO}>(a) {between} z = Transpose<{BACK}>(c)", constants=constants),
        graph(moved, constants=turned),
    )


def test_shapes_change() -> None:
    check(
        PASS,
        graph(
            f"b = Transpose<{TO}>(a) c = Concat<axis=-1>(b, b) z = Transpose<{BACK}>(c)", y="float[N,6,4,5] y"
        ),
        graph("z = Concat<axis=1>(a, a)", y="float[N,6,4,5] y"),
    )
    check(
        PASS,
        graph(
            f"b = Transpose<{TO}>(a) c = Pad(b, p) z = Transpose<{BACK}>(c)",
            constants="int64[8] p = {0,1,2,3,0,4,5,6}",
            y="float[N,12,9,12] y",
        ),
        graph("z = Pad(a, p)", constants="int64[8] p = {0,3,1,2,0,6,4,5}", y="float[N,12,9,12] y"),
    )
    check(
        PASS,
        graph(
            f"b = Transpose<{TO}>(a) c = Slice(b, s, e, i) z = Transpose<{BACK}>(c)",
            y="float[N,2,4,5] y",
            constants="int64[1] s = {1}, int64[1] e = {9}, int64[1] i = {3}",
        ),
        graph(
            "z = Slice(a, s, e, i)",
            y="float[N,2,4,5] y",
            constants="int64[1] s = {1}, int64[1] e = {9}, int64[1] i = {1}",
        ),
    )


def test_reduction_absorbs_the_layout() -> None:
    check(
        PASS,
        graph(f"b = Transpose<{TO}>(a) z = ReduceMax<axes=[1,2], keepdims=0>(b)", y="float[N,3] y"),
        graph("z = ReduceMax<axes=[2,3], keepdims=0>(a)", y="float[N,3] y"),
    )
    check(PASS, graph(f"b = Transpose<{TO}>(a) z = ReduceMax<axes=[0], keepdims=0>(b)", y="float[4,5,3] y"))


def test_residual_network() -> None:
    """Convolutions turned to and fro around elementwise blocks, with a residual connection."""
    weights = ", ".join(f"float[3,3,1,1] w{i} = {{{', '.join(['0.2'] * 9)}}}" for i in range(3))
    before = " ".join(
        f"f{i} = Transpose<{BACK}>(r{i}) v{i} = Conv(f{i}, w{i}) t{i} = Transpose<{TO}>(v{i}) s{i} = Add(t{i}, k) "
        f"u{i} = Relu(s{i}) r{i + 1} = Add(u{i}, r{i})"
        for i in range(3)
    )
    after = " ".join(
        f"v{i} = Conv(r{i}, w{i}) s{i} = Add(v{i}, k) u{i} = Relu(s{i}) r{i + 1} = Add(u{i}, r{i})"
        for i in range(3)
    )
    check(
        PASS,
        graph(
            f"r0 = Transpose<{TO}>(a) {before} z = Transpose<{BACK}>(r3)",
            constants=f"{weights}, float[3] k = {{1, 2, 3}}",
        ),
        graph(
            f"r0 = Identity(a) {after} z = Identity(r3)".replace("r0 = Identity(a)", "")
            .replace("(r0", "(a")
            .replace(", r0", ", a")
            .replace("z = Identity(r3)", "")
            .replace("r3 =", "z ="),
            constants=f"{weights}, float[3,1,1] k = {{1, 2, 3}}",
        ),
    )


def test_not_worth_it() -> None:
    check(PASS, graph(f"b = Transpose<{TO}>(a) z = Relu(b)", y="float[N,4,5,3] y"))
    check(
        PASS,
        graph(
            f"b = Transpose<{TO}>(a) c = Relu(b) d = Transpose<{BACK}>(c) e = Transpose<perm=[0,3,2,1]>(d) z = Reshape(e, s)",
            constants="int64[2] s = {0, -1}",
            y="float[N,60] y",
        ),
        graph(
            "c = Relu(a) e = Transpose<perm=[0,3,2,1]>(c) z = Reshape(e, s)",
            constants="int64[2] s = {0, -1}",
            y="float[N,60] y",
        ),
    )


def test_other_readers_get_a_transpose() -> None:
    text = f"""g (float[N,3,4,5] x) => (float[N,3,4,5] y, float[N,4,5,3] v) {{ a = Exp(x) b = Transpose<{TO}>(a)
        c = Relu(b) d = Sin(c) z = Transpose<{BACK}>(d) y = Neg(z) v = Neg(c) }}"""
    before = load(text)
    result = before.copy()
    PASS.run(result)
    assert len(result) == len(before) - 1
    assert_equal_outputs(before, result)


def test_unknown_rank_and_old_opset() -> None:
    check(
        PASS,
        '<ir_version: 3, opset_import: ["": 9]> g (float[N,3] x) => (float[N,3] y)'
        "{ a = Transpose<perm=[1,0]>(x) b = Relu(a) y = Transpose<perm=[1,0]>(b) }",
    )


def test_interface() -> None:
    check(
        PASS,
        f"g (float[N,3,4,5] x) => (float[N,3,4,5] y) {{ b = Transpose<{TO}>(x) c = Relu(b) y = Transpose<{BACK}>(c) }}",
        "g (float[N,3,4,5] x) => (float[N,3,4,5] y) { y = Relu(x) }",
    )
