"""Parameters and multiply-accumulates of a model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, GraphProto

from onnxslim_lab import shapes
from onnxslim_lab.graph import Graph
from onnxslim_lab.layer_views.storage import FLOATS
from onnxslim_lab.layers import Layer, find_layers
from onnxslim_lab.shapes import Dim
from onnxslim_lab.worker.messages import Value


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one run of a model.

    Attributes:
        layers: Each layer with its count, None where a size is not known; a body counts once.
        assumed: Sizes taken for the symbolic dimensions of the inputs, by name.
        shapes: Shapes of the values by name, as far as inference knows them.
    """

    layers: list[tuple[Layer, int | None]]
    assumed: dict[str, int]
    shapes: dict[str, tuple[Dim, ...]]

    @property
    def total(self) -> int:
        """The sum over the layers whose sizes are known."""
        return sum(count or 0 for _, count in self.layers)

    @property
    def elements(self) -> dict[str, int]:
        """The number of elements of the values whose sizes are known, by name."""
        return {
            name: math.prod(size for size in shape if isinstance(size, int))
            for name, shape in self.shapes.items()
            if all(isinstance(size, int) for size in shape)
        }

    @property
    def unknown(self) -> int:
        """The number of layers without a count."""
        return sum(count is None for _, count in self.layers)


def model_macs(graph: Graph, dims: Mapping[str, int] | None = None, *, default: int = 1) -> Macs:
    """Count the multiply-accumulates of every layer of a whole model.

    Args:
        graph: The main graph.
        dims: Sizes of symbolic dimensions by name; nameless ones are named "input:axis".
        default: Size of every other symbolic dimension.
    """
    light = graph.root.light_model(value_info=False)
    assumed: dict[str, int] = {}
    for value in light.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                name = dim.dim_param or f"{value.name}:{axis}"
                assumed[name] = dim.dim_value = (dims or {}).get(name, default)
    known: dict[str, tuple[Dim, ...]] = {}
    _collect(shapes.infer(light).graph, known)
    counted = []
    for inner in graph.root.walk():
        counted += [(layer, layer.macs(known)) for layer in find_layers(inner)[0]]
    return Macs(counted, assumed, known)


def fed_sizes(model: Graph, feed: Mapping[str, Value]) -> dict[str, int]:
    """Return the sizes that a feed gives the symbolic dimensions of the inputs, named as `model_macs` names them."""
    sizes: dict[str, int] = {}
    for name, kind in model.input_types().items():
        value = feed.get(name)
        if not isinstance(value, np.ndarray):
            continue
        for axis, (dim, size) in enumerate(zip(kind.tensor_type.shape.dim, value.shape, strict=False)):
            if not dim.HasField("dim_value") or dim.dim_value < 0:
                sizes[dim.dim_param or f"{name}:{axis}"] = size
    return sizes


def _collect(proto: GraphProto, known: dict[str, tuple[Dim, ...]]) -> None:
    """Add the shapes of all values of a graph and its bodies by name."""
    for value in (*proto.input, *proto.output, *proto.value_info):
        shape = shapes.shape_from_type(value.type)
        if shape is not None:
            known.setdefault(value.name, shape)
    for node in proto.node:
        for item in node.attribute:
            if item.type == AttributeProto.GRAPH:
                _collect(item.g, known)
            for body in item.graphs:
                _collect(body, known)


def parameters(graph: Graph) -> int:
    """Count the real-valued constants of a whole model, each stored one once."""
    total = 0
    for inner in graph.root.walk():
        names = [*inner.initializers]
        names += [node.output[0] for node in inner.nodes if node.op_type == "Constant" and not node.domain]
        for name in names:
            data_type, shape, _ = inner.constant_type(name) or (0, (), 0)
            total += math.prod(shape) if data_type in FLOATS else 0
    return total
