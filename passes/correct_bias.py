"""correct-bias: after a lossy step, each layer's bias moves the mean of its output back to where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from onnxslim_lab.base import Change, Context, Outcome, Pass, Progress
from onnxslim_lab.equalization.biases import BiasSlot, add_to_bias, channels_of, find_slots
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import errors_by_feed
from onnxslim_lab.statistics import Calibration, Channels, Statistics, Want
from onnxslim_lab.statistics.collected import Place, place
from onnxslim_lab.worker.messages import Value

_CHANCE = 0.025  # of keeping a correction that gains nothing: two standard errors where one is tried

Key = tuple[Place, str]
Deltas = dict[Key, NDArray[np.float64]]


class CorrectBias(Pass):
    """Shift biases so that every layer's mean output by channel is the original's.

    The original is the model before its first lossy step: exact steps may have scaled values (equalize).

    before: y = Q(W) x + b        after: y = Q(W) x + b + E[W x + b] - E[Q(W) x + b]

    The means are taken over the calibration data (Nagel et al. 2019, section 4.2, measured instead of derived).
    Layers are Conv, ConvTranspose, Gemm, MatMul with a constant weight, float or behind DequantizeLinear;
    biases are float constants or int32 codes behind DequantizeLinear, and are made where there is none. A shift
    counts as far as it is the same on both halves of the data. The layers are corrected one after another, first
    layers first, since each correction moves the means behind it. All are kept when that lowers the error of the
    model's outputs on feeds that the means were not taken from (every fourth; where there is one feed only, on that)
    by more than chance: twice the standard error of what each feed gains. Otherwise they are tried again in parts,
    and each part is kept that gains more than chance does in as many trials.

    refuses: layers whose output the original does not have under the same name with as many channels;
    biases that are computed or stored in other types; everything, when the outputs do not get
    better.

    >>> CorrectBias(parts=2).parts
    2
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    parts: int = Field(
        16,
        ge=1,
        le=1000,
        description="in how many parts corrections are tried, one after another, when all at once do not help",
    )

    @property
    def needs_calibration(self) -> bool:
        """It measures means."""
        return True

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Correct the biases of the whole model in place."""
        outcome = Outcome()
        graph.infer()
        slots = _all_slots(graph, outcome)
        if not slots:
            return outcome
        original = context.original
        if context.calibration is None or original is None:
            raise ParameterError("correct-bias needs calibration data and the original model")
        original.infer()
        search = _Search(graph, original, context.calibration, outcome)
        search.prepare(slots)
        if search.wanted:
            search.run(self.parts, context.progress)
        search.finish()
        return outcome


def _all_slots(model: Graph, outcome: Outcome | None = None) -> dict[Key, BiasSlot]:
    """Return the bias slots of all graphs of a model by place and layer."""
    found: dict[Key, BiasSlot] = {}
    for graph in model.walk():
        slots, refused = find_slots(graph)
        found |= {slot.key: slot for slot in slots}
        for where, reason in refused if outcome is not None else ():
            assert outcome is not None
            outcome.refuse(where, reason)
    return found


@dataclass
class _Search:
    """The search for corrections that lower the output error."""

    model: Graph
    original: Graph
    calibration: Calibration
    outcome: Outcome

    def __post_init__(self) -> None:
        self.wanted: dict[Key, list[Channels]] = {}  # the original's statistics on each half
        self.total: Deltas = {}
        self.current = self.model  # with these
        self.before = self.best = np.zeros(1)  # by feed
        self._reference: list[dict[str, Value]] = []
        learned, self._judge = self.calibration.hold_back()
        feeds = learned.data.feeds
        self._halves = [learned.of(part) for part in (feeds[::2], feeds[1::2]) if part]

    def prepare(self, slots: dict[Key, BiasSlot]) -> None:
        """Find the original's means of every layer; refuse the layers that have none."""
        originals = {place(graph): graph for graph in self.original.walk()}
        wants, asked = [], {}
        for key, slot in slots.items():
            twin = originals.get(key[0])
            value = next((name for name in slot.twins() if twin is not None and twin.defines(name)), "")
            shape = twin.shape_of(value) if twin is not None and value else None
            wide = channels_of(slot)
            if twin is None or shape is None:
                self.outcome.refuse(slot.name, f"the original has no value {slot.value} to compare with")
            elif wide is None or len(shape) <= slot.axis or shape[slot.axis] != wide:
                self.outcome.refuse(slot.name, "the original's output has another number of channels")
            else:
                wants.append(Want(twin, value, axis=slot.axis))
                asked[key] = (twin, value, slot)
        if not wants:
            return
        theirs = [half.collect(self.original, wants) for half in self._halves]
        for key, (twin, value, slot) in asked.items():
            found = [_channels(half, twin, value) for half in theirs]
            known = [channels for channels in found if channels is not None]
            if len(known) < len(found):
                self.outcome.refuse(slot.name, "its output was never computed on the data, or is not finite")
            else:
                self.wanted[key] = known

    def run(self, parts: int, progress: Progress) -> None:
        """Correct all layers if that makes the outputs better, else those parts that do."""
        self._reference = self._judge.outputs(self.original)
        self.before = self.best = self._errors(self.model)
        order = [key for key in _all_slots(self.model) if key in self.wanted]
        split = np.array_split(np.arange(len(order)), min(parts, len(order)))
        if self._kept(order, 1, _counted(progress, len(order), "correct-bias")) or len(split) == 1:
            return
        told = _counted(progress, len(order), "correct-bias in parts")
        for numbers in split:
            self._kept([order[number] for number in numbers], len(split), told)

    def _kept(self, keys: Sequence[Key], trials: int, told: Callable[[], None]) -> bool:
        """Correct layers one after another, beside what was kept; keep it if it makes the outputs better."""
        trial, model = dict(self.total), self.current
        for key in keys:
            delta = self._delta(model, key)
            if delta is not None and delta.any():
                trial[key] = delta
                model = self._corrected(trial)
            told()
        if len(trial) == len(self.total):
            return False
        errors = self._errors(model)
        if not is_better(self.best, errors, trials):
            return False
        self.total, self.best, self.current = trial, errors, model
        return True

    def finish(self) -> None:
        """Write the corrections into the model, or say that there were none that helped."""
        slots = _all_slots(self.model)
        for key in (key for key in self.wanted if key not in self.total):
            self.outcome.refuse(
                slots[key].name, "correcting it does not lower the error of the outputs clearly"
            )
        for key, delta in self.total.items():
            slot = slots[key]
            reason = add_to_bias(slot, delta)
            if reason:
                self.outcome.refuse(slot.name, reason)
                continue
            detail: dict[str, float | int | str] = {
                "largest shift": float(np.abs(delta).max()),
                "output error before": float(self.before.sum()),
                "output error after": float(self.best.sum()),
            }
            self.outcome.changes.append(Change(slot.name, "bias corrected", detail=detail))

    def _delta(self, model: Graph, key: Key) -> NDArray[np.float64] | None:
        """Return what each mean of a layer lacks, as far as both halves of the data agree; None without data."""
        slot = _all_slots(model)[key]
        want = Want(slot.graph, slot.value, axis=slot.axis)
        found = []
        for wanted, half in zip(self.wanted[key], self._halves, strict=True):
            have = _channels(half.collect(model, [want]), slot.graph, slot.value)
            if have is None:
                return None
            found.append(np.asarray(wanted.mean - have.mean))
        return agreed(found)

    def _corrected(self, deltas: Deltas) -> Graph:
        """Return a copy of the model with these corrections."""
        model = self.model.copy()
        model.infer()
        slots = _all_slots(model)
        for key, delta in deltas.items():
            add_to_bias(slots[key], delta)
        model.infer()
        return model

    def _errors(self, model: Graph) -> NDArray[np.float64]:
        """Return what each held back feed adds to the error of the model's outputs."""
        return errors_by_feed(self._reference, self._judge.outputs(model))


