"""A Conv's kernel along each of its spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.shapes import Dim


@dataclass(frozen=True)
class KernelAxis:
    """A kernel along one axis.

    Attributes:
        taps: Its size.
        stride, dilation: What windows and what taps are apart.
        before, after: Padding.

    >>> axis = KernelAxis(taps=3, stride=2, dilation=1, before=1, after=1)
    >>> axis.span, axis.count(4), axis.is_read(0, 2), axis.is_read(1, 2)
    (3, 2, False, True)
    """

    taps: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def span(self) -> int:
        """The places from a window's first to its last tap."""
        return self.dilation * (self.taps - 1) + 1

    def count(self, length: int) -> int:
        """Return how many windows there are in so many places; less than one where none fits."""
        return (length + self.before + self.after - self.span) // self.stride + 1

    def slack(self, length: int) -> int:
        """Return how many places at the end no window reads, padding counted; some window must fit."""
        return (length + self.before + self.after - self.span) % self.stride

    def is_read(self, tap: int, length: int) -> bool:
        """Whether a tap ever meets data: window o reads place o * stride - before + tap * dilation."""
        start = self.before - tap * self.dilation
        first = max(0, -(-start // self.stride))
        last = min(self.count(length) - 1, (length - 1 + start) // self.stride)
        return first <= last


def kernel_axes(graph: Graph, node: NodeProto) -> list[KernelAxis] | None:
    """Return the spatial axes of a Conv, None where they are not known or padded by size."""
    if len(node.input) < 2:
        return None
    constant = graph.constant_type(node.input[1])
    shape = constant[1] if constant else graph.shape_of(node.input[1])
    return None if shape is None else axes_of(node, shape)


def axes_of(node: NodeProto, shape: Sequence[Dim]) -> list[KernelAxis] | None:
    """Return the spatial axes of a Conv by the shape of its weight, None as `kernel_axes`."""
    automatic = attribute(node, "auto_pad", "NOTSET")
    if set_by_caller(node) or automatic not in ("NOTSET", "VALID"):
        return None
    taps = [size for size in shape if isinstance(size, int) and size > 0][2:]
    rank = len(taps)
    if not rank or len(shape) != rank + 2:
        return None
    strides, dilations = attribute(node, "strides", [1] * rank), attribute(node, "dilations", [1] * rank)
    pads = attribute(node, "pads", [0] * 2 * rank) if automatic == "NOTSET" else [0] * 2 * rank
    kernel = attribute(node, "kernel_shape", taps)
    if list(kernel) != taps or not len(strides) == len(dilations) == rank or len(pads) != 2 * rank:
        return None
    if min(pads) < 0 or min(*strides, *dilations) < 1:
        return None
    return [
        KernelAxis(*numbers)
        for numbers in zip(taps, strides, dilations, pads[:rank], pads[rank:], strict=True)
    ]
