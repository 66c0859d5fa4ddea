from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from passes_helper import assert_equal_outputs, check, load

from onnxslim_lab.passes.eliminate_dead import EliminateDead

PASS = EliminateDead()


def test_nodes_and_initializers() -> None:
    outcome = check(
        PASS,
        """g (float[N] x, float[N] z) => (float[N] y) <float[2,1] u = {1, 2}, float[1] w = {3}> {
            a = Exp(x)  b = Sin(a)  c = Add(b, u)  r = RandomNormalLike(c)  k = Constant<value_float=2.0>()
            y = Mul(x, w) }""",
        "g (float[N] x, float[N] z) => (float[N] y) <float[1] w = {3}> { y = Mul(x, w) }",
    )
    assert sum(change.bytes_before for change in outcome.changes) == 8


def test_nothing_to_do() -> None:
    check(PASS, "g (float[N] x) => (float[N] y) { y = Exp(x) }")


def test_inputs_only_on_request() -> None:
    text = "g (float[N] x, float[M] z) => (float[N] y) { y = Exp(x) }"
    check(PASS, text)
    model = load(text)
    EliminateDead(inputs=True).run(model)
    assert model.inputs == ["x"]
    assert list(model.to_model().graph.input[0].type.tensor_type.shape.dim[0].dim_param) == ["N"]


def test_overridable_initializer_is_interface() -> None:
    text = "g (float[N] x, float[2] w = {1, 2}) => (float[N] y) { y = Exp(x) }"
    check(PASS, text)
    model = load(text)
    EliminateDead(inputs=True).run(model)
    assert (model.inputs, model.initializers) == (["x"], [])


def test_initializers_of_ir_3_leave_the_inputs() -> None:
    old = '<ir_version: 3, opset_import: ["": 8]> '
    check(
        PASS,
        old
        + "g (float[2] x, float[2] w, float[2] v) => (float[2] y) <float[2] w = {1, 2}, float[2] v = {3, 4}>"
        "{ y = Add(x, v) }",
        old + "g (float[2] x, float[2] v) => (float[2] y) <float[2] v = {3, 4}> { y = Add(x, v) }",
    )


def test_optional_outputs() -> None:
    check(
        PASS,
        "g (float[1,1,4,4] x) => (float[1,1,2,2] y)"
        "{ a, m = Dropout(x) y, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) }",
        "g (float[1,1,4,4] x) => (float[1,1,2,2] y) { a = Dropout(x) y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) }",
    )
    weights = ", ".join(
        f"float[1,{8},{n}] {name} = {{{', '.join(['0.1'] * 8 * n)}}}" for name, n in (("w", 3), ("r", 2))
    )
    check(
        PASS,
        f"g (float[5,1,3] x) => (float[1,1,2] h) <{weights}> {{ s, h, c = LSTM<hidden_size=2>(x, w, r) }}",
        f"g (float[5,1,3] x) => (float[1,1,2] h) <{weights}> {{ , h = LSTM<hidden_size=2>(x, w, r) }}",
    )


def test_required_outputs_stay() -> None:
    check(PASS, "g (float[5] x) => (float[2] v) <int64[1] k = {2}> { v, i = TopK(x, k) }")
    check(PASS, "g (float[6] x) => (float[2] b) { a, b, c = Split(x) }")


def test_unused_outputs_of_if() -> None:
    check(
        PASS,
        """g (float[2] x, float[2] z, bool c) => (float[2] y) { s = Exp(z)
            a, y = If (c) <then_branch = t () => (float[2] p, float[2] q) { p = Sin(s) q = Cos(x) },
                           else_branch = e () => (float[2] u, float[2] v) { u = Tan(s) v = Abs(x) }> }""",
        """g (float[2] x, float[2] z, bool c) => (float[2] y) {
            y = If (c) <then_branch = t () => (float[2] q) { q = Cos(x) },
                        else_branch = e () => (float[2] v) { v = Abs(x) }> }""",
    )