def _counted(progress: Progress, most: int, told: str) -> Callable[[], None]:
    """Return what tells, each time it is called, that one more is done."""
    numbers = count(1)
    return lambda: progress(next(numbers), most, told)


def is_better(before: NDArray[np.float64], after: NDArray[np.float64], trials: int = 1) -> bool:
    """Whether errors by feed fall by more than chance: their sum, beside the standard error of the differences.

    Args:
        before: Errors, float64 (feeds,).
        after: Errors of the same feeds.
        trials: How many are judged so: the chance to keep any that gains nothing stays the same (Bonferroni).

    >>> is_better(np.array([3.0, 2.0, 4.0]), np.array([2.0, 1.1, 2.9]))
    True
    >>> is_better(np.array([3.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.1]))
    False
    """
    if not np.isfinite(after).all():
        return False
    if not np.isfinite(before).all():
        return True
    gains = before - after
    error = np.sqrt(len(gains)) * gains.std(ddof=1) if len(gains) > 1 else 0.0
    return bool(gains.sum() > NormalDist().inv_cdf(1 - _CHANCE / trials) * error)


def agreed(shifts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the mean of shifts measured on parts of the data, shrunk to what they have in common.

    The factor is the product of both over the square of their mean: 1 where they agree, 0 where they are
    unrelated noise, which would be added to the outputs on other data.

    >>> agreed([np.array([1.0, 2.0]), np.array([1.0, 2.0])]), agreed([np.array([1.0, 0.0]), np.array([0.0, 1.0])])
    (array([1., 2.]), array([0., 0.]))
    """
    mean = np.asarray(np.mean(shifts, axis=0))
    power = float(mean @ mean)
    if len(shifts) < 2 or power == 0:
        return mean
    return np.asarray(mean * min(1.0, max(0.0, float(shifts[0] @ shifts[1]) / power)))


def _channels(statistics: Statistics, graph: Graph, value: str) -> Channels | None:
    found: Any = statistics.get(graph, value)
    if found is None or found.channels is None or found.nonfinite or found.empty:
        return None
    channels: Channels = found.channels
    return channels
