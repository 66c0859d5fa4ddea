from __future__ import annotations

import time

import onnx
import pytest
from passes_helper import check, load

from onnxslim_lab.errors import ModelError
from onnxslim_lab.passes.inline_functions import InlineFunctions

PASS = InlineFunctions()
HEAD = '<ir_version: 9, opset_import: ["": 17, "f": 1]>\n'
FUNCTION = '<domain: "f", opset_import: ["": 17, "f": 1]> '


def model(main: str, *functions: str) -> str:
    return HEAD + main + "".join("\n" + FUNCTION + function for function in functions)


def test_calls_and_nested_calls() -> None:
    check(
        PASS,
        model(
            "g (float[N] x) => (float[N] y) { a = Abs(x) t = f.twice(a) y = f.once(t) }",
            "twice (u) => (w) { a = f.once(u) w = f.once(a) }",
            "once (u) => (w) { t = Exp(u) w = Sin(t) }",
        ),
        HEAD
        + """g (float[N] x) => (float[N] y) { a = Abs(x) b = Exp(a) c = Sin(b) d = Exp(c) e = Sin(d)
                  h = Exp(e) y = Sin(h) }""",
    )


def test_attributes() -> None:
    check(
        PASS,
        model(
            "g (float[N] x) => (float[N] y, float[N] z) { y = f.leaky<alpha=0.5, to=1>(x) z = f.leaky<to=1>(x) }",
            """leaky <to> {alpha: float = 0.25, low: float = 1.0} (u) => (w) { k = Constant<value_float: float = @alpha>()
               a = LeakyRelu<alpha: float = @alpha>(u) b = Mul(a, k) w = Cast<to: int = @to>(b) }""".replace(
                "<to> {alpha: float = 0.25, low: float = 1.0}", "<to, alpha: float = 0.25>"
            ),
        ),
        HEAD
        + """g (float[N] x) => (float[N] y, float[N] z) {
            k = Constant<value_float = 0.5>() a = LeakyRelu<alpha = 0.5>(x) b = Mul(a, k) y = Cast<to = 1>(b)
            l = Constant<value_float = 0.25>() c = LeakyRelu<alpha = 0.25>(x) d = Mul(c, l) z = Cast<to = 1>(d) }""",
    )


def test_attribute_without_value_is_absent() -> None:
    check(
        PASS,
        model(
            "g (float[N] x) => (float[N] y) { y = f.leaky(x) }",
            "leaky <alpha> (u) => (w) { w = LeakyRelu<alpha: float = @alpha>(u) }",
        ),
        HEAD + "g (float[N] x) => (float[N] y) { y = LeakyRelu(x) }",
    )


def test_absent_inputs_and_outputs() -> None:
    check(
        PASS,
        model(
            "g (float[N] x) => (float[N] y) <float m = {0.5}> { y = f.clip(x, , m) z, = f.two(x) }",
            "clip (u, low, high) => (w) { w = Clip(u, low, high) }",
            "two (u) => (v, w) { v = Exp(u) w = Sin(u) }",
        ),
        HEAD + "g (float[N] x) => (float[N] y) <float m = {0.5}> { y = Clip(x, , m) z = Exp(x) s = Sin(x) }",
        run=False,  # onnxruntime wants every output of a function named
    )


def test_output_that_is_an_input() -> None:
    check(
        PASS,
        model(
            "g (float[N] x) => (float[N] y) { y, z = f.same(x) }",
            "same (u) => (w, v) { w = Identity(u) v = Exp(w) }",
        ),
        HEAD + "g (float[N] x) => (float[N] y) { y = Identity(x) v = Exp(y) }",
    )


