"""Grids of quantized values: from a range, from a weight; values to codes and back as ONNX defines it.

ONNX operators QuantizeLinear and DequantizeLinear, opset 10 to 25; Jacob et al. 2018, "Quantization and
training of neural networks for efficient integer-arithmetic-only inference", for the affine grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.kernels import quantize as kernels
from onnxslim_lab.quantization.types import QuantType

Granularity = Literal["tensor", "channel", "block"]

_LEAST_HALF = 2.0**-20  # float16 scales may be subnormal, down to where they still hold 4 bits
_SHRINKS = {2: np.linspace(0.2, 1.0, 65), 4: np.linspace(0.4, 1.0, 49)}
_SHRINKS_WIDE = np.linspace(0.7, 1.0, 31)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values a quantized tensor can take: (code - zero_point) * scale.

    Attributes:
        kind: Type of the codes.
        scale: float32 or float16, positive: a scalar (), one per index of `axis` (n,), or blockwise: the
            tensor's shape with `axis` divided by `block`, rounded up.
        zero_point: Of the scale's shape, dtype `kind.dtype`.
        axis: Axis of the channels or blocks; None for one scale for all.
        block: Length of a block along `axis`; 0 when there are none.
        bounds: Least and greatest code to use; None for all that the type has.
    """

    kind: QuantType
    scale: Array
    zero_point: Array
    axis: int | None = None
    block: int = 0
    bounds: tuple[int, int] | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest code in use."""
        return self.bounds or (self.kind.low, self.kind.high)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the codes."""
        return bool(np.all(self.zero_point.astype(np.int64) == middle(self.kind)))


def merged(grid: Grid) -> Grid:
    """Return a grid with one scale for all where every channel has the same.

    >>> from onnxslim_lab.quantization.types import QUANT_TYPES
    >>> merged(Grid(QUANT_TYPES["int8"], np.float32([2, 2]), np.int8([0, 0]), 0)).scale
    array(2., dtype=float32)
    """
    ends = [values.reshape(-1)[:1] for values in (grid.scale, grid.zero_point)]
    if grid.axis is None or grid.block or not ends[0].size:
        return grid
    if (grid.scale != ends[0]).any() or (grid.zero_point != ends[1]).any():
        return grid
    return replace(grid, scale=ends[0].reshape(()), zero_point=ends[1].reshape(()), axis=None)


def middle(kind: QuantType) -> int:
    """Return the zero point of a symmetric grid: 0 for signed types, half of the codes for unsigned ones.

    >>> from onnxslim_lab.quantization.types import QUANT_TYPES
    >>> middle(QUANT_TYPES["uint8"]), middle(QUANT_TYPES["int4"])
    (128, 0)
    """
    return 0 if kind.signed else 1 << kind.bits - 1


def code_range(kind: QuantType, *, symmetric: bool, reduce_range: bool = False) -> tuple[int, int]:
    """Return the least and the greatest code a grid uses.

    Symmetric grids of 8 bits and more leave the least code out (-127..127), as kernels that negate or
    multiply pairs in 16 bits ask for; narrower ones use all of theirs. `reduce_range` gives 8-bit types one
    bit less: sums of two products of a full and a reduced factor fit in 16 bits, which CPUs without VNNI
    saturate at. It does not concern other types.

    >>> from onnxslim_lab.quantization.types import QUANT_TYPES
    >>> code_range(QUANT_TYPES["int8"], symmetric=True), code_range(QUANT_TYPES["int4"], symmetric=True)
    ((-127, 127), (-8, 7))
    """
    if kind.floating:
        return kind.low, kind.high
    if reduce_range and kind.bits == 8:
        return (-64, 64) if kind.signed else (1 if symmetric else 0, 127)
    narrow = symmetric and kind.bits >= 8
    return kind.low + narrow, kind.high


def zero_code(kind: QuantType, *, reduce_range: bool = False) -> int:
    """Return the zero point of a symmetric grid, in the reduced range when asked."""
    return middle(kind) // (2 if reduce_range and kind.bits == 8 else 1)


