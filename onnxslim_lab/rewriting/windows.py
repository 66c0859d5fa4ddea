"""Pad before Conv where windows at the beginning, or padding at the end, are never read."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.rewriting.affine import drop_unused
from onnxslim_lab.rewriting.certain import integers, trusted_shape
from onnxslim_lab.rewriting.constant_integers import put_integers
from onnxslim_lab.rewriting.cuts import Cut, read_cut, shift_cut
from onnxslim_lab.rewriting.kernel_axes import KernelAxis, kernel_axes
from onnxslim_lab.rewriting.pads import pad_widths
from onnxslim_lab.rewriting.patterns import reshape_value, sole_reader

# What these put at a place does not depend on how many places there are.
_MODES = ("constant", "reflect", "edge")


@dataclass(frozen=True)
class _Padded:
    """A Pad that only a Conv reads, at most with axes of size one put in or taken out between.

    Attributes:
        pad, conv: The nodes.
        places: For each value from Pad's to the Conv's input, the axis of Pad that each of its axes is, None
            for one put in.
        widths: What Pad adds, begins then ends over all its axes.
        kernel: The Conv's kernel along its spatial axes.
    """

    pad: NodeProto
    conv: NodeProto
    places: dict[str, list[int | None]]
    widths: list[int]
    kernel: list[KernelAxis]

    def border(self, axis: int) -> tuple[int, int, int] | None:
        """Return the axis of Pad that a spatial axis is, and its widths; None where it is none."""
        place = self.places[self.conv.input[0]][axis + 2]
        rank = len(self.widths) // 2
        return None if place is None else (place, self.widths[place], self.widths[rank + place])


def skip_windows(graph: Graph, node: NodeProto) -> str:
    """Let a Pad add less at the beginning of an axis where every reader of the Conv slices those windows away.

    before: y = Slice<start = i>(Conv<stride = s>(Pad<begin = b>(x)))
    after:  y = Slice<start = i - n>(Conv<stride = s>(Pad<begin = b - n s>(x))), n = min(i, b / s)

    Returns:
        What was done, "" where nothing was.
    """
    padded = _read(graph, node)
    if padded is None or graph.is_output(padded.conv.output[0]):
        return ""
    shape = trusted_shape(graph, node.input[0])
    for axis, kernel in enumerate(padded.kernel):
        border = padded.border(axis)
        if border is None or kernel.before or not border[1]:
            continue
        place, begin, end = border
        length = shape[place] if shape is not None else None
        count = kernel.count(length + begin + end) if isinstance(length, int) else None
        cuts = _cuts(graph, padded.conv.output[0], axis + 2, len(padded.kernel) + 2)
        if not cuts:
            continue
        # One window must be left whatever the length is: a Conv without any is an error.
        most = (kernel.count(begin + end) if count is None else count) - 1
        fewest = min([most, begin // kernel.stride, *(cut.first(count) for cut in cuts)])
        if fewest < 1:
            continue
        _narrow(graph, padded, place, fewest * kernel.stride, 0)
        _resize(graph, padded.conv.output[0], axis + 2, fewest)
        for cut in cuts:
            shift_cut(graph, cut, fewest)
        which = (
            "1 window that nothing reads is" if fewest == 1 else f"{fewest} windows that nothing reads are"
        )
        return which + " not computed"
    return ""


def trim_end(graph: Graph, node: NodeProto) -> str:
    """Let a Pad add less at the end of an axis where the Conv's last window does not reach so far.

    Returns:
        What was done, "" where nothing was.
    """
    padded = _read(graph, node)
    shape = trusted_shape(graph, node.input[0])
    if padded is None or shape is None:
        return ""
    for axis, kernel in enumerate(padded.kernel):
        border = padded.border(axis)
        if border is None or kernel.after:
            continue
        place, begin, end = border
        length = shape[place]
        if not isinstance(length, int) or kernel.count(length + begin + end) < 1:
            continue
        less = min(end, kernel.slack(length + begin + end))
        if less:
            _narrow(graph, padded, place, 0, less)
            return "dropped padding that no window reads"
    return ""


def _read(graph: Graph, node: NodeProto) -> _Padded | None:
    """Return a Pad and the Conv after it, None where there is no such pair."""
    if graph.opset() < 11 or set_by_caller(node) or attribute(node, "mode", "constant") not in _MODES:
        return None
    chain = _to_conv(graph, node)
    kernel = kernel_axes(graph, chain[-1]) if chain else None
    if not chain or kernel is None:
        return None
    views = [integers(graph, view, "axes", 1) for view in chain[:-1]]
    if not all(views):
        return None
    signs = [1 if is_op(view, "Unsqueeze") else -1 for view in chain[:-1]]
    rank = len(kernel) + 2 - sum(sign * len(axes or ()) for sign, axes in zip(signs, views, strict=True))
    widths = pad_widths(graph, node, rank) if rank > 0 else None
    if widths is None or min(widths) < 0:
        return None
    order: list[int | None] = list(range(rank))
    places = {node.output[0]: order}
    for view, sign, axes in zip(chain, signs, views, strict=False):
        order = list(order)
        total = len(order) + len(axes or ()) * (sign > 0)
        chosen = sorted(axis % total for axis in axes or ())
        for axis in chosen if sign > 0 else reversed(chosen):
            if sign > 0:
                order.insert(axis, None)
            else:
                del order[axis]
        places[view.output[0]] = order
    return _Padded(node, chain[-1], places, widths, kernel)


def _to_conv(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """Return the nodes after a Pad up to a Conv, each the only reader of what is before it."""
    chain, value = [], node.output[0]
    while True:
        reader = sole_reader(graph, value)
        if reader is None or graph.use_count(value) != 1 or graph.bodies(reader):
            return None
        if reader.input[0] != value or set_by_caller(reader):
            return None
        chain.append(reader)
        if is_op(reader, "Conv"):
            return chain
        if not (is_op(reader, "Unsqueeze") or is_op(reader, "Squeeze")):
            return None
        value = reader.output[0]


def _cuts(graph: Graph, value: str, axis: int, rank: int) -> list[Cut]:
    """Return how every reader of a value slices an axis; none where one reads it in another way."""
    cuts = [read_cut(graph, reader, value, axis, rank) for reader in graph.consumers(value)]
    return [] if None in cuts else [cut for cut in cuts if cut is not None]


def _narrow(graph: Graph, padded: _Padded, place: int, begin: int, end: int) -> None:
    """Let a Pad add less on one of its axes."""
    node, widths = padded.pad, list(padded.widths)
    widths[place] -= begin
    widths[len(widths) // 2 + place] -= end
    axes = node.input[3] if len(node.input) > 3 else ""
    put_integers(graph, node, 1, widths)
    if axes:
        graph.set_input(node, 3, "")
        drop_unused(graph, (axes,))
    for value, order in padded.places.items():
        _resize(graph, value, order.index(place), begin + end)


def _resize(graph: Graph, value: str, axis: int, less: int) -> None:
    """Record that a value is so much shorter along an axis."""
    shape = graph.shape_of(value)
    if shape is not None:
        size = shape[axis]
        shape = (*shape[:axis], size - less if isinstance(size, int) else None, *shape[axis + 1 :])
    reshape_value(graph, value, shape)
