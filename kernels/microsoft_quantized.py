"""com.microsoft: quantized elementwise operators and pools (onnxruntime's ContribOperators.md).

They are the function of real numbers between a DequantizeLinear and a QuantizeLinear, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.activation import LeakyRelu, Sigmoid, softmax, trailing
from onnxslim_lab.kernels.dtypes import DTYPES
from onnxslim_lab.kernels.integer import centred, requantized
from onnxslim_lab.kernels.pool import average
from onnxslim_lab.kernels.quantize import dequantize, quantize, target
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, slide

MS = "com.microsoft"


def real(x: Array, scale: Array, zero_point: Array | None) -> Array:
    """Return the real numbers that quantized ones mean, in float32."""
    return dequantize(x, scale, zero_point, 0, 0, DTYPES[1])


def quantized(x: Array, scale: Array, zero_point: Array | None, dtype: np.dtype[np.generic]) -> Array:
    """Return real numbers in a quantized type."""
    return quantize(x, scale, zero_point, 0, 0, dtype)


@kernel("QuantizeLinear", since=1, domain=MS)
def QuantizeLinear(
    x: Array, y_scale: Array, y_zero_point: Array | None = None, *, axis: int | None = None
) -> Array:
    """Return saturate(round(x / y_scale) + y_zero_point)."""
    return quantize(x, y_scale, y_zero_point, 1 if axis is None else axis, 0, target(y_zero_point, 0))


@kernel("DequantizeLinear", since=1, domain=MS)
def DequantizeLinear(
    x: Array, x_scale: Array, x_zero_point: Array | None = None, *, axis: int | None = None
) -> Array:
    """Return (x - x_zero_point) * x_scale."""
    return dequantize(x, x_scale, x_zero_point, 1 if axis is None else axis, 0, x_scale.dtype)


@kernel("QLinearAdd", since=1, domain=MS)
def QLinearAdd(
    A: Array,
    A_scale: Array,
    A_zero_point: Array | None,
    B: Array,
    B_scale: Array,
    B_zero_point: Array | None,
    C_scale: Array,
    C_zero_point: Array | None = None,
) -> Array:
    """Return the quantized sum of what A and B mean."""
    total = real(A, A_scale, A_zero_point) + real(B, B_scale, B_zero_point)
    return quantized(np.asarray(total), C_scale, C_zero_point, A.dtype)


@kernel("QLinearMul", since=1, domain=MS)
def QLinearMul(
    A: Array,
    A_scale: Array,
    A_zero_point: Array | None,
    B: Array,
    B_scale: Array,
    B_zero_point: Array | None,
    C_scale: Array,
    C_zero_point: Array | None = None,
) -> Array:
    """Return the quantized product of what A and B mean."""
    product = real(A, A_scale, A_zero_point) * real(B, B_scale, B_zero_point)
    return quantized(np.asarray(product), C_scale, C_zero_point, A.dtype)


@kernel("QLinearSigmoid", since=1, domain=MS)
def QLinearSigmoid(
    X: Array,
    X_scale: Array,
    X_zero_point: Array | None,
    Y_scale: Array,
    Y_zero_point: Array | None = None,
) -> Array:
    """Return the quantized sigmoid of what X means."""
    return quantized(Sigmoid(real(X, X_scale, X_zero_point)), Y_scale, Y_zero_point, X.dtype)


@kernel("QLinearLeakyRelu", since=1, domain=MS)
def QLinearLeakyRelu(
    X: Array,
    X_scale: Array,
    X_zero_point: Array | None,
    Y_scale: Array,
    Y_zero_point: Array | None = None,
    *,
    alpha: float = 0.01,
) -> Array:
    """Return the quantized LeakyRelu of what X means."""
    result = LeakyRelu(real(X, X_scale, X_zero_point), alpha=alpha)
    return quantized(result, Y_scale, Y_zero_point, X.dtype)


@kernel("QLinearSoftmax", since=1, domain=MS)
def QLinearSoftmax(
    X: Array,
    X_scale: Array,
    x_zero_point: Array | None,
    y_scale: Array,
    y_zero_point: Array,
    *,
    axis: int = -1,
    opset: int,
) -> Array:
    """Return the quantized softmax along `axis`, over all axes from it on when `opset` is below 13."""
    axes = axis if opset >= 13 else trailing(X, axis)
    return quantized(softmax(real(X, X_scale, x_zero_point), axes), y_scale, y_zero_point, X.dtype)


@kernel("QLinearConcat", since=1, domain=MS)
def QLinearConcat(Y_scale: Array, Y_zero_point: Array, *inputs: Array, axis: int) -> Array:
    """Return tensors joined along `axis`; the inputs come in threes: tensor, scale, zero point."""
    parts = [real(*inputs[place : place + 3]) for place in range(0, len(inputs), 3)]
    return quantized(np.concatenate(parts, axis), Y_scale, Y_zero_point, Y_zero_point.dtype)


@kernel("QLinearWhere", since=1, domain=MS)
def QLinearWhere(
    condition: Array,
    X: Array,
    x_scale: Array,
    x_zero_point: Array,
    Y: Array,
    y_scale: Array,
    y_zero_point: Array,
    z_scale: Array,
    z_zero_point: Array,
) -> Array:
    """Return what X means where the condition holds, else what Y means, quantized."""
    chosen = np.where(condition, real(X, x_scale, x_zero_point), real(Y, y_scale, y_zero_point))
    return quantized(chosen, z_scale, z_zero_point, X.dtype)


@kernel("QLinearReduceMean", since=1, domain=MS)
def QLinearReduceMean(
    data: Array,
    data_scale: Array,
    data_zero_point: Array | None,
    reduced_scale: Array,
    reduced_zero_point: Array | None = None,
    *,
    axes: Sequence[int],
    keepdims: int,
) -> Array:
    """Return the quantized mean of what data means over the axes."""
    mean = real(data, data_scale, data_zero_point).mean(tuple(axes), keepdims=bool(keepdims))
    return quantized(np.asarray(mean), reduced_scale, reduced_zero_point, data.dtype)


@kernel("QLinearGlobalAveragePool", since=1, domain=MS)
def QLinearGlobalAveragePool(
    X: Array,
    x_scale: Array,
    x_zero_point: Array,
    y_scale: Array,
    y_zero_point: Array,
    *,
    channels_last: int = 0,
) -> Array:
    """Return the mean over the spatial axes: (N, C, ...), or (N, ..., C) with `channels_last`."""
    axes = tuple(range(1, X.ndim - 1) if channels_last else range(2, X.ndim))
    mean = centred(X, x_zero_point).mean(axes, keepdims=True, dtype=np.float64)
    return requantized(mean, x_scale / y_scale, y_zero_point, X.dtype)


@kernel("QLinearAveragePool", since=1, domain=MS)
def QLinearAveragePool(
    X: Array,
    x_scale: Array,
    x_zero_point: Array | None,
    y_scale: Array,
    y_zero_point: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the quantized mean of every window of what X means."""
    x = real(np.moveaxis(X, -1, 1) if channels_last else X, x_scale, x_zero_point)
    window = slide("QLinearAveragePool", x.shape[2:], kernel_shape, strides, None, pads, auto_pad, ceil_mode)
    mean = average(x, window, count_include_pad)
    result = quantized(mean, y_scale, y_zero_point, X.dtype)
    return np.moveaxis(result, 1, -1) if channels_last else result
