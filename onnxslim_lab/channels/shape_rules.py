"""Rules of operators that change shapes: see `rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from onnx import NodeProto

from onnxslim_lab.channels.axes import Axes, Fold, Kept, Tensor
from onnxslim_lab.channels.nodes import freeze_node, label
from onnxslim_lab.channels.sizes import Entry, entry_of, rewrite
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.shapes import Dim


def dims_read(graph: Graph, node: NodeProto, rank: int) -> list[int]:
    """Return the axes whose sizes are used of what a Shape node gives."""
    start = attribute(node, "start", 0)
    end = attribute(node, "end", rank)
    chosen = list(range(rank))[start:end]
    value = node.output[0]
    if graph.is_output(value):
        return chosen
    used: set[int] = set()
    for reader in graph.consumers(value):
        if reader.op_type == "Gather" and list(reader.input)[:1] == [value]:
            index = graph.constant(reader.input[1])
            if index is not None and chosen:
                used.update(chosen[int(i)] for i in index.reshape(-1) if -len(chosen) <= int(i) < len(chosen))
                continue
        if reader.op_type == "Slice" and list(reader.input)[:1] == [value] and len(reader.input) > 2:
            parts = [graph.constant(name) if name else None for name in reader.input[1:]]
            if all(part is not None for part in parts[:2]) and (len(parts) < 4 or parts[3] is not None):
                step = int(parts[3].reshape(-1)[0]) if len(parts) > 3 and parts[3] is not None else 1
                first, last = (int(part.reshape(-1)[0]) for part in parts[:2] if part is not None)
                used.update(chosen[first:last:step])
                continue
        return chosen
    return sorted(used)


def _sized(axes: Axes, tensor: Tensor, entries: Sequence[Entry | None], reason: str) -> None:
    """Let the sizes of a result be rewritten; freeze the axes whose size is written nowhere."""
    for axis, (atoms, entry) in enumerate(zip(tensor, entries, strict=True)):
        if entry is None:
            axes.freeze(atoms, reason)
        elif atoms is not None and entry.size > 0:
            rewrite(axes, atoms, entry, axis)


def _shape_entries(axes: Axes, node: NodeProto, slot: int, rank: int) -> list[Entry | None]:
    return [entry_of(axes.graph, node, slot, place) for place in range(rank)]


def reshape(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Reshape and Flatten: axes that are joined or taken apart."""
    x, y, graph = axes.input(node, 0), axes.output(node), axes.graph
    unknown = f"shapes around {label(node)} are not known"
    before = graph.shape_of(node.input[0])
    kind = graph.constant_type(node.input[0]) if graph.is_constant(node.input[0]) else None
    before, after = kind[1] if kind else before, graph.shape_of(node.output[0])
    if x is None or y is None or before is None or after is None:
        return freeze_node(axes, node, unknown)
    if node.op_type == "Reshape":
        if len(node.input) < 2 or attribute(node, "allowzero", 0):
            return freeze_node(axes, node, f"the sizes of {label(node)} are not to be rewritten")
        entries = _shape_entries(axes, node, 1, len(y))
        for axis, entry in enumerate(entries):
            if entry is not None and entry.size == 0:
                axes.link(x[axis] if axis < len(x) else None, y[axis], unknown)
        _sized(axes, y, entries, f"the shape of {label(node)} is computed (simplify-shapes may help)")
    fold(axes, (x, before), (y, after), label(node))
    return [0, 1]


def fold(axes: Axes, x: tuple[Tensor, Sequence[Dim]], y: tuple[Tensor, Sequence[Dim]], name: str) -> None:
    """Relate two shapes of the same elements, from the front as far as sizes are known, then from the back."""
    blocks, rest = _blocks(x[1], y[1])
    back, middle = _blocks(x[1][rest[0] :][::-1], y[1][rest[1] :][::-1])
    ends = len(x[1]), len(y[1])
    blocks += [
        ([ends[0] - 1 - i for i in reversed(one)], [ends[1] - 1 - j for j in reversed(other)])
        for one, other in back
    ]
    for side, (tensor, shape) in enumerate((x, y)):
        for axis in range(rest[side], len(shape) - middle[side]):
            axes.freeze(tensor[axis], f"{name} mixes it with axes of unknown size")
    for ones, others in blocks:
        first = [atoms for i in ones if (atoms := x[0][i]) is not None and atoms.size > 1]
        second = [atoms for j in others if (atoms := y[0][j]) is not None and atoms.size > 1]
        if len(first) == 1 and len(second) == 1:
            axes.link(first[0], second[0], name)
        elif len(first) == 1 and second:
            axes.folds.append(Fold(first[0], tuple(second)))
        elif len(second) == 1 and first:
            axes.folds.append(Fold(second[0], tuple(first)))
        else:
            for atoms in (*first, *second):
                axes.freeze(atoms, f"{name} mixes several axes")


