"""Weight-only quantization: every layer kind, type and form, on onnxruntime and on the NumPy runtime."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from passes_helper import runner

from onnxslim_lab.base import Context
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.types import QUANT_TYPES
from onnxslim_lab.quantization.weight_only import apply_weight_only
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.statistics import Gram


@dataclass(frozen=True)
class Step:
    """The fields of the quantize pass that count here."""

    weights: str = "int8"
    granularity: str = "channel"
    block: int = 32
    symmetric: bool | None = None
    rounding: str = "nearest"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    op_types: tuple[str, ...] = ()
    target: str = "onnxruntime-x86-vnni"
    format: str = "auto"

    def pass_name(self):
        return "quantize"


class Data:
    """A Calibration that knows the Gram matrices of some input rows."""

    def __init__(self, rows):
        self.rows = rows

    def grams(self, model, layers, limit=None):
        for layer in layers:
            rows = layer.rows(self.rows)
            yield layer, Gram(np.swapaxes(rows, 1, 2) @ rows, rows.sum(1), rows.shape[1])


ALLOWED = Context(allow_opset_raise=True)

LAYERS = {  # text, shapes of the weights, shape of x
    "MatMul": ("(float[5, 72] x) => (float[5, 40] y) { y = MatMul (x, w) }", {"w": (72, 40)}, (5, 72)),
    "MatMul left": ("(float[72, 5] x) => (float[40, 5] y) { y = MatMul (w, x) }", {"w": (40, 72)}, (72, 5)),
    "MatMul batch": (
        "(float[3, 5, 72] x) => (float[3, 5, 40] y) { y = MatMul (x, w) }",
        {"w": (3, 72, 40)},
        (3, 5, 72),
    ),
    "MatMul behind Transpose": (
        "(float[5, 72] x) => (float[5, 40] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }",
        {"w": (40, 72)},
        (5, 72),
    ),
    "Gemm": (
        "(float[5, 72] x) => (float[5, 40] y) { y = Gemm <transB = 1> (x, w, b) }",
        {"w": (40, 72), "b": (40,)},
        (5, 72),
    ),
    "Gemm alpha": (
        "(float[5, 72] x) => (float[5, 40] y) { y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }",
        {"w": (72, 40), "b": (40,)},
        (5, 72),
    ),
    "Gemm scalar C": (
        "(float[5, 72] x) => (float[5, 40] y) { y = Gemm (x, w, b) }",
        {"w": (72, 40), "b": (1,)},
        (5, 72),
    ),
    "Conv": (
        "(float[1, 40, 6, 6] x) => (float[1, 24, 4, 4] y) { y = Conv (x, w) }",
        {"w": (24, 40, 3, 3)},
        (1, 40, 6, 6),
    ),
    "Conv groups": (
        "(float[1, 80, 8] x) => (float[1, 24, 6] y) { y = Conv <group = 2> (x, w) }",
        {"w": (24, 40, 3)},
        (1, 80, 8),
    ),
    "ConvTranspose": (
        "(float[1, 40, 5] x) => (float[1, 48, 7] y) { y = ConvTranspose <group = 2> (x, w) }",
        {"w": (40, 24, 3)},
        (1, 40, 5),
    ),
    "Gather": (
        "(int64[2, 3] x) => (float[2, 3, 72] y) { y = Gather (w, x) }",
        {"w": (60, 72)},
        (2, 3),
    ),
    "Gather axis 1": (
        "(int64[2, 3] x) => (float[60, 2, 3] y) { y = Gather <axis = 1> (w, x) }",
        {"w": (60, 72)},
        (2, 3),
    ),
    "Einsum": (
        '(float[5, 72] x) => (float[5, 40] y) { y = Einsum <equation = "bi,oi->bo"> (x, w) }',
        {"w": (40, 72)},
        (5, 72),
    ),
    "LSTM": (
        "(float[4, 2, 24] x) => (float[4, 1, 2, 40] y) { y = LSTM <hidden_size = 40> (x, w, r) }",
        {"w": (1, 160, 24), "r": (1, 160, 40)},
        (4, 2, 24),
    ),
    "GRU both ways": (
        '(float[4, 2, 24] x) => (float[4, 2, 2, 20] y) { y = GRU <hidden_size = 20, direction = "bidirectional"> (x, w, r) }',
        {"w": (2, 60, 24), "r": (2, 60, 20)},
        (4, 2, 24),
    ),
    "tied": (
        """(int64[2, 3] x) => (float[2, 3, 60] y)
        { e = Gather (w, x) t = Transpose <perm = [1, 0]> (w) y = MatMul (e, t) }""",
        {"w": (60, 72)},
        (2, 3),
    ),
    "shared": (
        "(float[5, 64] x) => (float[5, 64] y) { h = MatMul (x, w) y = MatMul (h, w) }",
        {"w": (64, 64)},
        (5, 64),
    ),
}


def build(text, weights, *, opset=21, dtype=np.float32, seed=0):
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}')
    random = np.random.default_rng(seed)
    for name, shape in weights.items():
        values = random.standard_normal(shape) * random.uniform(0.5, 2, (*shape[:-1], 1)) / 8
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(dtype), name))
    return Graph.load(model)


def feed(graph, shape, dtype=np.float32, seed=1):
    random = np.random.default_rng(seed)
    if graph.dtype_of("x") == onnx.TensorProto.INT64:
        return {"x": random.integers(-60, 60, shape)}
    return {"x": random.standard_normal(shape).astype(dtype)}


def error(graph, result, feeds, optimization="all"):
    """Return the relative error of the result on onnxruntime; both engines must agree on it."""
    first = runner().run(graph, [feeds], optimization="off")[0]["y"]
    plain = runner().run(result, [feeds], optimization="off")[0]["y"]
    fused = runner().run(result, [feeds], optimization=optimization)[0]["y"]
    ours = Interpreter(result).run(feeds)["y"]
    assert (plain.dtype, plain.shape) == (first.dtype, first.shape)
    size = np.linalg.norm(plain.astype(float)) + 1e-9
    contrib = any(
        node.op_type == "MatMulNBits" for node in result.nodes
    )  # int8 activations also when unfused
    assert np.linalg.norm(plain.astype(float) - ours) / size < (2e-2 if contrib else 1e-3)
    assert np.linalg.norm(plain.astype(float) - fused) / size < 2e-2  # MatMulNBits has activations in int8
    return np.linalg.norm(plain.astype(float) - first) / np.linalg.norm(first.astype(float))


LIMITS = {16: 1e-3, 8: 0.02, 4: 0.2, 2: 1.0}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("kind", "granularity", "format_", "block"),
    [
        ("int8", "channel", "auto", 32),
        ("uint4", "block", "auto", 32),
        ("int4", "block", "qdq", 16),
        ("int4", "block", "microsoft", 16),
    ],
)
def test_every_layer_keeps_its_output_and_shrinks(layer, kind, granularity, format_, block):
    text, weights, shape = LAYERS[layer]
    graph = build(text, weights)
    result = graph.copy()
    outcome = apply_weight_only(result, Step(kind, granularity, block, format=format_), ALLOWED)
    quantized = {name for change in outcome.changes for name in change.weights}
    assert quantized == {name for name in weights if name != "b"}, outcome.refusals
    onnx.checker.check_model(result.to_model(), full_check=True)
    assert result.file_bytes() < graph.file_bytes()
    limit = LIMITS[QUANT_TYPES[kind].bits] * (2 if granularity == "tensor" else 1)
    assert error(graph, result, feed(graph, shape)) < limit
    stored = [result.constant_type(name) for name in result.initializers]
    assert not any(found[0] == onnx.TensorProto.FLOAT and np.prod(found[1]) > 1500 for found in stored)


@pytest.mark.parametrize(
    ("layer", "format_"), [("MatMul", "auto"), ("Conv", "auto"), ("Conv", "qdq"), ("Gather", "auto")]
)
@pytest.mark.parametrize("kind", ["int2", "uint2", "int16", "uint16", "float8e4m3fn", "float8e5m2"])
def test_other_types(kind, layer, format_):
    text, weights, shape = LAYERS[layer]
    graph = build(text, weights)
    result = graph.copy()
    outcome = apply_weight_only(result, Step(kind, "block", 32, format=format_), ALLOWED)
    assert [change for change in outcome.changes if change.weights], outcome.refusals
    limit = 0.2 if kind.startswith("float8") else LIMITS[QUANT_TYPES[kind].bits]
    assert error(graph, result, feed(graph, shape)) < limit


@pytest.mark.parametrize(
    ("layer", "operator", "format_"),
    [
        ("MatMul", "MatMulNBits", "auto"),
        ("Gemm", "MatMulNBits", "auto"),
        ("MatMul behind Transpose", "MatMulNBits", "microsoft"),
        ("shared", "MatMulNBits", "microsoft"),
        ("Gather", "GatherBlockQuantized", "microsoft"),
    ],
)
def test_form_of_a_layer(layer, operator, format_):
    graph = build(*LAYERS[layer][:2])
    outcome = apply_weight_only(graph, Step("uint4", "block", format=format_), ALLOWED)
    operators = {node.op_type for node in graph.nodes}
    if format_ == "microsoft":
        assert operator in operators
    else:
        assert "DequantizeLinear" in operators
        assert not {"Transpose", "Reshape"} & operators  # they would keep it from fusing
    assert outcome.changes[0].detail["form"] in ("fused", operator)


@pytest.mark.parametrize("layer", ["MatMul", "Conv", "Gather", "LSTM"])
@pytest.mark.parametrize(
    ("kind", "granularity", "format_"), [("uint8", "tensor", "qdq"), ("uint8", "block", "microsoft")]
)
def test_unsigned_bytes_per_tensor_and_by_block(layer, kind, granularity, format_):
    text, weights, shape = LAYERS[layer]
    graph = build(text, weights)
    result = graph.copy()
    assert apply_weight_only(result, Step(kind, granularity, format=format_), ALLOWED).changes
    assert error(graph, result, feed(graph, shape)) < 0.04


def test_embedding_is_never_dequantized_whole():
    graph = build(*LAYERS["Gather"][:2])
    apply_weight_only(graph, Step("int4", "block"), ALLOWED)
    graph.infer()
    table = 60 * 72
    for node in graph.nodes:
        shape = graph.shape_of(node.output[0])
        assert shape is not None
        assert np.prod(shape) < table


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype):
    name = {np.float16: "float16", np.float64: "double"}[dtype]
    text = f"({name}[5, 72] x) => ({name}[5, 40] y) {{ y = MatMul (x, w) }}"
    graph = build(text, {"w": (72, 40)}, dtype=dtype)
    result = graph.copy()
    assert apply_weight_only(result, Step("int8"), ALLOWED).changes
    assert error(graph, result, feed(graph, (5, 72), dtype)) < 0.02


def test_bfloat16_is_kept():
    text = "(bfloat16[5, 72] x) => (bfloat16[5, 40] y) { y = MatMul (x, w) }"
    graph = build(
        text, {"w": (72, 40)}, dtype=onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    )
    apply_weight_only(graph, Step("int4", "block"), ALLOWED)
    onnx.checker.check_model(graph.to_model(), full_check=True)
    assert graph.file_bytes() < 72 * 40 * 2


def test_weights_in_bodies_constant_nodes_and_functions():
    text = """<ir_version: 10, opset_import: ["" : 21, "f" : 1]>
    g (float[5, 64] x, bool c) => (float[5, 64] y) {
      h = If (c) <
        then_branch = t () => (float[5, 64] p) { q = MatMul (x, outer) p = MatMul (q, inner) },
        else_branch = e () => (float[5, 64] r) { r = Identity (x) }
      >
      y = f.F (h)
    }
    <domain: "f", opset_import: ["" : 21]> F (a) => (b) { b = MatMul (a, k) }"""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        text.replace("{ b = MatMul", "{ k = Constant <value_float = 1.0> () b = MatMul")
    )
    values = (random.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(3))
    tensors = [onnx.numpy_helper.from_array(next(values), name) for name in ("outer", "inner", "")]
    model.graph.initializer.append(tensors[0])
    model.graph.node[0].attribute[0].g.initializer.append(tensors[1])
    constant = model.functions[0].node[0]
    del constant.attribute[:]
    constant.attribute.append(onnx.helper.make_attribute("value", tensors[2]))
    graph = Graph.load(model)
    result = graph.copy()
    outcome = apply_weight_only(result, Step("uint4", "block"), ALLOWED)
    assert len(outcome.changes) == 3, outcome.refusals
    onnx.checker.check_model(result.to_model())
    assert result.file_bytes() < 0.3 * graph.file_bytes()
    feeds = {"x": random.standard_normal((5, 64)).astype(np.float32), "c": np.array(True)}
    assert error(graph, result, feeds) < 0.3


def test_opset_is_raised_only_when_allowed():
    text, weights, shape = LAYERS["MatMul"]
    raised = build(text, weights, opset=13)
    outcome = apply_weight_only(raised, Step("uint4", "block"), ALLOWED)
    assert raised.opset() == 21
    assert "raised the opset from 13 to 21" in outcome.changes[0].what
    kept = build(text, weights, opset=13)
    original = kept.copy()
    outcome = apply_weight_only(kept, Step("uint4", "block"), Context())
    assert kept.opset() == 13
    assert "allow raising it" in outcome.refusals[0].reason
    assert "decoded once at load" in outcome.changes[0].what
    assert error(original, kept, feed(kept, shape)) < 0.2
    assert kept.file_bytes() < 0.4 * original.file_bytes()


def test_refuses_what_would_not_be_smaller_with_the_numbers():
    graph = build("(float[5, 6] x) => (float[5, 7] y) { y = MatMul (x, w) }", {"w": (6, 7)})
    outcome = apply_weight_only(graph, Step("int8"), ALLOWED)
    assert not outcome.changes
    assert "42 bytes with 7 scales" not in outcome.refusals[0].reason
    assert "70 bytes with 7 scales" in outcome.refusals[0].reason
    assert "takes 168" in outcome.refusals[0].reason


def test_refuses_weights_that_are_not_finite():
    graph = build(*LAYERS["MatMul"][:2])
    values = np.array(graph.constant("w"))
    values[3, 4] = np.inf
    graph.set_constant("w", values)
    assert "NaN or infinite" in apply_weight_only(graph, Step(), ALLOWED).refusals[0].reason


def test_patterns_and_operators_that_match_nothing_are_errors():
    graph = build(*LAYERS["MatMul"][:2])
    with pytest.raises(ParameterError, match="matches no layer"):
        apply_weight_only(graph, Step(exclude=("nothing*",)), ALLOWED)
    with pytest.raises(ParameterError, match="op_types"):
        apply_weight_only(graph, Step(op_types=("Conv",)), ALLOWED)
    with pytest.raises(ParameterError, match="needs calibration data"):
        apply_weight_only(graph, Step(rounding="gptq"), ALLOWED)
    with pytest.raises(ParameterError, match="int32"):
        apply_weight_only(graph, Step("int32"), ALLOWED)


def test_excluded_layers_stay_float():
    graph = build(*LAYERS["MatMul"][:2])
    before = np.array(graph.constant("w"))
    outcome = apply_weight_only(graph, Step(exclude=("w",)), ALLOWED)
    assert not outcome.changes
    assert np.array_equal(graph.constant("w"), before)


@pytest.mark.parametrize("layer", ["MatMul", "Conv groups", "Gemm", "MatMul left"])
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_by_activations_changes_outputs_less(layer, rounding):
    text, weights, shape = LAYERS[layer]
    graph = build(text, weights)
    random = np.random.default_rng(5)
    axis = 1 if "Conv" in layer else 0 if layer == "MatMul left" else 1
    mixing = random.standard_normal((shape[axis],) * 2) * np.geomspace(1, 0.05, shape[axis])[:, None]

    def inputs(seed):
        x = np.random.default_rng(seed).standard_normal((150, *shape))
        mixed = np.moveaxis(np.moveaxis(x, axis + 1, -1) @ mixing, -1, axis + 1)
        return mixed.astype(np.float32) / 8

    calibration = inputs(1)
    flat = calibration.reshape(-1, *shape[1:]) if layer in ("Gemm", "Conv groups") else calibration
    context = Context(allow_opset_raise=True, calibration=Data(flat))
    found = {}
    for how in ("nearest", rounding):
        result = graph.copy()
        apply_weight_only(result, Step("uint4", "block", 32, rounding=how), context)
        feeds = [{"x": x} for x in inputs(2)[:8]]
        first, second = (runner().run(model, feeds, optimization="off") for model in (graph, result))
        found[how] = sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in zip(first, second, strict=True))
    assert found[rounding] < 0.8 * found["nearest"]


@pytest.mark.parametrize("with_data", [False, True])
def test_codebook_leaves_few_values_for_encode(with_data):
    text, weights, _ = LAYERS["MatMul"]
    graph = build(text, weights)
    context = Context(calibration=Data(feed(graph, (50, 72))["x"])) if with_data else Context()
    outcome = apply_weight_only(graph, Step("uint4", rounding="codebook"), context)
    assert "encode" in outcome.changes[0].what
    assert any("encode" in notice for notice in outcome.notices), "it is not seen in what the console shows"
    assert len(np.unique(graph.constant("w"))) <= 16


def test_weights_decoded_one_after_another_in_copies_have_names_of_their_own():
    text = "(float[4, 64] x) => (float[4, 64] y) { t = Tanh (x) u = MatMul (t, v) z = Mul (u, t) y = MatMul (z, w) }"
    model = build(text, {"v": (64, 64), "w": (64, 64)}, opset=12)
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)}
    expected = runner().run(model, [feeds])[0]["y"]
    for name in "vw":
        model = model.copy()
        outcome = apply_weight_only(model, Step(weights="int4", include=(name,)), Context())
        assert [change.detail["form"] for change in outcome.changes] == ["decoded"]
    found = runner().run(Graph.load(model.to_model()), [feeds])[0]["y"]
    assert np.linalg.norm(found - expected) < 0.5 * np.linalg.norm(expected)
