"""Measuring in the child process: values are tallied where onnxruntime leaves them and never sent.

Feeds run side by side, each on one thread, and are tallied in the order they came, so that the result does
not depend on which run ends first.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_lab.worker.binding import needs_binding, run_bound
from onnxslim_lab.worker.grams import GramTally, unpack_kind
from onnxslim_lab.worker.messages import Value
from onnxslim_lab.worker.running import HUGE, RunningRanges
from onnxslim_lab.worker.tally import Array, Extremes, Tally, by_sample

_CTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass
class Reduced:
    """How a value that is reduced inside the graph is read.

    Attributes:
        low, high, shape: Outputs that hold its least and greatest elements and its shape; "" for `shape`
            where asking for it would cost something.
        bound: What `low` must reach if it is only a sample of the elements: nothing is below it.
        sum: Output with the sum of its elements, which shows NaN; "" where it cannot have any.
        size, seen: Its shape in another run and that of `low` there, instead of `shape`: while the latter
            and the shapes of the feed stay the same, so does the former.
    """

    low: str
    high: str
    shape: str
    bound: float | None = None
    sum: str = ""
    size: Sequence[int] = ()
    seen: Sequence[int] = ()

    def sizes(self, outputs: dict[str, Array]) -> list[int] | None:
        """Return the value's shape, None when it is not certain."""
        if self.shape:
            return [int(size) for size in outputs[self.shape]]
        return list(self.size) if list(outputs[self.low].shape) == list(self.seen) else None

    def read(self, outputs: dict[str, Array], samples: int, axis: int | None) -> Extremes | None:
        """Return the extremes, None when they are not certain to be those of finite elements."""
        sizes = self.sizes(outputs)
        if sizes is None:
            return None
        count = math.prod(sizes)
        if not count:
            return Extremes(0, 0, [], [])
        lows, weight = _per_sample(outputs[self.low], samples, axis, np.minimum)
        highs, _ = _per_sample(outputs[self.high], samples, axis, np.maximum)
        if not all(-HUGE < low <= high < HUGE for low, high in zip(lows, highs, strict=True)):
            return None
        if self.bound is not None and max(lows) > self.bound:
            return None
        if self.sum and not math.isfinite(outputs[self.sum].item()):
            return None
        return Extremes(count, 0, lows, highs, weight)


def _per_sample(array: Array, samples: int, axis: int | None, reduction: np.ufunc) -> tuple[list[float], int]:
    """Return what is left of an array for each sample, and the samples that each entry stands for."""
    if samples == 1:
        return [float(array.item() if array.size == 1 else reduction.reduce(array, axis=None))], 1
    rows, weight = by_sample(array, samples, axis)
    found: list[float] = reduction.reduce(rows, axis=1).astype(np.float64).tolist()
    return found, weight


@dataclass
class Derived:
    """How a value's extremes follow from those of another.

    Attributes:
        source: The other value.
        low, high: Bounds it is clipped to; None for no clipping.
        pads: Output with the pads around it; "" for none.
        fixed: These pads, where they are constant.
        fill: What they are filled with.
        padded: Whether it is padded.
    """

    source: str
    low: float | None = None
    high: float | None = None
    pads: str = ""
    fill: float = 0.0
    padded: bool = False
    fixed: Sequence[int] = ()

    def follow(self, found: Extremes, outputs: dict[str, Array], shape: Array | None) -> Extremes | None:
        """Return the extremes, None when they do not follow; `shape` is that of the source."""
        if found.nonfinite:
            return None
        if self.padded:
            pads = outputs[self.pads].reshape(-1) if self.pads else np.array(self.fixed, np.int64)
            if shape is None or len(pads) != 2 * len(shape) or pads.min(initial=0) < 0:
                return None
            if not pads.any():
                return found
            count = math.prod((shape + pads[: len(shape)] + pads[len(shape) :]).tolist())
            lows = [min(low, self.fill) for low in found.lows]
            highs = [max(high, self.fill) for high in found.highs]
            return Extremes(count, 0, lows, highs, found.weight)
        if self.low is not None and self.high is not None:
            return found.clipped(self.low, self.high)
        return found


