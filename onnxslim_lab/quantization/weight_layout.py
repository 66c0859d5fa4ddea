"""A stored weight as (outer, length, inner): the middle axis is the one its layers sum over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.layers import Layer

Array = NDArray[Any]
Shape3 = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a stored weight is cut into channels and blocks.

    Every weight is a plain reshape of its stored form: a channel is what lies along the middle axis at one
    (outer, inner), and blocks run along the middle axis.

    Attributes:
        shape: (outer, length, inner).
        outer, inner: Place of each row of the layer's matrix, integers (groups, out); None when the rows are
            no channels (lookups, kernels of ConvTranspose): such a weight is rounded value by value.
        source: The layer whose matrix this is; None likewise.
    """

    shape: Shape3
    outer: Array | None = None
    inner: Array | None = None
    source: Layer | None = None

    def of(self, array: Array) -> Array:
        """Return a stored array as (outer, length, inner)."""
        return array.reshape(self.shape)

    def rows(self, array: Array) -> Array:
        """Return an array (outer, any, inner) by matrix row, as (groups, out, any)."""
        assert self.outer is not None
        return np.asarray(array[self.outer, :, self.inner])

    def from_rows(self, rows: Array) -> Array:
        """Return an array by matrix row, (groups, out, any), as (outer, any, inner)."""
        assert self.outer is not None
        result = np.empty((self.shape[0], rows.shape[-1], self.shape[2]), rows.dtype)
        result[self.outer, :, self.inner] = rows
        return result


def layout_of(layers: Sequence[Layer]) -> Layout:
    """Return the layout of one stored weight from the layers that use it.

    The layers that multiply decide; a table that is only looked up has an entry per outer index.
    """
    products = [layer for layer in layers if layer.op_type != "Gather"]
    for layer in products:
        found = _strided(layer)
        if found is not None:
            return found
    shape = layers[0].stored.stored_shape
    size = math.prod(shape)
    if (
        not products
        and layers[0].kind.weight_shape == shape
        and len(shape) > 1
        and gather_axis(layers[0]) == 0
    ):
        return Layout((shape[0], size // shape[0], 1))
    convolution = next((layer for layer in products if layer.op_type == "ConvTranspose"), None)
    if convolution is not None and not convolution.stored.views:
        groups, out, columns = convolution.shape
        channels = shape[0] // groups
        return Layout((groups, channels, out * columns // channels))
    return Layout((size // shape[-1], shape[-1], 1))


def gather_axis(layer: Layer) -> int:
    """Return the axis of its stored table that a Gather looks up in."""
    return int(getattr(layer.kind, "axis", 0))


def _strided(layer: Layer) -> Layout | None:
    """Return the layout when each matrix row lies in the stored weight at one constant distance."""
    size = layer.parameters
    numbers = np.arange(size, dtype=np.int32 if size < 1 << 31 else np.int64)
    matrix = layer.kind.matrix(layer.stored.forward(numbers.reshape(layer.stored.stored_shape)))
    row, starts = matrix[0, 0], matrix[:, :, 0]
    step = int(row[1] - row[0]) if row.size > 1 else 1
    if step < 1 or (row.size > 1 and (np.diff(row) != step).any()):
        return None
    stored = layer.stored.stored_shape
    if row.size == 1 and len(stored) > 1 and stored[-2] == 1:
        step = stored[-1]  # (1, n): one row that is long the other way
    shape = (size // (row.size * step), int(row.size), step)
    outer, rest = np.divmod(starts, row.size * step)
    if (rest >= step).any():
        return None
    return Layout(shape, outer, rest, layer)
