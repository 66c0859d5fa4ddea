"""The encode pass on whole models: same outputs, smaller files, nothing else changed."""

import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxslim_lab.base import Context
from onnxslim_lab.errors import ModelError
from onnxslim_lab.graph import Graph
from onnxslim_lab.opset import raise_opset
from onnxslim_lab.passes.encode import Encode

IR_OF_OPSET = {7: 3, 9: 4, 11: 6, 13: 7, 17: 8, 21: 10, 25: 13}


def pruned(shape, density=0.08, values=15, seed=0):
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(values).astype(np.float32)
    return np.where(rng.random(shape) < density, rng.choice(pool, shape), np.float32(0))


def network(opset=17, shapes=((784, 300), (300, 100), (100, 10)), weights=None):
    """Return a multi-layer perceptron, x [n, 784] to y, as a ModelProto."""
    weights = weights or [pruned(shape, seed=seed) for seed, shape in enumerate(shapes)]
    nodes, tensors, value = [], [], "x"
    for number, weight in enumerate(weights):
        tensors += [numpy_helper.from_array(weight, f"fc{number}.weight")]
        tensors += [
            numpy_helper.from_array(np.linspace(-1, 1, weight.shape[1]).astype("f"), f"fc{number}.bias")
        ]
        out = "y" if number == len(weights) - 1 else f"h{number}"
        nodes.append(helper.make_node("Gemm", [value, f"fc{number}.weight", f"fc{number}.bias"], [out]))
        value = out
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weights[0].shape[0]]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weights[-1].shape[1]]),
    ]
    graph = helper.make_graph(nodes, "mlp", ends[:1], ends[1:], tensors)
    if IR_OF_OPSET[opset] < 4:
        for tensor in tensors:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_OF_OPSET[opset], producer_name="test")


def with_body(body, tensors=(), condition=True):
    """Return a model y = If(condition) {body} else {Identity(x)} with x [2, 64]."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (bool condition, float[2, 64] x) => (float[2, 64] y) {{
        y = If (condition) <
            then_branch = then () => (float[2, 64] inside) {{ {body} }},
            else_branch = otherwise () => (float[2, 64] outside) {{ outside = Identity (x) }}>
    }}"""
    model = parser.parse_model(text)
    model.graph.node[0].attribute[0].g.initializer.extend(tensors)
    return model


def run(model, feeds=None, *, optimize=True, saved=""):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if saved:
        options.optimized_model_filepath = str(saved)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    if feeds is None:
        feeds = {item.name: rng.random((2, item.shape[1]), np.float32) for item in session.get_inputs()}
    return session.run(None, feeds)


def encoded(model, context=None, **parameters):
    """Return (encoded ModelProto, outcome), after checking it and that a second run changes nothing."""
    graph = Graph.load(model)
    outcome = Encode(**parameters).run(graph, context)
    result = graph.to_model()
    onnx.checker.check_model(result, full_check=True)
    again = Graph.load(result)
    assert not Encode(**parameters).run(again, context).changes
    assert again.to_model().SerializeToString() == result.SerializeToString()
    return result, outcome


@pytest.mark.parametrize("opset", sorted(IR_OF_OPSET))
def test_outputs_are_equal_at_every_opset(opset):
    model = network(opset)
    result, outcome = encoded(model)
    assert [change.where for change in outcome.changes] == [f"fc{i}.weight" for i in range(3)]
    assert result.opset_import[0].version == opset
    assert model.ByteSize() > (36 if opset >= 11 else 7.5) * result.ByteSize()
    assert np.array_equal(run(model)[0], run(result)[0])
    unfolded = run(result, optimize=False)[0]  # weights are not prepacked then: another order of summation
    np.testing.assert_allclose(unfolded, run(model, optimize=False)[0], rtol=1e-4, atol=1e-4)


def test_outcome_tells_the_bytes_of_the_file():
    model = network()
    result, outcome = encoded(model)
    told = sum(change.bytes_before - change.bytes_after for change in outcome.changes)
    assert abs(model.ByteSize() - result.ByteSize() - told) <= 4  # the length prefix of the graph itself
    assert {refusal.where for refusal in outcome.refusals} == {"fc0.bias", "fc1.bias"}
    assert outcome.changes[0].detail["encoding"] in outcome.changes[0].what


def test_a_pruned_and_shared_lenet_is_thirty_times_smaller_and_loads_fast(tmp_path):
    model = network()
    result, _ = encoded(model)
    assert result.ByteSize() < 32_000
    session_times = []
    for _ in range(3):
        start = time.perf_counter()
        run(result, saved=tmp_path / "optimized.onnx")
        session_times.append(time.perf_counter() - start)
    assert min(session_times) < 0.2
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left == {"Gemm"}