def test_bodies_with_names_of_the_main_graph() -> None:
    check(
        PASS,
        model(
            """g (float[2] x, bool c) => (float[2] y) { t = Exp(x) i = f.f(t, c) j = f.f(i, c) s = Sin(j)
               y = If (c) <then_branch = b () => (float[2] p) { p = f.f(s, c) }, else_branch = d () => (float[2] q) { q = Abs(t) }> }""",
            """f (x, c) => (y) { k = Exp(x) y = If (c) <then_branch = a () => (float[2] t) { i = Sin(k) t = Neg(i) },
               else_branch = b () => (float[2] s) { s = Cos(x) }> }""",
        ),
        HEAD
        + """g (float[2] x, bool c) => (float[2] y) { t = Exp(x)
            k1 = Exp(t) i = If (c) <then_branch = a () => (float[2] t1) { i1 = Sin(k1) t1 = Neg(i1) }, else_branch = b () => (float[2] s1) { s1 = Cos(t) }>
            k2 = Exp(i) j = If (c) <then_branch = a () => (float[2] t2) { i2 = Sin(k2) t2 = Neg(i2) }, else_branch = b () => (float[2] s2) { s2 = Cos(i) }>
            s = Sin(j)
            y = If (c) <then_branch = b () => (float[2] p) { k3 = Exp(s) p = If (c) <then_branch = a () => (float[2] t3) { i3 = Sin(k3) t3 = Neg(i3) },
                else_branch = b () => (float[2] s3) { s3 = Cos(s) }> }, else_branch = d () => (float[2] q) { q = Abs(t) }> }""",
    )


def test_inner_names_are_unique() -> None:
    graph = load(
        model(
            "g (float[2] x, bool c) => (float[2] y) { t = f.f(x, c) y = f.f(t, c) }",
            """f (x, c) => (y) { y = If (c) <then_branch = a () => (float[2] t) { i = Sin(x) t = Neg(i) },
           else_branch = b () => (float[2] s) { s = Cos(x) }> }""",
        )
    )
    PASS.run(graph)
    made = [name for part in graph.walk() for node in part.nodes for name in node.output]
    assert len(made) == len(set(made))


def test_other_opset() -> None:
    text = """<ir_version: 9, opset_import: ["": 17, "f": 1]> g (float[N,4] x) => (float[M,4] y) { y = f.f(x) }
        <domain: "f", opset_import: ["": %d]> f (u) => (w) { %s }"""
    graph = load(text % (11, "w = Softmax(u)"))
    outcome = PASS.run(graph)
    assert [node.op_type for node in graph.nodes] == ["f"]
    assert (
        outcome.refusals[0].reason == "function 'f' uses Softmax of operator set ai.onnx 11, the model has 17"
    )
    main = '<ir_version: 9, opset_import: ["": 17, "f": 1]> g (float[N,4] x) => (float[M,4] y) { y = Sigmoid(x) }'
    check(PASS, text % (16, "w = Sigmoid(u)"), main)


def test_missing_import_is_added() -> None:
    graph = load("""<ir_version: 9, opset_import: ["": 17, "f": 1]> g (float[N] x) => (float[N] y) { y = f.f(x) }
        <domain: "f", opset_import: ["": 17, "ai.onnx.ml": 3]> f (u) => (w) { w = ai.onnx.ml.Binarizer(u) }""")
    PASS.run(graph)
    assert graph.opset("ai.onnx.ml") == 3
    onnx.checker.check_model(graph.to_model())


def test_no_functions() -> None:
    check(PASS, "g (float[N] x) => (float[N] y) { y = Exp(x) }")


def test_recursion() -> None:
    graph = load(
        model(
            "g (float[N] x) => (float[N] y) { y = f.a(x) }",
            "a (u) => (w) { w = f.b(u) }",
            "b (u) => (w) { w = f.a(u) }",
        )
    )
    with pytest.raises(ModelError, match="calls itself"):
        PASS.run(graph)


def test_exponential_growth() -> None:
    functions = [f"f{i} (u) => (w) {{ a = f.f{i + 1}(u) w = f.f{i + 1}(a) }}" for i in range(40)]
    graph = load(
        model("g (float[N] x) => (float[N] y) { y = f.f0(x) }", *functions, "f40 (u) => (w) { w = Exp(u) }")
    )
    start = time.perf_counter()
    with pytest.raises(ModelError, match="nodes, more than"):
        PASS.run(graph)
    assert time.perf_counter() - start < 1


def test_overloads() -> None:
    made = onnx.parser.parse_model(
        model(
            "g (float[N] x) => (float[N] y) { a = f.f(x) y = f.f(a) }",
            "f (u) => (w) { w = Exp(u) }",
            "h (u) => (w) { w = Sin(u) }",
        )
    )
    made.ir_version = 10
    made.functions[0].overload, made.functions[1].name, made.functions[1].overload = "one", "f", "two"
    made.graph.node[0].overload, made.graph.node[1].overload = "one", "two"
    check(PASS, made, HEAD + "g (float[N] x) => (float[N] y) { a = Exp(x) y = Sin(a) }", run=False)
