"""Putting operators on codes into a graph, with the Clip of codes, the Cast or the scale that they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.quantization.microsoft import import_domain
from onnxslim_lab.quantization.numerics import Grid, quantize
from onnxslim_lab.quantization.operands import Operand, Result, widening, zero_of
from onnxslim_lab.quantization.operators import clip_bounds
from onnxslim_lab.quantization.types import QUANT_TYPES
from onnxslim_lab.rewriting.removal import release

_KINDS = {kind.data_type: kind for kind in QUANT_TYPES.values()}


@dataclass
class OperatorWriter:
    """Edits one graph.

    Attributes:
        graph: The graph.
        written: Counts of the operators on codes.
    """

    graph: Graph
    written: Counter[str]
    _stored: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict, init=False)

    def store(self, array: Array) -> str:
        """Store a constant, equal ones once; return its name."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored or not self.graph.is_constant(self._stored[key]):
            name = self._stored[key] = self.graph.fresh_name("k")
            self.graph.set_constant(name, array)
        return self._stored[key]

    def zero(self, operand: Operand) -> str:
        """Return the name of an operand's zero point, made where it has none."""
        return operand.zero or self.store(np.zeros((), _KINDS[operand.kind].dtype))

    def triple(self, operand: Operand) -> list[str]:
        """Return the names of codes, scale and zero point."""
        return [operand.codes, operand.scale, self.zero(operand)]

    def transposed(self, codes: str) -> str:
        """Store a constant matrix of codes transposed, behind the Cast that it may be behind; return its name."""
        array = self.graph.constant(codes)
        if array is not None:
            return self.store(np.ascontiguousarray(array.T))
        cast = widening(self.graph, codes)
        assert cast is not None
        kind = attribute(cast, "to")
        return self.graph.emit("Cast", [self.transposed(cast.input[0])], name="c", to=kind).output[0]

    def put(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str,
        name: str,
        domain: str = "",
        attributes: Iterable[AttributeProto] = (),
    ) -> None:
        """Add a node under the name of the one it replaces; trailing empty inputs are cut."""
        kept = list(inputs)
        while kept and not kept[-1]:
            kept.pop()
        node = helper.make_node(op_type, kept, [output], name, domain=domain)
        node.attribute.extend(attributes)
        self.graph.adopt(node)
        self.written[op_type] += 1
        if domain:
            import_domain(self.graph)

    def limits(self, bounds: tuple[float, float], operand: Operand) -> list[Array]:
        """Return the codes of two bounds."""
        kind, scale = _KINDS[operand.kind], self.graph.constant(operand.scale)
        assert scale is not None
        zero = zero_of(self.graph, operand).reshape(()).astype(kind.dtype)
        grid = Grid(kind, scale.reshape(()), zero)
        return [quantize(np.asarray(bound, np.float32), grid) for bound in bounds]

    def limit(self, codes: str, output: str, limits: Sequence[Array], name: str) -> None:
        """Emit a Clip of codes; an end of the type's range needs no saying."""
        pairs = zip(limits, _ends(limits), strict=True)
        names = ["" if limit == end else self.store(limit) for limit, end in pairs]
        self.put("Clip", [codes, *names], output, name)

    def quantized(
        self,
        node: NodeProto,
        result: Result,
        op_type: str,
        inputs: Sequence[str],
        domain: str = "",
        attributes: Iterable[AttributeProto] | None = None,
    ) -> None:
        """Replace a node, its QuantizeLinear and what is between them by an operator that makes codes.

        Rounding never swaps two values: a Relu or Clip between them does the same to the codes, and nothing
        when its bounds are the ends of the type's range.

        Args:
            node: The node.
            result: What quantizes its output.
            op_type: Of the operator.
            inputs: Of the operator.
            domain: Of the operator.
            attributes: Of the operator; None: those of the node.
        """
        graph, activation = self.graph, result.activation
        bounds = clip_bounds(graph, activation) if activation is not None else None
        limits = self.limits(bounds, result.operand) if bounds else []
        if [int(limit) for limit in limits] == _ends(limits):
            limits = []
        gone = [node, *([activation] if activation is not None else []), result.quantizer]
        output = result.quantizer.output[0]
        graph.remove(*gone)
        codes = graph.fresh_name("q") if limits else output
        self.put(
            op_type, inputs, codes, node.name, domain, node.attribute if attributes is None else attributes
        )
        if activation is not None and limits:
            self.limit(codes, output, limits, activation.name)
        release(graph, [name for each in gone for name in each.input])

    def floating(
        self,
        node: NodeProto,
        op_type: str,
        inputs: Sequence[str],
        factor: str,
        added: str,
        attributes: Iterable[AttributeProto],
    ) -> None:
        """Replace a node by a sum of integer products, its Cast, its scale, and an Add of a bias.

        Args:
            node: The node.
            op_type: Of the sum of products.
            inputs: Of the sum of products.
            factor: Name of its scales.
            added: Name of the bias; "" for none.
            attributes: Of the sum of products.
        """
        graph = self.graph
        whole, real = graph.fresh_name("i"), graph.fresh_name("f")
        scaled = graph.fresh_name("f") if added else node.output[0]
        graph.remove(node)
        self.put(op_type, inputs, whole, node.name, attributes=attributes)
        graph.emit("Cast", [whole], [real], name="c", to=TensorProto.FLOAT)
        graph.emit("Mul", [real, factor], [scaled], name="m")
        if added:
            graph.emit("Add", [scaled, added], [node.output[0]], name="a")
        release(graph, node.input)


def _ends(limits: Sequence[Array]) -> list[int]:
    """Return the ends of the range of the limits' type."""
    return [int(np.iinfo(limits[0].dtype).min), int(np.iinfo(limits[0].dtype).max)] if limits else []