def test_decoder_in_a_body_stays_in_the_body_and_folds(tmp_path):
    tensor = numpy_helper.from_array(pruned((64, 64), 0.5), "w")
    model = with_body("inside = MatMul (x, w)", [tensor])
    result, outcome = encoded(model)
    assert [change.where for change in outcome.changes] == ["w"]
    then = result.graph.node[0].attribute[0].g
    assert len(result.graph.node) == 1
    assert then.initializer
    assert "w" not in [item.name for item in then.initializer]
    x = np.random.default_rng(1).random((2, 64), np.float32)
    feeds = {"condition": np.array(True), "x": x}
    assert np.array_equal(run(model, feeds)[0], run(result, feeds, saved=tmp_path / "o.onnx")[0])
    then = next(
        item.g
        for item in onnx.load(tmp_path / "o.onnx").graph.node[0].attribute
        if item.name == "then_branch"
    )
    assert [node.op_type for node in then.node] == ["MatMul"]


def test_weight_of_the_main_graph_that_a_body_captures():
    model = with_body("inside = MatMul (x, w)")
    model.graph.initializer.append(numpy_helper.from_array(pruned((64, 64), 0.5), "w"))
    result, outcome = encoded(model)
    assert [change.where for change in outcome.changes] == ["w"]
    feeds = {"condition": np.array(True), "x": np.ones((2, 64), np.float32)}
    assert np.array_equal(run(model, feeds)[0], run(result, feeds)[0])


def test_constant_nodes_of_functions_become_decoder_nodes():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        main (float[2, 64] x) => (float[2, 64] y) { y = local.layer (x) }
        <opset_import: ["" : 17], domain: "local"> layer (a) => (b) { b = MatMul (a, w) }""")
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(pruned((64, 64), 0.5)))
    model.functions[0].node.insert(0, constant)
    result, outcome = encoded(model)
    assert [change.where for change in outcome.changes] == ["w"]
    told = outcome.changes[0].bytes_before - outcome.changes[0].bytes_after
    assert abs(model.ByteSize() - result.ByteSize() - told) <= 4 + 2 * len(result.functions[0].node)
    assert np.array_equal(run(model)[0], run(result)[0])


def test_constant_node_of_the_main_graph():
    model = network(shapes=((64, 64),))
    weight = model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], name="constant", value=weight))
    del model.graph.initializer[0]
    result, outcome = encoded(model)
    assert [change.where for change in outcome.changes] == ["fc0.weight"]
    told = outcome.changes[0].bytes_before - outcome.changes[0].bytes_after
    assert abs(model.ByteSize() - result.ByteSize() - told) <= 16
    assert np.array_equal(run(model)[0], run(result)[0])


def test_weight_with_several_readers_is_decoded_once():
    model = network(shapes=((64, 64), (64, 64)))
    model.graph.node[1].input[1] = "fc0.weight"
    del model.graph.initializer[2]
    result, outcome = encoded(model)
    assert len(outcome.changes) == 1
    assert sum("fc0.weight" in node.output for node in result.graph.node) == 1
    assert np.array_equal(run(model)[0], run(result)[0])


def test_shared_constants_are_stored_once_a_graph():
    result, _ = encoded(network(shapes=((64, 64), (64, 64), (64, 64))))
    names = [item.name for item in result.graph.initializer]
    assert len(names) == len(set(names))
    assert names.count("e.shift1") == 1
    assert sum(".shift" in name for name in names) == len({name for name in names if ".shift" in name})


def test_names_that_a_model_already_has_are_avoided():
    model = network(shapes=((64, 64), (64, 64)))
    model.graph.initializer[1].name = "e0.codebook"
    model.graph.node[0].input[2] = "e0.codebook"
    model.graph.node[0].output[0] = "e.shift1"
    model.graph.node[1].input[0] = "e.shift1"
    result, outcome = encoded(model)
    assert len(outcome.changes) == 2
    assert np.array_equal(run(model)[0], run(result)[0])


def test_outputs_and_overridable_inputs_are_refused():
    model = network(shapes=((64, 64), (64, 64)))
    model.graph.output.append(helper.make_tensor_value_info("fc0.weight", TensorProto.FLOAT, [64, 64]))
    model.graph.input.append(helper.make_tensor_value_info("fc1.weight", TensorProto.FLOAT, [64, 64]))
    result, outcome = encoded(model)
    assert result.ByteSize() == model.ByteSize()
    reasons = {refusal.where: refusal.reason for refusal in outcome.refusals}
    assert "output" in reasons["fc0.weight"]
    assert "override" in reasons["fc1.weight"]


def test_weights_listed_as_inputs_up_to_ir_3_leave_the_inputs():
    model = network(opset=9)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    result, outcome = encoded(model)
    assert len(outcome.changes) == 3
    stored = {item.name for item in result.graph.initializer}
    assert {item.name for item in result.graph.input} == {"x"} | stored
    x = {"x": np.ones((2, 784), np.float32)}
    assert np.array_equal(run(model, x)[0], run(result, x)[0])


def test_what_is_too_small_or_random_stays_and_says_why():
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = network(weights=[weight])
    result, outcome = encoded(model)
    assert result == model or result.ByteSize() == model.ByteSize()
    assert [refusal.where for refusal in outcome.refusals] == ["fc0.weight"]
    assert "16384 bytes" in outcome.refusals[0].reason


def test_min_saving_decides():
    model = network(shapes=((64, 64),))
    assert encoded(model)[1].changes
    assert not encoded(model, min_saving=16_000)[1].changes


def test_integer_tables_are_narrowed_but_not_the_storage_of_decoders():
    table = np.random.default_rng(0).integers(0, 1000, 4096)
    tensors = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.zeros((64, 64), np.int8), "quantized"),
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
    ]
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        main (float[4096] x, float[2, 64] a) => (float[4096] y, float[2, 64] b) {
            y = Gather (x, table)  w = DequantizeLinear (quantized, scale)  b = MatMul (a, w) }""")
    model.graph.initializer.extend(tensors)
    result, outcome = encoded(model)
    assert [change.where for change in outcome.changes] == ["table"]
    assert "quantized" in [item.name for item in result.graph.initializer]


