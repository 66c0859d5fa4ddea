"""Convolutions on codes whose results stay float: ConvInteger, which gives the sums of products unrounded.

QLinearConv rounds what it gives to 8 bits. Where that spoils the outputs and nothing takes the result in codes,
ConvInteger -> Cast -> Mul (-> Add) computes the same products and rounds nothing. With weights in uint8,
onnxruntime's ConvInteger takes 0.7 to 1.3 times as long as a float Conv and 0.4 to 4 times as long as QLinearConv
(1.31 on x86 with VNNI, images of 7 to 224 pixels). Convolutions along one axis are written as MatMul (see
unrolling), which is faster than ConvInteger and the float Conv.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from onnx import NodeProto

from onnxslim_lab.base import Outcome
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.operator_layers import LayerWriter


def write_sums(graph: Graph, nodes: Iterable[tuple[str, NodeProto]], outcome: Outcome) -> None:
    """Write Conv nodes of named layers between codes and float as ConvInteger; those it cannot take are refused."""
    writer = LayerWriter(graph, Counter(), microsoft=False)
    for name, node in nodes:
        reason = writer.layer(node)
        if reason:
            outcome.refuse(name, f"no float sums: {reason}")
