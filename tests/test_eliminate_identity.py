from __future__ import annotations

import re

import numpy as np
import pytest
from passes_helper import check

from onnxslim_lab.passes.eliminate_identity import EliminateIdentity

PASS = EliminateIdentity()


def graph(body: str, *, x: str = "float[N,3,4] x", y: str = "float[N,3,4] y", constants: str = "") -> str:
    return f"g ({x}) => ({y}) <{constants}> {{ {body} }}"


def untouched(body: str, *, dims: dict[str, int] | None = None, **kinds: str) -> None:
    check(PASS, graph(inside(body), **kinds), dims=dims)


def inside(body: str) -> str:
    """Put nodes around the body: between an input and an output of the graph no node could be removed."""
    return f"p = Softplus(x) {re.sub('y', 'q', re.sub('x(?=[,)])', 'p', body), count=1)} y = Neg(q)"


def removed(body: str, *, x: str = "float[N,3,4] x", y: str = "float[N,3,4] y", constants: str = "") -> None:
    """The body maps `a` to `b`, which must be the same; Softplus stands before and after."""
    whole = f"a = Softplus(x) {body} y = Neg(b)"
    kept = graph("a = Softplus(x) y = Neg(a)", x=x, y=y)
    outcome = check(PASS, graph(whole, x=x, y=y, constants=constants), kept)
    assert outcome.changes


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("b = Identity(a)", ""),
        ("c = Identity(a) d = Identity(c) b = Identity(d)", ""),
        ("b = Dropout(a)", ""),
        ("b, mask = Dropout(a, r, t)", "float r = {0.5}, bool t = {0}"),
        ("b = Cast<to=1>(a)", ""),
        ("b = CastLike(a, x)", ""),
        ("b = Reshape(a, s)", "int64[3] s = {-1, 3, 4}"),
        ("b = Reshape(a, s)", "int64[3] s = {0, 0, 4}"),
        ("b = Reshape(a, s)", "int64[3] s = {0, 3, -1}"),
        ("s = Shape(x) b = Reshape(a, s)", ""),
        ("b = Transpose<perm=[0,1,2]>(a)", ""),
        ("b = Slice(a, s, e, i)", "int64[1] s = {0}, int64[1] e = {9223372036854775807}, int64[1] i = {0}"),
        ("b = Slice(a, s, e, i)", "int64[2] s = {0, -4}, int64[2] e = {3, 4}, int64[2] i = {1, 2}"),
        ("b = Pad(a, p)", "int64[6] p = {0, 0, 0, 0, 0, 0}"),
        ("b = Concat<axis=1>(a)", ""),
        ("b = Sum(a)", ""),
        ("b = Max(a)", ""),
        ("b = Split<axis=1>(a)", ""),
        ("b = Expand(a, s)", "int64[3] s = {1, 3, 4}"),
        ("s = Shape(a) b = Expand(a, s)", ""),
        ("b = Tile(a, s)", "int64[3] s = {1, 1, 1}"),
        ("b = Add(a, z)", "float z = {0}"),
        ("b = Add(z, a)", "float[1, 4] z = {0, 0, 0, 0}"),
        ("b = Sub(a, z)", "float z = {0}"),
        ("b = Mul(a, z)", "float[1] z = {1}"),
        ("b = Div(a, z)", "float[3, 1] z = {1, 1, 1}"),
        ("b = Pow(a, z)", "int64 z = {1}"),
        ("b = Where(c, a, z)", "bool c = {1}, float z = {7}"),
        ("b = Where(c, z, a)", "bool c = {0}, float z = {7}"),
        ("b = Clip(a)", ""),
        ("c = Neg(a) b = Neg(c)", ""),
        ("c = Transpose<perm=[1,2,0]>(a) b = Transpose<perm=[2,0,1]>(c)", ""),
        ("c = Transpose(a) b = Transpose(c)", ""),
        ("c = Unsqueeze(a, i) b = Squeeze(c, i)", "int64[1] i = {1}"),
        ("c = Cast<to=11>(a) b = Cast<to=1>(c)", ""),
        ("c = Reshape(a, s) b = Reshape(c, t)", "int64[2] s = {-1, 12}, int64[3] t = {-1, 3, 4}"),
        ("c, d = Split<axis=2>(a, s) b = Concat<axis=-1>(c, d)", "int64[2] s = {1, 3}"),
        ("b = ReduceSum<noop_with_empty_axes=1>(a)", ""),
    ],
)
def test_does_nothing(body: str, constants: str) -> None:
    removed(body, constants=constants)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("b = MaxPool<kernel_shape=[1, 1]>(a)", ""),
        ("b = AveragePool<kernel_shape=[1, 1], strides=[1, 1]>(a)", ""),
        ('b = Resize<mode="nearest">(a, , s)', "float[4] s = {1, 1, 1, 1}"),
        ('b = Resize<mode="linear">(a, , , s)', "int64[4] s = {1, 2, 5, 5}"),
    ],
)
def test_does_nothing_to_images(body: str, constants: str) -> None:
    removed(body, x="float[1,2,5,5] x", y="float[1,2,5,5] y", constants=constants)


