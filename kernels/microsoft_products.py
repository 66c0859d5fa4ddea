"""com.microsoft: quantized products, exact integers until they are scaled (onnxruntime's ContribOperators.md)."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.integer import (
    DynamicQuantizeLinear,
    QLinearConv,
    centred,
    integer_matmul,
    requantized,
)
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints


@kernel("MulInteger", since=1, domain=MS)
def MulInteger(A: Array, A_zero_point: Array | None, B: Array, B_zero_point: Array | None = None) -> Array:
    """Return (A - A_zero_point) * (B - B_zero_point) in int32."""
    left, right = (x.astype(np.int32) for x in (A, B))
    left = left if A_zero_point is None else left - A_zero_point.astype(np.int32)
    right = right if B_zero_point is None else right - B_zero_point.astype(np.int32)
    return np.asarray(left * right)


@kernel("QLinearConv", since=1, domain=MS)
def QLinearConvLast(
    x: Array,
    x_scale: Array,
    x_zero_point: Array,
    w: Array,
    w_scale: Array,
    w_zero_point: Array,
    y_scale: Array,
    y_zero_point: Array,
    B: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    channels_last: int = 0,
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the quantized convolution; x and y are (N, ..., C) with `channels_last`, w never is."""
    result = QLinearConv(
        np.moveaxis(x, -1, 1) if channels_last else x,
        x_scale,
        x_zero_point,
        w,
        w_scale,
        w_zero_point,
        y_scale,
        y_zero_point,
        B,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return np.moveaxis(result, 1, -1) if channels_last else result


@kernel("MatMulIntegerToFloat", since=1, domain=MS)
def MatMulIntegerToFloat(
    A: Array,
    B: Array,
    a_scale: Array,
    b_scale: Array,
    a_zero_point: Array | None = None,
    b_zero_point: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Return the product of what A and B mean, in the scales' type; B's parameters also per column."""
    total = integer_matmul(centred(A, a_zero_point), centred(B, b_zero_point, -1))
    scale = a_scale.astype(np.float32) * b_scale.astype(np.float32)
    product = total.astype(np.float32, copy=False) * (scale.reshape(()) if scale.size == 1 else scale)
    if bias is not None:
        product = product + bias.astype(np.float32)
    return np.asarray(product).astype(a_scale.dtype)


@kernel("DynamicQuantizeMatMul", since=1, domain=MS)
def DynamicQuantizeMatMul(
    A: Array, B: Array, b_scale: Array, b_zero_point: Array | None = None, bias: Array | None = None
) -> Array:
    """Return the product of A, quantized by its own range, and what B means."""
    quantized_a, a_scale, a_zero_point = DynamicQuantizeLinear(A)
    return MatMulIntegerToFloat(quantized_a, B, a_scale, b_scale, a_zero_point, b_zero_point, bias)


@kernel("QGemm", since=1, domain=MS)
def QGemm(
    A: Array,
    a_scale: Array,
    a_zero_point: Array,
    B: Array,
    b_scale: Array,
    b_zero_point: Array,
    C: Array | None = None,
    y_scale: Array | None = None,
    y_zero_point: Array | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    """Return alpha * A' B' + C of what they mean: quantized when y_scale is given, else float32.

    C is int32 in units of alpha * a_scale * b_scale.
    """
    left, right = centred(A, a_zero_point), centred(B.T if transB else B, b_zero_point, -1)
    total = integer_matmul(left.T if transA else left, right)
    if C is not None:
        total = total.astype(np.float64) + C
    scale = np.float32(alpha) * a_scale * (b_scale.reshape(()) if b_scale.size == 1 else b_scale)
    if y_scale is None:
        return np.asarray(total.astype(np.float32) * scale)
    dtype = A.dtype if y_zero_point is None else y_zero_point.dtype
    return requantized(total, np.asarray(scale / y_scale), y_zero_point, dtype)
