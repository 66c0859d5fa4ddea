"""runtime.py: bodies, functions, sequences."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtime_helper import HEAD, agrees

from onnxslim_lab import runtime
from onnxslim_lab.errors import ModelError, ParameterError, RunError, UnsupportedError
from onnxslim_lab.graph import Graph
from onnxslim_lab.kernels import lookup
from onnxslim_lab.running import functions as runtime_functions
from onnxslim_lab.running import plan as runtime_plan
from onnxslim_lab.running import support as runtime_support
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.sessions import Runner

NESTED = f"""{HEAD} nested (float[2] x, bool c, int64 n) => (float[2] y, float[k, 2] rows) {{
  one = Constant <value = float[2] {{1, 2}}> ()
  shift = Add(x, one)
  y, rows = Loop(n, c, x) <body = turn (int64 i, bool go, float[2] state) => (bool more, float[2] next, float[2] row) {{
    more = And(c, go)
    next = If (more) <
      then_branch = yes () => (float[2] t) {{ both = Add(shift, one)  t = Mul(state, both) }},
      else_branch = no () => (float[2] e) {{ e = Identity(x) }}>
    row = Sub(next, shift)
  }}>
}}"""


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as shared:
        yield shared


def test_hook_sees_nodes_of_bodies():
    seen = []
    feed = {"x": np.ones(2, np.float32), "c": np.array(True), "n": np.array(2)}
    runtime.run(Graph.parse(NESTED), feed, hook=lambda node, *_: seen.append(node.op_type))
    assert seen == ["Add", *["And", "Add", "Mul", "If", "Sub"] * 2, "Loop"]


@pytest.mark.parametrize(("condition", "trips"), [(True, 3), (True, 0), (False, 3)])
def test_nested_bodies_and_captures(runner, condition, trips):
    feed = {"x": np.array([1, -2], np.float32), "c": np.array(condition), "n": np.array(trips)}
    assert agrees(Graph.parse(NESTED), feed, runner)


def scan_model(opset, directions):
    body = onnx.parser.parse_graph(
        "turn (float[2] s, float[2] a, float b) => (float[2] t, float[2] o, float p) "
        "{ u = Add(s, a) t = Mul(u, k) o = Sub(t, a) p = Add(b, b) }"
    )
    node = helper.make_node(
        "Scan",
        ["s", "a", "b"],
        ["t", "o", "p"],
        body=body,
        num_scan_inputs=2,
        scan_input_axes=[1, 0],
        scan_output_axes=[-1, 0],
        scan_input_directions=directions,
        scan_output_directions=directions[::-1],
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("s", 1, [2]), value("a", 1, [2, "n"]), value("b", 1, ["n"])],
        [value("t", 1, [2]), value("o", 1, [2, "n"]), value("p", 1, ["n"])],
        [numpy_helper.from_array(np.array(0.5, np.float32), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("opset", [9, 16])
@pytest.mark.parametrize("directions", [[0, 0], [1, 0], [0, 1]])
def test_scan(runner, opset, directions):
    random = np.random.default_rng(0)
    feed = {name: random.standard_normal(shape).astype(np.float32) for name, shape in
            {"s": 2, "a": (2, 4), "b": 4}.items()}  # fmt: skip
    assert agrees(Graph.load(scan_model(opset, directions)), feed, runner)


def test_scan_of_opset_8_has_batches_and_lengths():
    body = onnx.parser.parse_graph(
        "turn (float s, float a) => (float t, float o) { t = Add(s, a) o = Identity(t) }"
    )
    node = helper.make_node(
        "Scan", ["lengths", "s", "a"], ["t", "o"], body=body, num_scan_inputs=1, directions=[0]
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("lengths", 7, [2]), value("s", 1, [2]), value("a", 1, [2, 3])],
        [value("t", 1, [2]), value("o", 1, [2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)
    a = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    result = runtime.run(model, {"lengths": np.array([3, 2]), "s": np.zeros(2, np.float32), "a": a})
    assert result["t"].tolist() == [6, 9]
    assert result["o"].tolist() == [[1, 3, 6], [4, 9, 0]]


FUNCTIONS = """<ir_version: 10, opset_import: ["": 17, "own": 1]>
g (float[n] x) => (float[n] y, float[n] z, float[n] w) {
  y = own.scaled <factor = 3.0> (x)
  z = own.scaled (x)
  w = own.twice (x)
}
<domain: "own", opset_import: ["": 17]>
scaled <factor: float = 2.0> (a) => (b) {
  f = Constant <value_float: float = @factor> ()
  yes = Constant <value = bool {1}> ()
  b = If (yes) <then_branch = t () => (c) { c = Mul(a, f) }, else_branch = e () => (d) { d = Identity(a) }>
}
<domain: "own", opset_import: ["": 17, "own": 1]>
twice (a) => (b) { c = own.scaled <factor = 5.0> (a)  b = own.scaled (c) }
"""


def test_local_functions_take_attributes_defaults_and_each_other():
    result = runtime.run(Graph.parse(FUNCTIONS), {"x": np.ones(1, np.float32)})
    assert {name: value.tolist() for name, value in result.items()} == {"y": [3], "z": [2], "w": [10]}


def test_a_function_that_calls_itself_is_refused():
    text = """<ir_version: 10, opset_import: ["": 17, "own": 1]> g (float[n] x) => (float[n] y) { y = own.f (x) }
    <domain: "own", opset_import: ["own": 1]> f (a) => (b) { b = own.f (a) }"""
    with pytest.raises(ModelError, match="'f' of domain 'own' calls itself"):
        Interpreter(Graph.parse(text))


def without_kernels(monkeypatch, *op_types):
    """Make the runtime believe that some operators have no kernel."""

    def less(op_type, domain="", opset=1):
        return None if op_type in op_types else lookup(op_type, domain, opset)

    for module in (runtime_plan, runtime_support):
        monkeypatch.setattr(module, "lookup", less)


@pytest.mark.parametrize(
    ("op_type", "attributes", "shapes"),
    [
        ("Softmax", {"axis": 0}, [(3, 4)]),  # the body depends on the types
        ("LayerNormalization", {"epsilon": 0.1}, [(3, 4), (4,), (4,)]),
        ("Clip", {}, [(3, 4), (), ()]),
        ("MeanVarianceNormalization", {"axes": [0, 2]}, [(2, 3, 4)]),  # the body is always the same
        ("HardSwish", {}, [(5,)]),
        ("Elu", {"alpha": 0.3}, [(5,)]),
    ],
)
def test_bodies_of_the_specification(runner, monkeypatch, op_type, attributes, shapes):
    without_kernels(monkeypatch, op_type)
    random = np.random.default_rng(0)
    feed = {f"x{i}": random.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    if op_type == "Clip":
        feed |= {"x1": np.array(-0.5, np.float32), "x2": np.array(0.5, np.float32)}
    node = helper.make_node(op_type, list(feed), ["y"], **attributes)
    inputs = [helper.make_tensor_value_info(name, 1, ["n"] * value.ndim) for name, value in feed.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert agrees(Graph.load(model), feed, runner)


def test_what_is_missing_is_said_before_anything_runs():
    text = """<ir_version: 9, opset_import: ["": 17, "odd": 3]>
    g (float[n] x, bool c) => (float[n] y) {
      [early] a = odd.Strange (x)
      y = If (c) <
        then_branch = t () => (float[n] p) { [deep] p = odd.Stranger (a) },
        else_branch = e () => (float[n] q) { q = Identity(a) }>
    }
    <domain: "odd", opset_import: ["nobody": 2]> unused (a) => (b) { b = nobody.Asks (a) }"""
    graph = Graph.parse(text)
    missing = runtime.supports(graph)
    assert [(m.domain, m.op_type, m.version) for m in missing] == [
        ("odd", "Strange", 3),
        ("odd", "Stranger", 3),
    ]
    with pytest.raises(
        UnsupportedError, match="'Strange' of domain 'odd' \\(version 3\\), node 'early'.*'deep'"
    ):
        Interpreter(graph)
    assert runtime.supports(Graph.parse(NESTED)) == []


def test_missing_operators_inside_a_body_of_the_specification_count(monkeypatch):
    without_kernels(monkeypatch, "MeanVarianceNormalization", "ReduceMean")
    graph = Graph.parse(
        f"{HEAD} g (float[a, b] x) => (float[a, b] y) {{ y = MeanVarianceNormalization <axes = [0]> (x) }}"
    )
    assert [missing.op_type for missing in runtime.supports(graph)] == ["MeanVarianceNormalization"]


def test_errors_in_bodies_name_the_inner_node():
    graph = Graph.parse(f"""{HEAD} g (float[n] x, float[m] z, bool c) => (float[k] y) {{
      [outer] y = If (c) <then_branch = t () => (float[k] p) {{ [inner] p = Mul(x, z) }},
                          else_branch = e () => (float[k] q) {{ q = Identity(x) }}> }}""")
    feed = {"x": np.ones(2, np.float32), "z": np.ones(3, np.float32), "c": np.array(True)}
    with pytest.raises(RunError, match="^node 'inner' \\(Mul\\): .*float32\\[2\\].*float32\\[3\\]"):
        runtime.run(graph, feed)


def test_sequences_optionals_and_strings():
    text = f"""{HEAD} g (seq(float[n]) s, optional(float[n]) o) => (float[m] y, bool has, int64 count, string[k] t) {{
      position = Constant <value_int = -2> ()
      part = SequenceAt(s, position)
      longer = SequenceInsert(s, part)
      count = SequenceLength(longer)
      y = ConcatFromSequence <axis = 0> (longer)
      has = OptionalHasElement(o)
      t = Constant <value_strings = ["a", "b"]> ()
    }}"""
    text = text.replace('"": 17', '"": 18')
    graph = Graph.parse(text)
    s = [np.array([1, 2], np.float32), np.array([3], np.float32)]
    result = runtime.run(graph, {"s": s, "o": None})
    assert result["y"].tolist() == [1, 2, 3, 1, 2]
    assert (result["has"].item(), result["count"].item(), result["t"].tolist()) == (False, 3, ["a", "b"])
    assert len(s) == 2
    assert runtime.run(graph, {"s": s, "o": s[0]})["has"].item()


def test_sequence_map(runner):
    body = onnx.parser.parse_graph(
        "each (float[n] a, float[2] b) => (float[n] c) { d = Mul(a, k) c = Add(d, b) }"
    )
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2]))
    graph = helper.make_graph(
        [helper.make_node("SequenceMap", ["s", "b"], ["t"], body=body)],
        "g",
        [helper.make_value_info("s", sequence), helper.make_tensor_value_info("b", 1, [2])],
        [helper.make_value_info("t", sequence)],
        [numpy_helper.from_array(np.array(3, np.float32), "k")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    s = [np.array([1, 2], np.float32), np.array([3, 4], np.float32)]
    result = runtime.run(model, {"s": s, "b": np.array([10, 20], np.float32)})
    assert [item.tolist() for item in result["t"]] == [[13, 26], [19, 32]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y = SequenceAt(s, p)", "position 2 is outside a sequence of 2"),
        ("z = SequenceErase(s, p)  y = ConcatFromSequence <axis = 0> (z)", "position 2 is outside"),
        ("e = SequenceEmpty()  y = ConcatFromSequence <axis = 0> (e)", "the sequence is empty"),
    ],
)
def test_errors_of_sequences(text, message):
    graph = Graph.parse(f"{HEAD} g (seq(float[n]) s, int64 p) => (float[m] y) {{ {text} }}")
    with pytest.raises(RunError, match=message):
        runtime.run(graph, {"s": [np.ones(1, np.float32)] * 2, "p": np.array(2)})


def test_types_of_values():
    assert runtime_functions.type_of(np.array(["a"], object)).tensor_type.elem_type == TensorProto.STRING
    assert (
        runtime_functions.type_of([np.ones(2)]).sequence_type.elem_type.tensor_type.elem_type
        == TensorProto.DOUBLE
    )
    assert runtime_functions.type_of(None) == onnx.TypeProto()


def test_bodies_cannot_be_run_alone():
    graph = Graph.parse(NESTED)
    (body,) = (part for part in graph.walk() if part.name == "turn")
    with pytest.raises(ParameterError, match="'turn' is a body"):
        Interpreter(body)
