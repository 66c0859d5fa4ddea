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
from onnxslim_lab.floats import exact_half
from onnxslim_lab.quantization.quantized_weight import Array, QuantizedWeight

FIRST_OPSET = 7
_CAST_FLOAT8 = 19
_WORTH_A_CAST = 32  # scales
_PARTED = 4  # dimensions of codes whose blocks have an axis of their own


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
    view, parameters = _view(weight)
    value, zero = _codes(plan, weight, view, parameters)
    scale = _scale(plan, weight.grid.scale.reshape(parameters))
    if not weight.per_tensor and weight.blocks > 1 and len(view) != _PARTED:
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


def _view(weight: QuantizedWeight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of codes, and of scales that multiply them: the stored shape where it has channels."""
    outer, length, inner = weight.layout.shape
    stored = weight.layer.stored.stored_shape
    if weight.per_tensor:
        return stored, ()
    if weight.blocks > 1 and length % weight.block == 0:
        return (outer, weight.blocks, weight.block, inner), (outer, weight.blocks, 1, inner)
    if weight.blocks == 1 and inner == 1 and stored[0] == outer:
        return stored, (outer, *(1,) * (len(stored) - 1))
    if weight.blocks == 1 and outer == 1 and stored[-1] == inner:
        return stored, (inner,)
    return (outer, length, inner), (outer, weight.blocks, inner)


def narrowed(weight: QuantizedWeight) -> QuantizedWeight:
    """Return the weight with scales that float16 holds, which a decoder stores in half the bytes.

    A scale changes by 1/2048 of itself at most, which adds half a percent to the error of codes of 8 bits and
    less to that of fewer. Scales that are too small or too great for float16 stay as they are.
    """
    scale = weight.grid.scale
    info = np.finfo(np.float16)
    if not scale.size or scale.min() < float(info.smallest_normal) or scale.max() > float(info.max):
        return weight
    return replace(weight, grid=replace(weight.grid, scale=scale.astype(np.float16).astype(scale.dtype)))


def _scale(plan: Plan, scale: Array) -> str:
    """Add the scales, in float16 and a Cast where that is exact and smaller."""
    half = exact_half(scale)
    if scale.dtype == np.float16 or scale.size < _WORTH_A_CAST or half is None:
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


def _codes(
    plan: Plan, weight: QuantizedWeight, view: tuple[int, ...], parameters: tuple[int, ...]
) -> tuple[str, str]:
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
    zero = zero.reshape(parameters)
    if kind.bits > 8:
        return value, plan.tensor("zero_point", zero)
    narrow = zero.astype(np.uint8 if zero.min() >= 0 else np.int8)
    return value, plan.op("Cast", plan.tensor("zero_point", narrow), to=onnx_type(dtype))


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
