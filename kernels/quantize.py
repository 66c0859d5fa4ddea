"""QuantizeLinear and DequantizeLinear: per tensor, per axis and blockwise."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.cast import cast
from onnxslim_lab.kernels.dtypes import DTYPES, dtype_of_number, is_integer, limits
from onnxslim_lab.kernels.registry import Array, kernel


def spread(parameter: Array, x: Array, axis: int, block_size: int) -> Array:
    """Return a scale or zero point shaped so that it broadcasts over x.

    Args:
        parameter: A scalar, one value per index of `axis`, or x's shape with `axis` divided in blocks.
        x: What is (de)quantized.
        axis: Axis of the values or of the blocks.
        block_size: Length of a block along `axis`; 0 when there are no blocks.

    Raises:
        ValueError: The shape of the parameter fits none of these.
    """
    if parameter.size == 1 and not block_size:
        return parameter.reshape(())
    axis += x.ndim if axis < 0 else 0
    if block_size:
        repeated = np.repeat(parameter, block_size, axis)
        kept = tuple(slice(0, length) for length in x.shape)
        if repeated[kept].shape != x.shape:
            raise ValueError(f"blocks of {block_size} of {parameter.shape} do not cover {x.shape}")
        return repeated[kept]
    if parameter.ndim != 1 or axis >= x.ndim or parameter.shape[0] != x.shape[axis]:
        raise ValueError(f"{parameter.shape} does not fit axis {axis} of {x.shape}")
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def dequantize(
    x: Array, scale: Array, zero_point: Array | None, axis: int, block_size: int, dtype: np.dtype[np.generic]
) -> Array:
    """Return (x - zero_point) * scale: the difference exact, the product in float32 or wider."""
    precision = np.float64 if scale.dtype == np.float64 else np.float32
    wide = x.astype(np.int64 if x.dtype == np.int32 else np.int32) if is_integer(x.dtype) else x
    if zero_point is not None:
        wide = wide.astype(np.float32) if wide.dtype == x.dtype else wide
        wide = wide - spread(zero_point, x, axis, block_size).astype(wide.dtype)
    product = wide.astype(precision) * spread(scale, x, axis, block_size).astype(precision)
    return cast(np.asarray(product), dtype)


def quantize(
    x: Array,
    scale: Array,
    zero_point: Array | None,
    axis: int,
    block_size: int,
    dtype: np.dtype[np.generic],
    *,
    saturate: bool = True,
    precision: np.dtype[np.generic] | None = None,
) -> Array:
    """Return saturate(round(x / scale) + zero_point), ties to even.

    `precision` is the dtype of the division: the scale's unless given, float32 for the half types.
    """
    chosen = precision or scale.dtype
    divisor = spread(scale, x, axis, block_size)
    if chosen.itemsize < 4:
        ratio = (x.astype(np.float32) / divisor.astype(np.float32)).astype(chosen).astype(np.float32)
    else:
        ratio = x.astype(chosen) / divisor.astype(chosen)
    if not is_integer(dtype):
        if zero_point is not None:
            ratio = ratio + spread(zero_point, x, axis, block_size).astype(ratio.dtype)
        return cast(np.asarray(ratio), dtype, saturate=saturate)
    low, high = limits(dtype)
    rounded = np.asarray(np.rint(ratio))
    if zero_point is not None:
        rounded = np.asarray(rounded + spread(zero_point, x, axis, block_size).astype(rounded.dtype))
    np.fmax(rounded, np.asarray(low, rounded.dtype), out=rounded)  # NaN becomes the lowest, as in onnxruntime
    np.fmin(rounded, np.asarray(high, rounded.dtype), out=rounded)
    return rounded.astype(np.int32).astype(dtype)


@kernel("DequantizeLinear", since=10)
def DequantizeLinear_10(x: Array, x_scale: Array, x_zero_point: Array | None = None) -> Array:
    """Return (x - x_zero_point) * x_scale, one scale for all."""
    return dequantize(x, x_scale, x_zero_point, 0, 0, x_scale.dtype)


@kernel("DequantizeLinear", since=13)
def DequantizeLinear_13(
    x: Array, x_scale: Array, x_zero_point: Array | None = None, *, axis: int = 1
) -> Array:
    """Return (x - x_zero_point) * x_scale, one scale for all or one per index of `axis`."""
    return dequantize(x, x_scale, x_zero_point, axis, 0, x_scale.dtype)


@kernel("DequantizeLinear", since=21)
def DequantizeLinear_21(
    x: Array, x_scale: Array, x_zero_point: Array | None = None, *, axis: int = 1, block_size: int = 0
) -> Array:
    """Return (x - x_zero_point) * x_scale; `block_size` above 0 means a scale per block along `axis`."""
    return dequantize(x, x_scale, x_zero_point, axis, block_size, x_scale.dtype)


@kernel("DequantizeLinear", since=23)
def DequantizeLinear_23(
    x: Array,
    x_scale: Array,
    x_zero_point: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Array:
    """Return (x - x_zero_point) * x_scale in `output_dtype`, the scale's unless given."""
    dtype = dtype_of_number(output_dtype) if output_dtype else x_scale.dtype
    return dequantize(x, x_scale, x_zero_point, axis, block_size, dtype)


def target(zero_point: Array | None, output_dtype: int) -> np.dtype[np.generic]:
    """Return the quantized type: the zero point's, else the attribute's, else uint8."""
    if zero_point is not None:
        return zero_point.dtype
    return dtype_of_number(output_dtype) if output_dtype else DTYPES[2]


@kernel("QuantizeLinear", since=10)
def QuantizeLinear_10(x: Array, y_scale: Array, y_zero_point: Array | None = None) -> Array:
    """Return saturate(round(x / y_scale) + y_zero_point), one scale for all."""
    return quantize(x, y_scale, y_zero_point, 0, 0, target(y_zero_point, 0))


@kernel("QuantizeLinear", since=13)
def QuantizeLinear_13(x: Array, y_scale: Array, y_zero_point: Array | None = None, *, axis: int = 1) -> Array:
    """Return saturate(round(x / y_scale) + y_zero_point), one scale for all or one per index of `axis`."""
    return quantize(x, y_scale, y_zero_point, axis, 0, target(y_zero_point, 0))


@kernel("QuantizeLinear", since=19)
def QuantizeLinear_19(
    x: Array, y_scale: Array, y_zero_point: Array | None = None, *, axis: int = 1, saturate: int = 1
) -> Array:
    """Return the quantized x; `saturate` is about float8."""
    dtype = target(y_zero_point, 0)
    return quantize(x, y_scale, y_zero_point, axis, 0, dtype, saturate=bool(saturate))


@kernel("QuantizeLinear", since=21)
def QuantizeLinear_21(
    x: Array,
    y_scale: Array,
    y_zero_point: Array | None = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Array:
    """Return the quantized x; `block_size` above 0 means a scale per block along `axis`."""
    dtype = target(y_zero_point, output_dtype)
    return quantize(x, y_scale, y_zero_point, axis, block_size, dtype, saturate=bool(saturate))


@kernel("QuantizeLinear", since=23)
def QuantizeLinear_23(
    x: Array,
    y_scale: Array,
    y_zero_point: Array | None = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
) -> Array:
    """Return the quantized x, divided in the dtype `precision`, the scale's unless given."""
    return quantize(
        x,
        y_scale,
        y_zero_point,
        axis,
        block_size,
        target(y_zero_point, output_dtype),
        saturate=bool(saturate),
        precision=dtype_of_number(precision) if precision else None,
    )
