"""The Gram matrix of a layer's input rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.errors import ParameterError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Gram:
    """Sums over the rows x that a layer multiplies (see Layer.rows).

    Only the diagonal is kept of a lookup (Gather: how often each entry was looked up; its rows are one-hot,
    so that nothing is off the diagonal) and of a matrix that would not fit the memory budget alone.

    Attributes:
        matrix: Sum of x x^T, float64 (groups, in, in); its diagonal alone, (groups, in), when not `full`.
        total: Sum of x, float64 (groups, in).
        count: Number of rows in each group; 0 when the layer never ran.
    """

    matrix: Array
    total: Array
    count: int

    @property
    def full(self) -> bool:
        """Whether the whole matrix is there."""
        return self.matrix.ndim == 3

    @property
    def xtx(self) -> Array:
        """Sum of x x^T, float64 (groups, in, in).

        Raises:
            ParameterError: Only the diagonal was kept.
        """
        if not self.full:
            size = self.matrix.shape[-1]
            raise ParameterError(
                f"only the diagonal of the {size} x {size} Gram matrix was kept (see Gram.full): use "
                "`diagonal`, or raise the memory budget"
            )
        return self.matrix

    @property
    def diagonal(self) -> Array:
        """Sum of the squares of each input, float64 (groups, in)."""
        return np.diagonal(self.matrix, axis1=1, axis2=2) if self.full else self.matrix

    @property
    def mean(self) -> Array:
        """Mean row, float64 (groups, in); 0 without rows."""
        return np.asarray(self.total / max(self.count, 1))

    def merge(self, other: Gram) -> Gram:
        """Return the sums over both sets of rows.

        Raises:
            ParameterError: They are of different layers.
        """
        if self.matrix.shape != other.matrix.shape:
            raise ParameterError(
                f"Gram matrices of shapes {self.matrix.shape} and {other.matrix.shape} do not merge"
            )
        return Gram(self.matrix + other.matrix, self.total + other.total, self.count + other.count)
