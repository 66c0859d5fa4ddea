"""com.microsoft: products, normalizations and activations fused with what follows or comes before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.activation import HardSigmoid, LeakyRelu, Relu, Sigmoid, clip, softmax, wide
from onnxslim_lab.kernels.activation_more import Gelu
from onnxslim_lab.kernels.conv import Conv
from onnxslim_lab.kernels.elementwise import Tanh
from onnxslim_lab.kernels.linear import gemm
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.pool import MaxPool_10
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import Ints

EPSILON = 9.999999960041972e-13  # 1e-12 in float32, which the schemas have


def activated(x: Array, activation: str | None, parameters: Sequence[float]) -> Array:
    """Return x after the activation that a fused operator names.

    Raises:
        ValueError: The activation is unknown.
    """
    plain = {"Relu": Relu, "Sigmoid": Sigmoid, "Tanh": Tanh}
    if not activation:
        return x
    if activation in plain:
        return plain[activation](x)
    if activation == "LeakyRelu":
        return LeakyRelu(x, alpha=parameters[0] if parameters else 0.01)
    if activation == "HardSigmoid":
        alpha, beta = parameters or (0.2, 0.5)
        return HardSigmoid(x, alpha=alpha, beta=beta)
    if activation == "Clip":
        low, high = (np.asarray(bound, x.dtype) for bound in parameters)
        return clip(x, low, high)
    raise ValueError(f"activation {activation!r} is not known")


@kernel("FusedConv", since=1, domain=MS)
def FusedConv(
    X: Array,
    W: Array,
    B: Array | None = None,
    Z: Array | None = None,
    *,
    activation: str | None = None,
    activation_params: Sequence[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return activation(Conv(X, W, B) + Z)."""
    y = Conv(
        X,
        W,
        B,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return activated(y if Z is None else y + Z, activation, activation_params or ())


@kernel("FusedGemm", since=1, domain=MS)
def FusedGemm(
    A: Array,
    B: Array,
    C: Array | None = None,
    *,
    activation: str | None = None,
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    """Return activation(alpha * A' B' + beta * C)."""
    parameters = [value for value in (activation_alpha, activation_beta) if value is not None]
    return activated(gemm(A, B, C, alpha, beta, transA, transB), activation, parameters)


@kernel("FusedMatMul", since=1, domain=MS)
def FusedMatMul(
    A: Array,
    B: Array,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Array:
    """Return alpha * A' B', batched as numpy.matmul.

    trans* swaps the last two axes; transBatch* first moves the first axis before the last one.
    """
    sides = []
    for side, batch, last in ((A, transBatchA, transA), (B, transBatchB, transB)):
        turned = np.moveaxis(side, 0, -2) if batch else side
        sides.append(wide(turned.swapaxes(-1, -2) if last and side.ndim > 1 else turned))
    product = np.matmul(*sides)
    return np.asarray(product * np.asarray(alpha, product.dtype)).astype(A.dtype)


@kernel("NhwcMaxPool", since=1, domain=MS)
def NhwcMaxPool(
    x: Array,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Array:
    """Return the greatest value of every window of x (N, ..., C)."""
    (result,) = MaxPool_10(
        np.moveaxis(x, -1, 1),
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        dilations=dilations,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return np.moveaxis(result, 1, -1)


def normalized(
    x: Array, gamma: Array, beta: Array | None, epsilon: float, *, centre: bool
) -> tuple[Array, ...]:
    """Return x (float32) scaled to variance 1 over the last axis, the mean, and 1 / deviation."""
    mean = x.mean(-1, keepdims=True) if centre else np.zeros((*x.shape[:-1], 1), x.dtype)
    rest = x - mean
    inverse = 1 / np.sqrt(np.square(rest).mean(-1, keepdims=True) + np.float32(epsilon))
    result = rest * inverse * wide(gamma)
    return result if beta is None else result + wide(beta), mean, inverse


@kernel("SkipLayerNormalization", since=1, domain=MS)
def SkipLayerNormalization(
    input: Array,
    skip: Array,
    gamma: Array,
    beta: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float = EPSILON,
) -> tuple[Array, ...]:
    """Return LayerNormalization(input + skip + bias), mean, 1 / deviation, and the sum."""
    total = wide(input) + wide(skip)
    total = total if bias is None else total + wide(bias)
    result, mean, inverse = normalized(total, gamma, beta, epsilon, centre=True)
    return result.astype(input.dtype), mean, inverse, total.astype(input.dtype)


@kernel("SkipSimplifiedLayerNormalization", since=1, domain=MS)
def SkipSimplifiedLayerNormalization(
    input: Array, skip: Array, gamma: Array, bias: Array | None = None, *, epsilon: float = EPSILON
) -> tuple[Array, ...]:
    """Return (input + skip + bias) over its root mean square, 0, its inverse, and the sum."""
    total = wide(input) + wide(skip)
    total = total if bias is None else total + wide(bias)
    result, mean, inverse = normalized(total, gamma, None, epsilon, centre=False)
    return result.astype(input.dtype), mean, inverse, total.astype(input.dtype)


@kernel("SimplifiedLayerNormalization", since=1)
def SimplifiedLayerNormalization(
    X: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Array, Array]:
    """Return X over its root mean square from `axis` on, and the inverse.

    An operator of onnxruntime that stands in the default domain.
    """
    first = axis + X.ndim if axis < 0 else axis
    flat = wide(X).reshape(*X.shape[:first], -1)
    result, _, inverse = normalized(flat, scale.reshape(-1), None, epsilon, centre=False)
    ones = (1,) * (X.ndim - first)
    return result.reshape(X.shape).astype(scale.dtype), inverse.reshape(*X.shape[:first], *ones)


@kernel("EmbedLayerNormalization", since=1, domain=MS)
def EmbedLayerNormalization(
    input_ids: Array,
    segment_ids: Array | None,
    word_embedding: Array,
    position_embedding: Array,
    segment_embedding: Array | None,
    gamma: Array,
    beta: Array,
    mask: Array | None = None,
    position_ids: Array | None = None,
    *,
    epsilon: float = EPSILON,
    mask_index_type: int | None = None,
) -> tuple[Array, ...]:
    """Return LayerNormalization of the sum of word, position and segment embeddings.

    Returns:
        (B, S, D), the number of ones in each row of the mask (B,), zeros without it, and the sum.
    """
    places = np.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
    total = wide(word_embedding[input_ids]) + wide(position_embedding[places])
    if segment_ids is not None and segment_embedding is not None:
        total = total + wide(segment_embedding[segment_ids])
    result, _, _ = normalized(total, gamma, beta, epsilon, centre=True)
    count = np.zeros(len(input_ids), np.int32) if mask is None else (mask == 1).sum(1).astype(np.int32)
    return result.astype(gamma.dtype), count, total.astype(gamma.dtype)


@kernel("Gelu", since=1, domain=MS)
def MicrosoftGelu(X: Array) -> Array:
    """Return X times the normal distribution function of X."""
    return Gelu(X)


@kernel("BiasGelu", since=1, domain=MS)
def BiasGelu(A: Array, B: Array) -> Array:
    """Return Gelu(A + B)."""
    return Gelu(np.add(A, B))


@kernel("FastGelu", since=1, domain=MS)
def FastGelu(X: Array, bias: Array | None = None) -> Array:
    """Return Gelu(X + bias) by its approximation with tanh."""
    return Gelu(X if bias is None else np.add(X, bias), approximate="tanh")


@kernel("QuickGelu", since=1, domain=MS)
def QuickGelu(X: Array, *, alpha: float = 1.7020000219345093) -> Array:
    """Return X * sigmoid(alpha * X)."""
    x = wide(X)
    return np.asarray(x * Sigmoid(x * np.asarray(alpha, x.dtype))).astype(X.dtype)


@kernel("BiasSoftmax", since=1, domain=MS)
def BiasSoftmax(data: Array, bias: Array, *, axis: int = 1, is_inner_broadcast: int) -> Array:
    """Return the softmax of data + bias over all axes from `axis` on.

    The bias lacks axes of data: those just before `axis` when `is_inner_broadcast`, else the first ones.
    """
    first = axis + data.ndim if axis < 0 else axis
    missing = data.ndim - bias.ndim
    spread = bias
    if is_inner_broadcast and missing:
        kept = bias.shape[: first - missing]
        spread = bias.reshape(*kept, *(1,) * missing, *bias.shape[first - missing :])
    return softmax(wide(data) + wide(spread), tuple(range(first, data.ndim))).astype(data.dtype)
