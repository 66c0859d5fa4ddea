"""What check_target says of onnxruntime is what onnxruntime does; of others, what their manuals say."""

import collections
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from qdq_graphs import MIDDLE, QdqModel
from runtime_version import INSTALLED
from typer.testing import CliRunner

from onnxslim_lab import Dataset, Graph
from onnxslim_lab.commands.check_target import check_target as command
from onnxslim_lab.profiles import find_profile, profile_of_cpu
from onnxslim_lab.saturation import find_saturation, pair_sums
from onnxslim_lab.target_check import check_target, target_report
from onnxslim_lab.targets.group import Group

VNNI = find_profile("onnxruntime-x86-vnni")
x86_only = pytest.mark.skipif(
    "x86" not in find_profile("auto").name or "no profile" in find_profile("auto").notice,
    reason="onnxruntime rewrites signed types on x86 only",
)


def optimized(model, tmp_path, level="ORT_ENABLE_ALL"):
    """The names of the nodes that stay float operators once onnxruntime has optimized the model, by operator."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def kinds(model, profile=VNNI):
    return {(f.severity, f.kind, f.op_type) for f in check_target(Graph.load(model), profile)}


def floats(model, profile=VNNI):
    """How many nodes are said to run in float, by operator."""
    found = collections.Counter()
    for finding in check_target(Graph.load(model), profile):
        if finding.severity == "float":
            found[finding.op_type] += len(set(finding.nodes))
    return found


def clip(b, value, low=0.0, high=6.0):
    return b.node("Clip", value, b.constant(np.float32(low)), b.constant(np.float32(high)))


# Each case: a function of a QdqModel, and the findings of severity float it must give.
CASES = {
    "conv": (lambda b: b.output(b.qdq(b.conv(b.qdq("x")))), set()),
    "conv int8": (lambda b: b.output(b.qdq(b.conv(b.qdq("x", "int8")), "int8")), set()),
    "conv float output": (lambda b: b.output(b.conv(b.qdq("x"))), {("float-output", "Conv")}),
    "conv uint16": (lambda b: b.output(b.qdq(b.conv(b.qdq("x", "uint16")), "uint16")), {("type", "Conv")}),
    "conv int4 weight": (lambda b: b.output(b.qdq(b.conv(b.qdq("x"), "int4"))), {("type", "Conv")}),
    "relu at the end": (lambda b: b.output(b.qdq(b.node("Relu", b.conv(b.qdq("x"))), zero=0)), set()),
    "relu inside": (lambda b: b.output(b.qdq(b.node("Relu", b.conv(b.qdq("x"))))), {("clip", "Conv")}),
    "clip at the end": (lambda b: b.output(b.qdq(clip(b, b.conv(b.qdq("x"))), scale=6 / 255, zero=0)), set()),
    "clip inside": (lambda b: b.output(b.qdq(clip(b, b.conv(b.qdq("x"))), zero=0)), {("clip", "Conv")}),
    "relu then float": (
        lambda b: b.output(
            b.node("Exp", b.node("Relu", b.node("MatMul", b.qdq("x"), b.weight((8, 8), axis=1))))
        ),
        {("clip", "MatMul")},
    ),
    "matmul float output": (
        lambda b: b.output(b.node("MatMul", b.qdq("x"), b.weight((8, 8), axis=1))),
        set(),
    ),
    "matmul through transpose": (
        lambda b: b.output(
            b.qdq(
                b.node("MatMul", b.qdq("x"), b.node("Transpose", b.qdq("x", scale=0.06), perm=[0, 1, 3, 2]))
            )
        ),
        set(),
    ),
    "conv then reshape then Q": (
        lambda b: b.output(b.qdq(b.node("Reshape", b.conv(b.qdq("x")), b.constant(np.array([1, -1]))))),
        set(),
    ),
    "convtranspose": (
        lambda b: b.output(b.qdq(b.node("ConvTranspose", b.qdq("x"), b.weight((4, 4, 3, 3))))),
        {("island", "ConvTranspose")},
    ),
    "tanh": (lambda b: b.output(b.qdq(b.node("Tanh", b.qdq("x")))), {("island", "Tanh")}),
    "add": (
        lambda b: b.output(b.qdq(b.node("Add", b.qdq("x"), b.qdq(b.node("Exp", "x"), scale=0.1)))),
        set(),
    ),
    "add one float": (
        lambda b: b.output(b.qdq(b.node("Add", b.qdq("x"), b.node("Exp", "x")))),
        {("operand", "Add")},
    ),
    "add of types": (
        lambda b: b.output(b.qdq(b.node("Add", b.qdq("x"), b.qdq(b.node("Exp", "x"), "uint16")))),
        {("type", "Add")},
    ),
    "maxpool": (lambda b: b.output(b.qdq(b.node("MaxPool", b.qdq("x"), kernel_shape=[2, 2]))), set()),
    "maxpool other scale": (
        lambda b: b.output(b.qdq(b.node("MaxPool", b.qdq("x"), kernel_shape=[2, 2]), scale=0.06)),
        {("parameters", "MaxPool")},
    ),
    "resize linear": (
        lambda b: b.output(
            b.qdq(b.node("Resize", b.qdq("x"), "", b.constant(np.float32([1, 1, 2, 2])), mode="linear"))
        ),
        {("attribute", "Resize")},
    ),
    "gemm alpha": (
        lambda b: b.output(
            b.qdq(
                b.node(
                    "Gemm", b.qdq(b.node("Flatten", "x")), b.weight((256, 8)), b.bias(8, 0.0005), alpha=2.0
                )
            )
        ),
        {("attribute", "Gemm")},
    ),
    "conv bias of another scale": (
        lambda b: b.output(b.qdq(b.node("Conv", b.qdq("x"), b.weight((4, 4, 3, 3)), b.bias(4, 1.0)))),
        {("bias", "Conv")},
    ),
}


def build(make, **options):
    b = QdqModel(**options)
    make(b)
    return b.model()


@x86_only
@pytest.mark.parametrize("name", CASES)
def test_a_case_is_what_onnxruntime_makes_of_it(name, tmp_path):
    make, expected = CASES[name]
    model = build(make)
    assert {(kind, op) for severity, kind, op in kinds(model) if severity == "float"} == expected
    left = optimized(model, tmp_path)
    for op_type in ("Conv", "MatMul", "Gemm", "Add", "Tanh", "ConvTranspose", "FusedConv"):
        if op_type in {op for _, op in expected}:
            assert left[op_type] or left[f"Fused{op_type}"], f"{op_type} was fused after all"
        elif op_type != "FusedConv":
            assert not left[op_type], f"{op_type} was not fused"
    if expected and {op for _, op in expected} & {"MaxPool", "Resize"}:
        assert left["QuantizeLinear"] == 2
    if name == "maxpool":
        assert left["QuantizeLinear"] == 1


def two_readers(b):
    """A residual block: int8 is not rewritten to uint8 where two nodes read it."""
    first = b.qdq(b.conv(b.qdq("x", "int8")), "int8")
    second = b.qdq(b.conv(first), "int8", scale=0.07)
    b.output(b.qdq(b.node("Add", first, second), "int8", scale=0.1))


@x86_only
def test_signed_residuals_run_in_float_and_unsigned_ones_do_not(tmp_path):
    model = build(two_readers)
    left = optimized(model, tmp_path)
    assert floats(model) == {"Conv": left["Conv"], "Add": left["Add"]} == {"Conv": 2, "Add": 1}
    assert ("float", "signed", "Add") in kinds(model)
    assert "activations=uint8" in {f.remedy for f in check_target(Graph.load(model), VNNI)}
    arm = find_profile("onnxruntime-arm")
    assert not floats(model, arm)  # signed types stay signed there


STEPS = ("conv", "relu", "maxpool", "add", "sigmoid", "tanh", "transpose", "concat", "fork")


@x86_only
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(STEPS),
            st.sampled_from(["uint8", "uint8", "other"]),
            st.sampled_from([0.05, 0.05, 0.08]),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    opset=st.sampled_from([19, 21]),
)
@example(  # a Q of int8 with several readers is moved up and, with a reader of its own, rewritten to uint8
    steps=[("conv", "uint8", 0.05, False), ("maxpool", "other", 0.05, True), ("fork", "uint8", 0.05, False)],
    opset=19,
)
@example(  # and moved down to several readers it stays int8
    steps=[
        ("tanh", "other", 0.05, True),
        ("maxpool", "other", 0.08, False),
        ("fork", "uint8", 0.08, False),
        ("add", "other", 0.05, True),
    ],
    opset=19,
)
def test_random_chains_run_in_float_where_it_is_said(steps, opset, tmp_path_factory):
    b = QdqModel(opset=opset)
    value, forks = b.qdq("x"), []
    for step, kind, scale, quantized in steps:
        if step == "conv":
            value = b.conv(value)
        elif step == "relu":
            value = b.node("Relu", value)
        elif step == "maxpool":
            value = b.node("MaxPool", value, kernel_shape=[3, 3], pads=[1] * 4)
        elif step in ("add", "concat"):
            other = forks[-1] if forks else value
            if step == "add":
                value = b.node("Add", value, other)
            else:  # a 1x1 window keeps the shape: halves along the channels
                value = b.node("Slice", b.node("Concat", value, other, axis=1), *_first_four(b))
        elif step in ("sigmoid", "tanh"):
            value = b.node(step.capitalize(), value)
        elif step == "transpose":
            value = b.node("Transpose", value, perm=[0, 1, 3, 2])
        if quantized and step != "fork":
            value = b.qdq(value, kind if kind != "other" else "int8" if opset < 21 else "uint16", scale)
        if step == "fork":
            forks.append(value)
    b.output(b.node("Identity", value), *[b.node("Neg", fork) for fork in forks])
    model = b.model()
    report = target_report(Graph.load(model), VNNI)
    left = optimized(model, tmp_path_factory.mktemp("o"))
    said = collections.Counter()
    for finding in report.findings:
        if finding.severity in ("float", "fails"):
            said[finding.op_type] += len(finding.nodes)
    graph = Graph.load(model)
    groups = [group for node in graph.nodes if (group := Group(graph, node)).activations]
    for op_type, integer in (("Conv", "QLinearConv"), ("Add", "QLinearAdd"), ("Sigmoid", "QLinearSigmoid")):
        meant = [g for g in groups if g.node.op_type == op_type and (op_type == "Conv" or g.quantizers)]
        assert left[integer] == len(meant) - said[op_type], (op_type, left, said)


def _first_four(b):
    return [b.constant(np.array([value])) for value in (0, 4, 1)]


BROKEN = {
    "activation per channel": (
        lambda b: b.output(b.qdq(b.node("Add", b.qdq("x"), b.weight((4, 1, 1), "uint8", 0)))),
        21,
    ),
    "matmul per input": (lambda b: b.output(b.node("MatMul", b.qdq("x"), b.weight((8, 4), axis=0))), 21),
    "conv in blocks": (
        lambda b: b.output(b.qdq(b.node("Conv", b.qdq("x"), b.weight((4, 4, 3, 3), axis=1, block=2)))),
        21,
    ),
    "matmul in blocks": (
        lambda b: b.output(b.node("MatMul", b.qdq("x"), b.weight((8, 4), axis=0, block=4))),
        21,
    ),
    "int8 before reshape": (
        lambda b: b.output(b.node("Exp", b.node("Reshape", b.qdq("x", "int8"), b.constant(np.array([-1]))))),
        21,
    ),
    "reducemax at opset 11": (lambda b: b.output(b.qdq(b.node("ReduceMax", b.qdq("x"), axes=[2]))), 11),
}


FIXED = {"activation per channel": (1, 32)}  # runs in float since that onnxruntime


@x86_only
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_said_to_fail_fails(name):
    make, opset = BROKEN[name]
    model = build(make, opset=opset)
    assert "fails" in {severity for severity, *_ in kinds(model)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    feed = {"x": np.random.default_rng(0).uniform(-3, 3, (1, 4, 8, 8)).astype(np.float32)}

    def run():
        return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)

    if FIXED.get(name, (99,)) <= INSTALLED:
        np.testing.assert_array_equal(run()[0], ReferenceEvaluator(model).run(None, feed)[0])
        return
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run()


@x86_only
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda b: b.output(b.qdq(b.conv(b.qdq("x"), axis=1), scale=0.5)), "axis"),
        (
            lambda b: b.output(
                b.node("Gemm", b.qdq(b.node("Flatten", "x")), b.weight((256, 8)), b.bias(8, 1.0)),
            ),
            "bias",
        ),
    ],
)
def test_what_is_said_to_give_wrong_results_does(make, kind):
    model = build(make)
    assert ("fails", kind) in {(severity, k) for severity, k, _ in kinds(model)}
    feed = {"x": np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    results = []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        results.append(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)[0])
    assert np.abs(results[0] - results[1]).max() > 0.2 * np.abs(results[0]).max()


def test_weights_that_are_dequantized_on_every_run(tmp_path):
    def weight_only(shape, kind="int4", axis=0, block=32, op_type="MatMul", **attributes):
        b = QdqModel((1, 8, 64) if op_type == "MatMul" else (8, 64))
        b.output(b.node(op_type, "x", b.weight(shape, kind, axis, block), **attributes))
        return b.model()

    packed = weight_only((64, 32))
    assert not kinds(packed)
    assert optimized(packed, tmp_path)["MatMulNBits"] == 1
    for model in (weight_only((64, 32), block=8), weight_only((32, 64), axis=1, op_type="Gemm", transB=1)):
        assert {(s, k) for s, k, _ in kinds(model)} == {("slow", "weight-only")}
        left = optimized(model, tmp_path)
        assert left["MatMulNBits"] == 0
        assert left["DequantizeLinear"] == 1


def test_other_targets_are_held_to_their_manuals():
    model = build(CASES["conv"][0])
    tensorrt = kinds(model, find_profile("tensorrt"))
    assert ("fails", "type", "QuantizeLinear") in tensorrt  # uint8
    signed = build(lambda b: b.output(b.qdq(b.conv(b.qdq("x", "int8")), "int8")))
    assert not {k for s, k, _ in kinds(signed, find_profile("tensorrt")) if s == "fails"}
    shifted = build(lambda b: b.output(b.qdq(b.conv(b.qdq("x", "int8", zero=3)), "int8")))
    assert ("fails", "zero-point", "QuantizeLinear") in kinds(shifted, find_profile("tensorrt"))
    biased = build(
        lambda b: b.output(
            b.qdq(b.node("Conv", b.qdq("x", "int8"), b.weight((4, 4, 3, 3)), b.bias(4, 0.0005)), "int8")
        )
    )
    assert ("fails", "bias", "Conv") in kinds(biased, find_profile("tensorrt"))

    open_shape = Graph.parse(
        '<ir_version: 8, opset_import: ["": 17, "com.example": 1]> g (float[n,4] x, bool c) => (float[n,4] y)'
        "{ z = com.example.Odd(x) y = If (c) <then_branch = t () => (float[n,4] a) { a = Abs(z) },"
        " else_branch = e () => (float[n,4] b) { b = Neg(z) }> }"
    )
    found = {f.kind for f in check_target(open_shape, find_profile("qnn"))}
    assert {"dynamic-shape", "control-flow", "domain"} <= found
    assert {f.kind for f in check_target(open_shape, VNNI)} == {"domain"}
    old = Graph.parse('<ir_version: 4, opset_import: ["": 6]> g (float[2] x) => (float[2] y) { y = Abs(x) }')
    assert {f.kind for f in check_target(old, find_profile("tensorrt"))} == {"opset"}


def test_functions_of_the_model_are_no_unknown_domain():
    model = Graph.parse(
        '<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[2] x) => (float[2] y) { y = local.f(x) }'
        '<domain: "local", opset_import: ["": 17]> f (a) => (b) { b = Abs(a) }'
    )
    assert not check_target(model, VNNI)


def test_pair_sums_are_those_of_the_instruction():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (7, 9))
    matrix = rng.integers(-128, 128, (5, 9))
    pairs, clamped, error = pair_sums(rows, matrix)
    assert pairs == 7 * 5 * 5
    counted, expected = np.zeros(5, int), np.zeros((7, 5), int)
    for n in range(7):
        for out in range(5):
            for k in range(0, 9, 2):
                total = sum(int(rows[n, j]) * int(matrix[out, j]) for j in range(k, min(k + 2, 9)))
                held = min(max(total, -32768), 32767)
                counted[out] += held != total
                expected[n, out] += held - total
    assert clamped.tolist() == counted.tolist()
    assert clamped.sum() > 0
    np.testing.assert_array_equal(error, expected)


def test_saturating_layers_are_found_on_data_and_cured_by_seven_bits():
    def network(largest):
        b = QdqModel()
        signs = np.where(np.arange(4 * 4 * 9).reshape(4, 4, 3, 3) // 36 % 2, 1, -1)
        weight = b.dequantize(b.constant(signs * largest, "int8"), "int8", 0.01)
        b.output(b.qdq(b.node("Conv", b.qdq("x"), weight, pads=[1] * 4), scale=1.0))
        return Graph.load(b.model())

    data = Dataset([{"x": np.full((1, 4, 8, 8), 6.0, np.float32)}])
    x86 = find_profile("onnxruntime-x86")
    (result,) = find_saturation(network(127), data.feeds)
    assert result.clamped == result.pairs - _padded_pairs()
    assert result.wrong == result.rows
    assert sorted(result.channels) == [0, 1, 2, 3]
    (finding,) = [f for f in target_report(network(127), x86, data).findings if f.kind == "saturation"]
    assert "exceed int16" in finding.what
    assert "reduce_range" in finding.remedy
    assert [f.kind for f in check_target(network(127), x86)] == ["saturation"]  # without data: it may
    assert not check_target(network(63), x86)
    (cured,) = find_saturation(network(63), data.feeds)
    assert not cured.clamped
    assert not check_target(network(127), VNNI)


def _padded_pairs():
    """Pairs whose activations are the padding, which is the zero point 128: 2 * 128 * 127 fits."""
    outside = sum(
        not (0 <= i + di < 8 and 0 <= j + dj < 8)
        for i in range(8)
        for j in range(8)
        for di in (-1, 0, 1)
        for dj in (-1, 0, 1)
    )
    return outside * 2 * 4


def test_quantized_operators_may_saturate_and_signed_ones_are_slow():
    def qlinear(kind):
        b = QdqModel((4, 8))
        scale, zero = b.constant(np.float32(0.05)), b.constant(MIDDLE.get(kind, 0), kind)
        weight = b.constant(np.full((8, 8), 127), "int8")
        weight_zero = b.constant(0, "int8")
        codes = b.node("QuantizeLinear", "x", scale, zero)
        made = b.node("QLinearMatMul", codes, scale, zero, weight, scale, weight_zero, scale, zero)
        b.output(b.node("DequantizeLinear", made, scale, zero))
        return Graph.load(b.model())

    x86 = find_profile("onnxruntime-x86")
    assert {f.kind for f in check_target(qlinear("uint8"), x86)} == {"saturation"}
    assert {f.kind for f in check_target(qlinear("int8"), VNNI)} == {"signed"}
    data = Dataset([{"x": np.full((4, 8), 6.0, np.float32)}])
    (result,) = find_saturation(qlinear("uint8"), data.feeds)
    assert result.clamped == result.pairs == 4 * 8 * 4
    assert {f.kind for f in target_report(qlinear("uint8"), find_profile("tensorrt")).findings} >= {
        "operator"
    }


def test_depthwise_layers_do_not_saturate():
    b = QdqModel()
    b.output(b.qdq(b.conv(b.qdq("x"), groups=4)))
    (result,) = find_saturation(Graph.load(b.model()), [{"x": np.full((1, 4, 8, 8), 6.0, np.float32)}])
    assert result.pairs == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_tells_and_fails(tmp_path, as_json):
    app = typer.Typer()
    app.command()(command)
    path = tmp_path / "m.onnx"
    onnx.save(build(CASES["conv float output"][0]), path)
    runner = CliRunner()
    flags = ["--json"] if as_json else []
    result = runner.invoke(app, [str(path), "--target", "onnxruntime-x86-vnni", *flags])
    assert result.exit_code == 0, result.output
    if as_json:
        told = json.loads(result.output)
        assert told["target"] == "onnxruntime-x86-vnni"
        assert told["groups"] == 1
        assert told["integer"] == 0
        assert told["findings"][0]["kind"] == "float-output"
    else:
        assert "is not quantized" in result.output
    refused = runner.invoke(app, [str(path), "--target", "tensorrt", *flags])
    assert refused.exit_code == 1  # uint8 does not run there


def test_the_reason_for_the_profile_is_reported():
    report = target_report(Graph.load(build(CASES["conv"][0])), profile_of_cpu("x86_64", None))
    assert "could not be read" in report.notice
    assert (report.groups, report.integer) == (1, 1)
