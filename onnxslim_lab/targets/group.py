"""A node with the DequantizeLinear and QuantizeLinear nodes around it."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.operands import codes_shape
from onnxslim_lab.targets.finding import Finding, Severity
from onnxslim_lab.targets.qdq import Ending, dequantizer, ending, parameters
from onnxslim_lab.targets.signed import effective_type


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
            if node.input[0] and codes_shape(self.graph, node.input[0]) is None
        }

    def types(self, slots: Iterable[int], *, rewrites_signed: bool) -> set[str]:
        """Return the types of the given inputs and of the outputs, once int8 has been rewritten where it is.

        Across nodes that only move values onnxruntime puts a Q and DQ of its own beside the node: these have one
        reader, however many the Q and DQ of the model have.
        """
        graph = self.graph
        names = set()
        for slot in slots:
            found, value = self.dequantizers[slot], self.node.input[slot]
            name = effective_type(graph, found, rewrites_signed=rewrites_signed)
            if rewrites_signed and value != found.output[0] and parameters(graph, found).type_name == "int8":
                name = "uint8" if graph.use_count(value) == 1 else "int8"
            names.add(name)
        for end in self.endings:
            for found in end.quantizers:
                name = effective_type(graph, found, rewrites_signed=rewrites_signed)
                names.add("uint8" if rewrites_signed and end.moved and name == "int8" else name)
        return names

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
