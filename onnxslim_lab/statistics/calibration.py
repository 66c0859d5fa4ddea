"""Calibration: a model's activations measured in one streaming pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError, ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.sessions import Runner, SessionTooLarge
from onnxslim_lab.statistics.cache import (
    Cache,
    data_digest,
    key_of,
    model_digest,
    pack_gram,
    pack_statistics,
    unpack_gram,
    unpack_statistics,
)
from onnxslim_lab.statistics.collected import Place, Statistics, Want, place
from onnxslim_lab.statistics.collected import key as key_of_value
from onnxslim_lab.statistics.gathering import Gathering, arrangement, gram_input, gram_source
from onnxslim_lab.statistics.gram import Gram
from onnxslim_lab.statistics.hooked import Observer
from onnxslim_lab.statistics.over_feeds import Feeds, sample_count
from onnxslim_lab.statistics.range_pass import RangePass
from onnxslim_lab.statistics.values import ValueStatistics
from onnxslim_lab.worker.messages import Value
from onnxslim_lab.worker.tally import Array, Tally

__all__ = ["Calibration", "gram_input", "gram_source"]

_LEAST_MEMORY = 16 << 20

Tallies = dict[tuple[Place, str], tuple[Graph, Tally]]


class Calibration:
    """Data, and the means to measure a model's activations on it.

    Activations are taken in as they are made and never kept: memory holds the statistics, one feed and
    the values of one run, as many at a time as fit the budget.

    Args:
        runner: Runs the model.
        data: The feeds.
        memory: Bytes to use beyond the model itself.
        cache: Folder of results to use again, keyed by the content of model, data and options; None for
            no cache.
        progress: Called as progress(feeds done, feeds, what).
        notices: Gets a line where the cache cannot be used.

    Raises:
        ParameterError: The memory is too little.
    """

    def __init__(
        self,
        runner: Runner,
        data: Dataset,
        *,
        memory: int = 1 << 30,
        cache: Path | None = None,
        progress: Progress = silent,
        notices: list[str] | None = None,
    ) -> None:
        if memory < _LEAST_MEMORY:
            raise ParameterError(f"memory must be at least {_LEAST_MEMORY} bytes, not {memory}")
        self.runner = runner
        self.data = data
        self.memory = memory
        self._cache = Cache(cache, notices) if cache is not None else None
        self._digests: dict[int, bytes] = {}
        self.progress = progress

    def of(self, feeds: Sequence[dict[str, Value]]) -> Self:
        """Return the same with other feeds."""
        data = Dataset(feeds, source=self.data.source, random=self.data.random)
        return type(self)(self.runner, data, memory=self.memory, progress=self.progress)

    def hold_back(self) -> tuple[Self, Self]:
        """Return the same with most of the feeds, and with every fourth, to judge on what is learned from the others.

        Of fewer than eight feeds every third is held back; one or two are in both.
        """
        feeds = self.data.feeds
        every = 4 if len(feeds) >= 8 else 3
        learned = [feed for number, feed in enumerate(feeds) if number % every < every - 1] or feeds
        return self.of(learned), self.of(feeds[every - 1 :: every] or feeds)

    def collect(self, model: Graph, wants: Iterable[Want]) -> Statistics:
        """Measure values in one pass over all feeds.

        Args:
            model: The main graph; it is not changed.
            wants: What to measure, in any graph of the model; several wants of a value add up.

        Raises:
            DataError: There are no feeds, or they do not fit the model.
            SessionError: onnxruntime cannot run the model.
        """
        feeds = self._feeds(None)
        wants = list(wants)
        tallies = _tallies(wants)
        average = any(want.average or want.histogram or want.axis is not None for want in wants)
        if self._cache is None:
            return self._collect(model, feeds, tallies, average=average)
        options = sorted((key, tally.histogram, tally.axis) for key, (_, tally) in tallies.items())
        key = key_of("collect", model_digest(model), self._digest(feeds), options, average)
        kept = self._cache.get(key, unpack_statistics)
        if kept is not None:
            return kept
        found = self._collect(model, feeds, tallies, average=average)
        self._cache.put(key, pack_statistics(found))
        return found

    def _collect(self, model: Graph, feeds: Feeds, tallies: Tallies, *, average: bool) -> Statistics:
        """Measure what is not in the cache; `average`: more than ranges."""
        found: dict[tuple[Place, str], ValueStatistics] = {}
        missing: dict[tuple[Place, str], str] = {}
        graphs = {place(graph): graph for graph in model.walk()}
        main = {value: tally for (at, value), (_, tally) in tallies.items() if not at}
        if main:
            try:
                run = RangePass(self.runner, model, feeds, self.memory, self.progress)
                measured = run.run(main) if average else run.ranges(main)
                found = {((), name): seen for name, seen in measured.items() if name not in run.wrong}
                missing = {((), name): why for name, why in run.wrong.items()}
            except SessionTooLarge:
                main = {}
        rest = {key: item for key, item in tallies.items() if key[0] or not main}
        if rest:
            observer = Observer(model, self.memory // 2)
            samples = 1

            def taker(key: tuple[Place, str], tally: Tally) -> Any:
                return lambda array: _add(tally, array, samples, key, missing)

            for key, (_, tally) in rest.items():
                graph = graphs.get(key[0])
                reason = "the model has no such graph"
                if graph is not None:
                    reason = observer.watch(graph, key[1], taker(key, tally))
                if reason:
                    missing[key] = reason
            for number, feed in enumerate(feeds):
                samples = sample_count(model, feed)
                observer.run(feed)
                self.progress(number + 1, len(feeds), "calibration of bodies")
        for key, (_, tally) in tallies.items():
            if key in found:
                continue
            if tally.runs:
                found[key] = ValueStatistics.of(tally.state())
            else:
                missing.setdefault(key, "no run computed it (a branch never taken, or nothing needs it)")
        return Statistics(found, missing)

    def grams(
        self, model: Graph, layers: Sequence[Layer], *, limit: int | None = None
    ) -> Iterator[tuple[Layer, Gram]]:
        """Yield each layer with the Gram matrix of its input rows, in order.

        Args:
            model: The main graph; it is not changed.
            layers: Layers of any of its graphs.
            limit: Use the first so many feeds only.
        """
        feeds = self._feeds(limit)
        gathering = Gathering(self.runner, model, feeds, self.memory, self.progress)
        if self._cache is None:
            yield from zip(layers, gathering.run(layers), strict=True)
            return
        content = model_digest(model), self._digest(feeds)
        keys = [
            key_of(
                "gram",
                *content,
                place(layer.graph),
                gram_source(layer),
                arrangement(layer),
                gathering.is_full(layer),
            )
            for layer in layers
        ]
        absent = [layer for layer, key in zip(layers, keys, strict=True) if not self._cache.has(key)]
        measured = gathering.run(absent)
        waiting = {id(layer) for layer in absent}
        for layer, key in zip(layers, keys, strict=True):
            kept = None if id(layer) in waiting else self._cache.get(key, unpack_gram)
            if kept is not None:
                yield layer, kept
                continue
            gram = next(measured if id(layer) in waiting else gathering.run([layer]))
            self._cache.put(key, pack_gram(gram))
            yield layer, gram

    def stream(
        self, model: Graph, values: Sequence[str], *, limit: int | None = None
    ) -> Iterator[dict[str, Value]]:
        """Yield values of the main graph, inputs and outputs too, feed by feed; nothing is kept."""
        feeds = self._feeds(limit)
        fed = [name for name in values if model.is_input(name)]
        run = [name for name in values if name not in fed]
        try:
            found: Iterator[dict[str, Value]] = self.runner.stream(model, feeds, outputs=run or None)
            for feed, made in zip(feeds, found, strict=True):
                yield {name: feed[name] if name in fed else made[name] for name in values}
        except SessionTooLarge:
            interpreter = Interpreter(model, memory=self.memory // 2)
            for feed in feeds:
                yield interpreter.run(feed, values)

    def _digest(self, feeds: Feeds) -> bytes:
        """Return the hash of so many feeds, computed once."""
        if len(feeds) not in self._digests:
            self._digests[len(feeds)] = data_digest(feeds)
        return self._digests[len(feeds)]

    def _feeds(self, limit: int | None) -> Feeds:
        """Return the first feeds.

        Raises:
            DataError: There are none.
        """
        if not len(self.data):
            raise DataError("there is no calibration data: the data set has no feeds")
        return self.data.feeds if limit is None else _First(self.data.feeds, limit)

    def outputs(self, model: Graph, *, limit: int | None = None) -> list[dict[str, Value]]:
        """Return the model's outputs on the first feeds."""
        return list(self.stream(model, model.outputs, limit=limit))