def test_storage_that_the_pass_wrote_is_left_alone():
    integers = np.random.default_rng(0).integers(-127, 128, (512, 64)).astype(np.float32)
    integers[:, 0] = 127
    # scales are powers of two: they would fit float16, and starts of codebooks uint16
    grid = integers * (np.float32(2) ** -(np.arange(512) % 12)).astype(np.float32)[:, None]
    groups = np.concatenate([pruned((16, 512), 1.0, 16, seed) for seed in range(32)])
    result, outcome = encoded(network(weights=[grid, np.ascontiguousarray(groups[:64])]))
    assert [change.where for change in outcome.changes] == ["fc0.weight", "fc1.weight"]
    assert np.array_equal(run(result)[0], run(network(weights=[grid, groups[:64]]))[0])


def test_interface_and_metadata_stay():
    model = network()
    helper.set_model_props(model, {"classes": "0123456789"})
    result, _ = encoded(model)
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    assert result.metadata_props == model.metadata_props
    assert (result.ir_version, result.producer_name) == (model.ir_version, "test")


def test_opset_is_raised_only_when_the_run_and_the_user_allow_it():
    model = network(opset=9)
    allowed = Context(allow_opset_raise=True)
    plain, outcome = encoded(model)
    assert plain.opset_import[0].version == 9
    assert outcome.refusals
    assert "sparse ones need opset 11: allow raising it" in outcome.refusals[0].reason
    assert encoded(model, allowed, raise_opset=False)[0].opset_import[0].version == 9
    raised, outcome = encoded(model, allowed)
    assert raised.opset_import[0].version == 11
    assert outcome.changes[0].what == "raised the opset from 9 to 11"
    assert raised.ByteSize() < 0.5 * plain.ByteSize()
    assert np.array_equal(run(model)[0], run(raised)[0])


def test_opset_is_not_raised_for_nothing():
    weight = pruned((64, 64), density=1.0, values=16)
    model = network(opset=9, weights=[weight])
    assert encoded(model, Context(allow_opset_raise=True))[0].opset_import[0].version == 9


@pytest.mark.parametrize("version", [11, 13, 17, 21])
def test_raise_opset_keeps_weights_and_interface(version):
    model = network(opset=9)
    helper.set_model_props(model, {"classes": "0123456789"})
    graph = Graph.load(model)
    raise_opset(graph, version)
    result = graph.to_model()
    onnx.checker.check_model(result, full_check=True)
    assert result.opset_import[0].version == version
    assert result.graph.initializer == model.graph.initializer
    assert (result.graph.input, result.graph.output) == (model.graph.input, model.graph.output)
    assert result.metadata_props == model.metadata_props
    assert np.array_equal(run(model)[0], run(result)[0])


def test_raise_opset_converts_operators_and_their_small_constants():
    model = parser.parse_model("""<ir_version: 4, opset_import: ["" : 9]>
        main (float[2, 64] x) => (float[2, 32] y) {
            p = Pad <pads = [0, 0, 0, 4]> (x)  s = Slice <starts = [0], ends = [32], axes = [1]> (p)
            y = Dropout (s) }""")
    graph = Graph.load(model)
    raise_opset(graph, 13)
    x = {"x": np.ones((2, 64), np.float32)}
    assert np.array_equal(run(model, x)[0], run(graph.to_model(), x)[0])


def test_raise_opset_that_fails_changes_nothing():
    model = parser.parse_model("""<ir_version: 4, opset_import: ["" : 7]>
        main (float[2, 3, 4] x, float[3] c) => (float[2, 3, 4] y) {
            s = Clip (x)  y = BatchNormalization <spatial = 0> (s, c, c, c, c) }""")
    graph = Graph.load(model)
    before = graph.to_model().SerializeToString()
    with pytest.raises(ModelError, match="spatial=0"):
        raise_opset(graph, 17)
    assert graph.to_model().SerializeToString() == before
