"""Rules of operators with weights, and of products: see `rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from onnx import NodeProto

from onnxslim_lab.channels.axes import Atoms, Axes, Kept
from onnxslim_lab.channels.nodes import freeze_node, label
from onnxslim_lab.graph import attribute


def conv(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Conv and ConvTranspose: channels on either side; in groups, whole groups or the same place of all.

    Whole groups go where there are more groups than places in one, as in depthwise convolution.
    """
    x, w, y = axes.input(node, 0), axes.input(node, 1), axes.output(node)
    unknown = f"shapes around {label(node)} are not known"
    if x is None or w is None or y is None or min(len(x), len(w), len(y)) < 3:
        return freeze_node(axes, node, unknown)
    inputs, outputs = x[1], y[1]
    turned = node.op_type == "ConvTranspose"
    groups = attribute(node, "group", 1)
    if inputs is None or outputs is None or w[0] is None or w[1] is None or inputs.size % groups:
        return freeze_node(axes, node, unknown)
    axes.link(x[0], y[0], unknown)
    for tensor in (x, y, w):
        axes.freeze_all(tensor[2:], f"{label(node)} slides over it")
    first, second = (inputs, outputs) if turned else (outputs, inputs)
    axes.link(w[0], first, unknown)
    if groups == 1:
        axes.link(w[1], second, unknown)
    else:
        ins, outs = inputs.reshape(groups, -1), outputs.reshape(groups, -1)
        inner = w[1]
        if groups >= ins.shape[1]:  # whole groups
            axes.tie(np.concatenate([ins.T, outs.T]))
            axes.freeze(inner, f"{label(node)} has groups of these")

            def regroup(kept: Kept) -> None:
                count = int(kept(ins[:, 0]).sum())
                if count != groups:
                    axes.graph.set_attribute(node, "group", count)

            axes.edits.append(regroup)
        else:
            axes.tie(ins)
            axes.tie(outs)
            axes.link(inner, (outs if turned else ins)[0], unknown)
    if len(node.input) > 2 and node.input[2]:
        bias = axes.input(node, 2)
        axes.link(bias[0] if bias else None, outputs, unknown)
    return [0, 1, 2]


