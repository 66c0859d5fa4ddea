"""Groups: channels of the same layers, any of which may go; and what keeps the others."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxslim_lab.base import Refusal
from onnxslim_lab.channels.axes import LONE, Array, Atoms, Axes, Closure, Mask, Tensor
from onnxslim_lab.channels.rules import relate
from onnxslim_lab.graph import Graph
from onnxslim_lab.layer_views.kinds import RecurrentKind
from onnxslim_lab.layers import Layer, find_layers


@dataclass(frozen=True, eq=False)
class Side:
    """The rows or the columns of a layer's matrix that belong to the channels of a group.

    Attributes:
        layer: The layer.
        members: For each row, (groups, out), or each column, (in,), the number of its channel in the group;
            -1 for those of other groups.
    """

    layer: Layer
    members: Atoms


@dataclass(eq=False)
class Group:
    """Channels that appear along the same axes: removing one removes a slice of each of these tensors.

    Attributes:
        name: The first layer that makes them.
        part: The part of the model they are in.
        classes: The class of each channel.
        makers: Layers of whose matrix they are rows.
        readers: Layers of whose matrix they are columns.
        values: Computed values that each channel is a slice of.
        width: Rows of the first maker that each channel is (gates of an LSTM not counted).
    """

    name: str
    part: Part
    classes: Atoms
    makers: list[Side] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)
    values: int = 0
    width: int = 1

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.classes.size

    @property
    def layers(self) -> list[Layer]:
        """The layers that shrink."""
        return [side.layer for side in (*self.makers, *self.readers)]


@dataclass(eq=False)
class Part:
    """One graph of the model.

    Attributes:
        graph: The graph.
        axes: Its atoms.
        closure: What of them goes together.
        layers: Its layers with a weight that has atoms, each with these.
        rows: (identity of a layer, axis of its weight) where the axis is that of its outputs.
    """

    graph: Graph
    axes: Axes
    closure: Closure
    layers: list[tuple[Layer, Tensor]]
    rows: set[tuple[int, int]] = field(default_factory=set)


def matrix_of(layer: Layer, values: Array, axis: int) -> Array:
    """Return values along one axis of a stored weight as they lie in the layer's matrix (groups, out, in)."""
    shape = layer.stored.stored_shape
    spread = np.broadcast_to(values.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)
    return layer.kind.matrix(layer.stored.forward(spread))


def find_groups(graph: Graph, *, widths: bool) -> tuple[list[Group], list[Refusal]]:
    """Return the groups of one graph, and its layers whose outputs cannot be cut, each with the reason."""
    layers, refusals = find_layers(graph)
    axes = relate(graph, widths=widths)
    closure = axes.close()
    uses = [(layer, axes.constants.get(layer.weight)) for layer in layers]
    known = [(layer, use.tensor) for layer, use in uses if use is not None]
    refusals += [
        Refusal(layer.name, "its weight is defined in another graph") for layer, use in uses if not use
    ]
    part = Part(graph, axes, closure, known)
    signature = _signatures(part)
    members = np.full(len(closure.reasons), -1, np.int64)
    groups: dict[int, Group] = {}
    for layer, tensor in known:
        stays: str | None = None
        for axis, atoms in enumerate(tensor):
            if atoms is None or atoms.size < 2:
                continue
            labels = closure.labels[atoms]
            loose = ~closure.frozen(atoms)
            side = _side(layer, labels, axis)
            if side is None:
                continue
            made, table = side
            if made:
                part.rows.add((id(layer), axis))
            for key in np.unique(signature[labels[loose]]):
                _add(groups, part, int(key), layer, table, signature, members, made=made)
            if made and loose.any():
                stays = ""
            elif made and stays is None and closure.reason(atoms) != LONE:
                stays = closure.reason(atoms)
        if stays:
            refusals.append(Refusal(layer.name, f"its channels stay: {stays}"))
    counts = _values(part)
    for group in groups.values():
        group.values = int(counts[group.classes[0]])
    found = [group for group in groups.values() if group.size > 1 and group.makers and group.readers]
    for group in groups.values():
        if group.size == 1 and group.makers:
            refusals.append(Refusal(group.name, "its channels stay: all of them go together"))
        elif group.makers and not group.readers:
            refusals.append(Refusal(group.name, "its channels stay: no layer reads them"))
    return found, [_hinted(refusal) for refusal in refusals] if graph.is_function else refusals


def _hinted(refusal: Refusal) -> Refusal:
    """Say what helps in a function: shapes and weights may be known at the place where it is called."""
    lost = "not known" in refusal.reason or "input of the function" in refusal.reason
    return Refusal(refusal.where, f"{refusal.reason} (inline-functions helps)") if lost else refusal


def _signatures(part: Part) -> Atoms:
    """Return for each class a number that is the same for classes that appear along the same axes."""
    random = np.random.default_rng(0)
    found = np.zeros(len(part.closure.reasons), np.uint64)
    tensors = [use.tensor for use in part.axes.constants.values()]
    tensors += [tensor for tensor in part.axes.values.values() if tensor is not None]
    for tensor in tensors:
        for atoms in tensor:
            if atoms is not None:
                mark = random.integers(1 << 63, dtype=np.uint64)
                np.add.at(found, part.closure.labels[atoms], mark)
    return found.astype(np.int64)


def _values(part: Part) -> Atoms:
    """Return for each class the number of computed values it is a slice of."""
    found = np.zeros(len(part.closure.reasons), np.int64)
    for tensor in part.axes.values.values():
        labels = [part.closure.labels[atoms] for atoms in tensor or () if atoms is not None]
        if labels:
            found[np.unique(np.concatenate(labels))] += 1
    return found


def _side(layer: Layer, labels: Atoms, axis: int) -> tuple[bool, Atoms] | None:
    """Return whether the classes along an axis of a weight are rows of the matrix, and (groups, out) or (in,)."""
    matrix = matrix_of(layer, labels, axis)
    if (matrix == matrix[:, :, :1]).all():
        return True, np.asarray(matrix[:, :, 0])
    if (matrix == matrix[:1, :1]).all():
        return False, np.asarray(matrix[0, 0])
    return None


def _add(
    groups: dict[int, Group],
    part: Part,
    key: int,
    layer: Layer,
    table: Atoms,
    signature: Atoms,
    members: Atoms,
    *,
    made: bool,
) -> None:
    """Add a layer to the group with this signature."""
    own: Mask = (signature[table] == key) & (part.closure.reasons[table] < 0)
    if key not in groups:
        classes = np.unique(table[own])
        order = np.argsort([np.flatnonzero(table.reshape(-1) == label)[0] for label in classes])
        groups[key] = Group(layer.name, part, classes[order])
        members[classes[order]] = np.arange(classes.size)
    group = groups[key]
    if made and not group.makers:
        gates = layer.shape[1] // layer.shape[2] if _is_recurrent(layer) else 1
        group.name, group.width = layer.name, max(1, int(own.sum()) // group.size // gates)
    side = Side(layer, np.where(own, members[table], -1))
    (group.makers if made else group.readers).append(side)


def _is_recurrent(layer: Layer) -> bool:
    return isinstance(layer.kind, RecurrentKind) and layer.role == "R"
