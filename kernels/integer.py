"""Integer products, exact: nothing is rounded or saturated before the result is.

Integers are held in floating point for BLAS: in float32 where no sum can reach 2**24, else in float64 (below
2**53). Such sums are exact in whatever order they are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxslim_lab.kernels.cast import cast
from onnxslim_lab.kernels.conv import check, convolve
from onnxslim_lab.kernels.dtypes import is_integer, limits
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints, slide

FLOAT32_EXACT = 1 << 24


def centred(x: Array, zero_point: Array | None, axis: int | None = None) -> Array:
    """Return x - zero_point, exact: float32 for 8- and 16-bit types, float64 for 32-bit ones.

    Args:
        x: Integers.
        zero_point: One value, one per index of `axis`, or an array that broadcasts over x.
        axis: Where a vector of zero points belongs.

    Raises:
        ValueError: The zero points do not fit.
    """
    result = x.astype(np.float64 if x.dtype.itemsize >= 4 else np.float32)
    if zero_point is None or (zero_point.size == 1 and not zero_point.any()):
        return result
    shift = zero_point.astype(result.dtype)
    if shift.size == 1:
        shift = shift.reshape(())
    elif shift.ndim == 1 and axis is not None:
        if shift.shape[0] != x.shape[axis]:
            raise ValueError(f"{shift.shape[0]} zero points for {x.shape[axis]} indices of axis {axis}")
        shift = shift.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return np.asarray(np.subtract(result, shift, out=result))


def carried(x: Array, w: Array, axes: int | tuple[int, ...]) -> tuple[Array, Array]:
    """Return both in the narrowest type in which sums of x times w over some axes of w are exact."""
    most = np.abs(w).sum(axes, dtype=np.float64).max(initial=0) * np.abs(x).max(initial=0)
    if most < FLOAT32_EXACT:
        return x.astype(np.float32, copy=False), w.astype(np.float32, copy=False)
    return x.astype(np.float64, copy=False), w.astype(np.float64, copy=False)


def integer_matmul(left: Array, right: Array) -> Array:
    """Return the exact matrix product of centred integers, batched as numpy.matmul."""
    return np.asarray(np.matmul(*carried(left, right, 0 if right.ndim < 2 else -2)))


def integer_conv(
    op_type: str,
    x: Array,
    w: Array,
    *,
    auto_pad: str,
    dilations: Ints | None,
    group: int,
    kernel_shape: Ints | None,
    pads: Ints | None,
    strides: Ints | None,
) -> Array:
    """Return the exact convolution of centred integers: padding counts as zero.

    Takes the input (N, C, ...), the weights (M, C / group, ...) and the attributes of Conv.

    Raises:
        ValueError: The shapes do not fit.
    """
    check(op_type, x, w, None, group, kernel_shape)
    window = slide(op_type, x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    return convolve(*carried(x, w, tuple(range(1, w.ndim))), None, window, group)


def in_int32(total: Array) -> Array:
    """Return exact integers in int32, which wraps as the specification has it."""
    return total.astype(np.int64).astype(np.int32)


def requantized(accumulated: Array, scale: Array, zero_point: Array | None, dtype: np.dtype[Any]) -> Array:
    """Return saturate(round(accumulated * scale) + zero_point), ties to even, the product in float32."""
    scaled = np.asarray(np.multiply(accumulated, scale, dtype=np.float32, casting="same_kind"))
    np.rint(scaled, out=scaled)
    low, high = limits(dtype)
    if zero_point is not None:
        scaled = np.asarray(np.add(scaled, zero_point, dtype=np.float32))
    np.fmax(scaled, np.float32(low), out=scaled)  # NaN becomes the lowest
    np.fmin(scaled, np.float32(high), out=scaled)
    return scaled.astype(dtype)


@kernel("MatMulInteger", since=10)
def MatMulInteger(
    A: Array, B: Array, a_zero_point: Array | None = None, b_zero_point: Array | None = None
) -> Array:
    """Return (A - a_zero_point) (B - b_zero_point) in int32; zero points per row of A, per column of B."""
    left = centred(A, a_zero_point, -2 if A.ndim > 1 else None)
    return in_int32(integer_matmul(left, centred(B, b_zero_point, -1)))


@kernel("ConvInteger", since=10)
def ConvInteger(
    x: Array,
    w: Array,
    x_zero_point: Array | None = None,
    w_zero_point: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the convolution of the centred integers in int32; padding means x_zero_point."""
    total = integer_conv(
        "ConvInteger",
        centred(x, x_zero_point),
        centred(w, w_zero_point, 0),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return in_int32(total)


@kernel("QLinearConv", since=10)
def QLinearConv(
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
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the quantized convolution; scale and zero point of the weights also per filter, B in int32."""
    total = integer_conv(
        "QLinearConv",
        centred(x, x_zero_point),
        centred(w, w_zero_point, 0),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    ones = (1,) * (x.ndim - 2)
    if B is not None:
        total = total.astype(np.float64) + B.reshape(-1, *ones)
    scale = (x_scale.reshape(-1) * w_scale.reshape(-1) / y_scale.reshape(-1)).reshape(-1, *ones)
    return requantized(total, scale, y_zero_point, y_zero_point.dtype)


@kernel("QLinearMatMul", since=10)
def QLinearMatMul(
    a: Array,
    a_scale: Array,
    a_zero_point: Array,
    b: Array,
    b_scale: Array,
    b_zero_point: Array,
    y_scale: Array,
    y_zero_point: Array,
) -> Array:
    """Return the quantized matrix product; scales and zero points per row of a and of y, per column of b."""

    def rows(parameter: Array) -> Array:
        return parameter[:, None] if parameter.ndim == 1 and parameter.size > 1 else parameter

    def scalar(parameter: Array) -> Array:
        return parameter.reshape(()) if parameter.size == 1 else parameter

    left, right, out = (scalar(rows(a_scale)), scalar(b_scale), scalar(rows(y_scale)))
    scale = left.astype(np.float32) * right.astype(np.float32) / out.astype(np.float32)
    if is_integer(a.dtype):
        total = integer_matmul(centred(a, a_zero_point, -2), centred(b, b_zero_point, -1))
        return requantized(total, scale, scalar(rows(y_zero_point)), y_zero_point.dtype)
    exact = [
        value.astype(np.float64) - scalar(zero_point).astype(np.float64)
        for value, zero_point in ((a, rows(a_zero_point)), (b, b_zero_point))
    ]
    product = np.matmul(*exact).astype(np.float32) * scale
    return cast(product + scalar(rows(y_zero_point)).astype(np.float32), y_zero_point.dtype)


@kernel("DynamicQuantizeLinear", since=11)
def DynamicQuantizeLinear(x: Array) -> tuple[Array, Array, Array]:
    """Return x in uint8, the scale and the zero point that its own range, widened to hold 0, asks for.

    The specification leaves the scale of all zeros open (it would be 0): 1, as onnxruntime has it.
    """
    low = np.minimum(x.min(initial=np.inf), 0).astype(np.float32)
    high = np.maximum(x.max(initial=-np.inf), 0).astype(np.float32)
    scale = np.float32(1) if high == low else (high - low) / np.float32(255)
    zero_point = np.rint(np.clip(-low / scale, 0, 255)).astype(np.uint8)
    quantized = np.clip(np.rint(x / scale) + np.float32(zero_point), 0, 255)
    return quantized.astype(np.uint8), np.asarray(scale, np.float32), zero_point
