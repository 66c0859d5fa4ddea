"""Quantized layers as operators of com.microsoft, which onnxruntime has and other runtimes do not.

    MatMul, Gemm -> MatMulNBits             blocks along the summed axis, 2, 4 or 8 bits, at any opset
    Gather       -> GatherBlockQuantized    blocks along the entries of a table, 4 or 8 bits

onnxruntime, docs/ContribOperators.md. kernels/microsoft_blocks.py has the same operators in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.quantized_weight import Array, QuantizedWeight
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.quantization.weight_forms import is_product, is_table
from onnxslim_lab.rewriting.removal import release

DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4
"""accuracy_level of MatMulNBits: activations in int8 by block, as onnxruntime does when it fuses DequantizeLinear."""

_LEAST_BLOCK = 16


def can_multiply(layers: Sequence[Layer], kind: QuantType, block: int) -> bool:
    """Whether every layer that uses a weight can be a MatMulNBits.

    Args:
        layers: All layers that use it.
        kind: Type of the codes.
        block: Length of a block.
    """
    fits = block >= _LEAST_BLOCK and block & block - 1 == 0
    return fits and not kind.floating and kind.bits <= 8 and all(is_product(layer) for layer in layers)


def can_gather(layers: Sequence[Layer], kind: QuantType, block: int, entry: int) -> bool:
    """Whether every layer that uses a weight can be a GatherBlockQuantized; `entry`: length of an entry."""
    fits = block >= _LEAST_BLOCK and block & block - 1 == 0
    whole = entry * kind.bits % 8 == 0
    return fits and whole and not kind.floating and kind.bits in (4, 8) and is_table(layers)


def packed(codes: Array, bits: int) -> Array:
    """Return uint8 codes packed along the last axis, low bits first; a last byte is filled with zeros.

    >>> packed(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    per = 8 // bits
    width = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)]
    parts = np.pad(codes, width).reshape(*codes.shape[:-1], -1, per)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(parts << shifts, axis=-1), np.uint8)


def block_of(weight: QuantizedWeight) -> int:
    """Return the block size to write: the weight's, or for one scale per channel a power of two.

    A longer block than the channel costs padding, a shorter one repeats the scale.
    """
    if weight.blocks > 1:
        return weight.block
    length = weight.layout.shape[1]
    return min(max(_LEAST_BLOCK, 1 << (length - 1).bit_length()), 256)


def write_matmul(weight: QuantizedWeight, accuracy_level: int) -> None:
    """Replace the layers that multiply by the weight by MatMulNBits."""
    graph, bits = weight.graph, weight.kind.bits
    codes, zero = weight.unsigned()
    by_channel = [_by_channel(weight, x) for x in (codes, weight.scales, zero)]
    channels, length = by_channel[0].shape
    block = block_of(weight)
    blocks = -(-length // block)
    if weight.blocks != blocks:
        by_channel[1:] = [np.repeat(x, blocks, axis=1) for x in by_channel[1:]]
    middle = np.uint8(1 << bits - 1)
    padded = np.full((channels, blocks * block), middle, np.uint8)
    padded[:, :length] = by_channel[0]
    names = [graph.fresh_name(f"{weight.name}_{word}") for word in ("packed", "scale", "zero_point")]
    graph.set_constant(names[0], packed(padded.reshape(channels, blocks, block), bits))
    graph.set_constant(names[1], by_channel[1])
    if weight.symmetric:
        names.pop()
    else:
        graph.set_constant(names[2], packed(by_channel[2], bits))
    for layer in weight.layers:
        _replace_product(layer, names, channels, length, bits, block, accuracy_level)
    release(graph, [weight.name])


def _replace_product(
    layer: Layer, names: list[str], channels: int, length: int, bits: int, block: int, accuracy_level: int
) -> None:
    graph, node = layer.graph, layer.node
    needed = [node.input[0], *names]
    outputs, label, read = list(node.output), node.name or None, node.input[1]
    bias = layer.bias if layer.op_type == "Gemm" else None
    shape = graph.shape_of(bias) if bias else None
    if bias and shape == (channels,):
        needed += [""] * (5 - len(needed)) + [bias]
        bias = None
    level: dict[str, Any] = {"accuracy_level": accuracy_level} if accuracy_level else {}
    graph.remove(node)
    made: list[str] = [graph.fresh_name(f"{outputs[0]}_product")] if bias else outputs
    graph.emit(
        "MatMulNBits",
        needed,
        made,
        name=label,
        domain=DOMAIN,
        K=length,
        N=channels,
        bits=bits,
        block_size=block,
        **level,
    )
    if bias:
        graph.emit("Add", [made[0], bias], outputs, name=f"{label}_bias" if label else None)
    release(graph, [read])
    import_domain(graph)


def write_gather(weight: QuantizedWeight) -> None:
    """Replace the lookups in the weight by GatherBlockQuantized over bytes."""
    graph, bits = weight.graph, weight.kind.bits
    codes, zero = (x[:, :, 0] for x in weight.unsigned())
    scales = weight.scales[:, :, 0]
    block = block_of(weight)
    blocks = -(-codes.shape[1] // block)
    if weight.blocks != blocks:
        scales, zero = (np.repeat(x, blocks, axis=1) for x in (scales, zero))
    words = {"packed": packed(codes, bits), "scale": np.ascontiguousarray(scales)}
    if not weight.symmetric:
        words["zero_point"] = packed(zero, bits)
    names = []
    for word, array in words.items():
        names.append(graph.fresh_name(f"{weight.name}_{word}"))
        graph.set_constant(names[-1], array)
    for layer in weight.layers:
        inner, node = layer.graph, layer.node
        index, outputs, label = node.input[1], list(node.output), node.name or None
        inner.remove(node)
        inner.emit(
            "GatherBlockQuantized",
            [names[0], index, *names[1:]],
            outputs,
            name=label,
            domain=DOMAIN,
            gather_axis=0,
            quantize_axis=1,
            block_size=block,
            bits=bits,
        )
        import_domain(inner)
    release(graph, [weight.name])


def import_domain(graph: Graph) -> None:
    """Let the model, or the function, that a node of com.microsoft was added to import its domain."""
    if not graph.opset(DOMAIN):
        graph.set_opset(DOMAIN, 1)


def product_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes of the constants of a MatMulNBits."""
    outer, length, inner = weight.layout.shape
    block = block_of(weight)
    blocks, channels = -(-length // block), outer * inner
    zero = 0 if weight.symmetric else -(-blocks * weight.kind.bits // 8)
    return channels * (blocks * block * weight.kind.bits // 8 + blocks * weight.grid.scale.itemsize + zero)


def _by_channel(weight: QuantizedWeight, array: Array) -> Array:
    """Return (outer, any, inner) as (out, any), one of outer and inner being 1."""
    return np.ascontiguousarray(array[:, :, 0] if weight.layout.shape[2] == 1 else array[0].T)
