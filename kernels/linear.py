"""Matrix products, in the inputs' dtype (half types accumulate in float32)."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.arithmetic import aligned
from onnxslim_lab.kernels.registry import Array, kernel


@kernel("MatMul", since=1)
def MatMul(A: Array, B: Array) -> Array:
    """Return the matrix product, batched as numpy.matmul."""
    return np.asarray(np.matmul(wide(A), wide(B))).astype(A.dtype, copy=False)


def gemm(A: Array, B: Array, C: Array | None, alpha: float, beta: float, transA: int, transB: int) -> Array:
    """Return alpha * A' B' + beta * C."""
    product = np.matmul(wide(A.T if transA else A), wide(B.T if transB else B))
    if alpha != 1:
        product = product * np.asarray(alpha).astype(product.dtype)
    if C is not None and beta != 0:
        product = product + (wide(C) if beta == 1 else wide(C) * np.asarray(beta).astype(product.dtype))
    return np.asarray(product).astype(A.dtype, copy=False)


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
    product = gemm(A, B, None, alpha, beta, transA, transB)
    scaled = aligned(product, C, None, broadcast) * np.asarray(beta, product.dtype)
    return np.asarray(product + scaled)


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
