"""The removal itself: slices out of constants, and the sizes and attributes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.channels.axes import Array, Atoms, Mask
from onnxslim_lab.channels.groups import Group, Part, matrix_of
from onnxslim_lab.errors import InternalError, quote
from onnxslim_lab.layers import Layer


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a layer's matrix: which groups, rows and columns."""

    groups: Mask
    rows: Mask
    columns: Mask

    def of(self, matrix: Array) -> Array:
        """Return what stays of a matrix (groups, out, in)."""
        return matrix[self.groups][:, self.rows][:, :, self.columns]


def kept_of(layer: Layer, part: Part, gone: Mask) -> Kept:
    """Return what stays of a layer when these classes go."""
    tensor = next(held for other, held in part.layers if other is layer)
    stays = np.ones(layer.shape, np.bool_)
    for axis, atoms in enumerate(tensor):
        if atoms is not None:
            stays &= matrix_of(layer, ~gone[part.closure.labels[atoms]], axis)
    return Kept(*(np.asarray(stays.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))))


def cut(part: Part, groups: Sequence[tuple[Group, Atoms]]) -> None:
    """Remove channels of groups of one graph, given by their numbers."""
    graph, axes, labels = part.graph, part.axes, part.closure.labels
    gone = np.zeros(len(part.closure.reasons), np.bool_)
    for group, numbers in groups:
        gone[group.classes[numbers]] = True

    def kept(atoms: Atoms) -> Mask:
        return np.asarray(~gone[labels[atoms]])

    for edit in axes.edits:
        edit(kept)
    declared = set(graph.declared)
    for name in declared & set(axes.values):
        if any(atoms is not None and not kept(atoms).all() for atoms in axes.values[name] or ()):
            graph.undeclare(name)
    for use in axes.constants.values():
        masks = [(axis, kept(atoms)) for axis, atoms in enumerate(use.tensor) if atoms is not None]
        masks = [(axis, mask) for axis, mask in masks if not mask.all()]
        if not masks:
            continue
        array, kind = graph.constant(use.name), graph.constant_type(use.name)
        assert array is not None and kind is not None  # noqa: PT018
        for axis, mask in masks:
            array = np.compress(mask, array, axis=axis)
        home = graph.scope_of(use.name)
        readers = [(node, slot) for node, slot in use.readers if node.input[slot] == use.name]
        own = home is graph and graph.use_count(use.name) == len(readers) and not graph.is_input(use.name)
        target = use.name if own else graph.fresh_name(use.name)
        if own and use.name in declared:
            graph.undeclare(use.name)
        graph.set_constant(target, np.ascontiguousarray(array), kind[0])
        if not own:
            for node, slot in readers:
                graph.set_input(node, slot, target)
            given = home is not None and home.is_input(use.name) and home.ir_version >= 4
            if home is not None and home.use_count(use.name) == 0 and not given:
                home.remove_constant(use.name)
    graph.infer()
    _check(part, gone)


def _check(part: Part, gone: Mask) -> None:
    """Compare the shapes that inference finds with those that the removal should leave."""
    for name, tensor in part.axes.values.items():
        shape = part.graph.shape_of(name) if part.graph.scope_of(name) is part.graph else None
        if shape is None or tensor is None:
            continue
        for axis, (size, atoms) in enumerate(zip(shape, tensor, strict=True)):
            left = None if atoms is None else int((~gone[part.closure.labels[atoms]]).sum())
            if left is not None and isinstance(size, int) and size != left:
                raise InternalError(
                    f"prune-channels: axis {axis} of {quote(name)} became {size}, {left} was expected"
                )
