"""Which values need not be measured, since their range follows from another's; which cannot hold NaN."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, domain_of

MOVING = {
    "Identity",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "DepthToSpace",
    "SpaceToDepth",
}
_FINITE = MOVING | {  # finite results for finite inputs, short of overflow
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Cast",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Elu",
    "Erf",
    "Expand",
    "Gather",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "LayerNormalization",
    "LeakyRelu",
    "MatMul",
    "Max",
    "MaxPool",
    "Min",
    "Mul",
    "Neg",
    "PRelu",
    "Pad",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "Relu",
    "Resize",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Split",
    "Sub",
    "Tanh",
    "Tile",
}
_PRODUCTS = {"Mul", "MatMul", "Gemm"}
_DEPTH = 4  # nodes between measured values: magnitudes below 1e9 cannot overflow in so few steps


@dataclass(frozen=True)
class Source:
    """The value whose extremes tell those of another, and how.

    Attributes:
        value: The source.
        low, high: Bounds it is clipped to.
        pads: A value or initializer with the padding; "" for none.
        fixed_pads: The padding, where it is an attribute.
        fill: What is padded with.
    """

    value: str
    low: float | None = None
    high: float | None = None
    pads: str = ""
    fixed_pads: tuple[int, ...] = ()
    fill: float = 0.0


def bounds(graph: Graph, node: NodeProto) -> tuple[float, float] | None:
    """Return the constant bounds that a Relu or Clip clips to, None when they are not constant."""
    if domain_of(node.domain):
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    found = []
    for index, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        value = attribute(node, name, default)
        if len(node.input) > index and node.input[index]:
            constant = graph.constant(node.input[index])
            if constant is None or constant.size != 1:
                return None
            value = constant.item()
        found.append(float(value))
    return (found[0], found[1]) if found[0] <= found[1] else None


def source_of(graph: Graph, value: str, measured: Container[str]) -> Source | None:
    """Return what tells a value's extremes, None when it has to be measured.

    A Pad's output is never measured: that would keep it apart from the convolution that takes it in.
    """
    node = graph.producer(value)
    if node is None or domain_of(node.domain) or not node.input:
        return None
    source = node.input[0]
    if (
        node.op_type == "Pad"
        and graph.dtype_of(source) in (1, 11)
        and attribute(node, "mode", "constant") == "constant"
    ):
        fill: float | None = attribute(node, "value", 0.0)
        if len(node.input) > 2 and node.input[2]:
            constant = graph.constant(node.input[2])
            fill = None if constant is None or constant.size != 1 else float(constant.item())
        if fill is None or not np.isfinite(fill) or (len(node.input) > 3 and node.input[3]):
            return None
        if len(node.input) > 1:
            return Source(source, pads=node.input[1], fill=fill)
        pads = tuple(attribute(node, "pads", attribute(node, "paddings", ())))
        return Source(source, fixed_pads=pads, fill=fill) if min(pads, default=-1) >= 0 else None
    if source not in measured:
        return None
    if node.op_type in MOVING:
        return Source(source)
    clipped = bounds(graph, node)
    return Source(source, *clipped) if clipped else None


def finite(graph: Graph, value: str, measured: Container[str]) -> bool:
    """Whether a value is finite if the measured ones are finite and below 1e9.

    Weights are taken to be sane: a sum of products of numbers below 1e9 with them does not overflow.
    """
    return _finite(graph, value, measured, _DEPTH, 1, first=True)


def _finite(
    graph: Graph, value: str, measured: Container[str], depth: int, products: int, *, first: bool = False
) -> bool:
    if not value or graph.is_constant(value) or (not first and value in measured):
        return True
    node = graph.producer(value)
    if node is None:
        return False
    if depth == 0 or domain_of(node.domain) or node.op_type not in _FINITE:
        return False
    moving = [name for name in node.input if name and not graph.is_constant(name)]
    if node.op_type in _PRODUCTS and len(set(moving)) + (len(moving) > len(set(moving))) > 1:
        products -= 1
    return products >= 0 and all(_finite(graph, name, measured, depth - 1, products) for name in moving)
