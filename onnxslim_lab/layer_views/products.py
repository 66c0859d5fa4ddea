"""MatMul and Einsum as matrix products; see layer_kinds for what every kind provides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.layer_views.kinds import Kind

Array = NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class MatMulKind(Kind):
    """MatMul with a constant on one side; its batch axes longer than 1 are the groups."""

    left: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape."""
        *batch, first, second = self._matrix_shape
        return (math.prod(batch), first, second) if self.left else (math.prod(batch), second, first)

    @property
    def _matrix_shape(self) -> Shape:
        """The weight's shape, a vector being a matrix of one row or column."""
        if len(self.weight_shape) > 1:
            return self.weight_shape
        return (1, *self.weight_shape) if self.left else (*self.weight_shape, 1)

    def matrix(self, weight: Array) -> Array:
        """Return (*batch, K, N), or (*batch, M, K) on the left, as (groups, out, in)."""
        whole = weight.reshape(self._matrix_shape)
        return (whole if self.left else whole.swapaxes(-1, -2)).reshape(self.shape)

    def weight(self, matrix: Array) -> Array:
        """Return the matrix in the weight's shape."""
        return (matrix if self.left else matrix.swapaxes(-1, -2)).reshape(self.weight_shape)

    def rows(self, x: Array) -> Array:
        """Return the other operand's rows (columns where the weight is on the left), by group."""
        if x.ndim == 1:
            x = x[:, None] if self.left else x[None]
        batch = np.broadcast_shapes(x.shape[:-2], self._matrix_shape[:-2])
        return self._by_group(np.broadcast_to(x, (*batch, *x.shape[-2:])))

    def output_rows(self, y: Array) -> Array:
        """Return the output's rows (columns where the weight is on the left), by group."""
        if len(self.weight_shape) == 1:
            y = y[..., None, :] if self.left else y[..., None]
        if y.ndim < len(self._matrix_shape):  # the other operand was a vector
            y = y[..., None] if self.left else y[None]
        return self._by_group(y)

    def _by_group(self, values: Array) -> Array:
        """Return (*batch, rows, columns) as (groups, rows, columns), columns first when on the left."""
        values = values.swapaxes(-1, -2) if self.left else values
        rank = values.ndim - 2
        own = (1,) * (rank - len(self._matrix_shape) + 2) + self._matrix_shape[:-2]
        order = sorted(range(rank), key=lambda axis: own[axis] == 1)
        moved = values.transpose(*order, rank, rank + 1)
        return moved.reshape(self.shape[0], -1, values.shape[-1])

    def products(self, _x: Shape, y: Shape) -> int:
        """Return the output's elements times K."""
        return math.prod(y) * self.shape[2]


@dataclass(frozen=True)
class EinsumKind(Kind):
    """Einsum of two operands that is a (batched) matrix product with a constant.

    Attributes:
        own: The labels of the weight's axes.
        other, result: Those of the other operand and of the output.
    """

    own: str = ""
    other: str = ""
    result: str = ""

    @classmethod
    def parse(cls, equation: str, weight_shape: Shape, position: int) -> Self | None:
        """Return the kind for the operand at `position`, None when it is no matrix product."""
        left, arrow, right = equation.replace(" ", "").partition("->")
        terms = left.split(",")
        if len(terms) != 2 or "." in equation:
            return None
        joined = "".join(terms)
        if not arrow:
            right = "".join(sorted(label for label in set(joined) if joined.count(label) == 1))
        own, other = terms[position], terms[1 - position]
        repeated = any(len(set(term)) < len(term) for term in (*terms, right))
        alone = set(own) ^ set(other)  # a label of one operand only must not be summed over
        if repeated or not alone <= set(right) or len(own) != len(weight_shape):
            return None
        return cls(weight_shape, own, other, right)

    @property
    def _groups(self) -> str:
        return "".join(label for label in self.own if label in self.other and label in self.result)

    @property
    def _out(self) -> str:
        return "".join(label for label in self.own if label not in self.other)

    @property
    def _in(self) -> str:
        return "".join(label for label in self.own if label in self.other and label not in self.result)

    def _count(self, labels: str) -> int:
        return math.prod(self.weight_shape[self.own.index(label)] for label in labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape."""
        return self._count(self._groups), self._count(self._out), self._count(self._in)

    def matrix(self, weight: Array) -> Array:
        """Return the weight's axes as (groups, out, in)."""
        order = self._groups + self._out + self._in
        return weight.transpose([self.own.index(label) for label in order]).reshape(self.shape)

    def weight(self, matrix: Array) -> Array:
        """Return the matrix with the weight's axes."""
        order = self._groups + self._out + self._in
        split = matrix.reshape([self._count(label) for label in order])
        return split.transpose([order.index(label) for label in self.own])

    def rows(self, x: Array) -> Array:
        """Return the other operand as (groups, n, in)."""
        rest = "".join(label for label in self.other if label not in self.own)
        order = self._groups + rest + self._in
        moved = x.transpose([self.other.index(label) for label in order])
        return moved.reshape(self.shape[0], -1, self.shape[2])

    def output_rows(self, y: Array) -> Array:
        """Return the output as (groups, n, out)."""
        rest = "".join(label for label in self.other if label not in self.own)
        moved = y.transpose([self.result.index(label) for label in self._groups + rest + self._out])
        return moved.reshape(self.shape[0], -1, self.shape[1])

    def products(self, _x: Shape, y: Shape) -> int:
        """Return the output's elements times the summed labels."""
        return math.prod(y) * self.shape[2]
