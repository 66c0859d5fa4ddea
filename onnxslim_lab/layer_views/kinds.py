"""How each kind of layer is a matrix product: its weight as (groups, out, in), its inputs as rows.

For every kind, with w the weight as the node sees it and g, n the numbers of groups and rows:

    rows(x)          (g, n, in)    what the layer multiplies
    matrix(w)        (g, out, in)
    output_rows(y)   (g, n, out)   the node's output in the same arrangement
    output_rows(y) = scale * rows(x) @ matrix(w).swapaxes(1, 2) + bias_rows(bias)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind(ABC):
    """A layer of one kind; `weight_shape` is the shape of its weight as the node sees it."""

    weight_shape: Shape

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape: (groups, out, in)."""

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return 1.0

    @abstractmethod
    def matrix(self, weight: Array) -> Array:
        """Return the weight as a matrix (groups, out, in); a view where possible."""

    @abstractmethod
    def weight(self, matrix: Array) -> Array:
        """Return a matrix as the weight the node sees."""

    @abstractmethod
    def rows(self, x: Array) -> Array:
        """Return the layer's input as rows (groups, n, in)."""

    @abstractmethod
    def output_rows(self, y: Array) -> Array:
        """Return the node's output as rows (groups, n, out)."""

    def bias_rows(self, bias: Array, shape: Shape) -> Array:
        """Return the bias as it is added to the output rows; `shape` is that of the output."""
        return self.output_rows(np.broadcast_to(bias, shape))

    @abstractmethod
    def products(self, x: Shape, y: Shape) -> int:
        """Return the multiply-accumulates for input and output shapes."""


@dataclass(frozen=True)
class GemmKind(Kind):
    """Gemm with its weight on one side; `transposed` is that side's transA or transB."""

    left: bool = False
    transposed: bool = False
    other_transposed: bool = False
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def _stored_rows(self) -> bool:
        """Whether the weight's rows are the matrix's: A as it is, or B transposed."""
        return self.left != self.transposed

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape."""
        first, second = self.weight_shape
        return (1, first, second) if self._stored_rows else (1, second, first)

    @property
    def scale(self) -> float:
        """The factor alpha."""
        return self.alpha

    def matrix(self, weight: Array) -> Array:
        """Return the weight as (1, out, in)."""
        return np.asarray(weight if self._stored_rows else weight.T)[None]

    def weight(self, matrix: Array) -> Array:
        """Return the matrix as A or B."""
        return np.asarray(matrix[0] if self._stored_rows else matrix[0].T)

    def rows(self, x: Array) -> Array:
        """Return the other operand as rows."""
        return (x.T if self.left != self.other_transposed else x)[None]

    def output_rows(self, y: Array) -> Array:
        """Return the output, transposed when the weight is on the left."""
        return (y.T if self.left else y)[None]

    def bias_rows(self, bias: Array, shape: Shape) -> Array:
        """Return beta * C."""
        return np.asarray(self.output_rows(np.broadcast_to(bias, shape)) * bias.dtype.type(self.beta))

    def products(self, _x: Shape, y: Shape) -> int:
        """Return M * N * K."""
        return math.prod(y) * self.shape[2]


@dataclass(frozen=True)
class GatherKind(Kind):
    """Gather: an embedding; a one-hot row per index times the table.

    The matrix is (1, features, vocabulary): one row per feature of the embedding, one column per entry.
    """

    axis: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape."""
        entries = self.weight_shape[self.axis]
        return 1, math.prod(self.weight_shape) // max(entries, 1), entries

    def matrix(self, weight: Array) -> Array:
        """Return the table with its entries as columns."""
        entries = self.weight_shape[self.axis]
        return np.moveaxis(weight, self.axis, 0).reshape(entries, -1).T[None]

    def weight(self, matrix: Array) -> Array:
        """Return the matrix as the table."""
        rest = [size for axis, size in enumerate(self.weight_shape) if axis != self.axis]
        return np.moveaxis(matrix[0].T.reshape(self.weight_shape[self.axis], *rest), 0, self.axis)

    def rows(self, x: Array) -> Array:
        """Return one-hot rows (1, n, vocabulary) of the indices, float32."""
        entries = self.weight_shape[self.axis]
        found = np.zeros((x.size, entries), np.float32)
        index = x.reshape(-1).astype(np.int64)
        found[np.arange(x.size), np.where(index < 0, index + entries, index)] = 1
        return found[None]

    def output_rows(self, y: Array) -> Array:
        """Return what was looked up as (1, n, features)."""
        extra = y.ndim - len(self.weight_shape) + 1
        moved = np.moveaxis(y, range(self.axis, self.axis + extra), range(extra))
        return moved.reshape(1, math.prod(moved.shape[:extra]), -1)

    def products(self, _x: Shape, _y: Shape) -> int:
        """Return 0: a lookup multiplies nothing."""
        return 0


@dataclass(frozen=True)
class RecurrentKind(Kind):
    """W or R of LSTM, GRU or RNN; groups are directions, out is gates * hidden.

    `rows` takes the node's input X for W (steps, batch, inputs), and the hidden states that R meets,
    (steps, directions, batch, hidden), for R; `output_rows` takes the gates before activation,
    (steps, directions, batch, gates * hidden). With layout 1 the batch axis comes first in each.
    """

    recurrent: bool = False
    batch_first: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape."""
        directions, out, inputs = self.weight_shape
        return directions, out, inputs

    def matrix(self, weight: Array) -> Array:
        """Return the weight itself."""
        return weight

    def weight(self, matrix: Array) -> Array:
        """Return the matrix itself."""
        return matrix

    def rows(self, x: Array) -> Array:
        """Return the inputs of each direction as (directions, steps * batch, in)."""
        if self.recurrent:
            return self.output_rows(x)
        x = x.swapaxes(0, 1) if self.batch_first else x
        return np.broadcast_to(
            x.reshape(-1, x.shape[-1]), (self.shape[0], x.shape[0] * x.shape[1], x.shape[2])
        )

    def output_rows(self, y: Array) -> Array:
        """Return (steps, directions, batch, any) as (directions, steps * batch, any)."""
        y = np.moveaxis(y, 0, 2) if self.batch_first else y
        return np.moveaxis(y, 1, 0).reshape(self.shape[0], -1, y.shape[-1])

    def bias_rows(self, bias: Array, _shape: Shape) -> Array:
        """Return this weight's half of B (directions, 2 * out) as (directions, 1, out)."""
        out = self.shape[1]
        return bias[:, None, out:] if self.recurrent else bias[:, None, :out]

    def products(self, x: Shape, _y: Shape) -> int:
        """Return steps * batch * the size of the matrix; x is the node's input X."""
        return x[0] * x[1] * math.prod(self.weight_shape)
