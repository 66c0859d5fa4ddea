"""A quantized weight before it is written: codes and grid, and what any form of it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.numerics import Grid, middle
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.quantization.weight_layout import Layout

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One stored weight in codes.

    Attributes:
        layers: The layers that use it.
        layout: How it is seen as (outer, length, inner).
        codes: (outer, length, inner), dtype of the grid's kind.
        grid: One scale for all (axis None), or blocks along axis 1: scale (outer, blocks, inner).
    """

    layers: tuple[Layer, ...]
    layout: Layout
    codes: Array
    grid: Grid

    @property
    def layer(self) -> Layer:
        """The first layer that uses it."""
        return self.layers[0]

    @property
    def name(self) -> str:
        """The stored weight's name."""
        return self.layer.weight

    @property
    def graph(self) -> Graph:
        """The graph that stores it."""
        return self.layer.weight_graph

    @property
    def kind(self) -> QuantType:
        """The type of the codes."""
        return self.grid.kind

    @property
    def block(self) -> int:
        """Length of a block; that of a channel where it has one scale, or the tensor has."""
        return min(self.grid.block or self.layout.shape[1], self.layout.shape[1])

    @property
    def blocks(self) -> int:
        """Number of blocks of a channel."""
        return -(-self.layout.shape[1] // self.block)

    @property
    def per_tensor(self) -> bool:
        """Whether there is one scale for all."""
        return self.grid.axis is None

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the codes."""
        return self.kind.floating or self.grid.symmetric

    @property
    def scales(self) -> Array:
        """The scales as (outer, blocks, inner), also where there is one for all."""
        return self._spread(self.grid.scale)

    @property
    def zero_points(self) -> Array:
        """The zero points, likewise."""
        return self._spread(self.grid.zero_point)

    @property
    def needs_zero_point(self) -> bool:
        """Whether DequantizeLinear must be told the zero point: it is not 0."""
        return not self.symmetric or (middle(self.kind) != 0 and not self.kind.floating)

    def unsigned(self) -> tuple[Array, Array]:
        """Return codes and zero points as uint8, signed ones moved up by half of the codes."""
        shift = (1 << self.kind.bits - 1) if self.kind.signed else 0
        codes, zero = (x.astype(np.int16) + shift for x in (self.codes, self.zero_points))
        return codes.astype(np.uint8), zero.astype(np.uint8)

    def payload(self) -> int:
        """Return the bytes of codes, scales and zero points as DequantizeLinear has them."""
        scales = self.grid.scale.size
        total = -(-self.codes.size * self.kind.bits // 8) + scales * self.grid.scale.itemsize
        return total + (-(-scales * self.kind.bits // 8) if self.needs_zero_point else 0)

    def _spread(self, parameter: Array) -> Array:
        outer, _, inner = self.layout.shape
        return np.broadcast_to(parameter, (outer, 1, inner)) if self.per_tensor else parameter


def scale_dtype(layers: tuple[Layer, ...]) -> Any:
    """Return the dtype of a weight's scales: float16 where the layers compute in it, else float32."""
    types = {layer.stored.used_type for layer in layers}
    return np.float16 if types == {TensorProto.FLOAT16} else np.float32
