"""A node with the DequantizeLinear and QuantizeLinear nodes around it."""

from __future__ import annotations

from onnx import NodeProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.targets.finding import Finding, Severity
from onnxslim_lab.targets.qdq import Ending, dequantizer, ending


class Group:
    """A node with the Q and DQ nodes around it.

    Attributes:
        dequantizers: The DQ node behind each input slot that has one.
        endings: What comes after each output that the node has.
    """

    def __init__(self, graph: Graph, node: NodeProto) -> None:
        self.graph = graph
        self.node = node
        behind = {slot: dequantizer(graph, name) for slot, name in enumerate(node.input) if name}
        self.dequantizers: dict[int, NodeProto] = {
            slot: found for slot, found in behind.items() if found is not None
        }
        self.endings: list[Ending] = [ending(graph, name) for name in node.output if name]

    @property
    def name(self) -> str:
        """What reports call the node."""
        return self.node.name or next(filter(None, self.node.output), "")

    @property
    def quantizers(self) -> list[NodeProto]:
        """The Q nodes after the node."""
        return [quantizer for end in self.endings for quantizer in end.quantizers]

    @property
    def activations(self) -> dict[int, NodeProto]:
        """The DQ nodes whose input is computed, by input slot."""
        return {
            slot: node
            for slot, node in self.dequantizers.items()
            if not self.graph.is_constant(node.input[0]) and node.input[0]
        }

    def finding(self, kind: str, severity: Severity, what: str, remedy: str) -> Finding:
        """Return a finding about this node."""
        return Finding(
            kind=kind,
            severity=severity,
            nodes=(self.name,),
            op_type=self.node.op_type,
            what=what,
            remedy=remedy,
        )