def _blocks(
    before: Sequence[Dim], after: Sequence[Dim]
) -> tuple[list[tuple[list[int], list[int]]], tuple[int, int]]:
    """Return the runs of axes with equal products from the front, and where that ends on either side."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] is not None and before[i] == after[j]:
            found.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        ones, others = [i], [j]
        mine, theirs = before[i], after[j]
        while isinstance(mine, int) and isinstance(theirs, int) and mine != theirs:
            if mine < theirs:
                if ones[-1] + 1 >= len(before):
                    return found, (i, j)
                ones.append(ones[-1] + 1)
                size = before[ones[-1]]
                mine = mine * size if isinstance(size, int) else None
            else:
                if others[-1] + 1 >= len(after):
                    return found, (i, j)
                others.append(others[-1] + 1)
                size = after[others[-1]]
                theirs = theirs * size if isinstance(size, int) else None
        if not isinstance(mine, int) or mine != theirs:
            return found, (i, j)
        found.append((ones, others))
        i, j = ones[-1] + 1, others[-1] + 1
    return found, (i, j)


def squeeze(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Squeeze and Unsqueeze: the axes of size 1 apart, nothing changes."""
    x, y = axes.input(node, 0), axes.output(node)
    unknown = f"shapes around {label(node)} are not known"
    if x is None or y is None:
        return freeze_node(axes, node, unknown)
    longer, shorter = (y, x) if node.op_type == "Unsqueeze" else (x, y)
    given = axes.graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    if given is None and len(node.input) > 1 and node.input[1]:
        return freeze_node(axes, node, f"the axes of {label(node)} are computed")
    listed = attribute(node, "axes") if given is None else [int(axis) for axis in given.reshape(-1)]
    if listed is None:
        listed = [axis for axis, atoms in enumerate(longer) if atoms is not None and atoms.size == 1]
    chosen = {axis % len(longer) for axis in listed}
    axes.link_all(tuple(atoms for axis, atoms in enumerate(longer) if axis not in chosen), shorter, unknown)
    return [0, 1]


def transpose(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Transpose."""
    x = axes.input(node, 0)
    perm = list(attribute(node, "perm", range(len(x or ()))[::-1]))
    turned = None if x is None else tuple(x[axis] for axis in perm)
    axes.link_all(turned, axes.output(node), f"shapes around {label(node)} are not known")
    return [0]


def concat(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Concat: the parts one after the other."""
    parts = [axes.input(node, slot) for slot in range(len(node.input))]
    _joined(axes, node, axes.output(node), parts)
    return range(len(node.input))


def split(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Split: the parts one after the other; their sizes are written out."""
    graph, axis = axes.graph, attribute(node, "axis", 0)
    parts = [axes.output(node, slot) for slot in range(len(node.output))]
    if len(node.input) > 1 and node.input[1] and not graph.is_constant(node.input[1]):
        return freeze_node(axes, node, f"the sizes of {label(node)} are computed")
    _joined(axes, node, axes.input(node, 0), parts)
    sizes = [part[axis] for part in parts if part is not None]

    def resize(kept: Kept) -> None:
        counts = [int(kept(atoms).sum()) for atoms in sizes if atoms is not None]
        if len(counts) < len(parts) or counts == [atoms.size for atoms in sizes if atoms is not None]:
            return
        if graph.opset() < 13:
            graph.set_attribute(node, "split", counts)
            return
        name = graph.fresh_name(f"{node.output[0]}_sizes")
        graph.set_constant(name, np.array(counts, np.int64))
        graph.set_inputs(node, [node.input[0], name])
        graph.remove_attribute(node, "num_outputs")

    axes.edits.append(resize)
    return [0, 1]


def _joined(axes: Axes, node: NodeProto, whole: Tensor | None, parts: Sequence[Tensor | None]) -> None:
    unknown = f"sizes around {label(node)} are not known"
    known = [part for part in parts if part is not None]
    if whole is None or len(known) < len(parts):
        for tensor in (whole, *known):
            axes.freeze_all(tensor, unknown)
        return
    axis = attribute(node, "axis", 0) % len(whole)
    for part in known:
        for place, (mine, theirs) in enumerate(zip(part, whole, strict=True)):
            if place != axis:
                axes.link(mine, theirs, unknown)
    pieces = [atoms for part in known if (atoms := part[axis]) is not None]
    if len(pieces) < len(parts):
        for atoms in (*pieces, whole[axis]):
            axes.freeze(atoms, unknown)
    else:
        axes.link(np.concatenate(pieces), whole[axis], unknown)


SHAPES: dict[str, Callable[[Axes, NodeProto], Iterable[int]]] = {
    "Concat": concat,
    "Flatten": reshape,
    "Reshape": reshape,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": squeeze,
}
