"""The shapes of values as far as they follow from the shapes of a feed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from onnxslim_lab.graph import Graph
from onnxslim_lab.worker.messages import Value

Shape = tuple[int, ...]
Place = tuple[str, int]  # an input and an axis of it


class Sizes:
    """Shapes of values of the main graph, worked out once and filled in for each feed.

    Args:
        model: The main graph.
        values: Values whose shapes are asked for.
    """

    def __init__(self, model: Graph, values: Iterable[str]) -> None:
        symbols: dict[str, Place] = {}
        for name in model.inputs:
            for axis, size in enumerate(model.shape_of(name) or ()):
                if isinstance(size, str):
                    symbols.setdefault(size, (name, axis))
        self._forms: dict[str, tuple[int | Place, ...]] = {}
        for value in values:
            shape = model.shape_of(value)
            if shape is None:
                continue
            form = tuple(symbols.get(size) if isinstance(size, str) else size for size in shape)
            if None not in form:
                self._forms[value] = form  # type: ignore[assignment]

    def __contains__(self, value: str) -> bool:
        """Whether a value's shape follows from the feed's."""
        return value in self._forms

    def shape(self, value: str, feed: Mapping[str, Value]) -> Shape | None:
        """Return the shape of a value in the run of a feed, None when it does not follow."""
        found = []
        for size in self._forms.get(value, (None,)):
            if isinstance(size, tuple):
                array = feed.get(size[0])
                if not isinstance(array, np.ndarray) or size[1] >= array.ndim:
                    return None
                found.append(array.shape[size[1]])
            elif size is None:
                return None
            else:
                found.append(size)
        return tuple(found)

    def count(self, value: str, feed: Mapping[str, Value]) -> int:
        """Return the number of elements of a value in the run of a feed.

        Raises:
            KeyError: It does not follow from the feed.
        """
        shape = self.shape(value, feed)
        if shape is None:
            raise KeyError(value)
        return math.prod(shape)
