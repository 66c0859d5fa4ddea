"""Weights that are decoded when the model loads: Cast, Sub, Mul, Reshape, which onnxruntime folds.

A DequantizeLinear that no layer fuses with is run again at every inference, and two to twenty times the
time of the layer is lost (onnxruntime 1.31, CPU: it never folds DequantizeLinear). The same arithmetic in
Cast and Mul is folded once, so that inference is as fast as with float weights, and takes their memory.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from onnxslim_lab.encodings.packing import trim, unpack
from onnxslim_lab.encodings.plan import Plan, Target, onnx_type
from onnxslim_lab.quantization.quantized_weight import Array, QuantizedWeight

FIRST_OPSET = 7
_CAST_FLOAT8 = 19
_WORTH_A_CAST = 32  # scales


def decoder(weight: QuantizedWeight, stem: str) -> Plan:
    """Return the tensors and nodes that make a weight, under its own name, from its codes.

    The values are those of DequantizeLinear bit for bit: (code - zero point) * scale in the scale's type.

    Args:
        weight: The codes; integers of 2, 4, 8 or 16 bits, or float8 (from opset 19).
        stem: Prefix of the names that are added.
    """
    graph = weight.graph
    target = Target(
        name=weight.name,
        stem=stem,
        shared_stem=f"{stem}.s",
        opset=graph.opset(),
        ir_version=graph.ir_version,
        in_function=graph.is_function,
    )
    plan = Plan(target, f"{weight.kind}, decoded at load")
    outer, length, inner = weight.layout.shape
    block, blocks = weight.block, weight.blocks
    parted = not weight.per_tensor and blocks > 1 and length % block == 0
    view = (outer, blocks, block, inner) if parted else (outer, length, inner)
    value, zero = _codes(plan, weight, view)
    scale = _scale(plan, _parameter(weight, weight.grid.scale, parted=parted))
    if not weight.per_tensor and blocks > 1 and not parted:
        scale = _stretched(plan, scale, weight)
        zero = _stretched(plan, zero, weight) if zero else ""
    computed = onnx_type(weight.grid.scale.dtype)
    value = plan.op("Cast", value, to=computed)
    if zero:
        value = plan.op("Sub", value, zero)
    value = plan.op("Mul", value, scale)
    stored = weight.layer.stored
    if view != stored.stored_shape:
        value = plan.op("Reshape", value, plan.tensor("shape", np.array(stored.stored_shape, np.int64)))
    if computed != stored.data_type:
        plan.op("Cast", value, to=stored.data_type)
    return plan.finish()


def narrowed(weight: QuantizedWeight) -> QuantizedWeight:
    """Return the weight with scales that float16 holds, which a decoder stores in half the bytes.

    A scale changes by 1/2048 of itself at most, much less than codes of 4 bits are off. Scales that are too
    small or too great for float16 stay as they are.
    """
    scale = weight.grid.scale
    info = np.finfo(np.float16)
    if not scale.size or scale.min() < float(info.smallest_normal) or scale.max() > float(info.max):
        return weight
    return replace(weight, grid=replace(weight.grid, scale=scale.astype(np.float16).astype(scale.dtype)))


def _scale(plan: Plan, scale: Array) -> str:
    """Add the scales, in float16 and a Cast where that is exact and smaller."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if scale.dtype == np.float16 or scale.size < _WORTH_A_CAST or not np.array_equal(half, scale):
        return plan.tensor("scale", scale)
    return plan.op("Cast", plan.tensor("scale", half), to=onnx_type(scale.dtype))


def write_decoded(weight: QuantizedWeight, stem: str) -> None:
    """Put the decoder in the place of the stored weight; what reads it does not change."""
    graph, plan = weight.graph, decoder(weight, stem)
    graph.remove_constant(weight.name)
    for word, (array, data_type) in (plan.tensors | plan.shared).items():
        graph.set_constant(plan.full_name(word), array, data_type)
    for step in plan.steps:
        graph.adopt(plan.node(step))


def _codes(plan: Plan, weight: QuantizedWeight, view: tuple[int, ...]) -> tuple[str, str]:
    """Add the codes, and the zero points in the scale's type, "" where they are 0; return both names."""
    kind = weight.kind
    dtype = weight.grid.scale.dtype
    if kind.bits >= 8:
        value = plan.tensor("codes", weight.codes.reshape(view), kind.data_type)
        zero = weight.grid.zero_point.astype(dtype)
    else:
        codes, _ = weight.unsigned()
        value = unpack(plan, "codes", codes.reshape(view), kind.bits)
        zero = (weight.grid.zero_point.astype(np.int16) + (1 << kind.bits - 1) * kind.signed).astype(dtype)
    if kind.floating or not zero.any():
        return value, ""
    if weight.symmetric:
        return value, plan.tensor("zero_point", zero.reshape(-1)[0])
    parted = len(view) == 4
    narrow = _parameter(weight, zero, parted=parted).astype(np.uint8 if zero.min() >= 0 else np.int8)
    if kind.bits > 8:
        return value, plan.tensor("zero_point", _parameter(weight, zero, parted=parted))
    return value, plan.op("Cast", plan.tensor("zero_point", narrow), to=onnx_type(dtype))


def _parameter(weight: QuantizedWeight, values: Array, *, parted: bool) -> Array:
    """Return scales or zero points so that they multiply the codes' view."""
    return values[:, :, None, :] if parted and not weight.per_tensor else values


def _stretched(plan: Plan, value: str, weight: QuantizedWeight) -> str:
    """Add the nodes that repeat parameters (outer, blocks, inner) along blocks whose last one is shorter."""
    found = plan.tensors.get(value)
    if found is not None and found[0].size == 1:
        return value
    outer, length, inner = weight.layout.shape
    apart = np.array([outer, weight.blocks, 1, inner], np.int64)
    whole = np.array([outer, weight.blocks, weight.block, inner], np.int64)
    joined = np.array([outer, weight.blocks * weight.block, inner], np.int64)
    value = plan.op("Reshape", value, plan.share("apart", apart))
    value = plan.op("Expand", value, plan.share("whole", whole))
    value = plan.op("Reshape", value, plan.share("joined", joined))
    return trim(plan, value, length, axis=1)


def can_decode(weight: QuantizedWeight) -> bool:
    """Whether the opset of the weight's graph has what its decoder needs."""
    least = _CAST_FLOAT8 if weight.kind.floating else FIRST_OPSET
    if weight.kind.bits < 8 or weight.blocks > 1:
        least = max(least, 8)  # Expand
    return weight.graph.opset() >= least and weight.kind.data_type != TensorProto.UNDEFINED
