"""Put the factors of a weight where its layers are: new nodes before each, the layer itself made the last."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.graph import Graph
from onnxslim_lab.layer_views.convolutions import ConvKind
from onnxslim_lab.layer_views.kinds import GatherKind, GemmKind
from onnxslim_lab.layer_views.products import MatMulKind
from onnxslim_lab.layer_views.storage import Stored, numpy_dtype
from onnxslim_lab.layers import Layer
from onnxslim_lab.low_rank.storage import FactorStore, discard

Array = NDArray[Any]
Factors = dict[str, Array]


def write_factors(layers: list[tuple[Layer, bool]], made: Factors) -> FactorStore:
    """Replace a weight by its factors in all layers that use it.

    A layer's node becomes the last of its parts: name, output, bias and scale stay with it.

    Args:
        layers: Every layer that uses the weight, and whether its matrix is the first one's transposed.
        made: The factors of the first layer's matrix; see `forms.factors`.

    Returns:
        The new constants.
    """
    home, weight = layers[0][0].weight_graph, layers[0][0].weight
    store = FactorStore(layers[0][0])
    for layer, flipped in layers:
        if isinstance(layer.kind, ConvKind):
            _write_conv(layer, layer.kind, made, store)
        else:
            _Parts(layer, made, flipped, store).write()
    discard(home, weight)
    return store


class _Parts:
    """The two factors of a matrix product, as one of its layers multiplies them.

    Args:
        layer: The layer.
        made: Factors "v" (groups, r, in) and "u" (groups, out, r) of the first layer's matrix.
        flipped: Whether this layer's matrix is that one's transposed: V^T U^T.
        store: Where the factors are stored.
    """

    def __init__(self, layer: Layer, made: Factors, flipped: bool, store: FactorStore) -> None:
        self.layer, self.made, self.store = layer, made, store
        self.first, self.second = ("u", "v") if flipped else ("v", "u")
        self.flipped = flipped
        self.batch: tuple[int, ...] = ()

    def name(self, factor: str, *, transposed: bool) -> str:
        """Return a factor as the layer's matrix has it, (r, in) or (out, r), or transposed."""
        array = self.made[factor]
        array = array.reshape(*self.batch, *array.shape[1:])
        return self.store.get(factor, array, self.layer.stored, transposed=transposed != self.flipped)

    def write(self) -> None:
        """Write the layer as two."""
        kind = self.layer.kind
        if isinstance(kind, GemmKind):
            self._gemm(kind)
        elif isinstance(kind, MatMulKind):
            self._matmul(kind)
        else:
            assert isinstance(kind, GatherKind)
            self._gather()

    def _matmul(self, kind: MatMulKind) -> None:
        graph, node = self.layer.graph, self.layer.node
        self.batch = kind.weight_shape[:-2]
        first = self.name(self.first, transposed=not kind.left)
        second = self.name(self.second, transposed=not kind.left)
        other = node.input[1 if kind.left else 0]
        hidden = _hidden(graph, node.output[0])
        pair = [first, other] if kind.left else [other, first]
        graph.emit("MatMul", pair, [hidden], name=_part(self.layer))
        graph.set_inputs(node, [second, hidden] if kind.left else [hidden, second])

    def _gemm(self, kind: GemmKind) -> None:
        graph, node = self.layer.graph, self.layer.node
        first = self.name(self.first, transposed=kind.left == kind.transposed)
        second = self.name(self.second, transposed=kind.left == kind.transposed)
        slot = 0 if kind.left else 1
        hidden = _hidden(graph, node.output[0])
        pair = [node.input[1 - slot]]
        pair.insert(slot, first)
        if graph.opset() < 11:
            pair.append(_zero(self.layer))
        sides = (kind.transposed, kind.other_transposed)
        left, right = (int(side) for side in (sides if kind.left else sides[::-1]))
        graph.emit("Gemm", pair, [hidden], name=_part(self.layer), transA=left, transB=right)
        inputs = list(node.input)
        inputs[slot], inputs[1 - slot] = second, hidden
        graph.set_inputs(node, inputs)
        graph.remove_attribute(node, "transB" if kind.left else "transA")

    def _gather(self) -> None:
        graph, node = self.layer.graph, self.layer.node
        table = self.name(self.first, transposed=True)
        spread = self.name(self.second, transposed=True)
        output, hidden = node.output[0], _hidden(graph, node.output[0])
        name = node.name
        graph.set_inputs(node, [table, node.input[1]])
        graph.set_outputs(node, [hidden])
        graph.emit("MatMul", [hidden, spread], [output], name=f"{name or output}/u")


