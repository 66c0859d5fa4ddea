"""com.microsoft: weights packed below 8 bits, with a scale per block."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.dtypes import is_integer
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.registry import Array, kernel


def unpacked(data: Array, bits: int) -> Array:
    """Return the numbers that bytes hold, low bits first, along the last axis.

    Raises:
        ValueError: `bits` is not 2, 4 or 8.

    >>> unpacked(np.array([0x21], np.uint8), 4).tolist()
    [1, 2]
    """
    if bits not in {2, 4, 8}:
        raise ValueError(f"bits is {bits}, not 2, 4 or 8")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(*data.shape[:-1], -1)


@kernel("MatMulNBits", since=1, domain=MS)
def MatMulNBits(
    A: Array,
    B: Array,
    scales: Array,
    zero_points: Array | None = None,
    g_idx: Array | None = None,
    bias: Array | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    weight_prepacked: int = 0,
) -> Array:
    """Return A (..., K) times the weights (N, K) that B holds in blocks along K, plus the bias.

    `accuracy_level` lets onnxruntime quantize A; here A is taken as it is.

    Args:
        A: Real numbers.
        B: Bytes (N, blocks, block_size * bits / 8).
        scales: One per block, in A's type.
        zero_points: One per block: packed bytes, or real numbers; 2 ** (bits - 1) unless given.
        g_idx: Block of every column of the weights, when they are not in order.
        bias: (N,).
        K, N: Lengths of a column and a row.
        accuracy_level, weight_prepacked: Of no meaning here.
        bits: Bits of a weight.
        block_size: Weights per block.

    Raises:
        ValueError: A shape does not fit, or the weights are packed for another device.
    """
    if weight_prepacked:
        raise ValueError("MatMulNBits: weight_prepacked weights are in a layout of another device")
    blocks = -(-K // block_size)
    if B.size != N * blocks * (block_size * bits // 8) or scales.size != N * blocks or A.shape[-1] != K:
        raise ValueError(f"MatMulNBits: A {A.shape}, B {B.shape}, scales {scales.shape} for K {K}, N {N}")
    numbers = unpacked(B.reshape(N, blocks, -1), bits).astype(np.float32)
    scale = scales.reshape(N, blocks).astype(np.float32)
    if zero_points is None:
        zero = np.full((N, blocks), 1 << (bits - 1), np.float32)
    elif is_integer(zero_points.dtype):
        zero = unpacked(zero_points.reshape(N, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zero = zero_points.reshape(N, blocks).astype(np.float32)
    if g_idx is None:
        weights = ((numbers - zero[..., None]) * scale[..., None]).reshape(N, -1)[:, :K]
    else:
        block = g_idx[:K].astype(np.int64)
        weights = (numbers.reshape(N, -1)[:, :K] - zero[:, block]) * scale[:, block]
    result = np.matmul(wide(A), weights.T.astype(wide(A).dtype))
    if bias is not None:
        result = result + wide(bias)
    return np.asarray(result).astype(A.dtype)


@kernel("GatherBlockQuantized", since=1, domain=MS)
def GatherBlockQuantized(
    data: Array,
    indices: Array,
    scales: Array,
    zero_points: Array | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Array:
    """Return the entries of `gather_axis` at the indices, dequantized; zeros where one is out of range.

    Args:
        data: 4-bit integers; bytes that hold `bits` each along the last axis; float8 or float4.
        indices: What to gather.
        scales: As data, but one per block along `quantize_axis`.
        zero_points: As scales, in data's type and packing; 0 unless given, 2 ** (bits - 1) for bytes.
        bits: Bits of a number in bytes.
        block_size: Numbers per block; 0 means one block.
        gather_axis, quantize_axis: Axes of data.
    """
    packed = data.dtype == np.uint8
    numbers = (unpacked(data, bits) if packed else data).astype(np.float32)
    gathered, divided = gather_axis % data.ndim, quantize_axis % data.ndim
    length = numbers.shape[divided]
    if zero_points is not None:
        zero = (unpacked(zero_points, bits) if packed else zero_points).astype(np.float32)
        kept = tuple(slice(0, count) for count in scales.shape)
        zero = zero[kept]
    else:
        zero = np.full((1,) * data.ndim, 1 << (bits - 1) if packed else 0, np.float32)
    places = indices.astype(np.int64)
    count = numbers.shape[gathered]
    outside = (places < -count) | (places >= count)
    places = np.where(outside, 0, places)

    def taken(parameter: Array) -> Array:
        return np.take(parameter, places if parameter.shape[gathered] > 1 else places * 0, gathered)

    axis = divided if divided < gathered else divided + indices.ndim - 1

    def stretched(parameter: Array) -> Array:
        chosen = taken(parameter)
        if chosen.shape[axis] == 1:
            return chosen
        return np.take(chosen, np.arange(length) // (block_size or length), axis)

    result = (taken(numbers) - stretched(zero)) * stretched(scales.astype(np.float32))
    ones = (1,) * (data.ndim - gathered - 1)
    return np.where(outside.reshape(*outside.shape, *ones), np.float32(0), result).astype(scales.dtype)
