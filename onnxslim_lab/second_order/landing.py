"""Where a layer's output lands: the bias added to it, and the residual stream it is added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.layers import Layer
from onnxslim_lab.rewriting.patterns import added_to
from onnxslim_lab.second_order.obs import Doubles
from onnxslim_lab.shapes import Dim

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Bias:
    """A layer's own constant bias as (groups, out)."""

    read: Callable[[], Doubles]
    write: Callable[[Doubles], None]


@dataclass(frozen=True)
class Landing:
    """What is added to a layer's output and nowhere else used.

    Attributes:
        bias: Its bias, of the node or of the Add behind it; None without one.
        added: The value of the output's shape that is then added to it, such as a residual stream; "" for none.
    """

    bias: Bias | None
    added: str

    @classmethod
    def of(cls, layer: Layer) -> Landing:
        """Follow the output of a layer of the main graph through the sums behind it."""
        graph, value = layer.graph, layer.node.output[0]
        bias, added = own_bias(layer), ""
        while not added and (behind := added_to(graph, value)):
            node, index = behind
            other = node.input[index]
            if graph.is_constant(other):
                found = None if layer.bias is not None or bias is not None else _bias(layer, other, 1.0)
                if found is None or layer.op_type != "MatMul" or layer.shape[0] != 1:
                    break
                bias, value = found, node.output[0]
                continue
            alike = _alike(graph.shape_of(value), graph.shape_of(other))
            if layer.kind.scale == 1.0 and alike and graph.scope_of(other) is graph:
                added = other
            break
        return cls(bias, added)


def _alike(one: Shape | None, other: Shape | None) -> bool:
    """Return whether two shapes may be equal: the sizes that are known are."""
    if one is None or other is None or len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def own_bias(layer: Layer) -> Bias | None:
    """Return the bias of a Conv or Gemm that nothing else reads and that has one value for each output."""
    if layer.bias is None or layer.op_type not in ("Conv", "Gemm") or layer.kind.scale != 1.0:
        return None
    scale = float(getattr(layer.kind, "beta", 1.0))
    if not scale or getattr(layer.kind, "left", False):
        return None
    return _bias(layer, layer.bias, scale)


def _bias(layer: Layer, name: str, scale: float) -> Bias | None:
    """Return a constant as a bias with one value for each output; None where it is no such thing."""
    groups, outputs, _ = layer.shape
    values = layer.graph.constant(name)
    home = layer.graph.scope_of(name)
    if values is None or home is not layer.graph or layer.graph.use_count(name) != 1:
        return None
    if values.size != groups * outputs or values.shape[-1:] != (values.size,):
        return None

    def read() -> Doubles:
        return np.asarray(values, np.float64).reshape(groups, outputs) * scale

    def write(new: Doubles) -> None:
        layer.graph.set_constant(name, (new / scale).reshape(values.shape).astype(values.dtype))

    return Bias(read, write)