def test_flatten_of_a_matrix() -> None:
    removed("b = Flatten(a)", x="float[N,7] x", y="float[N,7] y")


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = Add(x, z)", "float z = {1e-10}"),
        ("y = Mul(x, z)", "float z = {1.0000001}"),
        ("y = Pow(x, z)", "float z = {2}"),
        ("y = Dropout(x, r, t)", "float r = {0.0}, bool t = {1}"),
        ("a = Cast<to=10>(x) y = Cast<to=1>(a)", ""),
        ("y = Clip(x, z)", "float z = {0}"),
        ("y = Slice(x, s, s2, i)", "int64[1] s = {0}, int64[1] s2 = {-1}, int64[1] i = {0}"),
        (
            "y = Slice(x, s, e, i, t)",
            "int64[1] s = {-1}, int64[1] e = {-99}, int64[1] i = {2}, int64[1] t = {-1}",
        ),
        ("y = Transpose<perm=[0,2,1]>(x)", ""),
        ("y = Relu(x)", ""),
        ("a = Abs(x) y = Sin(a)", ""),
        (
            """y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn", mode="nearest",
               nearest_mode="ceil">(x, , s)""",
            "float[3] s = {1, 1, 1}",
        ),
    ],
)
def test_does_something(body: str, constants: str) -> None:
    shape = "float[N,4,3]" if "0,2,1" in body else "float[M,3,4]"
    run = "Resize" not in body and "bool t" not in constants
    check(PASS, graph(inside(body), y=f"{shape} y", constants=constants), run=run)


def test_broadcasting_grows() -> None:
    untouched("y = Add(x, z)", x="float[1,4] x", y="float[3,4] y", constants="float[3,1] z = {0, 0, 0}")
    untouched("y = Add(x, z)", x="float[N] x", y="float[N,M] y", constants="float[1,1] z = {0}")
    untouched(
        "y = Where(c, x, z)", x="float[1] x", y="float[2] y", constants="bool[2] c = {1, 1}, float z = {0}"
    )
    untouched("y = Expand(x, s)", x="float[1,4] x", y="float[3,4] y", constants="int64[2] s = {3, 4}")


def test_reshape_that_may_differ() -> None:
    untouched(
        "y = Reshape(x, s)",
        x="float[N,M] x",
        y="float[A,B] y",
        constants="int64[2] s = {-1, 4}",
        dims={"M": 4},
    )
    untouched(
        "y = Reshape(x, s)",
        x="float[N,4] x",
        y="float[1,4] y",
        constants="int64[2] s = {1, 4}",
        dims={"N": 1},
    )


def test_interface_stays() -> None:
    outcome = check(PASS, graph("y = Identity(x)"))
    assert "interface" in outcome.refusals[0].reason
    check(PASS, graph("y = Identity(w)", x="float x", y="float[2] y", constants="float[2] w = {1, 2}"))
    text = "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Identity(y) }"
    check(PASS, text)


def test_output_of_the_graph_keeps_its_name() -> None:
    check(
        PASS,
        graph("a = Exp(x) b = Sin(a) y = Identity(a)", y="float[N,3,4] y"),
        graph("y = Exp(x) b = Sin(y)"),
    )


def test_dropout_mask_in_use() -> None:
    check(PASS, "g (float[2] x) => (float[2] y, bool[2] m) { y, m = Dropout(x) }")


def test_relu_before_clip() -> None:
    constants = "float a = {0}, float b = {6}"
    check(
        PASS,
        graph("r = Relu(x) y = Clip(r, a, b)", constants=constants),
        graph("y = Clip(x, a, b)", constants=constants),
    )
    check(PASS, graph("r = Relu(x) y = Clip(r, a)", constants="float a = {0}"), graph("y = Relu(x)"))
    check(PASS, graph("r = Sigmoid(x) s = Relu(r) y = Abs(s)"), graph("y = Sigmoid(x)"))
    check(PASS, graph("r = Round(x) s = Floor(r) y = Ceil(s)"), graph("y = Round(x)"))


def test_clips() -> None:
    constants = "float a = {-0.5}, float b = {0.5}, float c = {0}, float d = {9}"
    check(
        PASS,
        graph("r = Clip(x, a, b) y = Clip(r, c, d)", constants=constants),
        graph("y = Clip(x, c, b)", constants="float b = {0.5}, float c = {0}"),
    )
    apart = "float a = {-0.5}, float b = {0.5}, float c = {1}, float d = {9}"
    untouched("r = Clip(x, a, b) y = Clip(r, c, d)", constants=apart)
    old = '<ir_version: 3, opset_import: ["": 6]> g (float[4] x) => (float[4] y) { %s }'
    check(
        PASS,
        old % "r = Clip<min=-0.5, max=0.5>(x) y = Clip<min=0.0>(r)",
        old % "y = Clip<min=0.0, max=0.5>(x)",
    )


