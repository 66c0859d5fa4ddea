"""Quantized kernels, of ai.onnx and com.microsoft, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import MS, SEEDS, check, codes, grid, quantized, quick

from onnxslim_lab.kernels import lookup, run

BYTES = [np.uint8, np.int8]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_quantizing_what_is_no_number(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.25], np.float32)
    check("QuantizeLinear", [x, np.array(0.1, np.float32), np.array(5, dtype)], opset=21)


@quick
@given(SEEDS, st.sampled_from(BYTES))
def test_quantized_elementwise(seed, dtype):
    rng = np.random.default_rng(seed)
    left, right = quantized(rng, (2, 3, 4), dtype), quantized(rng, (3, 1), dtype)
    check("QLinearAdd", [*left, *right, *grid(rng, dtype)], domain=MS, steps=1)
    check("QLinearMul", [*left, *right, *grid(rng, dtype)], domain=MS, steps=1)
    check("QLinearSigmoid", [*left, *grid(rng, dtype, 0.01)], domain=MS, steps=1)
    check("QLinearLeakyRelu", [*left, *grid(rng, dtype)], {"alpha": 0.3}, domain=MS, steps=1)
    condition = rng.random((2, 3, 4)) < 0.5
    check(
        "QLinearWhere",
        [condition, *left, *quantized(rng, (2, 3, 4), dtype), *grid(rng, dtype)],
        domain=MS,
        steps=1,
    )
    parts = [*grid(rng, dtype), *left, *quantized(rng, (2, 5, 4), dtype)]
    check("QLinearConcat", parts, {"axis": 1}, domain=MS, steps=1)
    for opset, axis in ((13, 1), (11, 1)):
        size = np.array(1 / 256, np.float32)
        output = [size, np.array(0 if dtype == np.uint8 else -128, dtype)]
        check("QLinearSoftmax", [*left, *output], {"axis": axis, "opset": opset}, domain=MS, steps=1)


@quick
@given(SEEDS, st.sampled_from(BYTES), st.integers(0, 1), st.integers(0, 1))
def test_quantized_pools(seed, dtype, last, include):
    rng = np.random.default_rng(seed)
    x = quantized(rng, (2, 6, 5, 3), dtype)
    check("QLinearGlobalAveragePool", [*x, *grid(rng, dtype)], {"channels_last": last}, domain=MS, steps=1)
    attributes = {
        "kernel_shape": [3, 2],
        "pads": [1, 0, 1, 1],
        "strides": [2, 1],
        "channels_last": last,
        "count_include_pad": include,
    }
    check("QLinearAveragePool", [*x, *grid(rng, dtype)], attributes, domain=MS, steps=1)


@quick
@given(SEEDS, st.sampled_from(BYTES), st.booleans(), st.integers(0, 1))
def test_quantized_convolutions(seed, weights, columns, last):
    rng = np.random.default_rng(seed)
    w = codes(rng, (4, 2, 3, 2), weights) // np.array(2, weights)  # half the range: no CPU saturates
    scale = rng.random(4).astype(np.float32) * 0.01 + 0.001
    zero = np.zeros(4, weights)
    if not columns:
        scale, zero = scale[0], codes(rng, (), weights) if weights == np.uint8 else np.zeros((), weights)
    x = quantized(rng, (2, 4, 6, 5), np.uint8)
    bias = rng.integers(-1000, 1000, 4).astype(np.int32)
    attributes = {"group": 2, "pads": [1, 0, 0, 1], "strides": [1, 2], "dilations": [2, 1]}
    inputs = [*x, w, scale, zero, *grid(rng, np.uint8), bias]
    check("QLinearConv", inputs, attributes, opset=10)
    check("ConvInteger", [x[0], w, x[2], zero if zero.ndim == 0 else None], attributes, opset=10)
    inputs[0] = np.moveaxis(x[0], 1, -1).copy() if last else x[0]
    check("QLinearConv", inputs, attributes | {"channels_last": last}, domain=MS)


@quick
@given(SEEDS, st.sampled_from(BYTES), st.booleans())
def test_integer_products(seed, dtype, columns):
    rng = np.random.default_rng(seed)
    x, x_scale, x_zero = quantized(rng, (2, 5, 40), np.uint8)
    w = codes(rng, (40, 6), dtype) // np.array(2, dtype)
    zero = codes(rng, 6 if columns else (), dtype) // np.array(2, dtype)
    scale = (rng.random(6 if columns else ()) * 0.01 + 0.001).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    check("MatMulInteger", [x, w, x_zero, zero], opset=10)
    scale = np.asarray(scale)
    check("QLinearMatMul", [x, x_scale, x_zero, w, scale, zero, *grid(rng, np.uint8, 1)], opset=10)
    check("MatMulIntegerToFloat", [x, w, x_scale, scale, x_zero, zero, bias], domain=MS, atol=3e-3)
    real = rng.normal(size=(3, 40)).astype(np.float32)
    check("DynamicQuantizeMatMul", [real, w, scale, zero, bias], domain=MS, atol=3e-3)
    check("DynamicQuantizeLinear", [real], outputs=3, opset=11, steps=1)
    check("DynamicQuantizeLinear", [real * 0], outputs=3, opset=11)
    sums = rng.integers(-500, 500, 6).astype(np.int32)
    parts = [x[0], x_scale, x_zero, np.ascontiguousarray(w.T), scale, zero, sums]
    attributes = {"transB": 1, "alpha": 0.5}
    check("QGemm", [*parts, *grid(rng, np.uint8)], attributes, domain=MS)
    check("QGemm", parts, attributes, domain=MS, atol=3e-3)


@pytest.mark.parametrize("length", [1, 257, 40000])
def test_integer_sums_are_exact(length):
    rng = np.random.default_rng(length)
    a = rng.integers(200, 256, (2, length)).astype(np.uint8)
    b = rng.integers(-128, -100, (length, 3)).astype(np.int8)
    a[0], b[:, 0] = 255, -128
    want = a.astype(np.int64) @ b.astype(np.int64)
    (have,) = run(lookup("MatMulInteger", "", 10), [a, b], {})
    assert have.dtype == np.int32
    assert np.array_equal(have, want.astype(np.int32))  # which wraps
    filters = b.T.reshape(3, length, 1)
    (have,) = run(lookup("ConvInteger", "", 10), [a[:, :, None], filters], {})
    assert np.array_equal(have[..., 0], want.astype(np.int32))
    one, zero = np.array(1, np.float32), np.array(0, np.int8)
    scale = np.array(np.abs(want).max() / 100, np.float32)
    inputs = [a, one, np.array(0, np.uint8), b, one, zero, scale, zero]
    (have,) = run(lookup("QLinearMatMul", "", 21), inputs, {})
    assert np.array_equal(have, np.rint(want / np.float64(scale)).astype(np.int8))


@quick
@given(
    SEEDS, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.sampled_from(["no", "packed", "real"])
)
def test_products_with_packed_weights(seed, bits, block_size, zeros):
    rng = np.random.default_rng(seed)
    k, n = 50, 7
    blocks = -(-k // block_size)
    b = codes(rng, (n, blocks, block_size * bits // 8), np.uint8)
    scales = rng.normal(size=(n, blocks)).astype(np.float32)
    a = rng.normal(size=(2, 3, k)).astype(np.float32)
    zero = None
    if zeros == "packed":
        zero = codes(rng, (n, -(-blocks * bits // 8)), np.uint8)
    elif zeros == "real" and bits == 4:
        zero = rng.normal(size=(n, blocks)).astype(np.float32)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
    inputs = [a, b, scales, zero, None, rng.normal(size=n).astype(np.float32)]
    check("MatMulNBits", inputs, attributes, domain=MS, rtol=1e-3, atol=1e-3)


@quick
@given(SEEDS, st.sampled_from([4, 8]), st.booleans())
def test_packed_gather(seed, bits, zeros):
    rng = np.random.default_rng(seed)
    data = codes(rng, (9, 64 * bits // 8), np.uint8)
    scales = rng.normal(size=(9, 4)).astype(np.float32)
    points = codes(rng, (9, 4 * bits // 8), np.uint8) if zeros else None
    indices = rng.integers(-9, 9, (2, 3))
    attributes = {"bits": bits, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    check("GatherBlockQuantized", [data, indices, scales, points], attributes, domain=MS)
