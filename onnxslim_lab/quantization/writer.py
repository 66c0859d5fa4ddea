"""Writing quantized layers as standard ONNX: QuantizeLinear and DequantizeLinear around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.numerics import Grid, quantize
from onnxslim_lab.quantization.operators import clip_bounds
from onnxslim_lab.quantization.placement import Placement
from onnxslim_lab.quantization.static_layers import added_bias
from onnxslim_lab.quantization.types import QUANT_TYPES
from onnxslim_lab.rewriting.removal import release

_BIAS = QUANT_TYPES["int32"]
_WORTH = 24  # scales that take more bytes than the node that computes them
_BIAS_LIMIT = 2.0**27  # leaves room in int32 for narrower input ranges chosen later, and for corrections


@dataclass
class GraphWriter:
    """Writes one graph; names are short because there are many of them.

    Attributes:
        placement: What to quantize.
        grids: The grid of each root value of the placement, and of each constant on codes.
    """

    placement: Placement
    grids: Mapping[str, Grid]
    _codes: dict[str, str] = field(default_factory=dict)
    _parameters: dict[tuple[Any, ...], str] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The graph that is edited."""
        return self.placement.graph

    def grid(self, value: str) -> Grid:
        """Return the grid of a value of the placement."""
        return self.grids[self.placement.roots.get(value, value)]

    def write_activations(self) -> None:
        """Insert the pairs around values, in the order in which they are made."""
        placement, graph = self.placement, self.graph
        nodes = graph.nodes
        for value in placement.constants:
            self._constant(value)
        inner = {value for node in nodes for value in node.output}
        for value in placement.roots:
            if value not in inner:
                self._pair_beside(value)
        for node in nodes:
            for value in list(node.output):
                if value not in placement.roots:
                    continue
                if id(node) in placement.gates:
                    self._gate(node, value)
                elif id(node) in placement.coded:
                    self._put_on_codes(node, value)
                elif value in placement.made:
                    self._pair_behind(node, value)
                else:
                    self._pair_beside(value)
                self._drop_activation(value)

    def store(self, array: Array, data_type: int | None = None, *, owner: Graph | None = None) -> str:
        """Store a parameter in the graph, equal small ones once; return its name."""
        graph = owner or self.graph
        key = (id(graph), array.dtype.str, array.shape, array.tobytes()) if array.size < 2 else ()
        known = self._parameters.get(key, "") if key else ""
        if known and graph.is_constant(known):  # a bias that it was for may be gone
            return known
        name = graph.fresh_name("s" if array.dtype.kind == "f" else "z")
        graph.set_constant(name, array, data_type)
        if key:
            self._parameters[key] = name
        return name

    def parameters(self, grid: Grid, *, owner: Graph | None = None, brief: bool = False) -> list[str]:
        """Store scale and zero point; a zero point of 0 needs no saying when `brief`.

        onnxruntime fuses a Conv whose weight has none, but no Gemm.
        """
        names = [self.store(grid.scale, owner=owner)]
        if not brief or grid.zero_point.astype(np.float32).any():
            names.append(self.store(grid.zero_point, grid.kind.data_type, owner=owner))
        return names

    def _constant(self, value: str) -> None:
        """Store a constant that operators on codes read, quantized."""
        array = self.graph.constant(value)
        assert array is not None
        grid = self.grids[value]
        name = self.graph.fresh_name("q")
        self.graph.set_constant(name, quantize(array, grid), grid.kind.data_type)
        made = self.graph.emit("DequantizeLinear", [name, *self.parameters(grid)], name="dq").output[0]
        for node, index in self.placement.takers[value]:
            self.graph.set_input(node, index, made)
        release(self.graph, [value])

    def _pair_beside(self, value: str) -> None:
        """Quantize a value for those that take codes; the others go on reading it as it is."""
        codes, names = self._emit_codes(value, value)
        made = self.graph.emit("DequantizeLinear", [codes, *names], name="dq").output[0]
        for node, index in self.placement.takers.get(value, ()):
            self.graph.set_input(node, index, made)

    def _pair_behind(self, node: NodeProto, value: str) -> None:
        """Quantize what a node makes; everything reads it dequantized under its old name."""
        raw = self.graph.fresh_name(f"{value}_raw")
        self.graph.set_outputs(node, [raw if name == value else name for name in node.output])
        codes, names = self._emit_codes(value, raw)
        self.graph.emit("DequantizeLinear", [codes, *names], [value], name="dq")

    def _emit_codes(self, value: str, raw: str) -> tuple[str, list[str]]:
        names = self.parameters(self.grid(value))
        codes = self.graph.fresh_name("q")
        self.graph.emit("QuantizeLinear", [raw, *names], [codes], name="q")
        self._codes[value] = codes
        return codes, names

    def _put_on_codes(self, node: NodeProto, value: str) -> None:
        """Replace Relu, Clip or Pad by the same on codes."""
        graph, grid = self.graph, self.grid(value)
        source = self._codes[node.input[0]]
        names = self.parameters(grid)
        codes = graph.fresh_name("q")
        bounds = clip_bounds(graph, node) if node.op_type in ("Relu", "Clip") else None
        pads = list(node.input[1:2])
        axes = list(node.input[3:4])
        zero_point = names[1]
        graph.remove(node)
        if bounds is None:
            graph.emit("Pad", [source, *pads, zero_point, *axes], [codes], name=node.name)
        else:
            low, high = (quantize(np.asarray(bound, grid.scale.dtype), grid) for bound in bounds)
            ends = [self.store(low, grid.kind.data_type), self.store(high, grid.kind.data_type)]
            graph.emit("Clip", [source, *ends], [codes], name=node.name)
        graph.emit("DequantizeLinear", [codes, *names], [value], name="dq")
        self._codes[value] = codes

    def _gate(self, node: NodeProto, value: str) -> None:
        """Replace a hard sigmoid by a Clip of its input's codes and a scale of its own."""
        graph = self.graph
        inputs, grid = self.grid(node.input[0]), self.grid(value)
        top = np.asarray(2 * int(inputs.zero_point), grid.kind.dtype)
        codes = graph.fresh_name("q")
        graph.remove(node)
        ends = ["", self.store(top, grid.kind.data_type)]
        graph.emit("Clip", [self._codes[node.input[0]], *ends], [codes], name=node.name)
        graph.emit("DequantizeLinear", [codes, *self.parameters(grid)], [value], name="dq")
        self._codes[value] = codes

    def _drop_activation(self, value: str) -> None:
        """Remove a Relu or Clip in front of a QuantizeLinear that saturates where it does."""
        graph = self.graph
        quantizer = graph.producer(self._codes[value])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return
        raw = quantizer.input[0]
        node = graph.producer(raw)
        if node is None or node.op_type not in ("Relu", "Clip") or graph.use_count(raw) != 1:
            return
        bounds, grid = clip_bounds(graph, node), self.grid(value)
        if bounds is None or grid.kind.floating:
            return
        ends = [int(quantize(np.asarray(bound, grid.scale.dtype), grid)) for bound in bounds]
        if ends != [grid.kind.low, grid.kind.high]:
            return
        graph.set_input(quantizer, 0, node.input[0])
        graph.remove(node)
        release(graph, node.input[1:])

    @staticmethod
    def widen(owner: Graph, codes: str) -> str:
        """Cast stored codes of 2 or 4 bits to int8, which a runtime that folds constants does once; return the name."""
        known = owner.constant_type(codes)
        name = owner.emit("Cast", [codes], name="c", to=TensorProto.INT8).output[0]
        owner.set_type(name, TensorProto.INT8, known[1] if known else None)
        return name

    def write_weight(self, layer: Layer, codes: str, names: list[str], axis: int | None) -> None:
        """Let a layer read a stored quantized weight."""
        read = layer.node.input[layer.slot]
        node = self.graph.emit("DequantizeLinear", [codes, *names], name="dq")
        if axis is not None:
            self.graph.set_attribute(node, "axis", axis)
        made = node.output[0]
        self.graph.set_input(layer.node, layer.slot, made)
        release(self.graph, [read])

    def write_bias(self, layer: Layer, grid: Grid, shift: Array | None = None, folded: str = "") -> None:
        """Quantize the bias of a layer, the Add behind a MatMul included, to the grid of its sums.

        Args:
            layer: The layer.
            grid: Of its weight.
            shift: To be added to the bias, one for each output channel.
            folded: Name of the weight's scales, for targets that fold constants before they look for patterns:
                the bias's scales are then a product of two constants instead of being stored.
        """
        node, index = layer.node, 2
        if not layer.bias:
            added = added_bias(layer)
            if added is None:
                return
            node, index = added
        name = node.input[index]
        values = self.graph.constant(name)
        assert values is not None
        size = layer.groups * layer.shape[1] if layer.op_type == "Conv" else layer.shape[1]
        vector = np.broadcast_to(values.reshape(-1).astype(np.float64), (size,))
        vector = vector if shift is None else vector + shift
        single = bias_scale(self.grid(layer.node.input[0]), grid)
        scale = np.broadcast_to(single, (size,))
        codes = quantize(vector, Grid(_BIAS, scale, np.zeros(size, np.int32), 0))
        stored = self.graph.fresh_name("b")
        axis: dict[str, Any] = {"axis": 0}
        self.graph.set_constant(stored, codes)
        if folded and grid.scale.shape == (size,) and size >= _WORTH:
            factors = [folded, self.store(self.grid(layer.node.input[0]).scale)]
            inputs = [stored, self.graph.emit("Mul", factors, name="m").output[0]]
        elif not single.ndim:
            inputs, axis = [stored, self.store(single)], {}
        else:
            inputs = [stored, self.store(np.ascontiguousarray(scale))]
        made = self.graph.emit("DequantizeLinear", inputs, name="dq", **axis).output[0]
        self.graph.set_input(node, index, made)
        release(self.graph, [name])


def bias_scale(inputs: Grid, weight: Grid) -> Array:
    """Return the scale of the sums of products: input scale times weight scale, in float32."""
    return np.asarray(inputs.scale.astype(np.float32) * weight.scale.astype(np.float32))


def widen_for_bias(weight: Grid, inputs: Grid, bias: Array) -> Grid:
    """Return the weight's grid with its scales raised where the bias would not fit in int32.

    Channels whose weights are all but zero have scales so small that their bias, in units of the sums, does
    not fit; the weights lose nothing that shows beside such a bias.
    """
    needed = np.abs(bias.astype(np.float64)) / (_BIAS_LIMIT * inputs.scale.astype(np.float64))
    if weight.axis is None:
        needed = needed.max(initial=0.0)
    scale = np.maximum(weight.scale, np.nextafter(needed.astype(np.float32), np.float32(np.inf)))
    return replace(weight, scale=scale.astype(weight.scale.dtype))
