"""A grid seen column by column, as rounding methods that go through the columns of a matrix need it."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.floats import Array
from onnxslim_lab.kernels.quantize import spread
from onnxslim_lab.quantization.numerics import Grid


class Columns:
    """The grid of a matrix (out, in), column by column.

    Args:
        grid: One scale, one per row (axis 0), one per column (axis 1), or blocks along axis 1.
        shape: Of the matrix.

    Attributes:
        scale: float64 (in, out).
        zero: Zero points, as `scale`.

    Raises:
        ValueError: The grid does not fit the shape.
    """

    def __init__(self, grid: Grid, shape: tuple[int, ...]) -> None:
        self.grid = grid
        whole = np.broadcast_to(np.float32(0), shape)
        self.scale, self.zero = (
            np.broadcast_to(
                spread(np.ascontiguousarray(part, np.float64), whole, grid.axis or 0, grid.block), shape
            ).T
            for part in (grid.scale, grid.zero_point)
        )

    def snap(self, column: int, values: Array) -> tuple[Array, Array]:
        """Return (codes, their values) nearest to `values` (out,) of one column, in their dtype."""
        scale, zero = (part[column].astype(values.dtype) for part in (self.scale, self.zero))
        if self.grid.kind.floating:
            low, high = self.grid.limits
            codes = np.clip(values / scale, low, high).astype(self.grid.kind.dtype).astype(values.dtype)
            return codes, codes * scale
        codes = np.clip(np.rint(values / scale) + zero, *self.grid.limits)
        return codes, (codes - zero) * scale

    def stored(self, codes: Array) -> Array:
        """Return codes (in, out), floats, as they are stored: (out, in), of the grid's dtype."""
        whole = np.ascontiguousarray(codes.T)
        if self.grid.kind.floating:
            return whole.astype(self.grid.kind.dtype)
        return whole.astype(np.int32).astype(self.grid.kind.dtype)
