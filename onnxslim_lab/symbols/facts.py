"""What is known of the values of a graph in terms of symbolic sizes: their shapes, and small integer tensors."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.shapes import Dim, shape_from_type
from onnxslim_lab.symbols.dimensions import Size, low_of, symbol

Shape = tuple[Size, ...]
Elements = NDArray[np.object_]  # of Size; booleans are 0 and 1

Constants = dict[tuple[int, str], tuple[tuple[int, ...], Elements | None] | None]  # by graph and name

MOST_ELEMENTS = 64  # larger tensors are data, not shapes
RANGES: dict[int, tuple[int, int]] = {
    int(TensorProto.BOOL): (0, 1),
    int(TensorProto.INT32): (-(2**31), 2**31 - 1),
    int(TensorProto.INT64): (-(2**63), 2**63 - 1),
}


def elements(values: Any, shape: tuple[int, ...] | None = None) -> Elements:
    """Return sizes as an object array; of the given shape, else that of the nesting."""
    array = np.array(values, dtype=object)
    return array if shape is None else array.reshape(shape)


def named(dim: str) -> bool:
    """Whether a dim_param names a size, rather than saying that there is none.

    >>> [named(text) for text in ("batch", "unk__3", "?", "-1", "None")]
    [True, True, False, False, False]
    """
    return bool(re.search("[A-Za-z]", dim)) and dim.lower() not in {
        "none",
        "unknown",
        "dynamic",
        "null",
        "any",
    }


class ImpossibleError(Exception):
    """A node that must fail on every input: where it stands is never reached in a run that succeeds."""


class Facts:
    """Symbolic shapes and integer elements of the values one graph can see."""

    def __init__(self, graph: Graph, parent: Facts | None = None, constants: Constants | None = None) -> None:
        self.graph = graph
        self.parent = parent
        self.constants: Constants = parent.constants if parent else {} if constants is None else constants
        self._shapes: dict[str, Shape | None] = {}
        self._values: dict[str, Elements | None] = {}
        self.counter: Iterator[int] = parent.counter if parent else itertools.count()
        self.bodies: dict[int, dict[str, tuple[Facts, ...]]] = {}  # by id of the node
        self.impossible = False  # whether running this graph must fail
        self.decided: dict[int, bool] = {}  # condition of an If by id of the node
        self.unnamed: set[str] = parent.unnamed if parent else _repeated(graph)

    def _home(self, value: str) -> Facts:
        """Return the facts of the graph that defines a value, these when none does."""
        facts: Facts | None = self
        while facts is not None:
            if facts.graph.defines(value):
                return facts
            facts = facts.parent
        return self

    def fresh(self, low: int | None = 0) -> Size:
        """Return a symbol that nothing else has: an unknown size, or with low=None any integer."""
        return symbol(f"?{next(self.counter)}", low)

    def size(self, dim: Dim) -> Size:
        """Return an inferred axis as a size: names are symbols, what is not known becomes a fresh one."""
        if isinstance(dim, int):
            return dim if dim >= 0 else self.fresh()
        if dim is None or dim in self.unnamed or not named(dim):
            return self.fresh()
        return symbol(dim if re.fullmatch(r"[A-Za-z_][\w./:-]*", dim) else repr(dim))

    def shape(self, value: str) -> Shape | None:
        """Return a value's shape; None when even its rank is unknown."""
        home = self._home(value)
        if home is not self:
            return home.shape(value)
        if value not in self._shapes:
            constant = self._constant(value)
            known = constant[0] if constant else self.graph.shape_of(value)
            self._shapes[value] = None if known is None else tuple(self.size(dim) for dim in known)
        return self._shapes[value]

    def values(self, value: str) -> Elements | None:
        """Return the elements of a small int32, int64 or bool tensor of static shape, else None.

        Elements that are not known are fresh symbols, the same at every call.
        """
        home = self._home(value)
        if home is not self:
            return home.values(value)
        if value not in self._values:
            self._values[value] = self._read(value)
        return self._values[value]

    def _read(self, value: str) -> Elements | None:
        constant = self._constant(value)
        if constant:
            return constant[1]
        data_type = self.graph.dtype_of(value)
        static = static_shape(self.shape(value)) if data_type in RANGES else None
        if static is None:
            return None
        low = 0 if data_type == TensorProto.BOOL else None
        return elements([self.fresh(low) for _ in range(math.prod(static))], static)

    def _constant(self, value: str) -> tuple[tuple[int, ...], Elements | None] | None:
        """Return the shape of a constant of this graph, and its elements if it is a small integer tensor."""
        key = (id(self.graph), value)
        if key not in self.constants:
            found = self.graph.constant_type(value)
            if found is None:
                self.constants[key] = None
            else:
                small = found[0] in RANGES and math.prod(found[1]) <= MOST_ELEMENTS
                array = self.graph.constant(value) if small else None
                items = None if array is None else elements([int(item) for item in array.flat], found[1])
                self.constants[key] = (found[1], items)
        return self.constants[key]

    def reshape(self, value: str, shape: Shape | None) -> None:
        """Record that an edit gave an output of this graph another shape."""
        self._shapes[value] = shape

    def know(self, value: str, shape: Shape | None, values: Elements | None) -> None:
        """Record what a rule derived for an output of this graph; inferred sizes that are static win."""
        inferred = self.graph.shape_of(value)
        if shape is None or (inferred is not None and len(inferred) != len(shape)):
            shape = None
        elif inferred is not None:
            shape = tuple(
                dim if isinstance(dim, int) and dim >= 0 else size
                for dim, size in zip(inferred, shape, strict=True)
            )
        if shape is None and values is not None:
            shape = values.shape
        if shape is not None:
            self._shapes[value] = tuple(
                size if (low := low_of(size)) is not None and low >= 0 else self.fresh() for size in shape
            )
        data_type = self.graph.dtype_of(value)
        if values is None or data_type not in RANGES or values.size > MOST_ELEMENTS:
            return
        least, most = RANGES[data_type]
        kept = [
            self.fresh(None) if isinstance(item, int) and not least <= item <= most else item
            for item in values.reshape(-1)
        ]
        self._values[value] = elements(kept, values.shape)


