"""Ranges alone, over all feeds and not of each: little more than running the model.

What earlier feeds settled is not measured again: a Relu or Clip that has reached its bounds stays within them.
The first feeds are measured with everything, the others with what is left to find out. What cannot be told
from a few numbers (NaN, huge numbers) is measured again, in full.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxslim_lab.statistics.extremes import Extremes, Reached, measure_extremes, reducible
from onnxslim_lab.statistics.following import bounds
from onnxslim_lab.statistics.formulas import Range, dip_of
from onnxslim_lab.statistics.instrument import Shape
from onnxslim_lab.statistics.pass_over import Found, Pass, merge, statistics_of
from onnxslim_lab.statistics.sizes import Sizes
from onnxslim_lab.statistics.values import ValueStatistics
from onnxslim_lab.worker.messages import Value
from onnxslim_lab.worker.running import HUGE
from onnxslim_lab.worker.tally import Tally

_TWICE = 64  # feeds from which on a second session pays off
_ROUNDING = 2.0**-20  # of the least element of a Swish, which rounding may keep from being reached
_KNOWN = 256  # shapes of feeds of which the sizes of all values are kept
_FIRST = 4, 16  # feeds that the first session measures: at least, at most


class RangePass(Pass):
    """Measures the ranges of values of the main graph."""

    def ranges(self, wanted: Collection[str]) -> Found:
        """Return the statistics of values, without averages; `wrong` says which cannot be had, and why."""
        names = self.in_order(wanted)
        if reducible(self._model, names):
            found = self._ranges(names)
        else:
            found = self.run({name: Tally() for name in names})
        return {
            name: replace(statistics, average_low=math.nan, average_high=math.nan, samples=0)
            for name, statistics in found.items()
        }

    def _ranges(self, names: Sequence[str]) -> Found:
        total = len(self._feeds)
        first = total if total < _TWICE else max(_FIRST[0], min(_FIRST[1], total // 16))
        sizes = Sizes(self._model, {*names, *self._model.inputs})
        feed = self._feeds[0]
        shapes = {name: shape for name in names if (shape := sizes.shape(name, feed)) is not None}
        made = measure_extremes(self._model, names, sizes, shapes, witness=names)
        found, doubtful = self._measured(made, names, sizes, shapes, range(first))
        if first < total:
            reached = {name: self._reached(name, found[name]) for name in names if name in found}
            made = measure_extremes(self._model, names, sizes, shapes, full=doubtful, reached=reached)
            more, _ = self._measured(made, names, sizes, shapes, range(first, total))
            merge(found, more)
        return found

    def _reached(self, name: str, found: ValueStatistics) -> Reached:
        """Return the bounds that a value has reached and cannot pass, but for rounding."""
        dip = dip_of(self._model, name)
        if dip is not None:
            least = float(dip[1](np.array([dip[2]], np.float32))[0])
            return Reached(low=found.low if found.low <= least * (1 - _ROUNDING) else None)
        node = self._model.producer(name)
        limits = bounds(self._model, node) if node is not None else None
        if limits is None:
            return Reached()
        low, high = limits
        return Reached(low if found.low == low else None, high if found.high == high else None)

    def _measured(
        self,
        made: Extremes,
        names: Sequence[str],
        sizes: Sizes,
        shapes: Mapping[str, Shape],
        numbers: range,
    ) -> tuple[Found, frozenset[str]]:
        """Measure some feeds; return what was found, and the values that were doubtful in any of them."""
        parallel = self._parallel(shapes)
        counts: Counter[str] = Counter()
        known: dict[Any, dict[str, int]] = {}

        def count(feed: Mapping[str, Value], sign: int) -> None:
            key = tuple((name, getattr(value, "shape", None)) for name, value in feed.items())
            if len(known) >= _KNOWN:
                known.clear()
            if key not in known:
                known[key] = {name: sizes.count(name, feed) for name in names if name in sizes}
            for name, size in known[key].items():
                counts[name] += sign * size

        told = self._measure(
            made.instruments,
            numbers,
            parallel,
            "calibration",
            len(self._feeds),
            each=lambda feed: count(feed, 1),
        )
        again: list[int] = told["again"]
        for number in again:
            count(self._feeds[number], -1)
        doubtful = frozenset(told["doubtful"])
        found = statistics_of(told, names)
        missing = []
        if len(again) < len(numbers):
            counts.update(told["running"]["counts"])
            found.update(_assembled(made, told["running"], counts))
            missing = [name for name in names if name not in found and name not in self.wrong]
        rest = [number for number in numbers if number not in set(again)]
        if missing:
            merge(found, self.again(missing, rest, shapes, parallel))
        if again:
            full = [name for name in names if name not in made.instruments.exposed]
            merge(found, self.again(full, again, shapes, parallel))
        return found, doubtful


def _assembled(made: Extremes, told: Mapping[str, Any], counts: Mapping[str, int]) -> Found:
    """Return the statistics of the values whose ranges are certain."""
    ranges: dict[str, Range] = {}
    sizes = dict(counts)
    for name, reached in made.reached.items():
        low = told["lows"].get(name, reached.low)
        high = told["highs"].get(name, reached.high)
        if made.witnessed.get(name, low) == low and low <= high:
            ranges[name] = low, high
    for name, formula in made.formulas.items():
        if all(source in ranges for source in formula.sources):
            low, high = formula.range([ranges[source] for source in formula.sources])
            if -HUGE < low <= high < HUGE:
                ranges[name] = low, high
                if name not in sizes:
                    sizes[name] = sum(sizes[source] for source in formula.sources)
    return {
        name: ValueStatistics(sizes[name], 0, low, high, math.nan, math.nan, 0)
        for name, (low, high) in ranges.items()
        if name in sizes
    }
