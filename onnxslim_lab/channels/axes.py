"""Atoms: one for each place along each axis of each tensor of a graph; those that must go together are linked.

Removing a channel takes one slice out of many tensors. Each operator says which atoms of its operands
belong together (`rules`); the connected components are then what can be removed as a whole, unless one of
its atoms is frozen: it reaches an input or output of the graph, or an operator that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxslim_lab.components import components
from onnxslim_lab.graph import Graph
from onnxslim_lab.shapes import Dim

Atoms = NDArray[np.int64]
Mask = NDArray[np.bool_]
Array = NDArray[Any]
Tensor = tuple[Atoms | None, ...]
Key = str | tuple[int, int]
Kept = Callable[[Atoms], Mask]
Edit = Callable[[Kept], None]

LARGEST = 1 << 22  # atoms of one axis
LONE = "the only place along its axis"


@dataclass(frozen=True, eq=False)
class Fold:
    """One axis that a reshape makes of several, or takes apart: one of them at most can carry channels.

    Attributes:
        whole: Atoms of the one axis.
        parts: Atoms of the several axes, their sizes multiplied are that of the whole.
    """

    whole: Atoms
    parts: tuple[Atoms, ...]


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """A constant that nodes of this graph read, with its atoms."""

    name: str
    tensor: Tensor
    readers: list[tuple[NodeProto, int]]


class Axes:
    """The atoms of one graph.

    Attributes:
        graph: The graph.
        constants: Every constant that its nodes read; vectors once for each reader, so that they may be cut
            differently, everything else once.
        edits: What is to be rewritten besides constants once it is known what stays: sizes, attributes.
        folds: Reshapes that are not decided yet.
        sized: The axis that each size written in a constant is the size of.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.constants: dict[Key, ConstantUse] = {}
        self.edits: list[Edit] = []
        self.folds: list[Fold] = []
        self.sized: dict[tuple[int, int, int], Atoms] = {}
        self.values: dict[str, Tensor | None] = {}
        self._count = 0
        self._links: list[tuple[Atoms, Atoms]] = []
        self._frozen: list[tuple[Atoms, str]] = []

    def input(self, node: NodeProto, slot: int) -> Tensor | None:
        """Return the atoms of a node's input, axis by axis; None for an unknown size, or an unknown rank."""
        if slot >= len(node.input) or not node.input[slot]:
            return None
        name = node.input[slot]
        kind = self.graph.constant_type(name) if self.graph.is_constant(name) else None
        if kind is None:
            return self.value(name)
        key: Key = name if len(kind[1]) > 1 else (id(node), slot)
        if key not in self.constants:
            self.constants[key] = ConstantUse(name, self._new(kind[1]), [])
        use = self.constants[key]
        if all(held is not node or at != slot for held, at in use.readers):
            use.readers.append((node, slot))
        return use.tensor

    def output(self, node: NodeProto, slot: int = 0) -> Tensor | None:
        """Return the atoms of a node's output, likewise."""
        return self.value(node.output[slot]) if slot < len(node.output) and node.output[slot] else None

    def value(self, name: str) -> Tensor | None:
        """Return the atoms of a value that is no constant."""
        if name not in self.values:
            shape = self.graph.shape_of(name)
            self.values[name] = None if shape is None else self._new(shape)
        return self.values[name]

    def _new(self, shape: Sequence[Dim]) -> Tensor:
        found: list[Atoms | None] = []
        for size in shape:
            if isinstance(size, int) and 0 < size <= LARGEST:
                found.append(np.arange(self._count, self._count + size))
                self._count += size
                if size == 1:
                    self.freeze(found[-1], LONE)
            else:
                found.append(None)
        return tuple(found)

    def link(self, first: Atoms | None, second: Atoms | None, reason: str) -> None:
        """Demand that the places of two axes go together, one by one; freeze both when that cannot be."""
        if first is not None and second is not None and first.shape == second.shape:
            self._links.append((first.reshape(-1), second.reshape(-1)))
        else:
            self.freeze(first, reason)
            self.freeze(second, reason)

    def link_all(self, first: Tensor | None, second: Tensor | None, reason: str) -> None:
        """Link two tensors of one shape, axis by axis."""
        if first is None or second is None or len(first) != len(second):
            self.freeze_all(first, reason)
            self.freeze_all(second, reason)
            return
        for one, other in zip(first, second, strict=True):
            self.link(one, other, reason)

    def tie(self, table: Atoms) -> None:
        """Demand that the atoms of each column of (rows, columns) go together."""
        for row in table[1:]:
            self._links.append((table[0], row))

    def broadcast(self, tensors: Iterable[Tensor | None], reason: str) -> None:
        """Link tensors that are broadcast against each other, axes aligned at the end."""
        given = list(tensors)
        known = [tensor for tensor in given if tensor is not None]
        if len(known) < len(given):
            for tensor in known:
                self.freeze_all(tensor, reason)
            return
        for back in range(1, max(map(len, known), default=0) + 1):
            axes = [tensor[-back] for tensor in known if len(tensor) >= back]
            wide = [axis for axis in axes if axis is not None and axis.size > 1]
            if any(axis is None for axis in axes):
                for axis in wide:
                    self.freeze(axis, reason)
            for axis in wide[1:]:
                self.link(wide[0], axis, reason)

    def freeze(self, atoms: Atoms | None, reason: str) -> None:
        """Demand that these places stay."""
        if atoms is not None and atoms.size:
            self._frozen.append((atoms.reshape(-1), reason))

    def freeze_all(self, tensor: Tensor | None, reason: str) -> None:
        """Demand that all places along all axes of a tensor stay."""
        for axis in tensor or ():
            self.freeze(axis, reason)

    def close(self) -> Closure:
        """Decide the folds and find what goes together."""
        while True:
            found = self._components()
            undecided = list(self.folds)
            for fold in undecided:
                if self._decide(fold, found, by_default=False):
                    self.folds.remove(fold)
            if len(self.folds) == len(undecided):
                if not self.folds:
                    return found
                self._decide(self.folds.pop(0), found, by_default=True)

    def _components(self) -> Closure:
        count, labels = components(self._count, self._links)
        reasons = np.full(count, -1)
        texts: dict[str, int] = {}
        for atoms, reason in reversed(self._frozen):  # the first reason is the one that is told
            number = texts.setdefault(reason, len(texts))
            if reason != LONE:
                reasons[labels[atoms]] = number
            else:
                alone = labels[atoms]
                reasons[alone[reasons[alone] < 0]] = number
        return Closure(labels.astype(np.int64), reasons, list(texts))

    def _decide(self, fold: Fold, found: Closure, *, by_default: bool) -> bool:
        """Link the one axis of several that carries channels, freeze the others; returns whether it was clear."""
        sizes = [part.size for part in fold.parts]
        labels = found.labels[fold.whole].reshape(sizes)
        whole = fold.whole.reshape(sizes)
        chosen = None
        if found.frozen(fold.whole).all() or all(found.frozen(part).all() for part in fold.parts):
            pass
        else:
            for axis in range(len(sizes)):
                table = np.moveaxis(labels, axis, -1).reshape(-1, sizes[axis])
                if len(table) > 1 and (table == table[0]).all():
                    chosen = axis
                    break
            if chosen is None and not by_default:
                return False
            if chosen is None:
                chosen = next(i for i, part in enumerate(fold.parts) if not found.frozen(part).all())
        if chosen is None:
            self.freeze(fold.whole, "it is reshaped together with axes that stay")
        else:
            table = np.moveaxis(whole, chosen, -1).reshape(-1, sizes[chosen])
            self.tie(table)
            self.link(table[0], fold.parts[chosen], "")
        for axis, part in enumerate(fold.parts):
            if axis != chosen:
                self.freeze(part, "a reshape joins it with another axis")
        return True


@dataclass(frozen=True, eq=False)
class Closure:
    """What goes together: a class for each atom.

    Attributes:
        labels: The class of each atom.
        reasons: For each class the number of the reason why it stays, -1 where it may go.
        texts: The reasons.
    """

    labels: Atoms
    reasons: Atoms
    texts: list[str]

    def frozen(self, atoms: Atoms) -> Mask:
        """Return which of these places must stay."""
        return np.asarray(self.reasons[self.labels[atoms]] >= 0)

    def reason(self, atoms: Atoms) -> str:
        """Return the commonest reason why some of these places stay, "" when all may go."""
        numbers = self.reasons[self.labels[atoms.reshape(-1)]]
        numbers = numbers[numbers >= 0]
        return self.texts[int(np.bincount(numbers).argmax())] if numbers.size else ""
