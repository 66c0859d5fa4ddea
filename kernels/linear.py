"""Matrix products, in the inputs' dtype (half types accumulate in float32)."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.arithmetic import aligned
from onnxslim_lab.kernels.registry import Array, kernel

FEW_ROWS = 16
"""Rows up to which BLAS spends most of a product on laying out the right matrix."""
BLOCK = (128, 384)
"""Rows and columns of blocks of the right matrix that it multiplies as they lie."""


def product(left: Array, right: Array) -> Array:
    """Return the matrix product, batched as numpy.matmul; of few rows and a large matrix, block by block.

    >>> x, w = np.ones((2, 3, 300), np.float32), np.ones((300, 500), np.float32)
    >>> np.array_equal(product(x, w), np.matmul(x, w))
    True
    """
    depth, columns = right.shape[-2:] if right.ndim == 2 else (0, 0)
    rows = left.size // depth if depth else 0
    if depth * columns < 2 * BLOCK[0] * BLOCK[1] or not 2 < rows <= FEW_ROWS or left.shape[-1:] != (depth,):
        return np.asarray(np.matmul(left, right))
    if left.dtype != np.float32 or right.dtype != np.float32 or not right.flags.c_contiguous:
        return np.asarray(np.matmul(left, right))
    matrix = left.reshape(rows, depth)
    result = np.empty((rows, columns), left.dtype)
    part = np.empty((rows, min(columns, BLOCK[1])), left.dtype)
    for column in range(0, columns, BLOCK[1]):
        block = (slice(None), slice(column, column + BLOCK[1]))
        total = result[block]
        np.matmul(matrix[:, : BLOCK[0]], right[: BLOCK[0]][block], out=total)
        term = part[:, : total.shape[1]]
        for row in range(BLOCK[0], depth, BLOCK[0]):
            lines = slice(row, row + BLOCK[0])
            np.matmul(matrix[:, lines], right[lines][block], out=term)
            total += term
    return result.reshape(*left.shape[:-1], columns)


@kernel("MatMul", since=1)
def MatMul(A: Array, B: Array) -> Array:
    """Return the matrix product, batched as numpy.matmul."""
    return product(wide(A), wide(B)).astype(A.dtype, copy=False)


def gemm(A: Array, B: Array, C: Array | None, alpha: float, beta: float, transA: int, transB: int) -> Array:
    """Return alpha * A' B' + beta * C."""
    total = product(wide(A.T if transA else A), wide(B.T if transB else B))
    if alpha != 1:
        total = np.asarray(total * np.asarray(alpha).astype(total.dtype))
    if C is not None and beta != 0:
        total = total + (wide(C) if beta == 1 else wide(C) * np.asarray(beta).astype(total.dtype))
    return np.asarray(total).astype(A.dtype, copy=False)


@kernel("Gemm", since=1)
def Gemm_1(
    A: Array,
    B: Array,
    C: Array,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    broadcast: int = 0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    """Return alpha * A' B' + beta * C, C broadcast only when `broadcast` is 1."""
    total = gemm(A, B, None, alpha, beta, transA, transB)
    scaled = aligned(total, C, None, broadcast) * np.asarray(beta, total.dtype)
    return np.asarray(total + scaled)


@kernel("Gemm", since=7)
def Gemm_7(
    A: Array,
    B: Array,
    C: Array,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    """Return alpha * A' B' + beta * C."""
    return gemm(A, B, C, alpha, beta, transA, transB)


@kernel("Gemm", since=11)
def Gemm_11(
    A: Array,
    B: Array,
    C: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    """Return alpha * A' B' + beta * C, C zero unless given."""
    return gemm(A, B, C, alpha, beta, transA, transB)


@kernel("Einsum", since=12)
def Einsum(*Inputs: Array, equation: str) -> Array:
    """Return the sum of products that the equation spells in Einstein's notation."""
    operands = [wide(operand) for operand in Inputs]
    return np.asarray(np.einsum(equation.replace(" ", ""), *operands, optimize=True)).astype(
        Inputs[0].dtype, copy=False
    )