def test_pairs_become_one() -> None:
    check(
        PASS,
        graph("a = Transpose<perm=[1,0,2]>(x) y = Transpose<perm=[0,2,1]>(a)", y="float[3,4,N] y"),
        graph("y = Transpose<perm=[1,2,0]>(x)", y="float[3,4,N] y"),
    )
    check(
        PASS,
        graph("a = Cast<to=11>(x) y = Cast<to=6>(a)", y="int32[N,3,4] y"),
        graph("y = Cast<to=6>(x)", y="int32[N,3,4] y"),
    )
    check(
        PASS,
        graph("a = Concat<axis=1>(x, x) y = Concat<axis=-2>(x, a, x)", y="float[N,12,4] y"),
        graph("y = Concat<axis=-2>(x, x, x, x)", y="float[N,12,4] y"),
    )


def test_reshapes() -> None:
    check(
        PASS,
        graph(
            "a = Reshape(x, s) y = Reshape(a, t)",
            y="float[A,6] y",
            constants="int64[1] s = {-1}, int64[2] t = {-1, 6}",
        ),
        graph("y = Reshape(x, t)", y="float[A,6] y", constants="int64[2] t = {-1, 6}"),
    )
    check(
        PASS,
        graph("a = Flatten(x) y = Unsqueeze(a, i)", y="float[N,1,12] y", constants="int64[1] i = {1}"),
        graph("y = Reshape(x, t)", y="float[N,1,12] y", constants="int64[3] t = {0, 1, 12}"),
    )
    check(
        PASS,
        graph(
            "a = Unsqueeze(x, i) y = Unsqueeze(a, j)",
            x="float[N,M] x",
            y="float[1,N,1,M] y",
            constants="int64[1] i = {1}, int64[1] j = {0}",
        ),
        graph("y = Unsqueeze(x, k)", x="float[N,M] x", y="float[1,N,1,M] y", constants="int64[2] k = {0, 2}"),
    )
    check(
        PASS,
        graph(
            "a = Squeeze(x, i) y = Squeeze(a, j)",
            x="float[1,A,1,B] x",
            y="float[A,B] y",
            constants="int64[1] i = {0}, int64[1] j = {1}",
        ),
        graph("y = Squeeze(x, k)", x="float[1,A,1,B] x", y="float[A,B] y", constants="int64[2] k = {0, 2}"),
    )


def test_zero_in_a_shape_reads_the_intermediate_shape() -> None:
    feed = {"x": np.ones((2, 3, 4), np.float32), "s": np.array([6, 4])}
    text = (
        "g (float[N,M,K] x, int64[2] s) => (float[A,B,2] y) <int64[3] t = {0, -1, 2}>"
        "{ a = Reshape(x, s) y = Reshape(a, t) }"
    )
    check(PASS, text, feeds=[feed])
    check(
        PASS,
        text.replace("{0, -1, 2}", "{-1, 1, 2}").replace("B,2]", "1,2]"),
        "g (float[N,M,K] x, int64[2] s) => (float[A,1,2] y) <int64[3] t = {-1, 1, 2}> { y = Reshape(x, t) }",
        feeds=[feed],
    )


def test_other_readers_keep_the_first() -> None:
    text = (
        "g (float[2,3,4] x) => (float[3,4,2] y, float[3,2,4] z)"
        "{ a = Transpose<perm=[1,0,2]>(x) y = Transpose<perm=[0,2,1]>(a) z = Relu(a) }"
    )
    check(PASS, text)


def test_bodies_and_functions() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "f": 1]>
    g (float[N] x, bool c) => (float[N] y) {
        a = f.id(x)
        y = If (c) <then_branch = t () => (float[N] p) { i = Identity(a) j = Exp(i) p = Identity(j) },
                    else_branch = e () => (float[N] q) { q = Identity(a) }>
    }
    <domain: "f", opset_import: ["": 17]> id (u) => (w) { s = Identity(u) t = Relu(s) v = Relu(t) w = Dropout(v) }"""
    check(
        PASS,
        text,
        """<ir_version: 8, opset_import: ["": 17, "f": 1]>
    g (float[N] x, bool c) => (float[N] y) {
        a = f.id(x)
        y = If (c) <then_branch = t () => (float[N] p) { p = Exp(a) },
                    else_branch = e () => (float[N] q) { q = Identity(a) }>
    }
    <domain: "f", opset_import: ["": 17]> id (u) => (w) { w = Relu(u) }""",
    )


def test_attribute_reference_is_left_alone() -> None:
    check(
        PASS,
        """<ir_version: 8, opset_import: ["": 17, "f": 1]>
    g (float[N] x) => (float[N] y) { y = f.cast<to=1>(x) }
    <domain: "f", opset_import: ["": 17]> cast<to>(u) => (w) { w = Cast<to: int = @to>(u) }""",
    )


def test_chain_of_ten_thousand() -> None:
    steps = " ".join(f"a{i + 1} = {'Identity' if i % 2 else 'Neg'}(a{i})" for i in range(10_000))
    check(
        PASS,
        f"g (float[2] a0) => (float[2] a10001) {{ {steps} a10001 = Exp(a10000) }}",
        "g (float[2] a0) => (float[2] a10001) { a10001 = Exp(a0) }",
        run=False,
    )
