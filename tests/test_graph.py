"""Graph keeps its index right under edits, bodies included."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxslim_lab.errors import ModelError
from onnxslim_lab.graph import Graph, attribute, is_op

CHAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
    a = Add(x, w)
    b = Relu(a)
    y = Mul(b, a)
}"""

BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[4] x, bool c) => (float[4] y) <float[4] w = {1, 2, 3, 4}> {
    a = Add(x, w)
    y = If (c) <
        then_branch = t () => (float[4] p) { p = Mul(a, w) },
        else_branch = e () => (float[4] q) { r = Neg(a) q = Sub(r, x) }
    >
}"""


def check_index(graph):
    """Compare the index with what the protobuf says."""
    fresh = Graph.load(graph.to_model())
    for mine, theirs in zip(graph.walk(), fresh.walk(), strict=True):
        assert [n.output for n in mine.nodes] == [n.output for n in theirs.nodes]
        values = {v for node in mine.nodes for v in (*node.input, *node.output)} | set(mine.initializers)
        for value in values - {""}:
            assert mine.use_count(value) == theirs.use_count(value), value
            assert sorted(n.output[0] for n in mine.consumers(value)) == sorted(
                n.output[0] for n in theirs.consumers(value)
            )
            assert mine.is_constant(value) == theirs.is_constant(value)


def test_index_of_a_chain():
    graph = Graph.parse(CHAIN)
    assert is_op(graph.producer("b"), "Relu")
    assert [node.op_type for node in graph.consumers("a")] == ["Relu", "Mul"]
    assert graph.use_count("y") == 1
    assert graph.constant("w").tolist() == [1, 2, 3, 4]
    assert not graph.is_constant("x")
    assert graph.shape_of("b") == ("N", 4)


def test_captures_count_as_uses_of_the_owner():
    graph = Graph.parse(BRANCHES)
    owner = graph.producer("y")
    assert graph.consumers("a") == [owner]
    assert graph.use_count("a") == 1
    assert graph.use_count("w") == 2
    then = graph.bodies(owner)["then_branch"][0]
    assert then.captured() == {"a", "w"}
    assert then.constant("w").tolist() == [1, 2, 3, 4]
    assert then.shape_of("a") == (4,)


def test_replace_uses_reaches_into_bodies():
    graph = Graph.parse(BRANCHES)
    relu = graph.emit("Relu", ["x"], ["z"])
    graph.replace_uses("a", "z")
    graph.remove(graph.producer("a"))
    assert graph.use_count("a") == 0
    assert graph.consumers("z") == [graph.producer("y")]
    assert [node.output[0] for node in graph.nodes] == ["z", "y"]
    assert relu in graph
    check_index(graph)


def test_replace_value_of_an_output_keeps_the_outputs_name():
    graph = Graph.parse(CHAIN)
    assert graph.replace_value("y", "b")
    assert graph.outputs == ["y"]
    assert is_op(graph.producer("y"), "Relu")
    graph.remove(*[node for node in graph.nodes if node.op_type == "Mul"])
    check_index(graph)
    assert not graph.replace_value("y", "x")  # an input cannot become an output's name


def test_absorb_gives_fresh_names():
    graph = Graph.parse(BRANCHES)
    owner = graph.producer("y")
    body = graph.bodies(owner)["else_branch"][0]
    graph.emit("Neg", ["x"], ["r_taken"])
    names = graph.absorb(body, {})
    assert names["a"] == "a"
    assert graph.replace_value("y", names["q"])
    graph.remove(owner)
    onnx.checker.check_model(graph.to_model())
    check_index(graph)


def test_copies_are_independent():
    graph = Graph.parse(CHAIN)
    twin = graph.copy()
    twin.set_constant("w", np.zeros(4, np.float32))
    twin.remove(twin.producer("y"))
    assert graph.constant("w").tolist() == [1, 2, 3, 4]
    assert len(graph.nodes) == 3


def test_ir3_lists_every_initializer_as_an_input():
    model = onnx.parser.parse_model(CHAIN.replace("ir_version: 8", "ir_version: 3").replace(": 17", ": 7"))
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [4]))
    graph = Graph.load(model)
    assert graph.is_constant("w")
    assert list(graph.input_types()) == ["x"]
    graph.set_constant("v", np.ones(4, np.float32))
    graph.replace_uses("w", "v")
    graph.remove_constant("w")
    back = graph.to_model()
    assert [value.name for value in back.graph.input] == ["x", "v"]
    onnx.checker.check_model(back)


def test_an_initializer_that_a_caller_may_override_is_no_constant():
    model = onnx.parser.parse_model(CHAIN)
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [4]))
    assert not Graph.load(model).is_constant("w")


def test_the_source_is_never_changed():
    model = onnx.parser.parse_model(CHAIN)
    before = model.SerializeToString()
    graph = Graph.load(model)
    graph.remove(graph.producer("y"))
    graph.set_constant("w", np.zeros(4, np.float32))
    assert model.SerializeToString() == before


BAD = {
    "a cycle": ("a = Add(x, b) b = Relu(a) y = Mul(a, b)", "cycle"),
    "a value defined nowhere": ("a = Add(x, nothing) y = Relu(a)", "'nothing', which no input"),
    "a value defined twice": ("a = Relu(x) a = Neg(x) y = Relu(a)", "'a' is defined twice"),
    "an output defined nowhere": ("a = Relu(x)", "'y', which no input"),
    "an input defined again": ("x = Relu(x) y = Relu(x)", "'x' is defined twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_graphs_are_refused(name):
    text, message = BAD[name]
    with pytest.raises(ModelError, match=message):
        Graph.parse(f'<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) {{ {text} }}')


def test_a_chain_of_ten_thousand_nodes_in_any_order():
    count = 10_000
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in reversed(range(count))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", 1, [1])],
        [helper.make_tensor_value_info(f"v{count}", 1, [1])],
    )
    loaded = Graph.load(helper.make_model(graph))
    assert [node.output[0] for node in loaded.nodes] == [f"v{i + 1}" for i in range(count)]


def test_graphsurgeon_there_and_back():
    import onnx_graphsurgeon

    graph = Graph.parse(BRANCHES)
    surgeon = graph.to_graphsurgeon()
    assert isinstance(surgeon, onnx_graphsurgeon.Graph)
    back = Graph.from_graphsurgeon(surgeon)
    assert [node.op_type for part in back.walk() for node in part.nodes] == [
        node.op_type for part in graph.walk() for node in part.nodes
    ]
    assert back.constant("w").tolist() == [1, 2, 3, 4]


def test_attribute_reads_strings_and_defaults():
    node = helper.make_node("Pad", ["x"], ["y"], mode="edge")
    assert attribute(node, "mode") == "edge"
    assert attribute(node, "none", 3) == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_edits_keep_the_index(data):
    graph = Graph.parse(BRANCHES)
    for _ in range(data.draw(st.integers(1, 12))):
        part = data.draw(st.sampled_from(list(graph.walk())))
        visible = sorted(
            {*graph.inputs[:1], *(v for n in part.nodes for v in n.output if part.is_output(v) is False)}
        )
        choice = data.draw(st.sampled_from(["emit", "constant", "replace", "input", "remove"]))
        nodes = [node for node in part.nodes if not part.bodies(node)]
        if choice == "emit":
            part.emit("Relu", [data.draw(st.sampled_from(visible))])
        elif choice == "constant":
            name = part.fresh_name("k")
            part.set_constant(name, np.ones(4, np.float32))
            part.emit("Add", [data.draw(st.sampled_from(visible)), name])
        elif choice == "replace" and nodes:
            new = part.emit("Neg", ["x"]).output[0]
            old = data.draw(st.sampled_from(nodes)).output[0]
            if old != new:
                part.replace_value(old, new)
        elif choice == "input" and nodes:
            node = data.draw(st.sampled_from(nodes))
            part.set_input(node, 0, "x")
        elif choice == "remove":
            dead = [node for node in nodes if not any(part.use_count(v) for v in node.output)]
            if dead:
                part.remove(data.draw(st.sampled_from(dead)))
    check_index(graph)
    onnx.checker.check_model(graph.to_model())
