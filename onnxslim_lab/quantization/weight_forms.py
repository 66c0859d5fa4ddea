"""Quantized weights in standard ONNX: which form a layer gets, and the nodes of each.

    fused       DequantizeLinear -> MatMul or Gemm: onnxruntime makes MatMulNBits of them
    looked up   Gather the codes, Gather their scales, DequantizeLinear what was looked up
    dequantized DequantizeLinear (-> Reshape) in the place of the weight
    decoded     see weight_decoders

What fuses was tried with onnxruntime 1.31: a MatMul, or a Gemm with alpha and beta 1, whose B is 2-D and
not transposed; codes and scales in the same graph as the node and read by no other; blocks of 16 to 256, a
power of two. A weight used twice, or used behind a Transpose, would be dequantized at every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from onnx import TensorProto

from onnxslim_lab.floats import exact_half
from onnxslim_lab.graph import attribute
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.quantized_weight import Array, QuantizedWeight
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.quantization.weight_layout import gather_axis
from onnxslim_lab.rewriting.removal import release

Form = Literal[
    "fused", "looked up", "dequantized", "decoded", "MatMulNBits", "GatherBlockQuantized", "dynamic"
]

BLOCK_OPSET = 21  # of DequantizeLinear's block_size and of its types below 8 bits
AXIS_OPSET = 13
_HALVES = (TensorProto.FLOAT, TensorProto.FLOAT16)


def is_product(layer: Layer) -> bool:
    """Whether onnxruntime can run a layer with a quantized weight: x @ w, or x @ w + c."""
    node = layer.node
    if layer.stored.used_type not in _HALVES or layer.slot != 1 or len(layer.kind.weight_shape) != 2:
        return False
    if layer.op_type == "MatMul":
        return True
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    return layer.op_type == "Gemm" and plain and not attribute(node, "transA", 0)


def fuses(layers: Sequence[Layer], kind: QuantType, block: int) -> bool:
    """Whether DequantizeLinear and the layer become one kernel; block 0: one scale per channel or tensor."""
    fits = not block or (16 <= block <= 256 and block & block - 1 == 0)
    return len(layers) == 1 and fits and not kind.floating and kind.bits <= 8 and is_product(layers[0])


def is_table(layers: Sequence[Layer]) -> bool:
    """Whether a weight is only looked up, by entry along its first axis, as it is stored."""
    return all(
        layer.op_type == "Gather"
        and gather_axis(layer) == 0
        and layer.kind.weight_shape == layer.stored.stored_shape
        and len(layer.kind.weight_shape) == 2
        and layer.stored.used_type == layer.stored.data_type
        and layer.stored.used_type in _HALVES
        for layer in layers
    )


def can_look_up(layers: Sequence[Layer], kind: QuantType) -> bool:
    """Whether codes of this type can be gathered: below 8 bits a row must fill whole bytes."""
    return not kind.floating and is_table(layers) and layers[0].stored.stored_shape[1] * kind.bits % 8 == 0


def least_opset(form: Form, kind: QuantType, *, block: bool, axis: bool) -> int:
    """Return the least opset of a form.

    Args:
        form: The form.
        kind: Type of the codes.
        block: Whether a channel has several scales.
        axis: Whether channels have scales of their own.
    """
    if form in ("fused", "dequantized"):
        return max(kind.opset, BLOCK_OPSET if block else AXIS_OPSET if axis else 10)
    if form == "looked up":
        return max(11, BLOCK_OPSET if block else 10)
    return kind.opset if form == "decoded" and kind.floating else 0  # that of Cast, too


def write_fused(weight: QuantizedWeight) -> None:
    """Let the one layer that uses the weight read a DequantizeLinear of codes stored as (in, out)."""
    layer = weight.layer
    graph, node = layer.graph, layer.node
    codes, scales, zero = (_matrix(weight, x) for x in (weight.codes, weight.scales, weight.zero_points))
    attributes: dict[str, Any] = {"axis": 0, "block_size": weight.block}
    if weight.per_tensor:
        attributes, scales, zero = {}, weight.grid.scale, weight.grid.zero_point
    elif weight.blocks == 1:
        attributes, scales, zero = {"axis": 1}, scales[0], zero[0]
    inputs = [_store(weight, layer, "quantized", codes, weight.kind)]
    inputs.append(_store(weight, layer, "scale", scales))
    if weight.needs_zero_point:
        inputs.append(_store(weight, layer, "zero_point", zero, weight.kind))
    made = graph.emit("DequantizeLinear", inputs, name=f"{weight.name}_dequantize", **attributes)
    read = node.input[layer.slot]
    graph.set_input(node, layer.slot, made.output[0])
    if attribute(node, "transB", 0):
        graph.remove_attribute(node, "transB")
    release(graph, [read])


def write_dequantized(weight: QuantizedWeight) -> None:
    """Put a DequantizeLinear in the place of the stored weight."""
    graph, stored = weight.graph, weight.layer.stored
    outer, length, inner = weight.layout.shape
    scales, zero = weight.scales, weight.zero_points
    attributes: dict[str, Any] = {"axis": 1, "block_size": weight.block}
    shape = stored.stored_shape
    if weight.per_tensor:
        attributes, scales, zero = {}, weight.grid.scale, weight.grid.zero_point
    elif weight.blocks == 1 and inner == 1 and shape[0] == outer:
        attributes, scales, zero = {"axis": 0}, scales.reshape(-1), zero.reshape(-1)
    elif weight.blocks == 1 and outer == 1 and shape[-1] == inner:
        attributes, scales, zero = {"axis": len(shape) - 1}, scales.reshape(-1), zero.reshape(-1)
    elif shape in ((outer, length), (length, inner)):
        axis = int(shape == (outer, length) and inner == 1)
        attributes["axis"] = axis
        scales, zero = (x[0] if not axis else x[:, :, 0] for x in (scales, zero))
    else:
        shape = (outer, length, inner)
    names = [graph.fresh_name(f"{weight.name}_{word}") for word in ("quantized", "scale", "zero_point")]
    graph.remove_constant(weight.name)
    graph.set_constant(names[0], weight.codes.reshape(shape), weight.kind.data_type)
    graph.set_constant(names[1], scales)
    if weight.needs_zero_point:
        graph.set_constant(names[2], zero, weight.kind.data_type)
    inputs = names if weight.needs_zero_point else names[:2]
    steps = [("DequantizeLinear", attributes)]
    computed = TensorProto.FLOAT16 if weight.grid.scale.dtype == np.float16 else TensorProto.FLOAT
    if shape != stored.stored_shape:
        steps.append(("Reshape", {}))
    if computed != stored.data_type:
        steps.append(("Cast", {"to": stored.data_type}))
    for number, (op_type, given) in enumerate(steps):
        last = number + 1 == len(steps)
        if op_type == "Reshape":
            size = graph.fresh_name(f"{weight.name}_shape")
            graph.set_constant(size, np.array(stored.stored_shape, np.int64))
            inputs = [*inputs, size]
        outputs = [weight.name] if last else [graph.fresh_name(f"{weight.name}_{op_type}")]
        graph.emit(op_type, inputs, outputs, name=f"{weight.name}_{op_type}", **given)
        inputs = outputs


def write_looked_up(weight: QuantizedWeight) -> None:
    """Let every Gather look codes and scales up and dequantize only these.

    Codes below 8 bits are packed in bytes, because Gather does not take them: byte j of a row holds the codes
    j, j + bytes, ... Each is moved to the high bits of its own byte, which multiplies it by 256 / 2**bits; the
    scales are divided by it, exactly.
    """
    graph, kind = weight.graph, weight.kind
    lift = 1 << 8 - kind.bits if kind.bits < 8 else 1
    scales = (weight.scales[:, :, 0] / lift).astype(weight.grid.scale.dtype)
    zero = weight.zero_points[:, :, 0].astype(np.int32) * lift
    wide = kind.dtype if kind.bits >= 8 else np.dtype(np.int8 if kind.signed else np.uint8)
    codes = weight.codes[:, :, 0] if kind.bits >= 8 else packed_rows(weight)
    names = [_store(weight, weight.layer, "quantized", codes, owner=True)]
    half = exact_half(scales)
    stored = scales if half is None else half
    names.append("" if weight.per_tensor else _store(weight, weight.layer, "scale", stored, owner=True))
    offset = weight.needs_zero_point and not weight.per_tensor
    names.append(_store(weight, weight.layer, "zero_point", zero.astype(wide), owner=True) if offset else "")
    for layer in weight.layers:
        _look_up(weight, layer, names, scales, zero.astype(wide))
    release(graph, [weight.name])


def _look_up(weight: QuantizedWeight, layer: Layer, names: list[str], scales: Array, zero: Array) -> None:
    graph, node, kind = layer.graph, layer.node, weight.kind
    index, output = node.input[1], node.output[0]
    label = node.name or output
    graph.remove(node)

    def gathered(name: str) -> str:
        return str(graph.emit("Gather", [name, index], name=label, axis=0).output[0])

    value = gathered(names[0])
    if kind.bits < 8:
        value = _fields(layer, label, value, kind)
    if weight.per_tensor:
        inputs = [value, _store(weight, layer, "scale", scales[0, 0])]
        if weight.needs_zero_point:
            inputs.append(_store(weight, layer, "zero_point", zero[0, 0]))
        graph.emit("DequantizeLinear", inputs, [output], name=f"{label}_dequantize")
        return
    inputs = [value, *(gathered(name) for name in names[1:] if name)]
    used = layer.stored.used_type
    stored = weight.graph.constant_type(names[1])
    if stored is not None and stored[0] != used:
        inputs[1] = str(graph.emit("Cast", [inputs[1]], name=f"{label}_scales", to=used).output[0])
    if graph.opset() >= BLOCK_OPSET:
        graph.emit(
            "DequantizeLinear",
            inputs,
            [output],
            name=f"{label}_dequantize",
            axis=-1,
            block_size=weight.block,
        )
        return
    real = [graph.emit("Cast", [name], name=f"{label}_real", to=used).output[0] for name in inputs[::2]]
    if len(real) > 1:
        real[0] = graph.emit("Sub", real, name=f"{label}_centre").output[0]
    graph.emit("Mul", [real[0], inputs[1]], [output], name=f"{label}_scale")


def packed_rows(weight: QuantizedWeight) -> Array:
    """Return the codes (rows, length) as bytes (rows, length * bits / 8): byte j holds j, j + bytes, ..."""
    bits = weight.kind.bits
    per = 8 // bits
    codes = weight.codes[:, :, 0].astype(np.int8).astype(np.uint8) & ((1 << bits) - 1)
    parts = codes.reshape(len(codes), per, -1)
    packed = np.zeros((len(codes), parts.shape[2]), np.uint8)
    for place in range(per):
        packed |= parts[:, place] << np.uint8(8 - bits * (place + 1))
    return packed


def _fields(layer: Layer, label: str, value: str, kind: QuantType) -> str:
    """Add the nodes that move each field of gathered bytes to the high bits of a byte of its own."""
    graph = layer.graph
    up = graph.fresh_name(f"{label}_shift")
    graph.set_constant(up, np.array(8 - kind.bits, np.uint8))
    parts = []
    for place in range(8 // kind.bits):
        part = value
        if place:
            count = graph.fresh_name(f"{label}_shift")
            graph.set_constant(count, np.array(kind.bits * place, np.uint8))
            part = graph.emit("BitShift", [part, count], name=label, direction="LEFT").output[0]
        if place + 1 < 8 // kind.bits:
            part = graph.emit("BitShift", [part, up], name=label, direction="RIGHT").output[0]
            part = graph.emit("BitShift", [part, up], name=label, direction="LEFT").output[0]
        parts.append(part)
    joined = str(graph.emit("Concat", parts, name=label, axis=-1).output[0])
    if not kind.signed:
        return joined
    return str(graph.emit("Cast", [joined], name=label, to=TensorProto.INT8).output[0])


def _matrix(weight: QuantizedWeight, array: Array) -> Array:
    """Return (outer, any, inner) as (any, out), one of outer and inner being 1."""
    return np.ascontiguousarray(array[0] if weight.layout.shape[0] == 1 else array[:, :, 0].T)


def _store(
    weight: QuantizedWeight,
    layer: Layer,
    word: str,
    array: Array,
    kind: QuantType | None = None,
    *,
    owner: bool = False,
) -> str:
    """Add a constant beside the layer, or beside the stored weight (`owner`); return its name."""
    graph = weight.graph if owner else layer.graph
    name = graph.fresh_name(f"{weight.name}_{word}")
    graph.set_constant(
        name, np.ascontiguousarray(array).reshape(array.shape), kind.data_type if kind else None
    )
    return name
