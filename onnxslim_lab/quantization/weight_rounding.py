"""The grid and the codes of one weight, with its layer's Gram matrix where the rounding asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.adaround import learn_rounding
from onnxslim_lab.quantization.codebook import round_codebook
from onnxslim_lab.quantization.fitting import fit
from onnxslim_lab.quantization.numerics import Grid, dequantize, quantize, weight_grid
from onnxslim_lab.quantization.quantized_weight import Array, QuantizedWeight, scale_dtype
from onnxslim_lab.quantization.rounding import descend, round_gptq
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.quantization.weight_layout import Layout
from onnxslim_lab.statistics import Gram

_PIECE = 1 << 21  # elements at a time
_FEW_BITS = 4  # of codes that gain by it
_THOROUGH = 1 << 25  # elements times the length of a channel, up to which starts are many


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded.

    Attributes:
        rounding: nearest, gptq or adaround.
        symmetric: Whether zero points are the middle of the codes.
        reduce_range: One bit less for 8-bit types, see numerics.code_range.
    """

    rounding: str
    symmetric: bool
    reduce_range: bool = False


def needs_gram(rounding: str) -> bool:
    """Whether a rounding cannot do without the layer's activations."""
    return rounding in ("gptq", "adaround")


def rounded(
    values: Array,
    layers: tuple[Layer, ...],
    layout: Layout,
    kind: QuantType,
    block: int,
    scheme: Scheme,
    gram: Gram | None = None,
    metric: Array | None = None,
) -> QuantizedWeight:
    """Return a weight in codes.

    Args:
        values: The stored weight, finite.
        layers: The layers that use it.
        layout: How it is cut.
        kind: Type of the codes.
        block: Weights per scale along the middle axis of the layout; 0: one scale for all.
        scheme: How to round.
        gram: Of the layout's source; None rounds value by value.
        metric: By which errors of every channel count, (length, length), where there is no Gram matrix.
    """
    array = layout.of(values).astype(np.float32, copy=False)
    dtype = scale_dtype(layers)
    usable = gram is not None and gram.full and gram.count > 0 and layout.source is not None
    if not block:
        return QuantizedWeight(
            layers, layout, *_per_tensor(array, layout, kind, scheme, dtype, gram if usable else None)
        )
    if gram is None or not usable:
        return QuantizedWeight(layers, layout, *_alone(array, kind, block, scheme, dtype, metric))
    found = []
    for group, rows in enumerate(layout.rows(array)):
        energy = shrunk(gram, group)
        item = fit(
            rows,
            kind,
            energy,
            block=block,
            dtype=dtype,
            symmetric=scheme.symmetric,
            reduce_range=scheme.reduce_range,
            thorough=kind.bits <= _FEW_BITS and rows.size * rows.shape[1] <= _THOROUGH,
        )
        if scheme.rounding == "adaround" and not kind.floating:
            item = replace(item, codes=learn_rounding(rows, item.grid, energy, start=item.codes))
        found.append(item)
    scale, zero = (
        layout.from_rows(np.stack([getattr(item.grid, name) for item in found]))
        for name in ("scale", "zero_point")
    )
    codes = layout.from_rows(np.stack([item.codes for item in found]))
    return QuantizedWeight(layers, layout, codes, replace(found[0].grid, scale=scale, zero_point=zero))


def shrunk(gram: Gram, group: int) -> Array:
    """Return one Gram matrix with what is off its diagonal made less, the more the fewer rows it was made of.

    The sample's correlations are the data's plus noise that rounding would fit: with 1,024 rows of 384 and
    1,536 inputs of a MiniLM, GPTQ with them as they are changed the outputs on other data by 10 to 25 % more. The
    share taken off is in / (in + rows), in the spirit of Ledoit & Wolf 2004, "A well-conditioned estimator
    for large-dimensional covariance matrices".
    """
    matrix = gram.xtx[group]
    share = len(matrix) / (len(matrix) + gram.count)
    result = matrix * (1 - share)
    np.fill_diagonal(result, np.diagonal(matrix))
    return np.asarray(result)


