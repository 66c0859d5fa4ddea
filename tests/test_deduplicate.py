from __future__ import annotations

import numpy as np
import onnx
from onnx import helper
from passes_helper import assert_equal_outputs, check, load

from onnxslim_lab.passes.deduplicate import Deduplicate

PASS = Deduplicate()


def test_equal_constants() -> None:
    outcome = check(
        PASS,
        """g (float[N,2] x) => (float[N,2] y) <float[2] u = {1, 2}, float[2] v = {1, 2}, float[1,2] w = {1, 2}> {
            k = Constant<value = float[2] {1, 2}>() a = Add(x, u) b = Mul(a, v) c = Sub(b, k) y = Div(c, w) }""",
        """g (float[N,2] x) => (float[N,2] y) <float[2] u = {1, 2}, float[1,2] w = {1, 2}> {
            a = Add(x, u) b = Mul(a, u) c = Sub(b, u) y = Div(c, w) }""",
    )
    assert [change.bytes_before for change in outcome.changes] == [8, 8]


def test_other_type_shape_or_sign_of_zero() -> None:
    check(
        PASS,
        """g (float[N,1] x) => (float[N,1] y, int32 z) <float[1] u = {0}, float[1] v = {-0.0}, float w = {0}, int32 i = {0}, int32 j = {1}> {
            a = Add(x, u) b = Div(a, v) y = Sub(b, w) z = Add(i, j) }""",
        run=False,
    )


def test_interface_constants_stay() -> None:
    check(
        PASS,
        """g (float[2] x, float[2] w = {1, 2}) => (float[2] y, float[2] v) <float[2] u = {1, 2}, float[2] v = {1, 2}>
           { a = Add(x, u) b = Mul(a, v) y = Sub(b, w) }""",
        run=False,
    )


def test_branches_share_through_the_outer_graph() -> None:
    values = ", ".join(str(i) for i in range(16))
    tensor = f"float[16] {{{values}}}"
    branches = (
        f"{{ k = Constant<value = {tensor}>() p = Add(x, k) }}",
        f"{{ l = Constant<value = {tensor}>() q = Mul(x, l) }}",
    )
    check(
        PASS,
        f"""g (float[16] x, bool c) => (float[16] y) {{ y = If (c) <then_branch = t () => (float[16] p)
            {branches[0]}, else_branch = e () => (float[16] q) {branches[1]}> }}""",
        f"""g (float[16] x, bool c) => (float[16] y) <float[16] k = {{{values}}}> {{ y = If (c) <then_branch = t () =>
            (float[16] p) {{ p = Add(x, k) }}, else_branch = e () => (float[16] q) {{ q = Mul(x, k) }}> }}""",
    )
    small = [branch.replace(tensor, "float {1}") for branch in branches]
    check(
        PASS,
        f"""g (float[16] x, bool c) => (float[16] y) {{ y = If (c) <then_branch = t () => (float[16] p)
            {small[0]}, else_branch = e () => (float[16] q) {small[1]}> }}""",
    )


def test_equal_nodes() -> None:
    check(
        PASS,
        """g (float[2] x, float[2] z) => (float[2] y) { a = Exp(x) b = Exp(x) c = Add(a, z) d = Add(z, b)
            e = Sub(a, z) f = Sub(z, a) s = Mul(c, d) t = Mul(e, f) y = Div(s, t) }""",
        """g (float[2] x, float[2] z) => (float[2] y) { a = Exp(x) c = Add(a, z)
            e = Sub(a, z) f = Sub(z, a) s = Mul(c, c) t = Mul(e, f) y = Div(s, t) }""",
    )


def test_outputs_of_the_graph() -> None:
    check(PASS, "g (float[2] x) => (float[2] y, float[2] z) { y = Exp(x) z = Exp(x) }")
    check(
        PASS,
        "g (float[2] x) => (float[2] y, float[2] z) { a = Exp(x) y = Sin(a) z = Exp(x) }",
        "g (float[2] x) => (float[2] y, float[2] z) { z = Exp(x) y = Sin(z) }",
    )


def test_optional_outputs_join() -> None:
    check(
        PASS,
        """g (float[1,1,4,4] x) => (float[1,1,2,2] y, int64[1,1,2,2] i) {
            a = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
            b, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) y = Add(a, b) }""",
        """g (float[1,1,4,4] x) => (float[1,1,2,2] y, int64[1,1,2,2] i) {
            a, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) y = Add(a, a) }""",
    )