def _repeated(graph: Graph) -> set[str]:
    """Return the names that one input has on two axes: some exporters call every dynamic axis "N"."""
    found: set[str] = set()
    for value_type in graph.input_types().values():
        names = [dim for dim in shape_from_type(value_type) or () if isinstance(dim, str)]
        found.update(name for name in names if names.count(name) > 1)
    return found


def static_shape(shape: Shape | None) -> tuple[int, ...] | None:
    """Return a shape that is known in full and small, else None."""
    if shape is None:
        return None
    static = tuple(size for size in shape if isinstance(size, int))
    total = 1
    for size in static:
        total *= size
    return static if len(static) == len(shape) and total <= MOST_ELEMENTS else None


class Step:
    """One node with what is known of its inputs; what rules are given."""

    def __init__(self, facts: Facts, node: NodeProto) -> None:
        self.facts = facts
        self.node = node
        self.opset = facts.graph.opset()

    def has(self, index: int) -> bool:
        """Whether the input is there."""
        return index < len(self.node.input) and bool(self.node.input[index])

    def shape(self, index: int) -> Shape | None:
        """Return an input's shape."""
        return self.facts.shape(self.node.input[index]) if self.has(index) else None

    def shapes(self) -> list[Shape] | None:
        """Return the shapes of all inputs, None when the rank of one is unknown."""
        found = [self.shape(index) for index in range(len(self.node.input))]
        known = [shape for shape in found if shape is not None]
        return known if len(known) == len(found) else None

    def values(self, index: int) -> Elements | None:
        """Return an input's elements."""
        return self.facts.values(self.node.input[index]) if self.has(index) else None

    def items(self, index: int) -> list[Size] | None:
        """Return an input's elements, flattened."""
        found = self.values(index)
        return None if found is None else found.reshape(-1).tolist()

    def ints(self, index: int) -> list[int] | None:
        """Return an input's elements when all of them are known, flattened."""
        found = self.items(index)
        known = [item for item in found or () if isinstance(item, int)]
        return known if found is not None and len(known) == len(found) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the node."""
        return attribute(self.node, name, default)

    def axes(self, index: int, rank: int, name: str = "axes") -> list[int] | None:
        """Return axes from the attribute or, in newer operators, the input; negative ones resolved."""
        given = self.attribute(name)
        if given is None:
            given = self.ints(index)
        if given is None or any(not -rank <= axis < rank for axis in given):
            return None
        return [axis % rank for axis in given]

    def fresh(self, low: int | None = 0) -> Size:
        """Return a new symbol."""
        return self.facts.fresh(low)


ShapeRule = Callable[[Step], "list[Shape | None] | None"]
ValueRule = Callable[[Step], "list[Elements] | None"]