def shared_values(values: Array, layout: Layout, bits: int, gram: Gram | None) -> Array:
    """Return a stored weight with at most 2**bits different values, in its own dtype and layout.

    Args:
        values: The stored weight, finite.
        layout: How it is cut.
        bits: 1 to 8.
        gram: Of the layout's source, used where the layer is one matrix.
    """
    array = layout.of(values).astype(np.float32, copy=False)
    if gram is not None and gram.count and layout.source is not None and layout.source.groups == 1:
        found = round_codebook(layout.rows(array)[0], bits, shrunk(gram, 0) if gram.full else gram.matrix[0])
        result = layout.from_rows(found.matrix[None])
    else:
        rows = np.moveaxis(array, 1, 2)
        found = round_codebook(rows.reshape(-1, array.shape[1]), bits)
        result = np.moveaxis(found.matrix.reshape(rows.shape), 2, 1)
    return np.ascontiguousarray(result.reshape(values.shape).astype(values.dtype))


def _alone(
    array: Array, kind: QuantType, block: int, scheme: Scheme, dtype: Any, metric: Array | None
) -> tuple[Array, Grid]:
    """Return codes and grid of least error of the weight itself: squared, value by value, or by a metric."""
    outer, length, inner = array.shape
    shape = (outer, -(-length // block), inner)
    codes, bounds = np.empty(array.shape, kind.dtype), None
    scale, zero = np.empty(shape, dtype), np.empty(shape, kind.dtype)
    for part in parts(array.shape):
        rows = np.moveaxis(array[part], 1, 2)
        found = fit(
            rows.reshape(-1, length),
            kind,
            metric,
            block=block,
            rounding="nearest" if metric is None else "gptq",
            rounds=1 if metric is None else 2,
            thorough=metric is not None and array.size * length <= _THOROUGH,
            dtype=dtype,
            symmetric=scheme.symmetric,
            reduce_range=scheme.reduce_range,
        )
        for whole, piece in ((codes, found.codes), (scale, found.grid.scale), (zero, found.grid.zero_point)):
            whole[part] = np.moveaxis(piece.reshape(*rows.shape[:2], -1), 2, 1)
        bounds = found.grid.bounds
    return codes, Grid(kind, scale, zero, 1, block, bounds)


def _per_tensor(
    array: Array, layout: Layout, kind: QuantType, scheme: Scheme, dtype: Any, gram: Gram | None
) -> tuple[Array, Grid]:
    """Return codes and grid with one scale for the whole weight."""
    grid = weight_grid(
        array,
        kind,
        granularity="tensor",
        method="mse",
        dtype=dtype,
        symmetric=scheme.symmetric,
        reduce_range=scheme.reduce_range,
    )
    if gram is None:
        return quantize(array, grid), grid
    codes = []
    for group, rows in enumerate(layout.rows(array)):
        energy = shrunk(gram, group)
        codes.append(descend(rows, grid, round_gptq(rows, grid, energy), energy))
    return layout.from_rows(np.stack(codes)), grid


def parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices that cut (outer, length, inner) into pieces of bounded size, never a channel."""
    outer, length, inner = shape
    width = max(1, min(inner, _PIECE // length))
    height = max(1, _PIECE // (length * width))
    for top in range(0, outer, height):
        for left in range(0, inner, width):
            yield slice(top, top + height), slice(None), slice(left, left + width)


def of_part(grid: Grid, part: tuple[slice, slice, slice]) -> Grid:
    """Return the grid of a piece of the weight."""
    if grid.axis is None:
        return grid
    return replace(grid, scale=grid.scale[part], zero_point=grid.zero_point[part])


def value_error(values: Array, weight: QuantizedWeight) -> tuple[float, float]:
    """Return the sums of values**2 and of (decoded - values)**2."""
    array = weight.layout.of(values)
    power = error = 0.0
    for part in parts(weight.layout.shape):
        exact = array[part].astype(np.float64)
        decoded = dequantize(weight.codes[part], of_part(weight.grid, part)).astype(np.float64)
        power += float(np.sum(exact**2))
        error += float(np.sum((decoded - exact) ** 2))
    return power, error
