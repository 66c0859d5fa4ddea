"""equalize: exact scales, what they follow, when they stop, and that a second run finds nothing to do."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from passes_helper import HEADER, assert_equal_outputs, assert_settled, load, random_feed, runner
from random_graphs import models

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.equalization.indexing import reshaped
from onnxslim_lab.equalization.scales import Noise, Sink, expected_error, settled, smoothing
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.equalize import Equalize
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.output_loss import output_loss
from onnxslim_lab.statistics import Calibration

QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
W = "float[2,2] v = {64, 0, 0, 1}, float[2,2] w = {1, 0, 0, 64}"


def calibration(graph, count=3):
    return Calibration(runner(), Dataset([random_feed(graph, seed, {}) for seed in range(count)]))


def apply(before, step=None, *, measured=False, **options):
    """Apply the pass; assert that the outputs stay and a second run changes nothing; return both."""
    original, graph = load(before), load(before)
    step = step or Equalize(**options)
    context = Context(calibration=calibration(original) if measured else None)
    outcome = step.run(graph, context)
    onnx.checker.check_model(graph.to_model())
    assert_equal_outputs(original, graph, relative=1e-5)
    context = Context(calibration=calibration(graph) if measured else None)
    assert_settled(step, graph, context)
    return graph, outcome


def reasons(outcome):
    return " | ".join(refusal.reason for refusal in outcome.refusals)


def test_ranges_become_equal():
    graph, outcome = apply(
        f"g (float[n,2] x) => (float[n,2] y) <{W}> {{ h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) }}"
    )
    assert len(outcome.changes) == 1
    assert np.abs(graph.constant("v")).max(0).tolist() == [8, 8]
    assert np.abs(graph.constant("w")).max(1).tolist() == [8, 8]


def test_bias_is_scaled_and_a_shared_one_is_not_touched():
    graph, _ = apply(
        f"g (float[n,2] x) => (float[n,2] y, float[n,2] z) <{W}, float[2] b = {{1, 1}}> "
        "{ h = MatMul(x, v) a = Add(h, b) r = Relu(a) y = MatMul(r, w) z = Add(x, b) }"
    )
    assert graph.constant("b").tolist() == [1, 1]
    added = next(n for n in graph.nodes if n.op_type == "Add" and n.output[0] == "a")
    assert graph.constant(added.input[1]).tolist() == [1 / 8, 8]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = Sigmoid(h) y = MatMul(r, w)", "Sigmoid does not let a scale through"),
        ("r = Clip(h, zero, six) y = MatMul(r, w)", "Clip is not homogeneous (bounds 0 and 6"),
        ("r = Mul(h, h) y = MatMul(r, w)", "Mul is not part of a root of a sum of squares"),
        ("r = Sqrt(h) y = MatMul(r, w)", "Sqrt is not part of"),
        ("p = Mul(h, h) q = Abs(p) s = Add(q, p) r = Sqrt(s) y = MatMul(r, w)", "Sqrt is not part of"),
        ("p = Mul(h, h) q = Add(p, six) r = Sqrt(q) y = MatMul(r, w)", "is not part of"),
        ("p = Mul(h, h) q = Mul(x, h) s = Add(p, q) r = Sqrt(s) y = MatMul(r, w)", "is not part of"),
        ("r = Softmax(h) y = MatMul(r, w)", "Softmax"),
        ("y = MatMul(h, w) k = Exp(h)", "Exp"),
    ],
)
def test_refused(body, reason):
    constants = f"{W}, float zero = {{0}}, float six = {{6}}"
    _, outcome = apply(f"g (float[n,2] x) => (float[n,2] y) <{constants}> {{ h = MatMul(x, v) {body} }}")
    assert not outcome.changes
    assert reason in reasons(outcome)


def test_output_and_capture_are_refused():
    _, outcome = apply(
        f"g (float[n,2] x) => (float[n,2] y, float[n,2] h) <{W}> {{ h = MatMul(x, v) y = MatMul(h, w) }}"
    )
    assert "an output of the graph" in reasons(outcome)
    _, outcome = apply(f"""g (float[n,2] x, bool c) => (float[n,2] y, float[n,2] k) <{W}> {{
        h = MatMul(x, v) y = MatMul(h, w)
        k = If (c) <then_branch = t () => (float[n,2] p) {{ p = Neg(h) }},
                    else_branch = e () => (float[n,2] q) {{ q = Relu(h) }}> }}""")
    assert "the body of If reads it" in reasons(outcome)


def test_works_inside_a_body():
    graph, outcome = apply(f"""g (float[n,2] x, bool c) => (float[n,2] k) <{W}> {{
        k = If (c) <then_branch = t () => (float[n,2] p) {{ h = MatMul(x, v) p = MatMul(h, w) }},
                    else_branch = e () => (float[n,2] q) {{ q = Relu(x) }}> }}""")
    assert len(outcome.changes) == 1
    assert np.abs(graph.constant("v")).max() == 8


def test_shared_weight_is_refused_unless_all_agree():
    _, outcome = apply(
        f"g (float[n,2] x) => (float[n,2] y) <{W}> "
        "{ h = MatMul(x, v) k = MatMul(h, w) s = Sigmoid(k) y = MatMul(s, w) }"
    )
    assert not outcome.changes
    assert "used by layers outside the region" in reasons(outcome)
    graph, outcome = apply(
        f"g (float[n,2] x) => (float[n,2] y) <{W}> "
        "{ h = MatMul(x, v) r = Relu(h) a = MatMul(h, w) b = MatMul(r, w) y = Add(a, b) }"
    )
    assert len(outcome.changes) == 1
    assert np.abs(graph.constant("w")).max() == 8


def test_residual_shares_one_scale():
    graph, outcome = apply(
        f"g (float[n,2] x) => (float[n,2] y) <{W}, float[2,2] u = {{1, 0, 0, 1}}> "
        "{ h = MatMul(x, v) k = MatMul(h, u) s = Add(h, k) y = MatMul(s, w) }"
    )
    assert len(outcome.changes) == 1
    assert np.abs(graph.constant("v")).max() < 64
    assert (graph.constant("u") == np.eye(2)).all()  # divided and multiplied by the same scale


def test_nan_weight_is_refused():
    graph = load(f"g (float[n,2] x) => (float[n,2] y) <{W}> {{ h = MatMul(x, v) y = MatMul(h, w) }}")
    graph.set_constant("v", np.array([[np.nan, 0], [0, 1]], np.float32))
    outcome = Equalize().run(graph)
    assert not outcome.changes
    assert "not finite" in reasons(outcome)


def test_float16_is_scaled_by_powers_of_two_bit_for_bit():
    graph = load(
        "g (float16[n,2] x) => (float16[n,2] y) <float16[2,2] v = {48, 0, 0, 1}, float16[2,2] w = {1, 0, 0, 33}> "
        "{ h = MatMul(x, v) y = MatMul(h, w) }"
    )
    before = graph.constant("v").astype(float)
    Equalize().run(graph)
    ratio = before.max(0) / graph.constant("v").astype(float).max(0)
    assert (ratio != 1).all()
    assert (np.log2(ratio) % 1 == 0).all()


def test_norm_needs_data_and_is_smoothed_with_it():
    text = """g (float[n,3,4] x) => (float[n,3,2] y, float[n,3,2] z)
        <float[4] s = {100, 1, 1, 1}, float[4] b = {1, 1, 1, 1}, float[4,2] v = {1,2,3,4,5,6,7,8},
         float[4,2] w = {8,7,6,5,4,3,2,1}>
        { h = LayerNormalization(x, s, b) y = MatMul(h, v) z = MatMul(h, w) }"""
    _, outcome = apply(text)
    assert "needs calibration data" in reasons(outcome)
    with pytest.raises(ParameterError, match="calibration data"):
        Equalize(mode="activations").run(load(text))
    graph, outcome = apply(text, measured=True)
    assert (
        outcome.changes[0].detail["expected error after"]
        < 0.5 * outcome.changes[0].detail["expected error before"]
    )
    scale = graph.constant("s")
    assert scale[0] / scale[1] < 50
    graph, _ = apply(text, measured=True, alpha=1.0)
    assert np.ptp(np.log2(graph.constant("s"))) < 3


def test_norm_behind_a_residual_is_copied_if_asked():
    text = """g (float[n,4] x) => (float[n,4] y)
        <float[4] s = {100, 1, 1, 1}, float[4] b = {1, 1, 1, 1}, float[4,4] v = {1,2,3,4,5,6,7,8,1,1,1,1,2,2,2,2}>
        { h = LayerNormalization(x, s, b) k = MatMul(h, v) a = Sigmoid(k) y = Add(h, a) }"""
    _, outcome = apply(text, measured=True)
    assert not outcome.changes
    graph, outcome = apply(text, measured=True, copy_norms=True)
    assert len(outcome.changes) == 1
    assert sum(node.op_type == "LayerNormalization" for node in graph.nodes) == 2
    assert graph.constant("s").tolist() == [100, 1, 1, 1]


def test_attention_value_to_output_projection():
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(8, 8)).astype(np.float32) for name in ("wq", "wv", "wo")}
    weights["wv"][:, 3] *= 50
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"]),
        helper.make_node("Softmax", ["q"], ["p0"], axis=-1),
        helper.make_node("Reshape", ["p0", "s4"], ["p"]),
        helper.make_node("Transpose", ["p"], ["pt"], perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["pt"], ["pk"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["pt", "pk"], ["probabilities"]),
        helper.make_node("MatMul", ["x", "wv"], ["v0"]),
        helper.make_node("Reshape", ["v0", "s4"], ["v1"]),
        helper.make_node("Transpose", ["v1"], ["v"], perm=[0, 2, 1, 3]),
        helper.make_node("MatMul", ["probabilities", "v"], ["c0"]),
        helper.make_node("Transpose", ["c0"], ["c1"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["c1", "s3"], ["c"]),
        helper.make_node("MatMul", ["c", "wo"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([0, 0, 2, 4]), "s4"))
    tensors.append(numpy_helper.from_array(np.array([0, 0, 8]), "s3"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "attention",
        [value("x", TensorProto.FLOAT, ["n", 5, 8])],
        [value("y", TensorProto.FLOAT, ["n", 5, 8])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result, outcome = apply(Graph.load(model), measured=True)
    assert len(outcome.changes) == 1
    spread = np.abs(result.constant("wv")).max(0)
    assert spread[3] / np.median(spread) < 12
    assert (result.constant("wq") == weights["wq"]).all()


def test_constructor_refuses_what_has_no_meaning():
    for options in (
        {"alpha": 2.0},
        {"mode": "weights", "alpha": 0.5},
        {"mode": "weights", "copy_norms": True},
    ):
        with pytest.raises(ValueError, match="alpha|copy_norms"):
            Equalize(**options)


@st.composite
def chains(draw):
    """Convolutions with what may stand between them, and a residual or a dense end."""
    random = np.random.default_rng(draw(st.integers(0, 99)))
    nodes, tensors, x, channels = [], [], "x", 3
    made = 0

    def constant(*shape):
        nonlocal made
        made += 1
        spread = np.exp(random.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        tensors.append(
            numpy_helper.from_array((spread * random.normal(size=shape)).astype(np.float32), f"c{made}")
        )
        return f"c{made}"

    def add(op_type, *inputs, **attributes):
        nonlocal made
        made += 1
        nodes.append(helper.make_node(op_type, inputs, [f"v{made}"], f"n{made}", **attributes))
        return f"v{made}"

    pads = numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 0, 0, 1]), "pads")
    split = numpy_helper.from_array(np.array([2, 2]), "sizes")
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "depthwise", "grouped", "residual"]))
        bias = draw(st.booleans())
        if kind == "conv" or channels % 2:
            inputs = [x, constant(4, channels, 1, 1)] + ([constant(4)] if bias else [])
            x, channels = add("Conv", *inputs), 4
        elif kind == "residual":
            y = add("Relu", add("Conv", x, constant(channels, channels, 3, 3), pads=[1, 1, 1, 1]))
            x = add("Add", x, add("Conv", y, constant(channels, channels, 1, 1), constant(channels)))
        else:
            groups = channels if kind == "depthwise" else 2
            x = add("Conv", x, constant(channels, channels // groups, 3, 3), pads=[1, 1, 1, 1], group=groups)
        between = draw(
            st.sampled_from(
                [
                    "Relu",
                    "LeakyRelu",
                    "MaxPool",
                    "AveragePool",
                    "Pad",
                    "PRelu",
                    "Split",
                    "Sigmoid",
                    "Gate",
                    "",
                ]
            )
        )
        if between in ("MaxPool", "AveragePool"):
            x = add(between, x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        elif between == "Pad":
            x = add("Pad", x, "pads")
            x = add("AveragePool", x, kernel_shape=[2, 2])
        elif between == "PRelu":
            x = add("PRelu", x, constant(channels, 1, 1))
        elif between == "Split" and channels == 4:
            made += 1
            nodes.append(helper.make_node("Split", [x, "sizes"], [f"a{made}", f"b{made}"], axis=1))
            x = add("Concat", f"b{made}", add("Relu", f"a{made}"), axis=1)
        elif between == "Gate":
            gate = add(
                "Sigmoid", add("Conv", add("GlobalAveragePool", x), constant(channels, channels, 1, 1))
            )
            x = add("Mul", x, gate)
        elif between in ("Relu", "LeakyRelu", "Sigmoid"):
            x = add(between, x)
    if draw(st.booleans()):
        x = add("Gemm", add("Flatten", x), constant(5, channels * 16), constant(5), transB=1)
    else:
        x = add("Conv", x, constant(2, channels, 1, 1))
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [value("y", TensorProto.FLOAT, None)],
        [*tensors, pads, split],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@QUICK
@given(model=chains(), measured=st.booleans(), granularity=st.sampled_from(["tensor", "channel"]))
def test_random_chains_stay_exact_and_settle(model, measured, granularity):
    original = Graph.load(model)
    graph = original.copy()
    step = Equalize(granularity=granularity)
    step.run(graph, Context(calibration=calibration(original) if measured else None))
    assert_equal_outputs(original, graph, relative=1e-4)
    assert_settled(step, graph, Context(calibration=calibration(graph) if measured else None))


@QUICK
@given(model=models(stepped=False))
def test_random_graphs_stay_exact(model):
    original = Graph.load(model)
    graph = original.copy()
    try:
        runner().run(original, [random_feed(original, 0, {})], optimization="off")
    except Exception:  # noqa: BLE001 - a model that does not run has nothing to measure
        return
    context = Context(calibration=calibration(original, 2))
    Equalize(copy_norms=True).run(graph, context)
    onnx.checker.check_model(graph.to_model())
    assert_equal_outputs(original, graph, relative=1e-4)
    assert_settled(Equalize(copy_norms=True), graph, Context(calibration=calibration(graph, 2)))


def test_reshape_keeps_heads_apart():
    index = np.arange(6).reshape(1, 1, 6)
    heads = reshaped(index, ("n", "s", 6), ("n", "s", 2, 3))
    assert heads.tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert reshaped(heads, ("n", "s", 2, 3), ("n", "s", 6)).tolist() == index.tolist()
    assert reshaped(index, ("n", "s", 6), ("n", None)) is None


def test_smoothing_lowers_the_measured_error():
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 16)) * np.exp(random.normal(size=16) * 1.5)
    w = random.normal(size=(8, 16))
    sink = Sink(
        np.abs(w)[None],
        w[None] ** 2,
        np.arange(16)[None],
        x.min(0)[None],
        x.max(0)[None],
        (x**2).mean(0)[None],
    )

    def measured(logs):
        scale = np.exp2(logs)
        data, weight = x / scale, w * scale
        step = (data.max() - min(0, data.min())) / 255
        rows = np.abs(weight).max(1, keepdims=True) * 2 / 255
        result = (np.rint(data / step) * step) @ (np.rint(weight / rows) * rows).T
        return ((result - x @ w.T) ** 2).mean() / ((x @ w.T) ** 2).mean()

    free = np.ones(16, bool)
    for alpha in (0.0, 0.5, 1.0):
        logs = settled(smoothing([sink], 16, alpha), free, 8)
        expected = expected_error([sink], [], logs, Noise())
        assert measured(logs) == pytest.approx(expected, rel=0.35)
    best = settled(smoothing([sink], 16, 0.5), free, 8)
    assert measured(best) < measured(np.zeros(16))


@pytest.mark.parametrize(
    ("middle", "readable"),
    [
        ("s = Slice(r, starts, ends, axes)", "axes = {1}"),
        ("s = Gather<axis = 1>(r, at)", "int64 at = {2}"),
        ("s = Gather<axis = 1>(r, at)", "int64[2] at = {2, 0}"),
    ],
)
def test_scales_pass_what_takes_places_along_other_axes(middle, readable):
    """A classifier reads the first token of what a normalization makes."""
    rank = 2 if "int64 at" in readable else 3
    out = "float[n,2] y" if rank == 2 else "float[n,k,2] y"
    places = f"int64[1] {readable}" if readable.startswith("axes") else readable
    graph, outcome = apply(
        f"g (float[n,4,2] x) => ({out}) <{W}, int64[1] starts = {{1}}, int64[1] ends = {{3}}, {places}> "
        f"{{ h = MatMul(x, v) r = Relu(h) {middle} y = MatMul(s, w) }}"
    )
    assert len(outcome.changes) == 1
    assert np.abs(graph.constant("v")).max(0).tolist() == [8, 8]


@pytest.mark.parametrize("square", ["Mul({0}, {0})", "Pow({0}, two)"])
def test_scales_pass_the_magnitude_of_a_spectrum(square):
    """Real and imaginary parts of a channel lie in two halves of what a layer gives."""
    one, two = square.format("a"), square.format("b")
    graph, outcome = apply(
        """g (float[n,2] x) => (float[n,2] y) <float[2,4] v = {64, 0, 16, 0, 0, 1, 0, 1}, float[2,2] w = {1, 0, 0, 64},
            float two = {2}, int64[1] zero = {0}, int64[1] half = {2}, int64[1] all = {4}, int64[1] axes = {1}>
        { h = MatMul(x, v) a = Slice(h, zero, half, axes) b = Slice(h, half, all, axes) p = ONE q = TWO
          s = Add(p, q) m = Sqrt(s) y = MatMul(m, w) }""".replace("ONE", one).replace("TWO", two)
    )
    assert [change.detail["channels"] for change in outcome.changes] == [2]
    rows = np.abs(graph.constant("v")).max(0)
    assert rows[0] / rows[2] == 4, "both halves of a channel have one scale"
    assert rows[0] < 64 < 64 * rows[1]


@pytest.mark.parametrize("known", [True, False])
def test_scales_pass_a_slice_of_the_channels_if_it_is_known(known):
    graph, outcome = apply(
        f"""g (float[n,2] x, int64[1] given) => (float[n,k] y)
        <float[2,3] v = {{64, 0, 9, 0, 1, 9}}, float[2,2] w = {{1, 0, 0, 64}}, int64[1] zero = {{0}}, int64[1] two = {{2}},
         int64[1] axes = {{1}}>
        {{ h = MatMul(x, v) r = Relu(h) a = Slice(r, {"zero" if known else "given"}, two, axes)
          {"y = MatMul(a, w)" if known else "b = Relu(a) c = Transpose(b) y = Abs(c)"} }}"""
    )
    assert len(outcome.changes) == known
    rows = np.abs(graph.constant("v")).max(0)
    assert rows[0] / rows[1] == pytest.approx(1 if known else 64)


def test_a_gather_along_the_channels_keeps_them_together():
    _, outcome = apply(
        f"g (float[n,2] x) => (float[n,2] y) <{W}, int64[2] at = {{1, 0}}> "
        "{ h = MatMul(x, v) r = Relu(h) s = Gather<axis = 1>(r, at) y = MatMul(s, w) }"
    )
    assert not outcome.changes


def test_trials_need_data_and_types_to_try():
    with pytest.raises(ValueError, match="parts needs calibration data"):
        Equalize(mode="weights", parts=2)
    with pytest.raises(ParameterError, match="parts=0"):
        Equalize(parts=2).run(load(f"g (float[n,2] x) => (float[n,2] y) <{W}> {{ y = MatMul(x, w) }}"))
    with pytest.raises(ValueError, match="weight_bits 2, 4, 8, 16"):
        Equalize(weight_bits=5, parts=2)


def test_scales_are_kept_where_the_quantized_outputs_get_better():
    """Channels of very different sizes gain by scales; a second part that gains nothing is undone."""
    random = np.random.default_rng(0)
    sizes = np.geomspace(0.01, 10, 32)
    text = """g (float[n,16] x) => (float[n,24] y) {
        h = MatMul(x, v) r = Relu(h) k = MatMul(r, w) q = Relu(k) y = MatMul(q, u) }"""
    model = onnx.parser.parse_model(HEADER + text)
    arrays = {
        "v": random.normal(size=(16, 32)) * sizes,
        "w": random.normal(size=(32, 32)) / sizes[:, None] / 6,
        "u": random.normal(size=(32, 24)) / 6,
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(values.astype(np.float32), name) for name, values in arrays.items()
    )
    graph = Graph.load(model)
    feeds = [{"x": random.normal(size=(32, 16)).astype(np.float32)} for _ in range(6)]
    context = Context(calibration=Calibration(runner(), Dataset(feeds)))
    step = Quantize(granularity="tensor", rounding="nearest", ranges="minmax")
    errors = {}
    for parts in (None, 0, 8):
        result = graph.copy()
        if parts is not None:
            outcome = Equalize(granularity="tensor", parts=parts).run(result, context)
            assert_equal_outputs(graph, result, feeds, relative=1e-5)
            assert bool(outcome.notices) == bool(parts)
        step.run(result, context)
        errors[parts] = output_loss(runner().run(graph, feeds), runner().run(result, feeds))
    assert errors[8] <= errors[0] * 1.06 + 1e-9
    assert errors[8] < errors[None] / 2


def test_scales_that_do_not_help_are_undone(monkeypatch):
    graph = load(
        f"g (float[n,2] x) => (float[n,2] y) <{W}> {{ h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) }}"
    )
    feeds = [random_feed(graph, seed, {}) for seed in range(3)]
    context = Context(calibration=Calibration(runner(), Dataset(feeds)))
    losses = iter([1.0, 2.0])
    monkeypatch.setattr("onnxslim_lab.equalization.trials.output_loss", lambda *_: next(losses))
    before = graph.to_model()
    outcome = Equalize(granularity="tensor", parts=1).run(graph, context)
    assert not outcome.changes
    assert "do not lower the error" in reasons(outcome)
    assert graph.to_model() == before
