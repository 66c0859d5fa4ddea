"""Pad before Conv and pooling: the border moves into the operator's own pads attribute."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import numpy_dtype, set_by_caller
from onnxslim_lab.rewriting.affine import drop_unused

_NOT_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "Abs", "HardSigmoid", "Softplus", "Sqrt", "Exp")
_KEEPS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Transpose", "Identity", "Reshape", "Cast")


def fold_pad(graph: Graph, node: NodeProto) -> str:
    """Move a Pad of the spatial axes into every reader's pads.

    before: y = Conv<pads = p>(Pad<q>(x))     after: y = Conv<pads = p + q>(x)

    Conv pads with zeros; AveragePool too, and counts them when count_include_pad is set; MaxPool pads with
    the lowest value, which zero equals only where the window also sees an x that is not negative.

    Returns:
        "" when done, else the reason why not.
    """
    if any(map(set_by_caller, [node, *graph.consumers(node.output[0])])):
        return "attributes are set by the function's caller"
    if attribute(node, "mode", "constant") != "constant":
        return "it does not pad with a constant"
    readers = graph.consumers(node.output[0])
    if not readers or graph.is_output(node.output[0]):
        return "its result is an output"
    rank = _rank(graph, node, readers)
    pads = pad_widths(graph, node, rank)
    value = pad_value(graph, node)
    if pads is None or rank is None or value is None:
        return "its widths or its value are not constant, or the rank is not known"
    begins, ends = pads[:rank], pads[rank:]
    if min(pads) < 0 or any(begins[:2]) or any(ends[:2]):
        return "it cuts, or pads the batch or channels"
    own = begins[2:] + ends[2:]
    merged = []
    for reader in readers:
        found = _merged(graph, node, reader, own, value)
        if isinstance(found, str):
            return found
        merged.append(found)
    for reader, (total, counts) in zip(readers, merged, strict=True):
        graph.set_attribute(reader, "pads", total)
        graph.remove_attribute(reader, "auto_pad")
        if counts:
            graph.set_attribute(reader, "count_include_pad", 1)
    graph.replace_uses(node.output[0], node.input[0])
    names = tuple(filter(None, node.input[1:]))
    graph.remove(node)
    drop_unused(graph, names)
    return ""


def _merged(
    graph: Graph, node: NodeProto, reader: NodeProto, own: list[int], value: float
) -> tuple[list[int], bool] | str:
    """Return a reader's pads with those of Pad, and whether an average must count them; or why not."""
    if reader.input[0] != node.output[0] or list(reader.input).count(node.output[0]) > 1:
        return f"{reader.op_type} after it cannot take a border"
    if graph.bodies(reader) or attribute(reader, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{reader.op_type} after it pads by size"
    declared = attribute(reader, "pads") if attribute(reader, "auto_pad", "NOTSET") == "NOTSET" else None
    before = list(declared or [0] * len(own))
    total = [a + b for a, b in zip(before, own, strict=True)] if len(before) == len(own) else []
    if not total:
        return f"{reader.op_type} after it has other axes"
    if is_op(reader, "Conv"):
        return (total, False) if value == 0 else "Conv pads with zeros only"
    pooled = is_op(reader, "AveragePool") or is_op(reader, "MaxPool")
    kernel = attribute(reader, "kernel_shape", ())
    if not pooled or any(
        attribute(reader, "dilations", ())[i] != 1 for i in range(len(kernel)) if _dilated(reader)
    ):
        return f"{reader.op_type} after it cannot take a border"
    if attribute(reader, "ceil_mode", 0) or any(
        pad >= size for pad, size in zip(total, [*kernel, *kernel], strict=True)
    ):
        return "a pool's border must be smaller than its window, without ceil_mode"
    if is_op(reader, "AveragePool"):
        if value != 0:
            return "AveragePool pads with zeros only"
        if graph.opset() < 7 or (any(before) and not attribute(reader, "count_include_pad", 0)):
            return "AveragePool does not count its own border"
        return total, True
    if len([name for name in reader.output if name]) > 1:
        return "MaxPool gives positions in the padded data"
    lowest = float(np.finfo(np.float32).min)
    if value <= lowest or (value == 0 and not any(before) and _not_negative(graph, node.input[0])):
        return total, False
    return "MaxPool pads with the lowest value, not with this one"


def _dilated(reader: NodeProto) -> bool:
    return bool(attribute(reader, "dilations", ()))


def _not_negative(graph: Graph, value: str) -> bool:
    """Whether no element of a value can be below zero, NaN aside."""
    for _ in range(8):
        node = graph.producer(value)
        if node is None or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type in _NOT_NEGATIVE:
            return True
        if node.op_type == "Clip":
            low = attribute(node, "min")
            if len(node.input) > 1 and node.input[1]:
                bound = graph.constant(node.input[1])
                low = None if bound is None else float(bound)
            return low is not None and low >= 0
        if node.op_type not in _KEEPS_SIGN:
            return False
        value = node.input[0]
    return False


def _rank(graph: Graph, node: NodeProto, readers: list[NodeProto]) -> int | None:
    shape = graph.shape_of(node.input[0])
    if shape is not None:
        return len(shape)
    for reader in readers:
        if is_op(reader, "Conv"):
            known = graph.constant_type(reader.input[1])
            return len(known[1]) if known else None
    return None


def pad_widths(graph: Graph, node: NodeProto, rank: int | None) -> list[int] | None:
    """Return the widths of a Pad, begins then ends over all axes; None when not constant."""
    if graph.opset() >= 11 and len(node.input) < 2:
        return None
    if graph.opset() < 11:
        given = attribute(node, "pads", attribute(node, "paddings"))
        return None if given is None or rank is None or len(given) != 2 * rank else list(given)
    values = graph.constant(node.input[1])
    if values is None or rank is None:
        return None
    axes = list(range(rank))
    if len(node.input) > 3 and node.input[3]:
        chosen = graph.constant(node.input[3])
        if chosen is None:
            return None
        axes = [int(axis) % rank for axis in chosen]
    if values.size != 2 * len(axes):
        return None
    widths = [0] * (2 * rank)
    for position, axis in enumerate(axes):
        widths[axis] = int(values[position])
        widths[rank + axis] = int(values[len(axes) + position])
    return widths


def pad_value(graph: Graph, node: NodeProto) -> float | None:
    """Return what a Pad pads with, None when it is not constant or not real."""
    if graph.opset() < 11:
        return float(attribute(node, "value", 0.0))
    if len(node.input) < 3 or not node.input[2]:
        return 0.0
    value = graph.constant(node.input[2])
    known = graph.constant_type(node.input[2])
    if value is None or known is None or value.size != 1:
        return None
    return float(np.asarray(value, np.float64).reshape(())) if numpy_dtype(known[0]).kind != "O" else None
