"""Weights and biases of layers between Q and DQ: scales, axes and types that a target takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxslim_lab.graph import attribute
from onnxslim_lab.quantization.operands import codes_shape
from onnxslim_lab.targets.finding import Finding
from onnxslim_lab.targets.group import Group
from onnxslim_lab.targets.model import Profile
from onnxslim_lab.targets.qdq import Parameters, parameters

_SMALL = 1024  # a constant of so few elements costs nothing to dequantize
_BIAS_TOLERANCE = 1e-3


def weight_problems(group: Group, profile: Profile) -> Iterator[Finding]:
    """Yield what is wrong with the scales of a layer's weight and bias."""
    graph, node = group.graph, group.node
    weight = parameters(graph, group.dequantizers[1])
    if weight.block:
        yield group.finding(
            "block",
            "float" if node.op_type == "Gemm" else "fails",
            "its weight has a scale for each block, which no operator with quantized activations takes",
            "granularity=channel, or leave the activations in float (mode=weight-only)",
        )
    elif weight.axis is not None:
        rank = len(codes_shape(graph, group.dequantizers[1].input[0]) or (0, 0))
        wanted = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}.get(
            node.op_type, 0 if attribute(node, "transB", 0) else 1
        )
        if not profile.per_channel:
            yield group.finding(
                "per-channel",
                "float",
                f"{profile.name} takes one scale for a weight, not one for each channel",
                "granularity=tensor",
            )
        elif weight.axis % max(rank, 1) != wanted:
            yield group.finding(
                "axis",
                "float" if node.op_type == "Gemm" else "fails",
                f"its weight has scales along axis {weight.axis} instead of the output channels (axis {wanted})",
                f"quantize the weight along axis {wanted}",
            )
    yield from _bias(group, weight, profile)


def _bias(group: Group, weight: Parameters, profile: Profile) -> Iterator[Finding]:
    if 2 not in group.dequantizers:
        return
    bias = parameters(group.graph, group.dequantizers[2])
    if not profile.quantized_bias:
        yield group.finding(
            "bias",
            "fails",
            f"its bias is {bias.type_name}; {profile.name} wants it in floating point",
            "write the bias as it was, in float",
        )
        return
    if bias.type_name != "int32":
        yield group.finding("bias", "float", f"its bias is {bias.type_name}", "quantize the bias to int32")
        return
    source = parameters(group.graph, group.dequantizers[0]).scale if 0 in group.dequantizers else None
    if bias.scale is None or source is None or weight.scale is None or weight.block:
        return
    wanted = np.float64(source.reshape(-1)[0]) * weight.scale.astype(np.float64)
    if not np.allclose(bias.scale.astype(np.float64), wanted, rtol=_BIAS_TOLERANCE, atol=0.0):
        yield group.finding(
            "bias",
            "fails" if group.node.op_type == "Gemm" else "float",
            "the scale of its bias is not that of the input times that of the weight, which the integer "
            "operator takes for granted",
            "quantize the bias with the product of both scales",
        )


def weight_only_problems(group: Group, profile: Profile) -> Iterator[Finding]:
    """Yield the constants that are dequantized on every run, because nothing fuses with their DQ."""
    graph, node = group.graph, group.node
    for slot, dequantizer in group.dequantizers.items():
        kind = graph.constant_type(dequantizer.input[0])
        if kind is None or int(np.prod(kind[1], dtype=np.int64)) < _SMALL:
            continue
        why = _not_packed(group, slot, kind[1], profile)
        if why:
            yield group.finding(
                "weight-only",
                "slow",
                f"{why}: its weight is dequantized on every run",
                "quantize its activations too, or leave it in float"
                if node.op_type != "Gather"
                else "look up the quantized rows, then dequantize",
            )


def _not_packed(group: Group, slot: int, shape: tuple[int, ...], profile: Profile) -> str:
    """Return why a weight-only layer does not become one operator; "" when it does."""
    graph, node = group.graph, group.node
    weight = parameters(graph, group.dequantizers[slot])
    if node.op_type not in ("MatMul", "Gemm") or slot != 1:
        return f"no {node.op_type} of {profile.name} takes a quantized constant beside float inputs"
    if weight.type_name not in profile.weight_only_types:
        return f"{profile.name} has no {weight.type_name} MatMul with float activations"
    if not profile.blocks:
        return ""
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions, not 2"
    if attribute(node, "transA", 0) or attribute(node, "transB", 0) or attribute(node, "alpha", 1.0) != 1.0:
        return "it is a Gemm with transA, transB or alpha"
    if weight.block and weight.block not in profile.blocks:
        return f"blocks of {weight.block} are not of {', '.join(map(str, profile.blocks))}"
    if weight.block and weight.axis != 0:
        return "its blocks run along the output channels"
    if not weight.block and weight.axis not in (None, 1):
        return "its scales run along the input channels"
    if graph.use_count(group.dequantizers[slot].output[0]) > 1:
        return "several nodes share its DequantizeLinear"
    if group.quantizers:
        return "its output is quantized"
    return ""
