"""Every combination of types, granularity, mode and format: it loads and runs, or is refused in one clear line."""

import numpy as np
import pytest
from onnx import TensorProto
from passes_helper import runner
from pydantic import ValidationError
from test_quantize import context_of, feeds_of, model_of, sqnr

from onnxslim_lab.errors import LabError, ParameterError
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.profiles import PROFILES, find_profile
from onnxslim_lab.quantization.types import QUANT_TYPES
from onnxslim_lab.target_check import check_target, target_report

VNNI = "onnxruntime-x86-vnni"
BODY = """a = Conv<pads = [1,1,1,1]>(x, w, b) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p)
    m = MatMul(f, v) n = Add(m, d) q = Relu(n) y = Gemm<transB = 1>(q, u, e)"""
SIZES = {"w": (32, 4, 3, 3), "b": (32,), "v": (32, 64), "d": (64,), "u": (48, 64), "e": (48,)}
GRAPH = model_of(BODY, SIZES, outputs="float[N,48] y")
FEEDS = feeds_of((1, 4, 8, 8), count=2)
WEIGHTS = [name for name in QUANT_TYPES if name != "int32"]
FORMATS = ["qdq", "qoperator", "microsoft"]
LEAST = {2: 3, 4: 15, 8: 25, 16: 40}  # dB by bits


def run(**options):
    """Return the quantized model, its SQNR on onnxruntime, and the outcome."""
    step = Quantize(**({"target": VNNI, "rounding": "nearest", "ranges": "minmax"} | options))
    result = GRAPH.copy()
    context = context_of(FEEDS)
    context.allow_opset_raise = True
    outcome = step.run(result, context)
    return result, sqnr(GRAPH, result, FEEDS), outcome


def floats_left(graph):
    return [name for name in ("w", "v", "u") if (graph.constant_type(name) or (0,))[0] == TensorProto.FLOAT]


def assert_one_line(error, *words):
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_static(weights, granularity, form):
    kind = QUANT_TYPES[weights]
    options = {"weights": weights, "granularity": granularity, "format": form}
    if granularity == "block":
        with pytest.raises(ValidationError) as error:
            run(**options)
        assert_one_line(error.value, "granularity=block", "granularity=tensor, channel", "mode=weight-only")
    elif kind.floating:
        with pytest.raises(ParameterError) as error:
            run(**options)
        assert_one_line(error.value, VNNI, weights, "choose weights=int8", "mode=weight-only")
    else:
        result, found, _ = run(**options)
        assert found > LEAST[kind.bits] - 3 * (granularity == "tensor")
        assert not floats_left(result)
        stored = {result.constant_type(name)[0] for name in result.initializers}
        assert kind.data_type in stored


@pytest.mark.parametrize("activations", [name for name in QUANT_TYPES if name != "uint8"])
def test_activations(activations):
    kind = QUANT_TYPES[activations]
    for weights in ("int8", "int2", "int16", "float8e4m3fn"):
        if kind.bits not in (8, 16) or kind.floating or (weights.startswith("float") and kind.bits == 8):
            with pytest.raises(ParameterError) as error:
                run(activations=activations, weights=weights)
            assert_one_line(error.value, VNNI, "choose ", "mode=weight-only")
        else:
            _, found, _ = run(activations=activations, weights=weights)
            assert found > LEAST[QUANT_TYPES[weights].bits]


@pytest.mark.parametrize("mode", ["weight-only", "dynamic"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_other_modes(weights, granularity, mode):
    for form in FORMATS:
        try:
            result, found, _ = run(weights=weights, granularity=granularity, format=form, mode=mode)
        except LabError as error:
            assert mode == "dynamic"
            assert weights not in ("int8", "uint8")
            assert_one_line(error, f"weights={weights}", "choose int8 or uint8")
            continue
        assert found > LEAST[QUANT_TYPES[weights].bits] - 5 * (granularity == "tensor")
        assert not [name for name in floats_left(result) if name in result.initializers]


@pytest.mark.parametrize(
    ("mode", "activations"), [("dynamic", "int8"), ("dynamic", "uint16"), ("weight-only", "int8")]
)
def test_modes_without_a_choice_of_activations_refuse_one(mode, activations):
    with pytest.raises(ValidationError) as error:
        Quantize(mode=mode, activations=activations)
    assert_one_line(error.value, f"mode {mode} has no activations={activations}")


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only"])
def test_int32_is_no_type_for_weights(mode):
    with pytest.raises(ParameterError) as error:
        run(mode=mode, weights="int32")
    assert_one_line(error.value, "weights=" if mode != "static" else "int32 weights", "choose")


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_products_of_codes_take_no_codebook(mode):
    with pytest.raises((ValidationError, ParameterError)) as error:
        run(mode=mode, rounding="codebook")
    assert_one_line(error.value, "rounding=codebook", "mode=weight-only")


@pytest.mark.parametrize("target", list(PROFILES))
def test_every_target_quantizes_with_its_own_types_and_refuses_what_it_lacks(target):
    profile = find_profile(target)
    result, _, outcome = run(target=target, weights="auto")
    assert not floats_left(result)
    assert outcome.changes
    for activations in sorted({"int8", "uint8", "uint16"} - {*profile.activation_types}):
        if not profile.activation_types or target.startswith("onnxruntime"):
            continue
        with pytest.raises(ParameterError) as error:
            run(target=target, activations=activations)
        assert_one_line(error.value, target, activations, "choose activations=")


@pytest.mark.parametrize("weights", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_bits_run_on_codes(weights, symmetric):
    """onnxruntime has no products of 2 or 4 bits: stored so, they are cast to int8 when the model loads."""
    result, _, _ = run(weights=weights, symmetric=symmetric)
    report = target_report(result, find_profile(VNNI))
    assert report.integer == report.groups > 3
    assert not [item for item in check_target(result, find_profile(VNNI)) if item.severity != "slow"]
    eight, _, _ = run(weights="int8")
    codes = [n for n in result.initializers if result.constant_type(n)[0] == QUANT_TYPES[weights].data_type]
    assert len(codes) == 3
    assert len(result.to_model().SerializeToString()) < len(eight.to_model().SerializeToString())
    before = result.to_model().ByteSize()
    Simplify().run(result)  # must not unpack them
    assert result.to_model().ByteSize() <= before


@pytest.mark.parametrize("form", FORMATS)
def test_formats_compute_the_same_with_few_bits(form):
    values = [runner().run(run(weights="int4", format=name)[0], FEEDS) for name in ("qdq", form)]
    for one, two in zip(*values, strict=True):
        assert np.abs(one["y"] - two["y"]).max() < 0.02 * np.abs(one["y"]).max()
