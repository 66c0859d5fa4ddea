"""Kernels of com.microsoft against onnxruntime, and their signatures against its schemas."""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import MS, SEEDS, both, check, codes, floats, grid, quantized, quick
from onnx import helper
from runtime_version import INSTALLED

from onnxslim_lab.kernels import lookup, run
from onnxslim_lab.kernels.registry import kernels


@quick
@given(
    SEEDS, st.sampled_from(["none", "lengths", "ends", "keys", "queries"]), st.booleans(), st.integers(0, 1)
)
def test_attention(seed, masking, past, unidirectional):
    rng = np.random.default_rng(seed)
    batch, length, width, count = 2, 4, 6, 2
    before = 3 if past and masking in {"none", "keys"} else 0
    total = length + before
    masks = {
        "none": None,
        "lengths": rng.integers(1, total + 1, batch),
        "ends": np.concatenate((rng.integers(2, total + 1, batch), rng.integers(0, 2, batch))),
        "keys": rng.integers(0, 2, (batch, total)),
        "queries": rng.integers(0, 2, (batch, length, total)),
    }
    mask = None if masks[masking] is None else masks[masking].astype(np.int32)
    state = floats(rng, 2, batch, count, before, 4) if before else None
    attributes = {"num_heads": count, "unidirectional": unidirectional}
    inputs = [floats(rng, batch, length, width), floats(rng, width, 24), floats(rng, 24), mask, state]
    check("Attention", inputs, attributes, outputs=2, domain=MS, atol=3e-3)
    bias = floats(rng, batch, count, length, total)
    if not before:  # onnxruntime does not take both
        check("Attention", [*inputs, bias], attributes, outputs=2, domain=MS, atol=3e-3)
    x, x_scale, x_zero = quantized(rng, (batch, length, width), np.uint8)
    w, w_scale, w_zero = quantized(rng, (width, 24), np.int8)
    if masking != "queries" and not before:
        parts = [
            x,
            w // np.int8(2),
            floats(rng, 24),
            x_scale,
            w_scale,
            mask,
            x_zero,
            w_zero // np.int8(2),
            state,
        ]
        check("QAttention", parts, attributes, domain=MS, atol=3e-3)


