"""Convolutions along one axis, and of one tap along any number, as products of matrices: every window becomes a row.

    before  DequantizeLinear -> Conv (weight W in codes) -> float
    after   Transpose (-> Pad) -> Gather -> Reshape of the codes -> DequantizeLinear -> MatMul -> Transpose

The windows are looked up in the codes, channels last, so that onnxruntime multiplies them by all of W at once and
gives float results (MatMulIntegerToFloat), for all of a batch, where ConvInteger takes one image after the other
and packs its windows anew: of four sounds of 640 samples, 258 filters of 256 taps take it 197 microseconds, and this
79 (1.31 on x86 with VNNI). Chellapilla, Puri and Simard, High Performance Convolutional Neural Networks for
Document Processing, 2006, section 3.1. A convolution of one tap has nothing to look up: its places are the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.quantization.operands import bias_values, read, zero_of
from onnxslim_lab.rewriting.certain import integers
from onnxslim_lab.rewriting.kernel_axes import KernelAxis, axes_of
from onnxslim_lab.rewriting.removal import release
from onnxslim_lab.shapes import Dim


def chunk(windows: KernelAxis, length: int) -> int:
    """Return how many neighbouring places can be looked up at once in so many, those added at the ends included.

    >>> chunk(KernelAxis(256, 128, 1, 0, 0), 640), chunk(KernelAxis(3, 2, 1, 0, 0), 64)
    (128, 1)
    """
    return math.gcd(windows.taps, windows.stride, length) if windows.dilation == 1 else 1


def windows_of(node: NodeProto, shape: Sequence[int]) -> KernelAxis | None:
    """Return the windows of a Conv by the shape of its weight, None when it is not one that can be a product.

    >>> from onnx import helper
    >>> windows_of(helper.make_node("Conv", ["x", "w"], ["y"], strides=[2], pads=[1, 0]), (8, 4, 3))
    KernelAxis(taps=3, stride=2, dilation=1, before=1, after=0)
    """
    axes = axes_of(node, shape)
    if not axes or attribute(node, "group", 1) != 1:
        return None
    if len(axes) == 1:
        return axes[0]
    every = all(axis.taps == axis.stride == 1 and not axis.before + axis.after for axis in axes)
    return KernelAxis(1, 1, 1, 0, 0) if every else None


@dataclass(frozen=True, eq=False)
class Product:
    """What a convolution became.

    Attributes:
        node: The MatMul.
        bias: Name of a constant vector that is still to be added to its columns, "" for none.
    """

    node: NodeProto
    bias: str


@dataclass
class Unroller:
    """Writes convolutions of one graph, constants of a layer once.

    Attributes:
        graph: The graph.
    """

    graph: Graph
    _stored: dict[str, tuple[str, str]] = field(default_factory=dict)
    _places: dict[str, str] = field(default_factory=dict)

    def write(
        self, node: NodeProto, key: str, shape: Sequence[Dim] | None, *, apart: bool = False
    ) -> Product | None:
        """Replace a Conv whose weight is in codes; returns None when it cannot be a product.

        Args:
            node: The Conv. The windows are looked up in codes where its input comes as codes.
            key: Equal for nodes that have the same weight, and inputs of the same shape.
            shape: What is known of its input's shape.
            apart: Whether its bias is left to the caller.
        """
        graph = self.graph
        x, w = read(graph, node.input[0]), read(graph, node.input[1])
        codes, scale = (graph.constant(name) for name in (w.codes, w.scale)) if w else (None, None)
        if (
            w is None
            or codes is None
            or scale is None
            or w.kind != TensorProto.INT8
            or zero_of(graph, w).any()
        ):
            return None
        windows = windows_of(node, codes.shape)
        bias = node.input[2] if len(node.input) > 2 else ""
        added = bias_values(graph, bias) if bias else None
        if windows is None or scale.dtype != np.float32 or (bias and added is None):
            return None
        if key not in self._stored:
            columns = np.ascontiguousarray(codes.T.reshape(-1, len(codes)))
            self._stored[key] = self._store(columns), self._store(np.broadcast_to(scale, codes.shape[:1]))
        zero = [x.zero] if x and x.zero else []
        value = self._rows(x.codes if x else node.input[0], zero, windows, codes, key, shape)
        if x:
            value = graph.emit("DequantizeLinear", [value, x.scale, *zero], name="dq").output[0]
        matrix = graph.emit("DequantizeLinear", [*self._stored[key]], name="dq", axis=1).output[0]
        output, gone, axes = node.output[0], list(node.input), codes.ndim - 2
        graph.remove(node)
        product = graph.emit("MatMul", [value, matrix], name=node.name)
        back = [0, axes + 1, *range(1, axes + 1)]
        made, left = product.output[0], ""
        if added is not None and apart:
            left, added = self._store(added.reshape(-1)), None
        # onnxruntime would make a Gemm of a MatMul and an Add behind it, and decode the weight for it
        if added is not None and axes == 1:
            made = graph.emit("Sum", [made, self._store(added.reshape(-1))], name="a").output[0]
        if added is None or axes == 1:
            graph.emit("Transpose", [made], [output], name="t", perm=back)
        else:
            made = graph.emit("Transpose", [made], name="t", perm=back).output[0]
            vector = self._store(added.reshape(-1, *[1] * axes))
            graph.emit("Add", [made, vector], [output], name="a")
        release(graph, gone)
        return Product(product, left)

    def _rows(
        self,
        source: str,
        zero: list[str],
        windows: KernelAxis,
        codes: Array,
        key: str,
        shape: Sequence[Dim] | None,
    ) -> str:
        """Emit the windows of (images, channels, places) as (images, windows, taps and channels)."""
        graph, channels = self.graph, codes.shape[1]
        padded = bool(windows.before or windows.after)
        size = shape[2] if shape is not None and len(shape) == 3 else None
        length = size + windows.before + windows.after if isinstance(size, int) else 0
        piece = chunk(windows, length) if length else 1
        if channels == 1 and piece > 1 and not padded:
            value = self._unsqueezed(source)  # of one channel, the last axis is the channels' already
        else:
            last = [0, *range(2, codes.ndim), 1]
            value = graph.emit("Transpose", [source], name="t", perm=last).output[0]
        if padded:
            pads = self._store(np.array([0, windows.before, 0, 0, windows.after, 0], np.int64))
            value = graph.emit("Pad", [value, pads, *zero], name="p").output[0]
        if windows.taps == windows.stride == 1:
            return value
        row = windows.taps * channels
        starts = range(0, length - windows.span + 1, windows.stride)
        if (
            length == len(starts) * windows.taps > 0
            and windows.stride == windows.taps
            and windows.dilation == 1
        ):
            whole = self._store(np.array([0, len(starts), row], np.int64))
            return graph.emit("Reshape", [value, whole], name="w").output[0]
        if piece > 1:
            cut = self._store(np.array([0, length // piece, piece * channels], np.int64))
            value = graph.emit("Reshape", [value, cut], name="w").output[0]
        if key not in self._places:
            taps = np.arange(0, windows.taps, piece)[None] * windows.dilation // piece
            self._places[key] = (
                self._store(np.array(starts)[:, None] // piece + taps)
                if length
                else self._places_of(source, windows, taps)
            )
        value = graph.emit("Gather", [value, self._places[key]], name="g", axis=1).output[0]
        rows = self._store(np.array([0, 0, row], np.int64))
        return graph.emit("Reshape", [value, rows], name="w").output[0]

    def _unsqueezed(self, value: str) -> str:
        """Return what a value of shape (images, 1, places) is made of by an Unsqueeze, else the value."""
        node = self.graph.producer(value)
        if node is None or not is_op(node, "Unsqueeze") or integers(self.graph, node, "axes", 1) != [1]:
            return value
        return node.input[0]

    def _places_of(self, source: str, windows: KernelAxis, taps: Array) -> str:
        """Emit the places of each window's taps, by the number of places at inference; return their name."""
        graph = self.graph
        shape = graph.emit("Shape", [source], name="l").output[0]
        length = graph.emit("Gather", [shape, self._store(np.asarray(2))], name="l").output[0]
        short = windows.span - 1 - windows.before - windows.after
        end = graph.emit("Sub", [length, self._store(np.asarray(short))], name="l").output[0]
        ends = [self._store(np.asarray(0)), end, self._store(np.asarray(windows.stride))]
        starts = graph.emit("Range", ends, name="l").output[0]
        column = graph.emit("Unsqueeze", [starts, self._store(np.array([1]))], name="l").output[0]
        return graph.emit("Add", [column, self._store(taps)], name="l").output[0]

    def _store(self, array: Array) -> str:
        name = self.graph.fresh_name("k")
        self.graph.set_constant(name, np.ascontiguousarray(array))
        return name