def test_unused_outputs_of_loop() -> None:
    text = """g (float[2] x) => (float[2] y) <int64 n = {{3}}, bool c = {{1}}> {{
        y{scan} = Loop (n, c, x) <body = b (int64 i, bool k, float[2] s) => (bool l, float[2] o{out}) {{
            l = Identity(k) o = Exp(s) {node} }}> }}"""
    check(
        PASS,
        text.format(scan=", z", out=", float[2] r", node="r = Sin(s)"),
        text.format(scan="", out="", node=""),
    )
    check(
        PASS,
        "g (float[2] x) => (float[3,2] z) <int64 n = {3}, bool c = {1}> {"
        "y, z = Loop (n, c, x) <body = b (int64 i, bool k, float[2] s) => (bool l, float[2] o, float[2] r) {"
        "l = Identity(k) o = Exp(s) r = Sin(s) }> }",
    )


def test_unused_outputs_of_scan() -> None:
    value = helper.make_tensor_value_info

    def body(outputs: list[str]) -> onnx.GraphProto:
        kinds = {"o": [2], "p": [2], "q": [2]}
        nodes = [helper.make_node("Add", ["s", "e"], ["o"])]
        nodes += [
            helper.make_node(op, ["e"], [name])
            for op, name in (("Sin", "p"), ("Cos", "q"))
            if name in outputs
        ]
        return helper.make_graph(
            nodes,
            "b",
            [value("s", 1, [2]), value("e", 1, [2])],
            [value(name, 1, kinds[name]) for name in outputs],
        )

    def model(outputs: list[str], directions: list[int]) -> onnx.ModelProto:
        made = ["", "z", "y"] if len(outputs) == 3 else ["", "y"]
        made[0] = "t"
        node = helper.make_node(
            "Scan", ["i", "x"], made, body=body(outputs), num_scan_inputs=1, scan_output_directions=directions
        )
        graph = helper.make_graph(
            [node], "g", [value("i", 1, [2]), value("x", 1, [3, 2])], [value("y", 1, [3, 2])]
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    check(PASS, model(["o", "p", "q"], [0, 1]), model(["o", "q"], [1]))


def test_functions() -> None:
    head = '<ir_version: 8, opset_import: ["": 17, "f": 1]> '
    used = '<domain: "f", opset_import: ["": 17]> used (u) => (w) { %s w = Relu(u) }\n'
    spare = '<domain: "f", opset_import: ["": 17, "f": 1]> spare (u) => (w) { w = f.deep(u) }\n'
    deep = '<domain: "f", opset_import: ["": 17]> deep (u) => (w) { w = Exp(u) }\n'
    main = "g (float[2] x) => (float[2] y) { %s y = f.used(x) }\n"
    check(
        PASS,
        head + main % "z = f.spare(x)" + used % "v = Exp(u)" + spare + deep,
        head + main % "" + used % "",
    )


def test_annotated_and_sparse_initializers() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y)'
        "<float s = {0.5}, float t = {0.5}> { y = Exp(x) }"
    )
    model.graph.quantization_annotation.add(
        tensor_name="y",
        quant_parameter_tensor_names=[onnx.StringStringEntryProto(key="SCALE_TENSOR", value="s")],
    )
    values = helper.make_tensor("spare", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("spare_at", TensorProto.INT64, [1], [2])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    graph = load(model)
    PASS.run(graph)
    assert (graph.initializers, graph.sparse_initializers) == (["s"], [])


def test_long_chain() -> None:
    steps = " ".join(f"a{i + 1} = Neg(a{i})" for i in range(10_000))
    check(
        PASS,
        f"g (float[2] a0) => (float[2] y) {{ {steps} y = Exp(a0) }}",
        "g (float[2] a0) => (float[2] y) { y = Exp(a0) }",
    )


def test_nested_bodies_free_what_they_captured() -> None:
    inner = "If (c) <then_branch = t2 () => (float[2] p2) { p2 = Sin(s) }, else_branch = e2 () => (float[2] q2) { q2 = Cos(s) }>"
    model = load(
        "g (float[2] x, float[2] z, bool c) => (float[2] y) { s = Exp(z) y = If (c) <then_branch = t () => (float[2] p)"
        f"{{ d = {inner} p = Exp(x) }}, else_branch = e () => (float[2] q) {{ q = Sin(x) }}> }}"
    )
    before = model.copy()
    PASS.run(model)
    assert [node.op_type for node in model.nodes] == ["If"]
    feed = {"x": np.ones(2, np.float32), "z": np.ones(2, np.float32), "c": np.array(True)}
    assert_equal_outputs(before, model, [feed, {**feed, "c": np.array(False)}])
