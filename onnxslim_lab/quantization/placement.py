"""Where values are quantized: around the layers chosen, and through what lies between them.

A pair of QuantizeLinear and DequantizeLinear goes

- on the input of every layer;
- on what a Conv gives (after the Relu or Clip that vanishes into it): without, it does not run on codes,
  unless it is written as a ConvInteger. MatMul and Gemm give float results from codes, so that nothing is
  rounded again where nothing needs codes;
- on what lies between, if values come quantized and are wanted quantized: no island of codes between float
  operators, none of float operators between codes where the operator has a kernel on codes.

Values that an operator only moves share one grid, inputs of a Concat that nothing else reads its grid. So does a
table that a Gather looks up for what is on codes: it is rounded once, when it is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.gates import is_gate
from onnxslim_lab.quantization.operators import clip_bounds, data_inputs, kind_of
from onnxslim_lab.targets.model import Operator

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass
class Placement:
    """What to quantize in one graph.

    Attributes:
        graph: The graph.
        roots: Every value to quantize, with the value whose statistics its grid is made of.
        bounds: What is known of a value's range from the Relu or Clip that made it.
        constants: Constants that operators on codes read, to be stored quantized.
        tables: Those of them that take the grid of another value, what a Gather looks up in them.
        coded: Nodes to be put between codes, by id.
        gates: Hard sigmoids on codes, by id (see gates).
        made: Values that come as codes: whatever reads them reads them quantized. Of the other values only
            `takers` read the quantized form.
        takers: (node, input index) of the layers and operators on codes, by the value they read.
    """

    graph: Graph
    roots: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    coded: dict[int, NodeProto] = field(default_factory=dict)
    gates: dict[int, NodeProto] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    takers: dict[str, list[tuple[NodeProto, int]]] = field(default_factory=dict)

    def read_in_float(self, value: str) -> bool:
        """Whether something but its takers reads a value, an output of the graph included."""
        on_codes = {id(node) for node, _ in self.takers.get(value, ())}
        readers = self.graph.consumers(value)
        return self.graph.is_output(value) or any(id(node) not in on_codes for node in readers)


def place(
    graph: Graph,
    layers: Sequence[Layer],
    operators: Mapping[str, Operator],
    *,
    by_codes: bool = True,
    summed: Collection[int] = (),
    tables: Collection[int] = (),
    floats: Collection[int] = (),
) -> Placement:
    """Return what to quantize so that `layers` run on codes.

    Args:
        graph: The graph they are in; read only.
        layers: Conv, Gemm and MatMul whose second input is a weight.
        operators: What the target runs in integers.
        by_codes: Whether Relu, Clip and Pad may be put between codes.
        summed: Ids of the Conv nodes whose results stay float, but for what takes codes.
        tables: Ids of the Gather nodes whose constant tables may be stored in codes.
        floats: Ids of the nodes between layers that are computed in float in any case.
    """
    return _Placing(
        graph, layers, operators, by_codes=by_codes, summed=summed, tables=tables, floats=floats
    ).run()


def fused_output(graph: Graph, node: NodeProto) -> str:
    """Return the output of a layer, or of the Relu or Clip behind it that quantization makes vanish."""
    value = node.output[0]
    readers = graph.consumers(value)
    if len(readers) != 1 or graph.use_count(value) != 1 or readers[0].op_type not in ("Relu", "Clip"):
        return value
    bounds = clip_bounds(graph, readers[0])
    if bounds is None or bounds[0] > 0 or bounds[1] < 0 or readers[0].input[0] != value:
        return value
    return readers[0].output[0]


class _Placing:
    def __init__(
        self,
        graph: Graph,
        layers: Sequence[Layer],
        operators: Mapping[str, Operator],
        *,
        by_codes: bool,
        summed: Collection[int],
        tables: Collection[int],
        floats: Collection[int],
    ) -> None:
        self.summed = summed
        self.tables = tables
        self.floats = floats
        self.operators = operators
        self.graph = graph
        self.nodes = graph.nodes
        self.layers = {id(layer.node): layer for layer in layers}
        self.by_codes = by_codes
        self.results: dict[int, str] = {}  # of layers and operators on codes: what is quantized behind them
        self.fused: set[int] = set()
        self.able: set[int] = set()
        self.found = Placement(graph)
        self.parents: dict[str, str] = {}

    def run(self) -> Placement:
        made = self._layer_outputs()
        wanted = dict.fromkeys(layer.node.input[0] for layer in self.layers.values())
        self._find_able(made, wanted)
        chosen = self._choose(wanted)
        self.found.made.update(made)
        for node in chosen:
            self.found.made.update(self._outputs(node))
        values = {*self.found.made, *wanted}
        for node in self.nodes:
            if id(node) in self.layers:
                self._take(node, node.input[:1])
        for node in chosen:
            self._take(node, data_inputs(node, self.operators))
        constants = {value for value in values if self.graph.is_constant(value)}
        self._share(chosen, values - constants)
        for node in self.nodes:
            self.found.bounds.update(self._bounds_of(node))
        self.found.roots = {value: self._root(value) for value in sorted(values - constants)}
        self.found.constants = sorted(constants)
        return self.found

    def _layer_outputs(self) -> list[str]:
        """Return the values that layers give quantized in any case, those of Conv."""
        made = []
        for node in self.nodes:
            own = id(node) not in self.floats and kind_of(self.graph, node, self.operators) == "own"
            if id(node) not in self.layers and not own:
                continue
            value = self.results[id(node)] = fused_output(self.graph, node)
            if value != node.output[0]:
                self.fused.add(id(self.graph.producer(value)))
            if id(node) in self.layers and node.op_type == "Conv" and id(node) not in self.summed:
                made.append(value)
        return made

    def _take(self, node: NodeProto, values: Sequence[str]) -> None:
        for index, value in enumerate(node.input):
            if value in values:
                self.found.takers.setdefault(value, []).append((node, index))

    def _outputs(self, node: NodeProto) -> list[str]:
        """Return the values of a node that are quantized when it works on codes."""
        return [self.results[id(node)]] if id(node) in self.results else [v for v in node.output if v]

    def _kind(self, node: NodeProto) -> str:
        if id(node) in self.layers or id(node) in self.fused:
            return "layer"
        if id(node) in self.floats:
            return "float"
        if self.by_codes and is_gate(self.graph, node):
            return "gate"
        kind = kind_of(self.graph, node, self.operators)
        if id(node) in self.tables and kind == "same" and self._is_own(node.input[0]):
            return "table"
        return "float" if kind == "codes" and not self.by_codes else kind

    def _is_own(self, table: str) -> bool:
        """Whether a constant is of this graph and nothing else reads it."""
        return table in self.graph.initializers and self.graph.use_count(table) == 1

    def _find_able(self, made: Sequence[str], read: Iterable[str]) -> None:
        """Find the nodes that can work on codes: what they read comes as codes, or is made codes for a layer."""
        available = {*made, *read}
        looked_up: set[str] = set()
        for node in self.nodes:
            kind = self._kind(node)
            moved = kind == "same" or node.op_type == "Concat"
            if kind == "table" or (moved and self._joins(node, looked_up)):
                self.able.add(id(node))
                looked_up.update(node.output)
            if (
                (kind in ("same", "codes") and node.input[0] in available)
                or (kind == "gate" and node.input[0] in made)
                or (kind == "own" and self._joins(node, available))
                or (kind == "own" and moved and self._joins(node, available | looked_up))
            ):
                self.able.add(id(node))
                available.update(self._outputs(node))

    def _joins(self, node: NodeProto, available: set[str]) -> bool:
        """Whether an operator's inputs come as codes, but for constants and small ones."""
        inputs = data_inputs(node, self.operators)
        if not any(value in available for value in inputs):
            return False
        return all(
            value in available or self.graph.is_constant(value) or self._is_small(value, node.output[0])
            for value in inputs
        )

    def _is_small(self, value: str, result: str) -> bool:
        """Whether a value is broadcast: quantizing it costs next to nothing."""
        shape, other = self.graph.shape_of(value), self.graph.shape_of(result)
        if shape is None or other is None:
            return False
        return len(shape) < len(other) or any(
            size == 1 and large != 1 for size, large in zip(shape, other, strict=False)
        )

    def _choose(self, wanted: dict[str, None]) -> list[NodeProto]:
        """Return the nodes between layers that work on codes; what they read is added to `wanted`."""
        chosen = []
        for node in reversed(self.nodes):
            kind = self._kind(node)
            if id(node) not in self.able or not any(value in wanted for value in self._outputs(node)):
                continue
            chosen.append(node)
            wanted.update(dict.fromkeys(data_inputs(node, self.operators)))
            if kind == "codes":
                self.found.coded[id(node)] = node
            if kind == "gate":
                self.found.gates[id(node)] = node
            if kind == "table":
                self.found.tables[node.input[0]] = node.output[0]
        return chosen[::-1]

    def _share(self, chosen: Sequence[NodeProto], values: set[str]) -> None:
        """Let values that are only moved share grids."""
        for node in chosen:
            if self._kind(node) in ("same", "codes"):
                for value in filter(None, node.output):
                    self.parents[value] = node.input[0]
        for node in chosen:
            if node.op_type == "Concat":
                for value in dict.fromkeys(node.input):
                    top = self._top(value)
                    if top in values and self.graph.defines(top) and not self.graph.is_input(top):
                        self.parents[top] = self._outputs(node)[0]

    def _top(self, value: str) -> str:
        """Return where the grid of a Concat's input begins; "" when something else reads it too."""
        while True:
            if self.graph.use_count(value) != 1:
                return ""
            if value not in self.parents:
                return value
            value = self.parents[value]

    def _root(self, value: str) -> str:
        seen = {value}
        while value in self.parents and self.parents[value] not in seen:
            value = self.parents[value]
            seen.add(value)
        return value

    def _bounds_of(self, node: NodeProto) -> dict[str, tuple[float, float]]:
        if node.op_type in ("Relu", "Clip"):
            bounds = clip_bounds(self.graph, node)
            return {} if bounds is None else {node.output[0]: bounds}
        return {node.output[0]: (0.0, 1.0)} if node.op_type in ("Sigmoid", "HardSigmoid", "Softmax") else {}
