"""One pass over the data on onnxruntime: pilot, groups that fit the memory, feeds to measure again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from onnxslim_lab.base import Progress
from onnxslim_lab.graph import Graph
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics.instrument import Instruments, Shape, instrument, sample_axes
from onnxslim_lab.statistics.over_feeds import Feeds, OverFeeds
from onnxslim_lab.statistics.values import ValueStatistics
from onnxslim_lab.worker.messages import Value
from onnxslim_lab.worker.tally import BINS, Tally

Found = dict[str, ValueStatistics]

_LOOK = 8  # feeds whose shapes are compared


def batch_symbol(model: Graph) -> str:
    """Return the name of the dimension that the samples are along, "" without one."""
    for name in model.inputs:
        shape = model.shape_of(name)
        if shape:
            return shape[0] if isinstance(shape[0], str) else ""
    return ""


def _shapes(feed: Mapping[str, Value]) -> dict[str, Shape]:
    return {name: value.shape for name, value in feed.items() if isinstance(value, np.ndarray)}


class Pass(OverFeeds):
    """Measures values of the main graph, everything there is to know of them."""

    def __init__(self, runner: Runner, model: Graph, feeds: Feeds, memory: int, progress: Progress) -> None:
        super().__init__(runner, model, feeds, memory, progress)
        self.wrong: dict[str, str] = {}

    def run(self, wanted: Mapping[str, Tally]) -> Found:
        """Return the statistics of values; `wrong` says which cannot be had, and why."""
        model = self._model
        wanted = {name: wanted[name] for name in self.in_order(wanted)}
        axes = sample_axes(model, list(_names(model)), batch_symbol(model))
        spread = (len(self._feeds) * step // _LOOK for step in range(_LOOK))
        looked = [_shapes(self._feeds[index]) for index in sorted({*spread, len(self._feeds) - 1})]
        steady = all(shapes == looked[0] for shapes in looked)

        ranges = {name: Tally() for name in wanted}
        pilot = instrument(model, ranges, full=frozenset(), axes=axes, shapes={})
        told = self._measure(pilot, [0], 1)
        shapes = {name: tuple(shape.tolist()) for name, shape in told["shapes"].items()}
        full = frozenset(told["doubtful"])
        if steady and any(self._pooled(wanted, full, axes, shapes)):
            made = instrument(model, ranges, full=full, axes=axes, shapes=shapes, steady=True)
            full |= frozenset(self._measure(made, [0], 1)["doubtful"])
        parallel = self._parallel(shapes)
        found: Found = {}
        groups = self._groups(wanted, full, shapes, parallel)
        for number, group in enumerate(groups):
            made = instrument(model, group, full=full & group.keys(), axes=axes, shapes=shapes, steady=steady)
            what = "calibration" if len(groups) == 1 else f"calibration, part {number + 1} of {len(groups)}"
            told = self._measure(made, range(len(self._feeds)), parallel, what)
            found.update(statistics_of(told, group))
            if told["again"]:
                names = [name for name in (*made.reduced, *made.derived) if name in group]
                merge(found, self.again(names, told["again"], shapes, parallel))
        return found

    def again(
        self, names: Iterable[str], numbers: Iterable[int], shapes: Mapping[str, Shape], parallel: int
    ) -> Found:
        """Return the ranges of values on some feeds, measured in full."""
        tallies = {name: Tally() for name in names}
        numbers = list(numbers)
        axes = sample_axes(self._model, list(tallies), batch_symbol(self._model))
        found: Found = {}
        for part in self._groups(tallies, frozenset(tallies), shapes, parallel):
            whole = instrument(self._model, part, full=frozenset(part), axes=axes, shapes=shapes)
            told = self._measure(whole, numbers, parallel, "calibration, uncertain ones again")
            found.update(statistics_of(told, part))
        return found

    def _pooled(self, wanted: Any, full: Any, axes: Any, shapes: Any) -> Iterator[bool]:
        """Yield for each value that is witnessed by a sample of its elements."""
        made = instrument(
            self._model, {name: Tally() for name in wanted}, full=full, axes=axes, shapes=shapes, steady=True
        )
        return (form["bound"] is not None for form in made.reduced.values())

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return values in topological order."""
        order = {name: index for index, name in enumerate(_names(self._model))}
        return sorted(names, key=lambda name: order.get(name, -1))

    def _measure(
        self,
        made: Instruments,
        numbers: Iterable[int],
        parallel: int,
        what: str = "",
        of: int | None = None,
        each: Callable[[dict[str, Value]], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Measure the feeds with these numbers; `each` is called with each of them."""

        def feeds() -> Iterator[tuple[int, dict[str, Value], int]]:
            for item in self._numbered(numbers, what, of):
                each(item[1])
                yield item

        told = self._runner.measure(
            self._model,
            feeds(),
            made.specification,
            nodes=made.nodes,
            outputs=made.outputs,
            parallel=parallel,
        )
        self.wrong.update(told["wrong"])
        return told

    def _bytes(self, name: str, shapes: Mapping[str, Shape]) -> int:
        """Return the bytes of a value; those of a large one where nothing is known."""
        shape = shapes.get(name)
        kind = self._model.dtype_of(name)
        size = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize if kind else 8
        return 1 << 20 if shape is None else math.prod(shape) * size

    def _parallel(self, shapes: Mapping[str, Shape]) -> int:
        """Return how many feeds may run at a time: a few of the largest values of each must fit."""
        largest = max((self._bytes(name, shapes) for name in shapes), default=0)
        room = self._memory // 2 // (4 * largest + 1)
        return max(1, min(self._runner.parallel, room, len(self._feeds)))

    def _groups(
        self,
        wanted: Mapping[str, Tally],
        full: frozenset[str],
        shapes: Mapping[str, Shape],
        parallel: int,
    ) -> list[dict[str, Tally]]:
        """Return the values in groups whose outputs and tallies fit the memory."""
        groups: list[dict[str, Tally]] = [{}]
        used = 0
        for name, tally in wanted.items():
            cost = 0
            if tally.histogram or tally.axis is not None or name in full:
                cost = self._bytes(name, shapes) * (parallel + 1) + (BINS * 8 if tally.histogram else 0)
            if used + cost > self._memory // 2 and groups[-1]:
                groups.append({})
                used = 0
            groups[-1][name] = tally
            used += cost
        return groups


def _names(model: Graph) -> Iterator[str]:
    """Yield the values of a graph in topological order."""
    made = (name for node in model.nodes for name in node.output if name)
    return itertools.chain(model.inputs, model.initializers, made)


def merge(found: Found, more: Found) -> None:
    """Merge more statistics into those found."""
    for name, statistics in more.items():
        found[name] = found[name].merge(statistics) if name in found else statistics


def statistics_of(told: Mapping[str, Any], wanted: Collection[str]) -> Found:
    """Return the statistics that the tallies of a measurement hold, of the values that can be measured."""
    return {
        name: ValueStatistics.of(state)
        for name, state in told["values"].items()
        if name in wanted and state["runs"] and name not in told["wrong"]
    }