def _write_conv(layer: Layer, kind: ConvKind, made: Factors, store: FactorStore) -> None:
    graph, node, rank = layer.graph, layer.node, len(kind.weight_shape) - 2
    first, last = made["v"], made["u"]
    groups = kind.groups
    ones = (1,) * rank
    stages: list[tuple[str, Array, tuple[int, ...]]]
    if "core" in made:
        stages = [("v", first.reshape(-1, kind.weight_shape[1], *ones), ())]
        core = made["core"]
        stages.append(("core", core.reshape(-1, *core.shape[2:]), tuple(range(rank))))
        stages.append(("u", last.reshape(-1, last.shape[2], *ones), ()))
    elif first.ndim == 4:
        stages = [("v", first.reshape(-1, *first.shape[2:], 1), (0,))]
        stages.append(("u", last.reshape(-1, last.shape[2], 1, last.shape[3]), (1,)))
    else:
        stages = [("v", first.reshape(-1, *kind.weight_shape[1:]), tuple(range(rank)))]
        stages.append(("u", last.reshape(-1, last.shape[2], *ones), ()))
    value, bias = node.input[0], list(node.input[2:])
    for number, (factor, array, axes) in enumerate(stages):
        weight = store.get(factor, array, layer.stored)
        settings = _conv_settings(kind, array.shape[2:], axes, groups)
        if number < len(stages) - 1:
            hidden = _hidden(graph, node.output[0])
            graph.emit("Conv", [value, weight], [hidden], name=_part(layer, factor), **settings)
            value = hidden
            continue
        graph.set_inputs(node, [value, weight, *bias])
        for setting in ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "group"):
            graph.remove_attribute(node, setting)
        for setting, given in settings.items():
            graph.set_attribute(node, setting, given)


def _conv_settings(
    kind: ConvKind, kernel: tuple[int, ...], axes: tuple[int, ...], groups: int
) -> dict[str, Any]:
    """Return the attributes of a part that moves along some of the spatial axes."""
    rank = len(kernel)
    settings: dict[str, Any] = {"kernel_shape": list(kernel), "group": groups}
    if not axes:
        return settings
    settings["strides"] = [kind.strides[axis] if axis in axes else 1 for axis in range(rank)]
    settings["dilations"] = [kind.dilations[axis] if axis in axes else 1 for axis in range(rank)]
    if kind.auto_pad.startswith("SAME"):
        settings["auto_pad"] = kind.auto_pad
    elif kind.auto_pad == "NOTSET":
        own = [axis % rank in axes for axis in range(2 * rank)]
        settings["pads"] = [pad if there else 0 for pad, there in zip(kind.pads, own, strict=True)]
    return settings


def _hidden(graph: Graph, output: str) -> str:
    return graph.fresh_name(f"{output}_low_rank")


def _part(layer: Layer, factor: str = "v") -> str:
    return f"{layer.name}/{factor}"


def _zero(layer: Layer) -> str:
    """Return a constant zero for the bias that Gemm had to have before opset 11."""
    graph = layer.graph
    name = graph.fresh_name(f"{layer.name}_zero")
    used: Stored = layer.stored
    graph.set_constant(name, np.zeros(1, numpy_dtype(used.used_type)), used.used_type)
    return name
