import doctest

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel, ValidationError

from onnxslim_lab import clustering, floats, selection
from onnxslim_lab.base import Outcome
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.selection import Overrides, Patterns, find_targets, matches

NETWORK = """
<ir_version: 10, opset_import: ["" : 18]>
network (float[N, 4] x, bool[1] c) => (float[N, 2] y)
<float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4, 2] v = {1,2,3,4,5,6,7,8}>
{
    [first] a = MatMul(x, w)
    [second] b = MatMul(a, w)
    t = MatMul(b, v)
    y = If(c) <
        then_branch = yes () => (float[N, 2] p) <float[4, 2] u = {1,2,3,4,5,6,7,8}> { [inner] p = MatMul(b, u) },
        else_branch = no () => (float[N, 2] q) { q = Identity(t) }
    >
}
"""


@pytest.fixture
def model():
    return Graph.parse(NETWORK)


def found(model, **patterns):
    outcome = Outcome()
    return find_targets(model, outcome, step="prune", **patterns), outcome


def test_doctests():
    for module in (selection, floats, clustering):
        assert doctest.testmod(module).failed == 0


def test_each_weight_is_found_once_wherever_it_is_stored(model):
    targets, outcome = found(model)
    assert [target.weight for target in targets] == ["w", "v", "u"]
    assert [layer.name for layer in targets[0].layers] == ["first", "second"]
    assert targets[1].where == "t"  # a nameless node goes by its output
    assert targets[2].layer.weight_graph is not model
    assert [target.size for target in targets] == [16, 8, 8]
    assert outcome.refusals == []


def test_what_is_written_reaches_every_user(model):
    targets, _ = found(model)
    targets[0].write(np.zeros((4, 4), np.float32))
    targets[2].write(np.full((4, 2), 7, np.float32))
    again, _ = found(model)
    assert not again[0].read().any()
    assert (again[2].read() == 7).all()


@pytest.mark.parametrize(
    ("include", "exclude", "weights"),
    [
        (["first"], [], ["w"]),
        (["second"], [], ["w"]),
        (["*"], ["second"], ["v", "u"]),
        (["v", "inn*"], [], ["v", "u"]),
        ([], ["w", "t"], ["u"]),
        (["?"], [], ["w", "v", "u"]),
        (["u", "v"], ["u"], ["v"]),
    ],
)
def test_patterns_choose_by_node_and_weight_name(model, include, exclude, weights):
    targets, outcome = found(model, include=include, exclude=exclude)
    assert [target.weight for target in targets] == weights
    assert len(outcome.refusals) == 3 - len(weights)


def test_the_first_override_that_matches_counts(model):
    targets, _ = found(model, overrides={"second": 0.25, "*": 0.5, "inner": 0.75})
    assert [target.override for target in targets] == [0.25, 0.5, 0.5]


@pytest.mark.parametrize("kind", ["include", "exclude", "overrides"])
def test_a_pattern_without_a_match_is_an_error_that_suggests(model, kind):
    value = {"fist": 0.5} if kind == "overrides" else ["w", "fist"]
    with pytest.raises(ParameterError, match=rf"prune: {kind} pattern 'fist' .*did you mean 'first'\?"):
        found(model, **{kind: value})


def test_a_pattern_may_name_a_layer_that_is_refused():
    model = Graph.parse("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 2] x, float[2, 2] w) => (float[1, 2] y) { [odd] y = Conv(x, w) }
    """)
    targets, outcome = found(model, include=["odd"])
    assert targets == []
    assert [refusal.where for refusal in outcome.refusals] == ["odd"]


def test_weights_of_functions_are_found():
    weight = helper.make_node(
        "Constant", [], ["w"], value=numpy_helper.from_array(np.ones((4, 4), np.float32), "")
    )
    product = helper.make_node("MatMul", ["a", "w"], ["b"], name="product")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Product", ["a"], ["b"], [weight, product], opsets[:1])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    call = helper.make_node("Product", ["x"], ["y"], domain="local")
    graph = helper.make_graph([call], "g", [x], [y])
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    model = Graph.load(proto)
    targets, _ = found(model)
    assert [target.weight for target in targets] == ["w"]
    targets[0].write(np.zeros((4, 4), np.float32))
    stored = model.to_model().functions[0].node[0].attribute[0].t
    assert not numpy_helper.to_array(stored).any()


def test_names_with_glob_characters_match_themselves():
    assert matches("block[0]/*", ["block[0]/*"])
    assert not matches("block[0]/*", ["block[0]/conv"])
    assert matches("*conv", ["onnx::conv"])


class Example(BaseModel):
    patterns: Patterns = ()
    overrides: Overrides[float] = {}


def test_text_and_structured_forms_agree():
    assert Example(patterns=" a*;b ").patterns == Example(patterns=["a*", "b"]).patterns == ("a*", "b")
    assert Example(overrides="a:0:0.5; b:1").overrides == {"a:0": 0.5, "b": 1.0}
    assert Example.model_validate_json(Example(overrides="a:1").model_dump_json()).overrides == {"a": 1.0}
    assert Example.model_json_schema()["properties"]["overrides"]["type"] == "object"


@pytest.mark.parametrize("text", ["a", "a:", ":0.5", "a:0.1;a:0.2", "a:x"])
def test_malformed_overrides_are_refused(text):
    with pytest.raises(ValidationError):
        Example(overrides=text)
