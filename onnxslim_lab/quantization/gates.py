"""Hard sigmoids on codes: a Clip of the codes and another scale, nothing is computed in float.

A hard sigmoid with beta 1/2 is clip(alpha (x - L), 0, 1) with L = -1 / (2 alpha), where it leaves 0. When the
grid of x begins at L, x = scale (code - zero_point) with zero_point = -L / scale, then it is

    alpha * scale * min(code, 2 zero_point)

which is a grid of its own, of scale alpha * scale and zero point 0. x below L need no codes when all that
reads x is the hard sigmoid and the product with it (hard swish), which is 0 there.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.quantization.numerics import Grid
from onnxslim_lab.quantization.types import QuantType


def split_hard_swish(graph: Graph) -> None:
    """Write every HardSwish as x * HardSigmoid(x), which is what runtimes compute."""
    for node in graph.nodes:
        if is_op(node, "HardSwish"):
            value, result = node.input[0], node.output[0]
            graph.remove(node)
            gate = graph.emit("HardSigmoid", [value], name=f"{node.name}_gate", alpha=1 / 6, beta=0.5)
            graph.emit("Mul", [value, gate.output[0]], [result], name=node.name)


def is_gate(graph: Graph, node: NodeProto) -> bool:
    """Whether a node is a hard sigmoid whose input nothing reads but it and the product with it."""
    if (
        not is_op(node, "HardSigmoid")
        or attribute(node, "beta", 0.5) != 0.5
        or attribute(node, "alpha", 0.2) <= 0
    ):
        return False
    value, result = node.input[0], node.output[0]
    if graph.is_output(value) or graph.is_output(result):
        return False
    others = [reader for reader in graph.consumers(value) if reader is not node]
    return all(is_op(reader, "Mul") and set(reader.input) == {value, result} for reader in others)


def gate_grids(graph: Graph, node: NodeProto, high: float, kind: QuantType) -> tuple[Grid, Grid]:
    """Return the grids of a hard sigmoid's input and output.

    Args:
        graph: Its graph.
        node: The hard sigmoid.
        high: Greatest value of the input.
        kind: An unsigned integer type.

    The zero point z is the greatest whole number for which codes reach the greatest value:
    scale (high code - z) >= high with scale = -L / z.
    """
    half = 0.5 / float(attribute(node, "alpha", 0.2))
    if len(graph.consumers(node.input[0])) == 1:
        high = min(high, half)  # what lies above is 1 for the hard sigmoid
    zero = int(np.clip(np.floor(kind.high * half / (max(high, half) + half)), 1, kind.high // 2))
    scale = np.asarray(half / zero, np.float32)
    result = np.asarray(np.float32(0.5) / np.float32(zero), np.float32)
    return (
        Grid(kind, scale, np.asarray(zero, kind.dtype)),
        Grid(kind, result, np.asarray(0, kind.dtype)),
    )