class _First(Sequence[dict[str, Value]]):
    """The first items of a sequence, read when asked for."""

    def __init__(self, items: Sequence[dict[str, Value]], count: int) -> None:
        self._items = items
        self._count = max(0, min(count, len(items)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._items[at] for at in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._items[index % self._count]


def _tallies(wants: Iterable[Want]) -> Tallies:
    """Return an empty tally for each value, wants of one value joined.

    Raises:
        ParameterError: A value is wanted along two axes, or does not exist.
    """
    found: Tallies = {}
    for want in wants:
        if want.graph.scope_of(want.value) is None:
            known = {name for node in want.graph.nodes for name in node.output} | set(want.graph.inputs)
            raise ParameterError(
                f"graph {quote(want.graph.name)} has no value {quote(want.value)}{suggest(want.value, known)}"
            )
        key = key_of_value(want.graph, want.value)
        histogram, axis = want.histogram, want.axis
        if key in found:
            before = found[key][1]
            if None not in (axis, before.axis) and axis != before.axis:
                raise ParameterError(
                    f"value {quote(want.value)} is wanted along axis {before.axis} and along axis {axis}: "
                    "collect it twice"
                )
            histogram, axis = histogram or before.histogram, before.axis if axis is None else axis
        found[key] = (want.graph, Tally(histogram, axis))
    return found


def _add(
    tally: Tally, value: Array, samples: int, key: tuple[Place, str], missing: dict[tuple[Place, str], str]
) -> None:
    """Add a value of a body, or say why that cannot be done."""
    try:
        tally.add(value, samples)
    except (TypeError, ValueError) as error:
        missing[key] = str(error)
