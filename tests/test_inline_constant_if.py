from __future__ import annotations

import onnx
from passes_helper import assert_equal_outputs, check, load

from onnxslim_lab.passes.inline_constant_if import InlineConstantIf

PASS = InlineConstantIf()


def branches(then: str, other: str, condition: str = "c", outputs: str = "y") -> str:
    return f"{outputs} = If ({condition}) <then_branch = t () => {then}, else_branch = e () => {other}>"


THEN = "(float[N] p) { a = Exp(x) p = Sin(a) }"
ELSE = "(float[N] q) { b = Cos(x) q = Neg(b) }"


def test_both_values() -> None:
    for value, body in ((1, "a = Exp(x) y = Sin(a)"), (0, "b = Cos(x) y = Neg(b)")):
        check(
            PASS,
            f"g (float[N] x) => (float[N] y) <bool c = {{{value}}}> {{ {branches(THEN, ELSE)} }}",
            f"g (float[N] x) => (float[N] y) {{ {body} }}",
        )


def test_condition_of_one_element_in_a_constant_node() -> None:
    check(
        PASS,
        f"g (float[N] x) => (float[N] y) {{ c = Constant<value = bool[1] {{1}}>() {branches(THEN, ELSE)} }}",
        "g (float[N] x) => (float[N] y) { a = Exp(x) y = Sin(a) }",
    )


def test_condition_from_an_input() -> None:
    check(PASS, f"g (float[N] x, bool c) => (float[N] y) {{ {branches(THEN, ELSE)} }}")
    text = f"g (float[N] x, bool c = {{1}}) => (float[N] y) {{ {branches(THEN, ELSE)} }}"
    check(PASS, text, run=False)


def test_equal_branches() -> None:
    same = "(float[N] q) { b = Exp(x) q = Sin(b) }"
    check(
        PASS,
        f"g (float[N] x, bool c) => (float[N] y) {{ {branches(THEN, same)} }}",
        "g (float[N] x, bool c) => (float[N] y) { a = Exp(x) y = Sin(a) }",
    )
    check(
        PASS,
        f"g (float[N] x, float[N] z, bool c) => (float[N] y) {{ {branches(THEN, same.replace('(x)', '(z)'))} }}",
    )


def test_names_stay_unique() -> None:
    text = branches(THEN, ELSE, outputs="u") + branches(THEN, ELSE, outputs="v")
    check(
        PASS,
        f"g (float[N] x) => (float[N] y) <bool c = {{1}}> {{ a0 = Abs(x) {text} y = Add(u, v) }}",
        "g (float[N] x) => (float[N] y) { a0 = Abs(x) a1 = Exp(x) p1 = Sin(a1) a2 = Exp(x) p2 = Sin(a2) y = Add(p1, p2) }",
    )


def test_outputs_that_are_no_nodes_of_the_branch() -> None:
    constant = "(float[2] p) <float[2] p = {1, 2}> { d = Exp(x) }"
    check(
        PASS,
        f"g (float[2] x) => (float[2] y) <bool c = {{1}}> {{ {branches(constant, '(float[2] q) { q = Abs(x) }')} }}",
        "g (float[2] x) => (float[2] y) <float[2] p = {1, 2}> { d = Exp(x) y = Identity(p) }",
    )


def test_one_value_for_two_outputs() -> None:
    then = "(float[N] p, float[N] p2) { p = Exp(x) p2 = Identity(p) }"
    twice = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y, float[N] z) <bool c = {1}> {'
        + branches(then, then.replace("p", "q"), outputs="y, z")
        + "}"
    )
    body = twice.graph.node[0].attribute[0].g
    del body.node[1]
    body.output[1].name = "p"
    graph = load(twice)
    PASS.run(graph)
    assert sorted(node.op_type for node in graph.nodes) == ["Exp", "Identity"]
    expected = load("g (float[N] x) => (float[N] y, float[N] z) { y = Exp(x) z = Identity(y) }")
    assert_equal_outputs(expected, graph)


def test_nested_25_deep_stays_in_order() -> None:
    inner = "y25 = Exp(x)"
    for depth in reversed(range(25)):
        inner = (
            (f"s{depth} = Add(x, k{depth - 1})" if depth else "s0 = Sin(x)")
            + f" k{depth} = Abs(s{depth}) "
            + f"""r{depth} = If (c) <then_branch = t{depth} () => (float[N] y{depth + 1})
            {{ {inner} }}, else_branch = e{depth} () => (float[N] z{depth + 1}) {{ z{depth + 1} = Neg(k{depth}) }}>
            y{depth} = Add(r{depth}, k{depth})"""
        )
    before = load(f"g (float[N] x) => (float[N] y0) <bool c = {{1}}> {{ {inner} }}")
    graph = before.copy()
    outcome = PASS.run(graph)
    assert len(outcome.changes) == 25
    assert "If" not in {node.op_type for node in graph.nodes}
    assert len(graph) == 25 * 3 + 1
    onnx.checker.check_model(graph.to_model())
    assert_equal_outputs(before, graph)


def test_in_bodies_and_functions() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[2] x, bool d) => (float[2] y) <bool c = {1}> {
        v = f.f(x)
        y = If (d) <then_branch = o () => (float[2] r) { r0 = If (c) <then_branch = t () => (float[2] p) { p = Exp(v) },
            else_branch = e () => (float[2] q) { q = Abs(v) }> r = Neg(r0) }, else_branch = w () => (float[2] s) { s = Sin(v) }> }
        <domain: "f", opset_import: ["": 17]> f (u) => (w) { c = Constant<value = bool {0}>()
            w = If (c) <then_branch = t () => (float[2] p) { p = Exp(u) }, else_branch = e () => (float[2] q) { q = Abs(u) }> }"""
    check(
        PASS,
        text,
        """<ir_version: 8, opset_import: ["": 17, "f": 1]> g (float[2] x, bool d) => (float[2] y) {
        v = f.f(x) y = If (d) <then_branch = o () => (float[2] r) { p = Exp(v) r = Neg(p) },
            else_branch = w () => (float[2] s) { s = Sin(v) }> }
        <domain: "f", opset_import: ["": 17]> f (u) => (w) { w = Abs(u) }""",
    )