@quick
@given(SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_multi_head_attention(seed, crossed, masked, biased):
    rng = np.random.default_rng(seed)
    batch, length, others, count, size = 2, 3, 5, 2, 4
    width = count * size
    query = floats(rng, batch, length, width)
    bias = mask = state = None
    if crossed:
        key, value = (floats(rng, batch, count, others, size) for _ in range(2))
    else:
        key, value = (floats(rng, batch, others, width) for _ in range(2))
        state = floats(rng, batch, count, 2, size) if biased else None
        bias = floats(rng, 3 * width) if biased else None
    total = others + (2 if state is not None else 0)
    if masked:
        mask = rng.integers(0, 2, (batch, total)).astype(np.int32)
    inputs = [query, key, value, bias, mask, floats(rng, 1, count, length, total), state, state]
    outputs = 1 if crossed else 3
    check("MultiHeadAttention", inputs, {"num_heads": count}, outputs=outputs, domain=MS, atol=3e-3)


def test_packed_multi_head_attention():
    rng = np.random.default_rng(0)
    query, key, value = (floats(rng, 2, 3, 8) for _ in range(3))
    found = lookup("MultiHeadAttention", MS, 1)
    split = [part.reshape(2, 3, 2, 1, 4) for part in (query, key, value)]
    bias = floats(rng, 24)
    want = run(found, [query, key, value, bias], {"num_heads": 2})
    for inputs in (
        [np.concatenate(split, 3), None, None, bias],
        [query, np.concatenate(split[1:], 3), None, bias],
    ):
        for wanted, got in zip(want, run(found, inputs, {"num_heads": 2}), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@quick
@given(
    SEEDS,
    st.booleans(),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([-1, 2]),
    st.booleans(),
    st.booleans(),
)
def test_group_query_attention(seed, prompt, rotary, window, extras, packed):
    rng = np.random.default_rng(seed)
    batch, count, shared, size, capacity = 2, 4, 2, 16, 6
    length, total = (3, 3) if prompt else (1, 5)
    lengths = np.array([total - 1, total - 1 if prompt else total - 2], np.int32)
    query, key, value = (floats(rng, batch, length, heads * size) for heads in (count, shared, shared))
    inputs = [query, key, value]
    if packed:
        inputs = [np.concatenate(inputs, -1), None, None]
    inputs += [floats(rng, batch, shared, capacity, size) for _ in range(2)]
    inputs += [lengths, np.array(total, np.int32)]
    attributes = {"num_heads": count, "kv_num_heads": shared, "local_window_size": window}
    if rotary is not None:
        inputs += [floats(rng, capacity, size // 2) for _ in range(2)]
        attributes |= {"do_rotary": 1, "rotary_interleaved": rotary}
    if extras:
        inputs += [None] * (10 - len(inputs))
        inputs += [floats(rng, 1, count, length, total), floats(rng, count)]
        attributes |= {"softcap": 2.0, "scale": 0.3}
    want, have = both("GroupQueryAttention", inputs, attributes, 3, MS)
    np.testing.assert_allclose(have[0], want[0], rtol=1e-4, atol=1e-4)
    for row, last in enumerate(lengths + 1):
        for place in (1, 2):
            state = (have[place][row, :, :last], want[place][row, :, :last])
            np.testing.assert_allclose(*state, rtol=1e-4, atol=1e-5)


def group_query_inputs(rng):
    query, key, value = (floats(rng, 2, 3, heads * 16) for heads in (4, 2, 2))
    past = [floats(rng, 2, 2, 3, 16) for _ in range(2)]
    return [query, key, value, *past, np.array([2, 2], np.int32), np.array(3, np.int32)]


def test_group_query_attention_has_an_epsilon_for_queries_and_one_for_keys():
    # the CPU provider refuses these norms: compared with the same attention of normalized queries and keys
    rng = np.random.default_rng(0)
    found, inputs = lookup("GroupQueryAttention", MS, 1), group_query_inputs(rng)
    scales, attributes = [floats(rng, 16), floats(rng, 16)], {"num_heads": 4, "kv_num_heads": 2}
    norms = {"qk_norm_epsilon": 1e-6, "q_norm_epsilon": 2.0, "k_norm_epsilon": 0.5}
    have = run(found, [*inputs, *[None] * 7, *scales], attributes | norms)
    for place, (scale, epsilon) in enumerate(zip(scales, (2.0, 0.5), strict=True)):
        x = inputs[place].reshape(2, 3, -1, 16)
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * scale
        inputs[place] = x.reshape(2, 3, -1).astype(np.float32)
    for wanted, got in zip(run(found, inputs, attributes), have, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_group_query_attention_refuses_padded_queries():
    inputs = [*group_query_inputs(np.random.default_rng(0)), *[None] * 9, np.array([3, 2], np.int32)]
    with pytest.raises(NotImplementedError, match="query_seqlens is not supported"):
        run(lookup("GroupQueryAttention", MS, 1), inputs, {"num_heads": 4, "kv_num_heads": 2})


@quick
@given(SEEDS, st.integers(0, 1), st.booleans(), st.booleans())
def test_rotary_embedding(seed, interleaved, flat, offset):
    rng = np.random.default_rng(seed)
    x = floats(rng, 2, 5, 24) if flat else floats(rng, 2, 3, 5, 8)
    places = np.array([2]) if offset else rng.integers(0, 9, (2, 5))
    check(
        "RotaryEmbedding",
        [x, places, floats(rng, 9, 4), floats(rng, 9, 4)],
        {"interleaved": interleaved},
        domain=MS,
    )


@quick
@given(SEEDS)
def test_fused_normalizations_and_activations(seed):
    rng = np.random.default_rng(seed)
    x, gamma, beta, bias = floats(rng, 2, 3, 8), floats(rng, 8), floats(rng, 8), floats(rng, 8)
    for skip in (floats(rng, 2, 3, 8), floats(rng, 1, 3, 8), floats(rng, 3, 8)):
        for op_type, inputs in {
            "SkipLayerNormalization": [x, skip, gamma, beta, bias],
            "SkipSimplifiedLayerNormalization": [x, skip, gamma, bias],
        }.items():
            attributes = {"epsilon": 0.1}
            want, have = both(op_type, inputs, attributes, 4, MS)
            for place in (0, 3):  # onnxruntime does not fill the two between on a CPU
                np.testing.assert_allclose(have[place], want[place], rtol=1e-4, atol=1e-5)
    ids, segments = rng.integers(0, 9, (2, 3)).astype(np.int32), rng.integers(0, 2, (2, 3)).astype(np.int32)
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    tables = [ids, segments, floats(rng, 9, 8), floats(rng, 4, 8), floats(rng, 2, 8), gamma, beta]
    check(
        "EmbedLayerNormalization",
        [*tables, mask],
        {"epsilon": 0.1},
        outputs=3,
        domain=MS,
        rtol=1e-4,
        atol=1e-5,
    )
    tables[1] = tables[4] = None
    places = rng.integers(0, 4, (2, 3)).astype(np.int32)
    check("EmbedLayerNormalization", [*tables, mask, places], outputs=2, domain=MS, rtol=1e-4, atol=1e-5)
    for op_type, inputs in {
        "Gelu": [x],
        "BiasGelu": [x, bias],
        "FastGelu": [x, bias],
        "QuickGelu": [x],
    }.items():
        check(op_type, inputs, domain=MS, rtol=1e-4, atol=1e-5)
    check("SimplifiedLayerNormalization", [x, gamma], opset=17, rtol=1e-4, atol=1e-5)


@quick
@given(SEEDS, st.booleans(), st.booleans())
def test_fused_products(seed, turned, batch):
    rng = np.random.default_rng(seed)
    a, b = floats(rng, 2, 3, 4), floats(rng, 2, 4, 5)
    a, b = (side.swapaxes(-1, -2).copy() if turned else side for side in (a, b))
    a = np.moveaxis(a, -2, 0).copy() if batch else a
    attributes = {"alpha": 0.5, "transA": int(turned), "transB": int(turned), "transBatchA": int(batch)}
    check("FusedMatMul", [a, b], attributes, domain=MS, atol=1e-5)
    for activation in ("Relu", "LeakyRelu", "Sigmoid", "Tanh"):
        attributes = {
            "activation": activation,
            "activation_alpha": 0.1,
            "alpha": 0.7,
            "beta": 0.3,
            "transB": 1,
        }
        inputs = [floats(rng, 3, 4), floats(rng, 5, 4), floats(rng, 5)]
        check("FusedGemm", inputs, attributes, domain=MS, atol=1e-5)
    x, w = floats(rng, 1, 4, 6, 5), floats(rng, 6, 2, 3, 3)
    known = {
        "Relu": None,
        "LeakyRelu": [0.2],
        "Clip": [-1.0, 1.0],
        "HardSigmoid": [0.3, 0.4],
        "Sigmoid": None,
    }
    for activation, parameters in known.items():
        attributes = {"activation": activation, "group": 2, "pads": [1, 1, 1, 1]}
        attributes |= {"activation_params": parameters} if parameters else {}
        check("FusedConv", [x, w, floats(rng, 6)], attributes, domain=MS, atol=1e-5)
    check(
        "FusedConv",
        [x, w, floats(rng, 6), floats(rng, 1, 6, 4, 3)],
        {"activation": "Relu", "group": 2},
        domain=MS,
        atol=1e-5,
    )
    pool = {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [0, 1, 1, 0]}
    check("NhwcMaxPool", [codes(rng, (1, 6, 5, 3), np.uint8)], pool, domain=MS)


@quick
@given(SEEDS)
def test_small_operators_of_microsoft(seed):
    rng = np.random.default_rng(seed)
    check(
        "Inverse", [floats(rng, 2, 3, 3) + 3 * np.eye(3, dtype=np.float32)], domain=MS, rtol=1e-3, atol=1e-4
    )
    for metric in ("euclidean", "sqeuclidean"):
        check("CDist", [floats(rng, 4, 3), floats(rng, 5, 3)], {"metric": metric}, domain=MS, atol=1e-4)
    check("ExpandDims", [floats(rng, 2, 3), np.array(-1, np.int32)], domain=MS)
    check("GatherND", [floats(rng, 2, 3, 4), rng.integers(0, 2, (5, 2))], domain=MS)
    check("Pad", [floats(rng, 2, 3), np.array([0, 2, 1, -1]), np.array([1.5], np.float32)], domain=MS)
    check("Range", [np.array(1, np.int64), np.array(5, np.int64)], domain=MS)
    check("Trilu", [floats(rng, 2, 3, 3), np.array(1)], {"upper": 0}, domain=MS)
    check("Unique", [rng.integers(0, 4, 9).astype(np.float32)], outputs=3, domain=MS)
    check("DequantizeLinear", [codes(rng, (2, 3), np.uint8), *grid(rng, np.uint8)], domain=MS)
    check("QuantizeLinear", [floats(rng, 2, 3), *grid(rng, np.uint8)], domain=MS)


def microsoft_schemas():
    bindings = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    return {s.name: s for s in bindings.get_all_operator_schema() if s.domain == MS}


NEWER = {
    "GroupQueryAttention": {"query_seqlens", "q_norm_epsilon", "k_norm_epsilon"}
}  # since onnxruntime 1.32


@pytest.mark.parametrize("known", [k for k in kernels() if k.domain == MS], ids=lambda known: known.op_type)
def test_signature_is_that_of_onnxruntime(known):
    schema = microsoft_schemas()[known.op_type]
    parameters = inspect.signature(known.function).parameters
    inputs = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    newer = NEWER.get(known.op_type, set()) if INSTALLED < (1, 32) else set()
    inputs = [p for p in inputs if p.name not in newer]
    assert [p.name for p in inputs] == [i.name for i in schema.inputs]
    for parameter, formal in zip(inputs, schema.inputs, strict=True):
        option = str(formal.option).rsplit(".", 1)[-1]
        assert (parameter.kind is parameter.VAR_POSITIONAL) == (option == "Variadic")
        if parameter.default is None:
            assert option == "Optional"
    named = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(named) - newer == set(schema.attributes)
    for name, attribute in schema.attributes.items():
        default = onnx.AttributeProto.FromString(attribute._default_value)
        if attribute.required:
            assert named[name].default is inspect.Parameter.empty
        elif not default.name:
            assert named[name].default is None
        else:
            value = helper.get_attribute_value(default)
            value = value.decode() if isinstance(value, bytes) else value
            assert named[name].default == (pytest.approx(value) if isinstance(value, float) else value)
