"""Types and shapes come from inference, whatever a model declares, and inference always ends."""

from __future__ import annotations

import time

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from onnxslim_lab import shapes
from onnxslim_lab.graph import Graph

HEADER = '<ir_version: 8, opset_import: ["" : 17, "other" : 1, "local" : 1]>\n'


def inferred(text: str) -> Graph:
    graph = Graph.parse(HEADER + text)
    graph.infer()
    return graph


def function_model(functions: list[onnx.FunctionProto], call: str) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node(call, ["x"], ["y"], domain="local"), helper.make_node("Relu", ["x"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=imports, functions=functions)


def local(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, imports)


def output_dims(model: ModelProto, index: int) -> tuple[shapes.Dim, ...] | None:
    return shapes.shape_from_type(shapes.infer(model).graph.output[index].type)


def test_declared_intermediate_and_output_shapes_are_dropped():
    graph = inferred(
        "g (float[n, 4] x, int64[2] k) => (float[9] y, float[5] w) <float[7] a> { a = Relu(x) y = Neg(a) w = Reshape(x, k) }"
    )
    assert graph.shape_of("a") == ("n", 4)
    assert graph.shape_of("y") == ("n", 4)
    assert len(graph.shape_of("w")) == 2
    assert graph.dtype_of("w") == TensorProto.FLOAT


def test_unknown_operators_keep_what_is_declared():
    graph = inferred("g (float[n] x) => (float[?] y) <float[n, 3] a> { a = other.Mystery(x) y = Relu(a) }")
    assert graph.shape_of("a") == ("n", 3)
    assert graph.shape_of("y") == ("n", 3)


def test_a_node_that_cannot_be_inferred_does_not_stop_the_rest():
    graph = inferred(
        "g (float[n, 4] x, float[2] z) => (float[?] y, float[?] w) { y = Concat<axis = 1>(x, z) w = Relu(x) }"
    )
    assert graph.shape_of("w") == ("n", 4)


def test_bodies_are_inferred_with_the_constants_they_capture():
    graph = inferred(
        """g (bool c, float[n, 1] x) => (float[?] y) <int64[1] axes = {1}> {
            y = If(c) <then_branch = t () => (float[8] a) <float[6] b> { b = Relu(x)  a = Squeeze(b, axes) },
                       else_branch = e () => (float[8] d) { d = Squeeze(x, axes) }> }"""
    )
    (node,) = graph.nodes
    for bodies in graph.bodies(node).values():
        assert bodies[0].shape_of(bodies[0].outputs[0]) == ("n",)
    assert graph.bodies(node)["then_branch"][0].shape_of("b") == ("n", 1)
    assert graph.shape_of("y") == ("n",)


def test_declared_shapes_of_what_a_loop_carries_are_dropped():
    graph = inferred(
        """g (float[2] x, int64 trips) => (float[?] y) <bool yes = {1}> {
            y = Loop(trips, yes, x) <body = b (int64 i, bool c, float[2] a) => (bool d, float[2] e) {
                d = Identity(c)  e = Concat<axis = 0>(a, a) }> }"""
    )
    (body,) = (inner for inner in graph.walk() if inner.parent is not None)
    assert body.shape_of("e") in (None, (None,))
    assert graph.shape_of("y") is None or not isinstance(graph.shape_of("y")[0], int)


def test_negative_declared_sizes_are_unknown():
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, [-1, 3, "n", None])
    assert shapes.shape_from_type(value) == (None, 3, "n", None)
    assert shapes.shape_from_type(helper.make_tensor_type_proto(TensorProto.FLOAT, None)) is None


def test_the_model_given_is_not_changed():
    model = onnx.parser.parse_model(
        HEADER + "g (float[n] x) => (float[9] y) <float[7] a> { a = Relu(x) y = Neg(a) }"
    )
    before = model.SerializeToString(deterministic=True)
    shapes.infer(model)
    assert model.SerializeToString(deterministic=True) == before


def test_local_functions_are_inferred():
    twice = local("Twice", [helper.make_node("Concat", ["a", "a"], ["b"], axis=0)])
    assert output_dims(function_model([twice], "Twice"), 1) == ("n",)
    assert len(output_dims(function_model([twice], "Twice"), 0)) == 1


@pytest.mark.parametrize("depth", [10, 40])
def test_functions_that_call_functions_end_in_time(depth):
    functions = [local("F0", [helper.make_node("Relu", ["a"], ["b"])])]
    for index in range(depth):
        calls = [("a", "c"), ("c", "b")]
        nodes = [helper.make_node(f"F{index}", [read], [made], domain="local") for read, made in calls]
        functions.append(local(f"F{index + 1}", nodes))
    began = time.perf_counter()
    assert output_dims(function_model(functions, f"F{depth}"), 1) == ("n",)
    assert time.perf_counter() - began < 5


def test_a_function_that_calls_itself_is_left_alone():
    functions = [local("Loop", [helper.make_node("Loop", ["a"], ["b"], domain="local")])]
    assert output_dims(function_model(functions, "Loop"), 1) == ("n",)


def test_sizes_beyond_int64_do_not_stop_inference():
    graph = inferred(
        f"g (float[{2**62}, 8] x, float[n] w) => (float[?] y, float[?] z) {{ y = Flatten<axis = 0>(x) z = Relu(w) }}"
    )
    assert graph.shape_of("z") == ("n",)


def test_deeply_nested_branches_take_linear_time():
    body: onnx.GraphProto | None = None
    for index in range(30):
        other = helper.make_graph(
            [helper.make_node("Relu", ["x"], [f"e{index}"])],
            "e",
            [],
            [helper.make_tensor_value_info(f"e{index}", TensorProto.FLOAT, None)],
        )
        node = (
            helper.make_node("Relu", ["x"], [f"v{index}"])
            if body is None
            else helper.make_node("If", ["c"], [f"v{index}"], then_branch=body, else_branch=other)
        )
        output = helper.make_tensor_value_info(f"v{index}", TensorProto.FLOAT, None)
        body = helper.make_graph([node], f"g{index}", [], [output])
    assert body is not None
    body.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]))
    body.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    began = time.perf_counter()
    assert output_dims(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)]), 0) == ("n",)
    assert time.perf_counter() - began < 5
