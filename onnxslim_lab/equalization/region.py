"""Region: values of a graph whose channels scale together, and the constants that take the scales."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import NodeProto

from onnxslim_lab.components import components
from onnxslim_lab.equalization.indexing import Array, Index, common_shape, varying
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.shapes import Dim


@dataclass(frozen=True, eq=False)
class LayerEnd:
    """A layer whose weight takes the scales of its input or output channels.

    Attributes:
        layer: The layer.
        value: The value whose channels these are.
        side: "in": columns of the matrix are multiplied by s; "out": its rows are divided by s.
        index: Scale variable of each channel, (channels,).
    """

    layer: Layer
    value: str
    side: Literal["in", "out"]
    index: Index


@dataclass(frozen=True, eq=False)
class ConstantEnd:
    """A constant operand that is divided by s: a bias, a scale, a bound.

    Attributes:
        node: The node that reads it.
        slot: Which of the node's inputs it is.
        index: Scale variables, broadcastable against the constant as NumPy does.
    """

    node: NodeProto
    slot: int
    index: Index


class Region:
    """Values that are connected by operators through which a positive scale of channels passes.

    Growing it gives every value an index (see `indexing`) into scale variables; `close` then finds which
    variables must be equal and which must stay 1.

    Attributes:
        graph: The graph of the values.
        indices: Index of each value.
        layers: The layers at its ends; an input of the region is the output of an "out" layer.
        constants: The other constants that take scales.
        norms: Nodes with a scale vector of their own (LayerNormalization, Mul) that the region starts from.
        copies: Nodes to make again for the region's layers alone, the last of which makes their input; empty
            where the region takes in all that reads its values.
        labels: After `close`: the scale of each variable, frozen or free, as a number from 0.
        free: After `close`: whether each of these scales may be chosen.
        reasons: Why scales are frozen, the commonest first.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.indices: dict[str, Index] = {}
        self.layers: list[LayerEnd] = []
        self.constants: list[ConstantEnd] = []
        self.norms: list[NodeProto] = []
        self.copies: list[NodeProto] = []
        self.labels: Index = np.zeros(0, np.int64)
        self.free: Array = np.zeros(0, np.bool_)
        self.reasons: list[str] = []
        self.waiting: deque[str] = deque()
        self._outside: list[tuple[str, Index, str]] = []
        self._count = 0
        self._links: list[tuple[Index, Index]] = []
        self._frozen: list[tuple[Index, str]] = []

    def shape(self, value: str) -> tuple[Dim, ...] | None:
        """Return what is known of a value's shape."""
        return self.graph.shape_of(value)

    def variables(self, count: int) -> Index:
        """Return so many new scale variables."""
        first = self._count
        self._count += count
        return np.arange(first, self._count)

    def start(self, value: str, axes: Iterable[int]) -> Index | None:
        """Return an index with a new variable for each place along these axes, None when a size is unknown."""
        shape = self.shape(value)
        if shape is None:
            return None
        sizes: list[int] = []
        for axis, size in enumerate(shape):
            if axis in axes and not isinstance(size, int):
                return None
            sizes.append(size if axis in axes and isinstance(size, int) else 1)
        return self.variables(int(np.prod(sizes))).reshape(sizes)

    def know(self, value: str, index: Index) -> None:
        """Give a value its index, or demand that the one it has be equal."""
        held = self.indices.get(value)
        if held is None:
            self.indices[value] = index
            self.waiting.append(value)
        else:
            self.link(held, index)

    def link(self, first: Index, second: Index) -> None:
        """Demand that the scales of two indices be equal, broadcast against each other."""
        shape = common_shape(first, second)
        if shape is None:
            self.freeze(first, "sizes do not fit each other")
            self.freeze(second, "sizes do not fit each other")
        else:
            self._links.append((np.broadcast_to(first, shape), np.broadcast_to(second, shape)))

    def collapse(self, index: Index, axes: Iterable[int]) -> Index:
        """Demand one scale along these axes; returns the index with size 1 along them."""
        own = index
        for axis in axes:
            own = own.take([0], axis)
        if own.shape != index.shape:
            self.link(index, own)
        return own

    def freeze(self, index: Index, reason: str) -> None:
        """Demand that these scales be 1."""
        self._frozen.append((index, reason))

    def freeze_values(self, values: Sequence[str], reason: str) -> None:
        """Demand that the scales of those values that have an index be 1."""
        for value in values:
            if value in self.indices:
                self.freeze(self.indices[value], reason)

    def keep_outside(self, value: str, index: Index, reason: str) -> None:
        """Demand that these scales be 1 if the value turns out to be scaled as well."""
        self._outside.append((value, index, reason))

    def close(self) -> None:
        """Find the scales: variables that must be equal share one."""
        for value, index, reason in self._outside:
            if value in self.indices:
                self.freeze(index, reason)
                self.freeze(self.indices[value], reason)
        found, self.labels = components(self._count, self._links)
        self.free = np.ones(found, np.bool_)
        counts: Counter[str] = Counter()
        for index, reason in self._frozen:
            self.free[self.labels[index.reshape(-1)]] = False
            counts[reason] += index.size
        self.reasons = [reason for reason, _ in counts.most_common()]

    def scales_of(self, index: Index) -> Index:
        """Return the number of the scale of each entry of an index."""
        return self.labels[index]

    def axis_of(self, value: str) -> int | None:
        """Return the one axis of a value along which its scale varies, None when there is no such axis."""
        axes = varying(self.indices[value])
        return axes[0] if len(axes) == 1 else None