class Measurement:
    """One pass of feeds through one session.

    Args:
        session: An onnxruntime session.
        exposed: Values that are outputs: name -> options of its Tally (histogram, axis) and "samples", the
            axis of the samples.
        reduced: Values reduced inside the graph: name -> fields of Reduced, and "samples".
        derived: Values that follow from those: name -> fields of Derived.
        grams: Layers: [{"value", "kind", "full"}].
        running: Values of which only the range is wanted: arguments of RunningRanges.
        parallel: Feeds to run at a time.
    """

    def __init__(
        self,
        session: Any,
        exposed: dict[str, Any],
        reduced: dict[str, Any],
        derived: dict[str, Any],
        grams: list[dict[str, Any]],
        running: dict[str, Any],
        parallel: int,
    ) -> None:
        self._session = session
        self._kinds = {a.name: a.type for a in session.get_outputs()}
        self._axes = {name: form.pop("samples") for name, form in {**exposed, **reduced}.items()}
        self._exposed = {name: Tally(**form) for name, form in exposed.items()}
        self._reduced = {name: Reduced(**form) for name, form in reduced.items()}
        self._derived = {name: Derived(**form) for name, form in derived.items()}
        self._certain = {name: Tally() for name in (*reduced, *derived)}
        self._grams = [
            (form["value"], GramTally(unpack_kind(form["kind"]), full=form["full"])) for form in grams
        ]
        self._ranges = RunningRanges(**running)
        self._wanted = self._outputs()
        self._pool = ThreadPoolExecutor(parallel)
        self._parallel = parallel
        self._running: deque[tuple[int, int, Future[Any]]] = deque()
        self._again: list[int] = []
        self._doubtful: dict[str, int] = {}
        self._wrong: dict[str, str] = {}
        self._shapes: dict[str, Array] = {}

    def _outputs(self) -> list[str]:
        """Return the names of the outputs to ask for."""
        names = [*self._exposed, *(value for value, _ in self._grams)]
        for reduced in self._reduced.values():
            names += [reduced.low, reduced.high, reduced.shape, reduced.sum]
        for derived in self._derived.values():
            names.append(derived.pads)
        names += self._ranges.outputs
        return [name for name in dict.fromkeys(names) if name]

    def feed(self, number: int, feed: dict[str, Value], samples: int) -> None:
        """Run a feed, sooner or later, and tally what is ready."""
        self._running.append((number, samples, self._pool.submit(self._run, feed)))
        while len(self._running) > self._parallel:
            self._next()

    def finish(self) -> dict[str, Any]:
        """Return all tallies, and what could not be told inside the graph.

        Returns:
            values: State of the Tally of each value.
            grams: State of each GramTally.
            running: State of the RunningRanges.
            again: Numbers of the feeds whose reduced, derived and running values are not in the tallies.
            doubtful: Reduced and running values that were the cause, and how often.
            wrong: Values that cannot be measured, and why.
            shapes: Shape of each reduced or exposed value in the last run.
        """
        while self._running:
            self._next()
        self._pool.shutdown()
        tallies = {**self._exposed, **self._certain}
        return {
            "values": {name: tally.state() for name, tally in tallies.items()},
            "grams": [tally.state() for _, tally in self._grams],
            "running": self._ranges.state(),
            "again": self._again,
            "doubtful": self._doubtful,
            "wrong": self._wrong,
            "shapes": self._shapes,
        }

    def _next(self) -> None:
        number, samples, future = self._running.popleft()
        self._take(number, samples, future.result())

    def _run(self, feed: dict[str, Value]) -> tuple[dict[str, Array], Any]:
        """Run a feed; return the outputs as arrays and what keeps their memory alive."""
        session, wanted = self._session, self._wanted
        if needs_binding(session, feed, wanted):
            return run_bound(session, feed, wanted), None
        if not self._exposed and not self._grams:  # a few numbers: a copy is cheaper than a binding
            return dict(zip(wanted, session.run(wanted, feed), strict=True)), None
        plain = all(isinstance(value, np.ndarray) and value.dtype.kind in "fiub" for value in feed.values())
        if not plain or not all(self._kinds[name] in _CTYPES for name in wanted):
            return dict(zip(wanted, session.run(wanted, feed), strict=True)), None
        binding = session.io_binding()
        for name, value in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in wanted:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()
        arrays = {
            name: _view(value, np.dtype(_CTYPES[self._kinds[name]]))
            for name, value in zip(wanted, values, strict=True)
        }
        return arrays, (binding, values)

    def _take(self, number: int, samples: int, run: tuple[dict[str, Array], Any]) -> None:
        """Tally one run."""
        outputs, _alive = run
        found: dict[str, Extremes] = {}
        for name, tally in self._exposed.items():
            try:
                found[name] = tally.add(outputs[name], samples, self._axes[name])
                self._shapes[name] = np.array(outputs[name].shape, np.int64)
            except (TypeError, ValueError, AttributeError) as error:
                self._wrong[name] = str(error)
        for value, gram in self._grams:
            gram.add(outputs[value])
        certain: dict[str, Extremes | None] = {}
        for name, reduced in self._reduced.items():
            sizes = reduced.sizes(outputs)
            if sizes is not None:
                self._shapes[name] = np.array(sizes, np.int64)
            certain[name] = reduced.read(outputs, samples, self._axes[name])
            if certain[name] is None:
                self._doubtful[name] = self._doubtful.get(name, 0) + 1
        for name, derived in self._derived.items():
            source = certain.get(derived.source) or found.get(derived.source)
            shape = self._shapes.get(derived.source)
            certain[name] = derived.follow(source, outputs, shape) if source else None
            if not derived.padded and shape is not None:
                self._shapes[name] = shape
        uncertain = any(extremes is None for extremes in certain.values())
        if not uncertain:
            for name in self._ranges.take(outputs):
                self._doubtful[name] = self._doubtful.get(name, 0) + 1
                uncertain = True
        if uncertain:
            self._again.append(number)
            return
        for name, extremes in certain.items():
            assert extremes is not None
            self._certain[name].take(extremes)


def _view(value: Any, dtype: np.dtype[Any]) -> Array:
    """Return an OrtValue's memory as an array, without a copy."""
    shape = value.shape()
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    memory = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype).reshape(shape)