def test_splits_of_different_count() -> None:
    check(
        PASS,
        "g (float[6] x) => (float[3] y, float[2] z) { y, a = Split(x) z, b, c = Split(x) }",
    )


def test_random_and_unknown() -> None:
    check(
        PASS,
        "g (float[2] x) => (float[2] y) { a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }",
        run=False,
    )
    text = "float r = {0.5}, bool t = {1}"
    check(
        PASS,
        f"g (float[2] x) => (float[2] y) <{text}> {{ a = Dropout(x, r, t) b = Dropout(x, r, t) y = Sub(a, b) }}",
        run=False,
    )
    functions = """<ir_version: 8, opset_import: ["": 17, "f": 1]>
        g (float[2] x) => (float[2] y) {{ a = f.f(x) b = f.f(x) y = Sub(a, b) }}
        <domain: "f", opset_import: ["": 17]> f (u) => (w) {{ w = {}(u) }}"""
    check(PASS, functions.format("RandomNormalLike"), run=False)
    check(
        PASS,
        functions.format("Exp"),
        functions.format("Exp").replace("b = f.f(x)", "").replace("a, b", "a, a"),
    )


def test_bodies() -> None:
    branch = "If (c) <then_branch = t{n} () => (float[2] p{n}) {{ m{n} = Exp(x) p{n} = Sin(m{n}) }}, else_branch = e{n} () => (float[2] q{n}) {{ q{n} = Cos(x) }}>"
    check(
        PASS,
        f"g (float[2] x, bool c) => (float[2] y) {{ k = Exp(x) a = {branch.format(n=1)} b = {branch.format(n=2)} s = Add(a, b) y = Add(s, k) }}",
        """g (float[2] x, bool c) => (float[2] y) { k = Exp(x) a = If (c) <then_branch = t () => (float[2] p) { p = Sin(k) },
            else_branch = e () => (float[2] q) { q = Cos(x) }> s = Add(a, a) y = Add(s, k) }""",
    )


def tied(*, gemm: bool, differ: bool = False, gather_first: bool = True) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    table = random.normal(size=(300, 64)).astype(np.float32)
    turned = np.ascontiguousarray(table.T)
    if differ:
        turned[5, 7] += 1
    value = helper.make_tensor_value_info
    last = (
        helper.make_node("Gemm", ["h", "v"], ["y"], transA=0)
        if gemm
        else helper.make_node("MatMul", ["h", "v"], ["y"])
    )
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "i"], ["h"]), last],
        "g",
        [value("i", 7, ["N"])],
        [value("y", 1, ["N", 300])],
    )
    tensors = [onnx.numpy_helper.from_array(table, "w"), onnx.numpy_helper.from_array(turned, "v")]
    graph.initializer.extend(tensors if gather_first else tensors[::-1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_transposed_copy() -> None:
    for gather_first in (True, False):
        model = tied(gemm=False, gather_first=gather_first)
        graph = load(model)
        outcome = PASS.run(graph)
        assert [change.bytes_before for change in outcome.changes] == [300 * 64 * 4]
        assert [node.op_type for node in graph.nodes] == ["Gather", "Transpose", "MatMul"]
        assert graph.initializers == ["w"]
        assert not PASS.run(graph).changes
        assert_equal_outputs(load(model), graph)


def test_transposed_copy_in_gemm() -> None:
    model = tied(gemm=True)
    graph = load(model)
    PASS.run(graph)
    assert [node.op_type for node in graph.nodes] == ["Gather", "Gemm"]
    assert graph.initializers == ["w"]
    assert_equal_outputs(load(model), graph)


def test_no_transposed_copy() -> None:
    assert not PASS.run(load(tied(gemm=False, differ=True))).changes
    assert not Deduplicate(through_transpose=False).run(load(tied(gemm=False))).changes


def test_many_equal_nodes() -> None:
    steps = " ".join(f"a{i + 1} = Neg(a{i}) b{i + 1} = Neg(b{i})" for i in range(3000))
    half = " ".join(f"a{i + 1} = Neg(a{i})" for i in range(3000))
    check(
        PASS,
        f"g (float[2] x) => (float[2] y) {{ a0 = Exp(x) b0 = Exp(x) {steps} y = Add(a3000, b3000) }}",
        f"g (float[2] x) => (float[2] y) {{ a0 = Exp(x) {half} y = Add(a3000, a3000) }}",
    )
