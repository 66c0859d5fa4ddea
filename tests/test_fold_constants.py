"""fold-constants: what folds, what must not, sizes, hostile inputs, random graphs."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxslim_lab.base import Context
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.fold_constants import FoldConstants

HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def parse(body, head=HEAD):
    return Graph.parse(head + body)


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def model(nodes, initializers=(), inputs=("x",), outputs=("y",), shape=("n", 4), opset=17, ir=8):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in inputs],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
        [tensor(name, value) for name, value in initializers],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    return onnx.shape_inference.infer_shapes(made)


def fold(graph, **options):
    """Fold; check that the file did not grow unless allowed, and that a second run changes nothing."""
    before = graph.file_bytes()
    outcome = FoldConstants(**options).run(graph)
    if not options.get("allow_growth"):
        assert graph.file_bytes() <= before
    version = graph.version
    assert not FoldConstants(**options).run(graph).changes
    assert graph.version == version
    return outcome


def ops(graph):
    return [node.op_type for node in graph.nodes]


def reasons(outcome):
    return " | ".join(refusal.reason for refusal in outcome.refusals)


def test_shape_arithmetic_folds_to_the_value():
    graph = parse("""g (float[2, 3] x) => (float[3, 2] y) {
        s = Shape (x)  i = Constant <value_ints = [1, 0]> ()  t = Gather (s, i)  y = Reshape (x, t) }""")
    outcome = fold(graph)
    assert ops(graph) == ["Reshape"]
    assert graph.constant("t").tolist() == [3, 2]
    assert graph.initializers == ["t"]
    assert {change.where for change in outcome.changes} >= {"Gather t"}


def test_static_part_of_a_dynamic_shape():
    graph = parse("""g (float[n, 3, 5] x) => (int64[3] y, int64 w) {
        a = Shape <start = 1> (x)  two = Constant <value_int = 2> ()  m = Mul (a, two)
        n = Shape <end = 1> (x)  y = Concat <axis = 0> (n, m)  w = Size (x) }""")
    fold(graph)
    assert sorted(ops(graph)) == ["Concat", "Shape", "Size"]
    assert graph.constant("m").tolist() == [6, 10]


def test_weights_made_by_constant_of_shape_stay():
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["w"], value=tensor("", np.array([0.5], np.float32))),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    made = model(nodes, [("s", np.array([4, 1000]))])
    graph = Graph.load(made)
    outcome = fold(graph)
    assert ops(graph) == ["ConstantOfShape", "MatMul"]
    assert "bytes larger (allow_growth=true folds it)" in reasons(outcome)
    graph = Graph.load(made)
    fold(graph, allow_growth=True)
    assert ops(graph) == ["MatMul"]
    assert graph.constant("w").shape == (4, 1000)
    assert graph.initializers == ["w"]


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_narrow_storage_stays(dtype):
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "scale"], ["m"]),
        helper.make_node("MatMul", ["x", "m"], ["y"]),
    ]
    made = model(nodes, [("w", np.ones((4, 300), dtype)), ("scale", np.float32(0.5))])
    graph = Graph.load(made)
    fold(graph)
    assert ops(graph) == ["Cast", "Mul", "MatMul"]
    graph = Graph.load(made)
    fold(graph, allow_growth=True)
    assert ops(graph) == ["MatMul"]
    np.testing.assert_array_equal(graph.constant("m"), np.full((4, 300), 0.5, np.float32))


@pytest.mark.parametrize("growth", [False, True])
def test_quantization_is_not_undone(growth):
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    graph = Graph.load(model(nodes, [("w", np.ones((4, 300), np.float32)), ("s", np.float32(0.5))]))
    outcome = fold(graph, allow_growth=growth)
    assert ops(graph) == ["DequantizeLinear", "MatMul"]
    assert graph.constant("q").dtype == np.uint8
    assert "undo the quantization" in reasons(outcome)


def test_a_weight_with_another_reader_is_not_stored_twice():
    w = np.arange(1200, dtype=np.float32).reshape(300, 4)
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
        helper.make_node("MatMul", ["y", "w"], ["z"]),
    ]
    graph = Graph.load(model(nodes, [("w", w)], outputs=("z",)))
    fold(graph)
    assert ops(graph) == ["Transpose", "MatMul", "MatMul"]
    graph = Graph.load(model(nodes[:2], [("w", w)]))
    fold(graph)
    assert ops(graph) == ["MatMul"]
    np.testing.assert_array_equal(graph.constant("t"), w.T)


def test_a_component_that_would_grow_is_folded_in_part():
    nodes = [
        helper.make_node("Add", ["s", "one"], ["s1"]),
        helper.make_node("ConstantOfShape", ["s1"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = Graph.load(model(nodes, [("s", np.array([3, 999])), ("one", np.array([1, 1]))]))
    fold(graph)
    assert ops(graph) == ["ConstantOfShape", "MatMul"]
    assert graph.constant("s1").tolist() == [4, 1000]
    assert graph.initializers == ["s1"]


def test_large_values_on_the_way_to_small_ones_fold():
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["w"], value=tensor("", np.array([2.0], np.float32))),
        helper.make_node("Neg", ["w"], ["n"]),
        helper.make_node("ReduceSum", ["n"], ["r"], keepdims=0),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    graph = Graph.load(model(nodes, [("s", np.array([1000, 100]))]))
    fold(graph)
    assert ops(graph) == ["Add"]
    assert graph.constant("r") == -200000


def test_folded_graph_output_is_legal_and_runs(tmp_path):
    graph = parse("""g (float[2] x) => (float[2] y, int64[1] s) {
        [the_shape_of_the_input_of_the_model_of_which_this_is_a_test] s = Shape (x)  y = Relu (x) }""")
    fold(graph)
    made = graph.to_model()
    onnx.checker.check_model(made, full_check=True)
    assert [output.name for output in made.graph.output] == ["y", "s"]
    assert sorted(ops(graph)) == ["Constant", "Relu"]
    _y, s = ReferenceEvaluator(made).run(None, {"x": np.zeros(2, np.float32)})
    assert s.tolist() == [2]


def test_bodies_fold_with_captured_constants():
    graph = parse("""g (bool c, float[3] x) => (float[3] y) <int64[1] a = {1}, int64[1] b = {2}> {
        y = If (c) <
            then_branch = t () => (float[3] u) { k = Add (a, b)  f = Cast <to = 1> (k)  u = Add (x, f) },
            else_branch = e () => (float[3] v) { v = Identity (x) }
        > }""")
    fold(graph)
    (body,) = graph.bodies(graph.nodes[0])["then_branch"]
    assert ops(body) == ["Add"]
    assert body.constant("f").tolist() == [3.0]
    assert graph.initializers == ["a", "b"]


def test_functions_keep_constant_nodes_and_attribute_references():
    graph = parse(
        """g (float[3] x) => (float[3] y) { y = f.fn <alpha = 2> (x) }
        <domain: "f", opset_import: ["": 17]> fn <alpha> (p) => (q) {
            a = Constant <value_float: float = @alpha> ()  two = Constant <value_float = 2.0> ()
            [the_product_of_two_and_two] four = Mul (two, two)  r = Mul (p, four)  q = Mul (r, a) }""",
        '<ir_version: 8, opset_import: ["": 17, "f": 1]>',
    )
    fold(graph)
    (function,) = graph.functions.values()
    assert sorted(ops(function)) == ["Constant", "Constant", "Mul", "Mul"]
    assert function.constant("four") == 4


def test_overridable_initializers_are_no_constants():
    graph = parse("""g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { n = Neg (w)  y = Add (x, n) }""")
    outcome = fold(graph)
    assert ops(graph) == ["Neg", "Add"]
    assert not outcome.refusals


def test_old_ir_keeps_its_inputs():
    nodes = [helper.make_node("Neg", ["w"], ["n"], "n" * 60), helper.make_node("Add", ["x", "n"], ["y"])]
    made = model(nodes, [("w", np.ones(4, np.float32))], inputs=("x", "w"), shape=(4,), ir=3)
    graph = Graph.load(made)
    fold(graph)
    assert ops(graph) == ["Constant", "Add"]
    saved = graph.to_model()
    onnx.checker.check_model(saved)
    assert [value.name for value in saved.graph.input] == ["x"]


def test_random_unknown_and_variable_nodes():
    graph = parse(
        """g (float[2] x) => (float[2] y, float[2] r, float[2] u) <float[2] w = {1, 2}> {
        r = RandomNormal <shape = [2]> ()  u = custom.Op (w)  y = custom.Op (x) }""",
        '<ir_version: 8, opset_import: ["": 17, "custom": 1]>',
    )
    outcome = fold(graph)
    assert len(graph.nodes) == 3
    assert reasons(outcome) == "its result is random | there is no kernel for 'Op' of 'custom'"


def test_failing_nodes_are_left_with_the_reason():
    graph = parse("""g (int64[1] x) => (int64[1] y) <int64[1] a = {1}, int64[1] b = {0}> {
        d = Div (a, b)  n = Neg (d)  y = Add (x, n) }""")
    outcome = fold(graph)
    assert ops(graph) == ["Div", "Neg", "Add"]
    assert reasons(outcome) == "cannot be computed: Div: an integer is divided by zero"


def test_failure_of_a_large_node_keeps_what_it_reads():
    nodes = [
        helper.make_node("Neg", ["w"], ["n"]),
        helper.make_node("Gather", ["n", "i"], ["p"], axis=0),
        helper.make_node("MatMul", ["x", "p"], ["y"]),
    ]
    initializers = [("w", np.ones((4, 30000), np.float32)), ("i", np.array([0, 1, 2, 9]))]
    graph = Graph.load(model(nodes, initializers))
    outcome = FoldConstants().run(graph)
    assert "cannot be computed" in reasons(outcome)
    onnx.checker.check_model(graph.to_model())
    assert ops(graph)[-2:] == ["Gather", "MatMul"]


def test_nan_infinity_and_strings():
    graph = parse("""g (float[2] x, string[2] t) => (float[2] y, bool[2] z) {
        o = Constant <value_floats = [-1.0, 0.0]> ()  l = Log (o)  y = Add (x, l)
        s = Constant <value_strings = ["a", "b"]> ()  u = Identity (s)  z = Equal (t, u) }""")
    fold(graph)
    assert ops(graph) == ["Add", "Equal"]
    assert np.isnan(graph.constant("l")[0])
    assert graph.constant("l")[1] == -np.inf
    assert graph.constant("u").tolist() == ["a", "b"]


def test_sparse_constants():
    def sparse(count):
        values, places = tensor("", np.ones(5, np.float32)), tensor("", np.arange(5) * 2)
        value = helper.make_sparse_tensor(values, places, [count])
        nodes = [
            helper.make_node("Constant", [], ["c"], sparse_value=value),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ]
        return Graph.load(model(nodes, shape=(count,)))

    graph = sparse(10)
    fold(graph)
    assert ops(graph) == ["Add"]
    assert graph.constant("c").tolist() == [1, 0] * 5
    graph = sparse(1000)
    assert "4000 bytes as a dense one" in reasons(fold(graph))
    fold(graph, allow_growth=True)
    assert ops(graph) == ["Add"]


def hostile():
    big = np.array([10_000, 10_000])
    one = np.ones((1, 1), np.float32)
    yield "ConstantOfShape", [big], {}
    yield "Expand", [one, big], {}
    yield "Tile", [one, big], {}
    yield "Range", [np.int64(0), np.int64(10**9), np.int64(1)], {}
    yield "Pad", [one, np.array([0, 0, 9_999, 9_999])], {}
    yield "OneHot", [np.arange(100), np.int64(10**8), np.array([0, 1], np.float32)], {}
    yield "Add", [np.ones((20_000, 1), np.float32), np.ones((1, 20_000), np.float32)], {}
    yield "MatMul", [np.ones((20_000, 1), np.float32), np.ones((1, 20_000), np.float32)], {}
    yield "Gather", [np.ones((1, 20_000), np.float32), np.zeros(20_000, np.int64)], {}
    yield "Einsum", [np.ones(20_000, np.float32)] * 2, {"equation": "i,j->ij"}
    yield "ConstantOfShape", [np.array([1 << 40, 1 << 40])], {}
    yield "ConstantOfShape", [np.array([-4])], {}


@pytest.mark.parametrize("growth", [False, True])
@pytest.mark.parametrize(("op_type", "inputs", "attributes"), list(hostile()))
def test_hostile_sizes_are_refused_before_allocation(op_type, inputs, attributes, growth):
    names = [f"i{position}" for position in range(len(inputs))]
    nodes = [
        helper.make_node(op_type, names, ["w"], **attributes),
        helper.make_node("NonZero", ["w"], ["k"]),
        helper.make_node("Cast", ["k"], ["y"], to=1),
    ]
    graph = Graph.load(model(nodes, zip(names, inputs, strict=True)))
    tracemalloc.start()
    start = time.perf_counter()
    outcome = FoldConstants(allow_growth=growth).run(graph, Context(memory=16 << 20))
    assert time.perf_counter() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()
    assert ops(graph) == [op_type, "NonZero", "Cast"]
    assert "over the memory allowed" in reasons(outcome) or "cannot be computed" in reasons(outcome)


@pytest.mark.parametrize("size", [1, 40_000])
def test_a_chain_of_ten_thousand_nodes(size):
    nodes = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(10_000)]
    nodes.append(helper.make_node("Add", ["x", "v10000"], ["y"]))
    made = model(nodes, [("v0", np.full(size, 3, np.float32))], shape=(size,))
    graph = Graph.load(made)
    start = time.perf_counter()
    FoldConstants().run(graph)
    assert time.perf_counter() - start < 30
    assert ops(graph) == ["Add"]
    assert graph.constant("v10000")[0] == 3


SHAPES = [(), (1,), (3,), (2, 1), (2, 3)]


@st.composite
def random_models(draw):
    """A random graph of constants and one input, of every kind of shape and of sizes that grow and shrink."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = {"x": False}
    initializers = []
    for position in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([*SHAPES, (40, 2, 3)]))
        initializers.append((f"c{position}", rng.normal(size=shape).astype(np.float32)))
        values[f"c{position}"] = True
    nodes = []
    for position in range(draw(st.integers(1, 14))):
        op_type = draw(st.sampled_from(["Add", "Mul", "Sub", "Neg", "Identity", "ReduceMax", "Shape", "Max"]))
        count = 2 if op_type in {"Add", "Mul", "Sub", "Max"} else 1
        picks = [draw(st.sampled_from(sorted(values))) for _ in range(count)]
        name = f"v{position}"
        if op_type == "Shape":
            nodes.append(helper.make_node("Shape", picks, [f"{name}_i"]))
            nodes.append(helper.make_node("Cast", [f"{name}_i"], [f"{name}_f"], to=1))
            nodes.append(helper.make_node("ReduceMax", [f"{name}_f"], [name]))
        elif op_type == "ReduceMax":
            nodes.append(helper.make_node(op_type, picks, [name], keepdims=0))
        else:
            nodes.append(helper.make_node(op_type, picks, [name]))
        values[name] = True
    made = [name for name in values if name.startswith("v")]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    return model(nodes, initializers, outputs=tuple(outputs), shape=("n", 3))


@settings(max_examples=120, deadline=None)
@given(random_models(), st.booleans())
def test_random_graphs_keep_their_outputs(made, growth):
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    before = ReferenceEvaluator(made).run(None, {"x": x})
    graph = Graph.load(made)
    fold(graph, allow_growth=growth)
    result = graph.to_model()
    onnx.checker.check_model(result)
    after = ReferenceEvaluator(result).run(None, {"x": x})
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5)
        assert np.shape(old) == np.shape(new)
