"""Layer: any weighted node seen as a matrix (groups, out, in)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxslim_lab.base import Refusal
from onnxslim_lab.errors import InternalError
from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.layer_views.convolutions import ConvKind, ConvTransposeKind
from onnxslim_lab.layer_views.kinds import GatherKind, GemmKind, Kind, RecurrentKind
from onnxslim_lab.layer_views.products import EinsumKind, MatMulKind
from onnxslim_lab.layer_views.storage import FLOATS, Stored, readers, set_by_caller, trace
from onnxslim_lab.shapes import Dim

Array = NDArray[Any]
Shape = tuple[int, ...]

_QUANTIZED = {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}


@dataclass(frozen=True, eq=False)
class Layer:
    """A weighted node as a matrix; reads and writes the constant behind it.

    `rows(x)` times the matrix, scaled, plus `bias_rows` equals `output_rows` of the node's output, for
    every kind of layer (see layer_kinds for the arrangement of each).

    Attributes:
        graph: The graph the node is in.
        node: The node.
        role: "weight"; "W" or "R" for the input and recurrent weights of LSTM, GRU and RNN.
        slot: Index of the weight among the node's inputs.
        stored: The constant and the Transposes, Reshapes ... between it and the node.
        kind: How the weight is arranged.
        bias: Name of the bias the node reads, None without one.
    """

    graph: Graph
    node: NodeProto
    role: str
    slot: int
    stored: Stored
    kind: Kind
    bias: str | None = None

    @property
    def name(self) -> str:
        """The node's name, or that of its first output; with the role where a node has two weights."""
        name = self.node.name or next(filter(None, self.node.output), "")
        return name if self.role == "weight" else f"{name}/{self.role}"

    @property
    def op_type(self) -> str:
        """The node's operator."""
        return self.node.op_type

    @property
    def weight(self) -> str:
        """Name of the stored constant, in `weight_graph`."""
        return self.stored.name

    @property
    def weight_graph(self) -> Graph:
        """The graph that defines the stored constant."""
        return self.stored.graph

    @property
    def groups(self) -> int:
        """Number of independent matrices."""
        return self.kind.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The matrix's shape: (groups, out, in)."""
        return self.kind.shape

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.stored.stored_shape)

    @property
    def matrix(self) -> Array:
        """The weight now, as (groups, out, in) in its stored dtype; read-only where it is a view."""
        array = self.weight_graph.constant(self.weight)
        if array is None or array.shape != self.stored.stored_shape:
            raise InternalError(f"weight {self.weight!r} changed its shape: find the layers again")
        return self.kind.matrix(self.stored.forward(array))

    def with_matrix(self, matrix: Array) -> Array:
        """Return a matrix (groups, out, in) in the stored layout and dtype."""
        array = self.stored.backward(self.kind.weight(np.asarray(matrix)))
        constant = self.weight_graph.constant(self.weight)
        assert constant is not None
        return np.ascontiguousarray(array.astype(constant.dtype, copy=False))

    def set(self, array: Array) -> None:
        """Replace the stored constant (an array in the stored layout); every sharer sees it."""
        self.weight_graph.set_constant(self.weight, array, self.stored.data_type)

    @cached_property
    def sharers(self) -> tuple[NodeProto, ...]:
        """Every other node of the model that reads the same constant, itself or behind views."""
        found = (use[1] for use in readers(self.weight_graph, self.weight) if use is not None)
        unique = {id(node): node for node in found if node is not self.node}
        return tuple(unique.values())

    def rows(self, x: Array) -> Array:
        """Return the input that meets the weight as rows (groups, n, in)."""
        return self.kind.rows(x)

    def output_rows(self, y: Array) -> Array:
        """Return the node's output as rows (groups, n, out)."""
        return self.kind.output_rows(y)

    def bias_rows(self, output_shape: Shape) -> Array | None:
        """Return the bias, scaled, as it is added to the output rows; None without a constant bias."""
        values = self.graph.constant(self.bias) if self.bias else None
        return None if values is None else self.kind.bias_rows(values, output_shape)

    def macs(self, shapes: Mapping[str, tuple[Dim, ...]] | None = None) -> int | None:
        """Return the multiply-accumulates of one run, None when a size is not known.

        Args:
            shapes: Shapes of values by name; those that are not there come from the graph.
        """
        other = self.node.input[0 if self.slot else 1] if self.role == "weight" else self.node.input[0]
        x, y = (self._sizes(value, shapes) for value in (other, self.node.output[0]))
        if self.role != "weight":
            y = y or ()
        return None if x is None or y is None else self.kind.products(x, y)

    def _sizes(self, value: str, shapes: Mapping[str, tuple[Dim, ...]] | None) -> Shape | None:
        shape = shapes.get(value) if shapes else None
        shape = shape or (self.graph.shape_of(value) if value else None)
        if shape is None or not all(isinstance(size, int) for size in shape):
            return None
        sizes = tuple(size for size in shape if isinstance(size, int))
        return None if min(sizes, default=0) < 0 else sizes


