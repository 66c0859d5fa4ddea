"""Taps of a kernel that meet padding alone: they add zeros, wherever the window stands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.rewriting.affine import is_float
from onnxslim_lab.rewriting.certain import trusted_shape
from onnxslim_lab.rewriting.kernel_axes import KernelAxis, kernel_axes
from onnxslim_lab.shapes import Dim
from onnxslim_lab.weights import Array


def drop_taps(graph: Graph, node: NodeProto) -> str:
    """Cut those taps off both ends of a Conv's kernel that never meet data, and padding that nothing reads.

    before: y = Conv<kernel_shape = [3], pads = [1, 1]>(x[n, c, 1], W)
    after:  y = Conv<kernel_shape = [1], pads = [0, 0]>(x[n, c, 1], W[:, :, 1:2])

    Exact up to the sign of zero.

    Returns:
        What was done, "" where nothing was.
    """
    axes = kernel_axes(graph, node)
    shape = trusted_shape(graph, node.input[0]) if axes else None
    if not axes or shape is None or len(shape) != len(axes) + 2:
        return ""
    found = [_shortened(axis, size) for axis, size in zip(axes, shape[2:], strict=True)]
    kept = [axis for _, axis in found]
    if kept == axes:
        return ""
    done = "dropped padding that no window reads"
    if any(new.taps < old.taps for new, old in zip(kept, axes, strict=True)):
        weight = own_weight(graph, node)
        if weight is None:
            return ""
        stretches = [slice(first, first + axis.taps) for first, axis in found]
        inside = (slice(None), slice(None), *stretches)
        dropped = np.ones(weight.shape, bool)
        dropped[inside] = False
        if not np.isfinite(weight[dropped]).all():
            return ""  # zero times infinity is no number
        data_type = (graph.constant_type(node.input[1]) or (0,))[0]
        graph.set_constant(node.input[1], np.ascontiguousarray(weight[inside]), data_type)
        if attribute(node, "kernel_shape"):
            graph.set_attribute(node, "kernel_shape", [axis.taps for axis in kept])
        before, after = (int(np.prod([axis.taps for axis in part])) for part in (axes, kept))
        done = f"dropped {before - after} of {before} taps that read padding alone"
    graph.set_attribute(node, "pads", [axis.before for axis in kept] + [axis.after for axis in kept])
    return done


def _shortened(axis: KernelAxis, length: Dim) -> tuple[int, KernelAxis]:
    """Return the first tap to keep, and the axis with as many windows and only the taps that may meet data."""
    if not isinstance(length, int) or not length or axis.count(length) < 1:
        return 0, axis
    first, last = 0, axis.taps - 1
    while first < last and (first + 1) * axis.dilation <= axis.before and not axis.is_read(first, length):
        first += 1
    while (
        first < last and (axis.taps - last) * axis.dilation <= axis.after and not axis.is_read(last, length)
    ):
        last -= 1
    less = axis.after - (axis.taps - 1 - last) * axis.dilation
    kept = replace(axis, taps=last - first + 1, before=axis.before - first * axis.dilation, after=less)
    trimmed = replace(kept, after=max(0, less - kept.slack(length)))
    uneven = abs(trimmed.after - axis.before) > abs(axis.after - axis.before)
    if kept == axis and uneven:
        return 0, axis  # equal padding at both ends suits more runtimes, and computes no more
    return first, trimmed


def own_weight(graph: Graph, node: NodeProto) -> Array | None:
    """Return a Conv's weight, None where it is no real constant of this graph or something else reads it too."""
    name = node.input[1]
    known = graph.constant_type(name)
    if known is None or not is_float(known[0]) or graph.scope_of(name) is not graph:
        return None
    if graph.use_count(name) != 1 or graph.is_input(name):
        return None
    return graph.constant(name)
