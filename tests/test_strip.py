"""strip: what people read goes, what the model computes and is called from outside stays."""

import numpy as np
import onnx
import pytest
from onnx import helper
from passes_helper import HEADER, assert_equal_outputs, assert_settled, check, runner

from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.strip import Strip

CAPTURE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[4] x, bool c) => (float[4] y) <float[4] long_constant = {1, 2, 3, 4}>
{
  [first_node] long_hidden = Add (x, long_constant)
  [branch] y = If (c) <
    then_branch = t () => (float[4] then_result) { [inner] inner_value = Exp (long_hidden) then_result = Neg (inner_value) },
    else_branch = e () => (float[4] else_result) { inner_value = Abs (long_hidden) else_result = Mul (inner_value, long_constant) }
  >
}"""


def test_doc_strings_go_and_those_of_the_interface_stay():
    model = onnx.parser.parse_model(HEADER + "g (float[4] x) => (float[4] y) { h = Relu (x) y = Exp (h) }")
    model.doc_string = model.graph.doc_string = model.graph.input[0].doc_string = "kept"
    model.metadata_props.add(key="alphabet", value="abc")
    for node in model.graph.node:
        node.doc_string = "File model.py, line 7"
        node.metadata_props.add(key="trace", value="x" * 100)
    graph = Graph.load(model)
    outcome = Strip().run(graph)
    result = graph.to_model()
    assert [(node.doc_string, len(node.metadata_props)) for node in result.graph.node] == [("", 0), ("", 0)]
    assert result.doc_string == result.graph.doc_string == result.graph.input[0].doc_string == "kept"
    assert result.metadata_props[0].value == "abc"
    change = outcome.changes[0]
    assert change.bytes_before - change.bytes_after > 250
    assert graph.file_bytes() == change.bytes_after == len(result.SerializeToString())
    assert_settled(Strip(), graph)


def test_fields_that_are_there_and_empty_go():
    model = onnx.parser.parse_model(HEADER + "g (float[4] x) => (float[4] y) { h = Relu (x) y = Exp (h) }")
    for node in model.graph.node:
        node.name = node.domain = node.doc_string = ""
    graph = Graph.load(model)
    before = graph.file_bytes()
    (change,) = Strip(types=False).run(graph).changes
    assert change.what == "removed doc strings, metadata and empty fields of 2 nodes and values"
    assert before - graph.file_bytes() == 2 * 3 * 2
    named = Graph.load(
        onnx.parser.parse_model(HEADER + "g (float[4] x) => (float[4] y) { [n] y = Relu (x) }")
    )
    Strip(names=True).run(named)
    assert not named.to_model().graph.node[0].HasField("name")


def test_types_that_inference_finds_go_and_others_stay():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "my.domain" : 1]> g (float[4] x) => (float[4] y)'
        "{ h = Relu (x) k = my.domain.Thing (h) y = Exp (k) }"
    )
    for name in "hk":
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]))
    graph = Graph.load(model)
    Strip().run(graph)
    assert [value.name for value in graph.to_model().graph.value_info] == ["k"]
    kept = Graph.load(model)
    Strip(types=False).run(kept)
    assert len(kept.to_model().graph.value_info) == 2


@pytest.mark.parametrize(
    ("declared", "goes"),
    [
        (["both", 4], False),  # inference loses it: runtimes would not know that h and z are of one size
        (["unk__7", 4], True),  # an exporter's name for a size, which no input has
        ([3, 4], False),
        ([None, 4], True),
        (None, True),
        (["both", 4, 1], True),  # wrong: it has two axes
    ],
)
def test_sizes_that_inference_does_not_find_again_stay(declared, goes):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 4] x, float[both, 4] z) => (float[N, M] y)'
        "{ r = Concat<axis = 0> (x, x) h = Relu (r) y = Add (h, z) }"
    )
    for name in "rh":
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, declared))
    graph = Graph.load(model)
    Strip().run(graph)
    assert [value.name for value in graph.to_model().graph.value_info] == ([] if goes else ["r", "h"])
    assert_settled(Strip(), graph)


def test_default_attributes_go():
    text = "(float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, N, M] y)"
    check(
        Strip(),
        f"g {text} {{ y = Conv <dilations = [1, 1], group = 1, pads = [0, 0, 0, 0], strides = [2, 2]> (x, w) }}",
        f"g {text} {{ y = Conv <strides = [2, 2]> (x, w) }}",
    )
    check(
        Strip(),
        "g (float[2, 3] x) => (float[2, 3] y) { h = Softmax <axis = -1> (x) y = LeakyRelu <alpha = 0.02> (h) }",
        "g (float[2, 3] x) => (float[2, 3] y) { h = Softmax (x) y = LeakyRelu <alpha = 0.02> (h) }",
    )


def test_a_default_of_another_opset_stays():
    text = '<ir_version: 7, opset_import: ["" : 11]> g (float[2, 3] x) => (float[2, 3] y)'
    check(Strip(documents=False), text + "{ y = Softmax <axis = -1> (x) }")


@pytest.mark.parametrize("condition", [True, False])
def test_names_are_shortened_where_bodies_capture_them(condition):
    graph = Graph.parse(CAPTURE)
    original = graph.copy()
    Strip(names=True).run(graph)
    result = graph.to_model()
    onnx.checker.check_model(result)
    assert (graph.inputs, graph.outputs) == (["x", "c"], ["y"])
    text = str(result)
    assert "long_" not in text
    assert "inner" not in text
    assert "first_node" not in text
    feed = {"x": np.float32([1, -2, 3, -4]), "c": np.array(condition)}
    assert_equal_outputs(original, graph, [feed])
    assert_settled(Strip(names=True), graph)


def test_names_stay_unless_asked_for():
    graph = Graph.parse(CAPTURE)
    assert not Strip(documents=False).run(graph).changes


def test_names_that_seeds_or_callers_go_by_stay():
    text = """<ir_version: 3, opset_import: ["" : 9]> g (float[4] x, float[4] default_weight) => (float[4] y)
    <float[4] default_weight = {1, 2, 3, 4}>
    { random_value = RandomUniform <shape = [4]> () hidden_value = Add (random_value, default_weight) y = Mul (x, hidden_value) }"""
    graph = Graph.parse(text)
    Strip(names=True).run(graph)
    names = {name for node in graph.nodes for name in (*node.input, *node.output)}
    assert {"random_value", "default_weight", "x", "y"} <= names
    assert "hidden_value" not in names
    runner().load_seconds(graph)