def find_layers(graph: Graph) -> tuple[list[Layer], list[Refusal]]:
    """Return the layers of one graph, and the weighted nodes that are none, each with the reason.

    Bodies are graphs of their own: a node in a body is found there, its weight in whatever graph
    defines it. A product of two values that the model computes has no weight and is not mentioned;
    neither is one of two constants.
    """
    layers: list[Layer] = []
    refusals: list[Refusal] = []
    dynamic: set[tuple[int, str]] = set()
    for node in graph.nodes:
        if node.op_type not in _WEIGHTED or domain_of(node.domain):
            continue
        where = node.name or next(filter(None, node.output), node.op_type)
        if node.op_type in _QUANTIZED:
            refusals.append(Refusal(where, f"the weight is already quantized: {node.op_type}"))
            continue
        for role, slot, needed in _slots(node):
            found: Layer | str = "the weight is missing"
            if slot < len(node.input):
                found = _layer(graph, node, role, slot, dynamic)
            if isinstance(found, Layer):
                layers.append(found)
                if role == "weight":
                    break
            elif found and (needed or ("computed while" not in found and "input of the" not in found)):
                refusals.append(Refusal(where, found))
    return layers, refusals


def layer_of(graph: Graph, node: NodeProto) -> Layer | str:
    """Return the layer that one node is now (not LSTM, GRU or RNN, which are two), or why it is none."""
    reason = "no weighted operator"
    if node.op_type in _WEIGHTED - _QUANTIZED and not domain_of(node.domain):
        for role, slot, _ in _slots(node):
            found = _layer(graph, node, role, slot) if slot < len(node.input) else "the weight is missing"
            if isinstance(found, Layer) and role == "weight":
                return found
            reason = found if isinstance(found, str) and found else reason
    return reason


def _slots(node: NodeProto) -> list[tuple[str, int, bool]]:
    """Return (role, input index, whether the operator always has a weight there) of a node."""
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return [("W", 1, True), ("R", 2, True)]
    if node.op_type in ("Conv", "ConvTranspose"):
        return [("weight", 1, True)]
    if node.op_type == "Gather":
        return [("weight", 0, False)]
    if node.op_type == "Einsum" and len(node.input) != 2:
        return []
    return [("weight", 1, False), ("weight", 0, False)]


def _layer(
    graph: Graph, node: NodeProto, role: str, slot: int, dynamic: set[tuple[int, str]] | None = None
) -> Layer | str:
    """Return the layer, the reason why it is none, or "" when there is nothing to say."""
    value = node.input[slot]
    if set_by_caller(node):
        return "its attributes are set by the function's caller"
    if node.op_type == "Gather" and not _is_embedding(graph, node, dynamic):
        return ""
    stored = trace(graph, value, dynamic)
    if isinstance(stored, str):
        return stored
    if len(node.input) > 1 and role == "weight" and graph.is_constant(node.input[1 - slot]):
        return ""  # nothing but constants
    if 0 in stored.shape:
        return "the weight has no elements"
    kind = _kind(node, role, slot, stored.shape)
    if isinstance(kind, str):
        return kind
    if None in readers(stored.graph, stored.name):
        return "the weight is also an output of the graph"
    bias_slot = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}.get(node.op_type, 3 if role != "weight" else 99)
    bias = node.input[bias_slot] if len(node.input) > bias_slot else ""
    return Layer(graph, node, role, slot, stored, kind, bias or None)


def _is_embedding(graph: Graph, node: NodeProto, dynamic: set[tuple[int, str]] | None) -> bool:
    """Whether a Gather looks real-valued entries up by an index the model computes."""
    if len(node.input) != 2 or graph.is_constant(node.input[1]):
        return False
    stored = trace(graph, node.input[0], dynamic)
    return not isinstance(stored, str) and len(stored.shape) > 1 and stored.data_type in FLOATS


def _kind(node: NodeProto, role: str, slot: int, shape: Shape) -> Kind | str:
    op_type = node.op_type
    odd = f"a weight of shape {list(shape)} does not fit {op_type}"
    if op_type in ("Conv", "ConvTranspose"):
        groups = attribute(node, "group", 1)
        rank = len(shape) - 2
        if rank < 1 or groups < 1 or shape[0] % groups:
            return odd
        common = {
            "weight_shape": shape,
            "groups": groups,
            "strides": tuple(attribute(node, "strides", (1,) * rank)),
            "dilations": tuple(attribute(node, "dilations", (1,) * rank)),
            "pads": tuple(attribute(node, "pads", (0,) * (2 * rank))),
            "auto_pad": attribute(node, "auto_pad", "NOTSET"),
        }
        if op_type == "Conv":
            return ConvKind(**common)
        return ConvTransposeKind(
            **common,
            output_padding=tuple(attribute(node, "output_padding", ())),
            output_shape=tuple(attribute(node, "output_shape", ())),
        )
    if op_type == "Gemm":
        sides = bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0))
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        return (
            GemmKind(shape, slot == 0, sides[slot], sides[1 - slot], alpha, beta) if len(shape) == 2 else odd
        )
    if op_type == "MatMul":
        return MatMulKind(shape, slot == 0) if shape else odd
    if op_type == "Gather":
        return GatherKind(shape, attribute(node, "axis", 0) % len(shape))
    if op_type == "Einsum":
        equation = attribute(node, "equation", "")
        found = EinsumKind.parse(equation, shape, slot)
        return found or f"Einsum {equation!r} is not a matrix product"
    if len(shape) != 3:
        return odd
    return RecurrentKind(shape, role == "R", bool(attribute(node, "layout", 0)))


_WEIGHTED = _QUANTIZED | {
    "Conv",
    "ConvTranspose",
    "Gemm",
    "MatMul",
    "Gather",
    "Einsum",
    "LSTM",
    "GRU",
    "RNN",
}