def gemm(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Gemm: rows, columns, and what is summed over."""
    a, b, y = axes.input(node, 0), axes.input(node, 1), axes.output(node)
    unknown = f"shapes around {label(node)} are not known"
    if a is None or b is None or y is None or not len(a) == len(b) == len(y) == 2 or axes.graph.opset() < 7:
        return freeze_node(axes, node, unknown)
    rows, summed = a[::-1] if attribute(node, "transA", 0) else a
    other, columns = b[::-1] if attribute(node, "transB", 0) else b
    axes.link(summed, other, unknown)
    axes.link(rows, y[0], unknown)
    axes.link(columns, y[1], unknown)
    if len(node.input) > 2 and node.input[2]:
        axes.broadcast([axes.input(node, 2), y], unknown)
    return [0, 1, 2]


def matmul(axes: Axes, node: NodeProto) -> Iterable[int]:
    """MatMul of any two values, batches broadcast."""
    a, b, y = axes.input(node, 0), axes.input(node, 1), axes.output(node)
    unknown = f"shapes around {label(node)} are not known"
    if a is None or b is None or y is None or not a or not b:
        return freeze_node(axes, node, unknown)
    axes.link(a[-1], b[-2] if len(b) > 1 else b[-1], unknown)
    batch = len(y) - (len(a) > 1) - (len(b) > 1)
    if len(a) > 1:
        axes.link(a[-2], y[batch], unknown)
    if len(b) > 1:
        axes.link(b[-1], y[-1], unknown)
    axes.broadcast([a[:-2], b[:-2], y[:batch]], unknown)
    return [0, 1]


def einsum(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Einsum: axes with the same letter."""
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = [*left.split(","), right]
    tensors = [axes.input(node, slot) for slot in range(len(node.input))] + [axes.output(node)]
    fits = len(terms) == len(tensors) and all(
        tensor is not None and len(tensor) == len(term) == len(set(term))
        for term, tensor in zip(terms, tensors, strict=True)
    )
    if "." in equation or not arrow or not fits:
        return freeze_node(axes, node, f"the equation of {label(node)} is not read")
    seen: dict[str, Atoms | None] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, axis in zip(term, tensor or (), strict=True):
            if letter in seen:
                axes.link(seen[letter], axis, f"sizes around {label(node)} are not known")
            seen[letter] = axis
    return range(len(node.input))


def recurrent(axes: Axes, node: NodeProto) -> Iterable[int]:
    """LSTM, GRU, RNN: the inputs; the hidden units, in all gates and directions, and `hidden_size`."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[node.op_type]
    x, w, r = (axes.input(node, slot) for slot in range(3))
    unknown = f"shapes around {label(node)} are not known"
    if x is None or w is None or r is None or len(x) != 3 or r[2] is None or w[1] is None or r[1] is None:
        return freeze_node(axes, node, unknown)
    hidden = r[2]
    axes.link(x[2], w[2], unknown)
    for tensor, axis, times in ((w, 1, gates), (r, 1, gates), (axes.input(node, 3), 1, 2 * gates)):
        if tensor is not None:
            stacked = tensor[axis]
            if stacked is None or stacked.size != times * hidden.size:
                return freeze_node(axes, node, unknown)
            axes.tie(np.concatenate([hidden[None], stacked.reshape(times, -1)]))
    if len(node.input) > 7 and node.input[7]:
        peepholes = axes.input(node, 7)
        if peepholes is None or peepholes[1] is None or peepholes[1].size != 3 * hidden.size:
            return freeze_node(axes, node, unknown)
        axes.tie(np.concatenate([hidden[None], peepholes[1].reshape(3, -1)]))
    if len(node.input) > 4 and node.input[4]:
        axes.freeze_all(axes.input(node, 4), unknown)
    for state in (axes.input(node, 5), axes.input(node, 6)):
        if state is not None:
            axes.link(state[2], hidden, unknown)
    for slot, value in enumerate(node.output):
        y = axes.output(node, slot)
        if value:
            axes.link(y[-1] if y else None, hidden, unknown)
            axes.freeze_all(y and y[:-1], f"{label(node)} works along it")
    for slot in (5, 6):
        state = axes.input(node, slot)
        axes.freeze_all(state and state[:2], f"{label(node)} works along it")
    axes.freeze_all(x[:2], f"{label(node)} works along it")
    for tensor in (w, r, axes.input(node, 3)):
        axes.freeze_all(tensor and tensor[:1], f"{label(node)} has two directions")

    def resize(kept: Kept) -> None:
        count = int(kept(hidden).sum())
        if count != hidden.size:
            axes.graph.set_attribute(node, "hidden_size", count)

    axes.edits.append(resize)
    return range(len(node.input))


def gather(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Gather: what it looks up stays, the features of an entry pass."""
    data, index, y = axes.input(node, 0), axes.input(node, 1), axes.output(node)
    unknown = f"shapes around {label(node)} are not known"
    if data is None or index is None or y is None or len(y) != len(data) + len(index) - 1:
        return freeze_node(axes, node, unknown)
    at = attribute(node, "axis", 0) % len(data)
    axes.freeze(data[at], f"{label(node)} looks it up by number")
    axes.freeze_all(index, f"{label(node)} reads it")
    axes.freeze_all(y[at : at + len(index)], f"{label(node)} makes it")
    kept = [axis for i, axis in enumerate(data) if i != at]
    axes.link_all(tuple(kept), y[:at] + y[at + len(index) :], unknown)
    return [0, 1]


LAYERS: dict[str, Callable[[Axes, NodeProto], Iterable[int]]] = {
    "Conv": conv,
    "ConvTranspose": conv,
    "Einsum": einsum,
    "GRU": recurrent,
    "Gather": gather,
    "Gemm": gemm,
    "LSTM": recurrent,
    "MatMul": matmul,
    "RNN": recurrent,
}
