"""Sizes that are written in constants: where they are, and their rewriting once axes have shrunk."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from onnxslim_lab.channels.axes import Atoms, Axes, Kept
from onnxslim_lab.equalization.ends import write_constant
from onnxslim_lab.graph import Graph


@dataclass(frozen=True, eq=False)
class Entry:
    """One size in a constant.

    Attributes:
        node: The node that reads the constant: a reshape, or a Concat of its sizes.
        slot: Which of its inputs that is.
        place: Index in the constant.
        size: The value there.
    """

    node: NodeProto
    slot: int
    place: int
    size: int


def entry_of(graph: Graph, node: NodeProto, slot: int, place: int) -> Entry | None:
    """Return where an entry of a node's vector input is written, None when it is computed."""
    value = node.input[slot]
    held = graph.constant(value) if graph.is_constant(value) else None
    if held is not None:
        size = held.reshape(-1)
        return Entry(node, slot, place, int(size[place])) if place < size.size else None
    maker = graph.producer(value)
    if maker is None or maker.op_type != "Concat" or maker.domain not in ("", "ai.onnx"):
        return None
    first = 0
    for number, name in enumerate(maker.input):
        kind = graph.constant_type(name) if graph.is_constant(name) else None
        shape = kind[1] if kind is not None else graph.shape_of(name)
        if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
            return None
        if place < first + shape[0]:
            return entry_of(graph, maker, number, place - first)
        first += shape[0]
    return None


def rewrite(axes: Axes, atoms: Atoms, entry: Entry, axis: int) -> None:
    """Let a size that is written somewhere be that of an axis; axes that one entry sizes go together."""
    key = (id(entry.node), entry.slot, entry.place)
    held = axes.sized.get(key)
    if held is not None:
        axes.link(held, atoms, f"a size is written once for axis {axis} of several values")
        return
    axes.sized[key] = atoms

    def edit(kept: Kept) -> None:
        count = int(kept(atoms).sum())
        if count == atoms.size:
            return
        constant = axes.graph.constant(entry.node.input[entry.slot])
        assert constant is not None
        values = constant.copy()
        values.reshape(-1)[entry.place] = count
        write_constant(axes.graph, entry.node, entry.slot, values)

    axes.edits.append(edit)
