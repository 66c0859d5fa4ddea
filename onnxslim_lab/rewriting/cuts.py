"""What Slice keeps along one axis, and Slice after the axis lost its first places."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.rewriting.affine import drop_unused
from onnxslim_lab.rewriting.certain import integers
from onnxslim_lab.rewriting.constant_integers import put_integers
from onnxslim_lab.rewriting.no_ops import SLICE_END


@dataclass(frozen=True)
class Cut:
    """A Slice that keeps a stretch of an axis.

    Attributes:
        node: The Slice.
        index: Which of its entries is about the axis.
        entries: Its starts, ends, axes and steps.
    """

    node: NodeProto
    index: int
    entries: tuple[list[int], list[int], list[int], list[int]]

    def first(self, length: int | None) -> int:
        """Return the first place that is kept; 0, which is never too many, where that is not known."""
        start = self.entries[0][self.index]
        return start if start >= 0 else max(0, start + (length or 0))


def read_cut(graph: Graph, node: NodeProto, value: str, axis: int, rank: int) -> Cut | None:
    """Return how a node slices an axis of a value, None where it reads it in another way.

    Args:
        graph: The node's graph; of opset 10 or later.
        node: The node.
        value: What it reads.
        axis: The axis, counted from the front.
        rank: The value's rank.
    """
    if not is_op(node, "Slice") or len(node.input) < 3:
        return None
    if list(node.input).count(value) != 1 or node.input[0] != value:
        return None
    found = [integers(graph, node, name, i) for i, name in enumerate(("starts", "ends", "axes", "steps"), 1)]
    starts, ends, axes, steps = (None if numbers is None else list(numbers) for numbers in found)
    if starts is None or ends is None or axes is None or steps is None or len(starts) != len(ends):
        return None
    axes = [number % rank for number in axes or range(len(starts))]
    steps = steps or [1] * len(starts)
    if not len(starts) == len(axes) == len(steps):
        return None
    if axes.count(axis) != 1 or steps[axes.index(axis)] != 1:
        return None
    return Cut(node, axes.index(axis), (starts, ends, axes, steps))


def shift_cut(graph: Graph, cut: Cut, places: int) -> None:
    """Let a Slice keep the same of an axis that lost places before all that it keeps; one that keeps all goes.

    Bounds that count from the end stay, and so does "to the end".
    """
    node, index = cut.node, cut.index
    starts, ends, axes, steps = (list(numbers) for numbers in cut.entries)
    starts[index] -= places if starts[index] >= 0 else 0
    ends[index] = max(0, ends[index] - places) if 0 <= ends[index] < SLICE_END else ends[index]
    whole = starts[index] == 0 and ends[index] >= SLICE_END
    if whole and len(starts) == 1:
        read = tuple(node.input[1:])
        if graph.replace_value(node.output[0], node.input[0]):
            graph.remove(node)
            drop_unused(graph, tuple(filter(None, read)))
            return
    elif whole:
        for numbers in (starts, ends, axes, steps):
            del numbers[index]
    for position, (new, old) in enumerate(zip((starts, ends, axes, steps), cut.entries, strict=True), 1):
        if new != old and (position < 4 or (len(node.input) > 4 and node.input[4])):
            put_integers(graph, node, position, new)