def grid_of(
    low: Any,
    high: Any,
    kind: QuantType,
    *,
    symmetric: bool,
    reduce_range: bool = False,
    dtype: Any = np.float32,
) -> tuple[Array, Array]:
    """Return (scale, zero_point) of the least grid that covers [low, high] and represents 0 exactly.

    Args:
        low: Least values; a scalar or an array.
        high: Greatest values, of the same shape.
        kind: Type of the codes; float8 grids are always symmetric.
        symmetric: Zero point in the middle of the codes.
        reduce_range: One bit less, see `code_range`.
        dtype: Of the scale: float32 or float16.

    Returns:
        Arrays of the shape of `low`. A range of nothing but 0 has scale 1. Scales are finite, and normal
        numbers in float32, because some processors take subnormal ones for 0.

    Raises:
        ValueError: A bound is not finite.

    >>> from onnxslim_lab.quantization.types import QUANT_TYPES
    >>> grid_of(-1.0, 1.55, QUANT_TYPES["uint8"], symmetric=False)
    (array(0.01, dtype=float32), array(100, dtype=uint8))
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
        raise ValueError("the range is not finite")
    least, greatest = code_range(kind, symmetric=symmetric, reduce_range=reduce_range)
    centre = zero_code(kind, reduce_range=reduce_range)
    if symmetric or kind.floating:
        wide = np.maximum(high / (greatest - centre), low / (least - centre))
        scale = _within(safe_scale(wide, dtype), low, high)
        zero_point = np.full(scale.shape, centre)
    else:
        scale = _within(safe_scale((high - low) / (greatest - least), dtype), low, high)
        exact = np.rint(least - low / scale.astype(np.float64))
        zero_point = np.where(high - low > 0, np.clip(exact, least, greatest), centre)
    return scale, np.asarray(zero_point).astype(kind.dtype)


def safe_scale(scale: Any, dtype: Any = np.float32) -> Array:
    """Return scales in `dtype`: 0 becomes 1, the rest is kept within what is finite and safe to divide by.

    float16 is rounded up: an error of half a unit would be 16 codes at the ends of an int16 range.

    >>> safe_scale([0.0, 1e-45, 0.5])
    array([1.0000000e+00, 1.1754944e-38, 5.0000000e-01], dtype=float32)
    """
    wide = np.asarray(scale, np.float64)
    info = np.finfo(dtype)
    least = _LEAST_HALF if info.bits == 16 else float(info.tiny)
    safe = np.where(wide > 0, np.clip(wide, least, float(info.max)), 1.0).astype(dtype)
    short = info.bits == 16 and safe < wide
    return np.asarray(np.where(short, np.nextafter(safe, np.asarray(info.max, dtype)), safe))


def _within(scale: Array, low: Array, high: Array) -> Array:
    """Return scales lowered, where need be, so that the codes of the ends times the scale stay finite."""
    info = np.finfo(scale.dtype)
    reach = np.rint(np.maximum(high, -low) / scale.astype(np.float64))
    return np.asarray(
        np.minimum(scale, float(info.max) * (1 - 4 * float(info.eps)) / np.maximum(reach, 1)).astype(
            scale.dtype
        )
    )


def quantize(values: Array, grid: Grid) -> Array:
    """Return the codes of values, as QuantizeLinear gives them: ties to even, saturated (at `grid.bounds`).

    Args:
        values: Floats, converted to the scale's dtype as the operator's input would be.
        grid: Its kind may also be int32 (biases), which the operator lacks: rounded in float64, saturated.

    Returns:
        Array of the shape of `values`, dtype `grid.kind.dtype`.

    Raises:
        ValueError: A value is NaN, or the grid does not fit the shape.
    """
    if np.isnan(values).any():
        raise ValueError("there are NaN among the values")
    axis = grid.axis or 0
    if grid.kind.name == "int32":
        spread = kernels.spread(grid.scale, values, axis, grid.block).astype(np.float64)
        zero = kernels.spread(grid.zero_point, values, axis, grid.block)
        codes = np.rint(values.astype(np.float64) / spread) + zero
        return np.asarray(np.clip(codes, grid.kind.low, grid.kind.high).astype(np.int32))
    source = values.astype(grid.scale.dtype, copy=False)
    with np.errstate(over="ignore"):
        codes = kernels.quantize(source, grid.scale, grid.zero_point, axis, grid.block, grid.kind.dtype)
    if grid.kind.floating or grid.limits == (grid.kind.low, grid.kind.high):
        return np.asarray(codes)
    return np.asarray(np.clip(codes.astype(np.int32), *grid.limits).astype(grid.kind.dtype))


def dequantize(codes: Array, grid: Grid) -> Array:
    """Return the values of codes in the scale's dtype, as DequantizeLinear gives them.

    Raises:
        ValueError: The grid does not fit the shape.
    """
    with np.errstate(over="ignore"):
        return kernels.dequantize(
            codes, grid.scale, grid.zero_point, grid.axis or 0, grid.block, grid.scale.dtype
        )


def weight_grid(
    array: Array,
    kind: QuantType,
    *,
    granularity: Granularity,
    axis: int = 0,
    block: int = 0,
    symmetric: bool = True,
    method: Literal["minmax", "mse"] = "minmax",
    reduce_range: bool = False,
    dtype: Any = np.float32,
) -> Grid:
    """Return the grid of a weight.

    Args:
        array: The weight, of any shape and float type.
        kind: Type of the codes.
        granularity: One scale for all, one per index of `axis`, or one per `block` elements along `axis`.
        axis: Axis of the channels or blocks, may be negative; without meaning for "tensor".
        block: Length of a block; without meaning otherwise. The last block may be shorter.
        symmetric: Zero point in the middle of the codes.
        method: "minmax" covers every value; "mse" shrinks the range to where the squared error of the
            rounded values is least.
        reduce_range: See `code_range`.
        dtype: Of the scale.

    Raises:
        ValueError: The weight holds NaN or infinities, or the granularity does not fit its shape.
    """
    if not np.isfinite(array).all():
        raise ValueError("the weight is not finite")
    place = _place(array, granularity, axis, block)
    block = block if granularity == "block" else 0
    low = np.asarray(_reduce(np.minimum, array, place, block))
    high = np.asarray(_reduce(np.maximum, array, place, block))

    least_code, greatest_code = code_range(kind, symmetric=symmetric, reduce_range=reduce_range)
    bounds = None if (least_code, greatest_code) == (kind.low, kind.high) else (least_code, greatest_code)

    def grid(shrink: Any) -> Grid:
        scale, zero_point = grid_of(
            low * shrink, high * shrink, kind, symmetric=symmetric, reduce_range=reduce_range, dtype=dtype
        )
        return Grid(kind, scale, zero_point, place, block, bounds)

    if method == "minmax" or array.size == 0:
        return grid(1.0)
    low, high = low.astype(np.float64), high.astype(np.float64)
    best = np.ones(low.shape)
    least = np.full(low.shape, np.inf)
    for shrink in _shrinks(kind):
        trial = grid(shrink)
        error = dequantize(quantize(array, trial), trial).astype(np.float64)
        error -= array
        loss = np.asarray(_reduce(np.add, error * error, place, block))
        better = loss <= least
        best = np.where(better, shrink, best)
        least = np.where(better, loss, least)
    return grid(best)


def _shrinks(kind: QuantType) -> Iterable[float]:
    """Return the shares of the full range to try: few codes gain most by leaving out the tails."""
    return [float(share) for share in _SHRINKS.get(kind.bits, _SHRINKS_WIDE)]


def _place(array: Array, granularity: Granularity, axis: int, block: int) -> int | None:
    """Return the axis, not negative; None for "tensor"."""
    if granularity == "tensor":
        return None
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis {axis} is not one of {array.shape}")
    if granularity == "block" and block < 1:
        raise ValueError(f"blocks of {block} elements")
    return axis % array.ndim


def _reduce(ufunc: np.ufunc, array: Array, axis: int | None, block: int) -> Array:
    """Reduce an array to the shape its scales have; what is empty gives 0."""
    if axis is None:
        return np.asarray(ufunc.reduce(array, axis=None) if array.size else np.zeros((), array.dtype))
    if block:
        starts = np.arange(0, array.shape[axis], block)
        shape = (*array.shape[:axis], starts.size, *array.shape[axis + 1 :])
        return np.asarray(ufunc.reduceat(array, starts, axis=axis) if array.size else np.zeros(shape))
    others = tuple(i for i in range(array.ndim) if i != axis)
    if array.size == 0:
        return np.zeros(array.shape[axis], array.dtype)
    return np.asarray(ufunc.reduce(array, axis=others))
