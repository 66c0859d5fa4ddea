"""How far a quantized model's outputs are from the original's, as one number that any output can move."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.base import Context
from onnxslim_lab.errors import SessionError
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.ranges import Method
from onnxslim_lab.worker.messages import Value

Array = NDArray[Any]

CANDIDATES: tuple[Method, ...] = ("minmax", "mse", "percentile")
"""Ways to choose ranges that "auto" tries on the whole model."""

_MACS = 1 << 34  # of all feeds that a choice is judged by: a second or so, about what loading the model takes
_ELEMENTS = 1 << 21  # of all outputs that are compared, likewise
_FEWEST_FEEDS, _MOST_FEEDS = 4, 256
_CLIPS = 0.4  # of the loss, that ranges that clip must save when there are few feeds
_FEW = 32  # feeds; what more of them do not show falls with their number
_RUNS = 6  # turns of each model
_SLOWER = 1.05  # what is less is noise
_LEAST_PROBABILITY = 1e-9  # what is less is not told apart
_FLOOR = 1e-12  # of a slice's energy, relative to its output's


class Judge:
    """Compares choices of a plan by the outputs of the models they give.

    Args:
        plan: The plan.
        context: Its calibration runs the models.
        feeds: How many of the first feeds to run; quantized models are run on these only. None: as many as
            are worth the time by the multiply-accumulates of one.

    Attributes:
        plan: The plan.
        calibrated: How many feeds its ranges were measured on.
    """

    def __init__(self, plan: Plan, context: Context, feeds: int | None = None) -> None:
        assert context.calibration is not None
        self.plan = plan
        self.calibrated = len(context.calibration.data)
        self._runner = context.calibration.runner
        if feeds is None:
            feeds = int(np.clip(_MACS // max(plan.macs, 1), _FEWEST_FEEDS, _MOST_FEEDS))
        chosen = [feed for feed, _ in zip(context.calibration.data.feeds, range(feeds), strict=False)]
        reference = self._runner.run(plan.model, chosen)
        sizes = np.cumsum(
            [sum(v.size for v in one.values() if isinstance(v, np.ndarray)) for one in reference]
        )
        enough = max(_FEWEST_FEEDS, int(np.searchsorted(sizes, _ELEMENTS)))
        self._feeds, self._reference = chosen[:enough], reference[:enough]

    def loss(self, *, without: Iterable[str] = (), only: Iterable[str] | None = None) -> float:
        """Return the loss of quantizing some layers, as `Plan.write`; infinite when the model does not run."""
        graph: Graph = self.plan.model.copy()
        self.plan.write(graph, without=without, only=only)
        return self.loss_of(graph)

    def loss_of(self, graph: Graph) -> float:
        """Return the loss of a model; infinite when it does not run."""
        try:
            return output_loss(self._reference, self._runner.run(graph, self._feeds))
        except SessionError:
            return float("inf")


def slower(context: Context, original: Graph, result: Graph) -> str:
    """Return how much slower than the original a result runs on this machine, "" when it does not.

    The least of several turns of runs on the first feed of the calibration data.
    """
    assert context.calibration is not None
    runner = context.calibration.runner
    feed = next(iter(context.calibration.data.feeds), None)
    if feed is None:
        return ""
    times: list[list[float]] = [[], []]
    try:
        for _ in range(_RUNS):
            for graph, taken in zip((original, result), times, strict=True):
                taken.append(runner.run_seconds(graph, feed))
    except SessionError:
        return ""
    before, after = (min(taken) for taken in times)
    if after <= before * _SLOWER:
        return ""
    return (
        f"slower than float on this machine: {1000 * after:.2f} ms after {1000 * before:.2f} ms; layers with few "
        "channels gain less from integer products than quantization costs (bench shows which operators)"
    )


def choose_ranges(judge: Judge, without: Sequence[str] = ()) -> str:
    """Let a plan choose ranges in the way whose outputs are nearest the original's; return what was chosen.

    Ranges that clip must be better by 1.5 dB on up to 32 feeds, by 0.4 dB on 128: what they clip of data not seen
    is not in the loss.

    Args:
        judge: Its plan is edited.
        without: Names of the layers that stay float.
    """
    losses = {}
    for method in CANDIDATES:
        judge.plan.use_ranges(method)
        losses[method] = judge.loss(without=without)
    clips = 1 + _CLIPS * min(1, _FEW / judge.calibrated)
    best = min(losses, key=lambda method: losses[method] * (1 if method == "minmax" else clips))
    judge.plan.use_ranges(best)
    shown = ", ".join(f"{method} {decibels(loss):.1f}" for method, loss in losses.items())
    return f"ranges of activations: {best}, by the output error in dB ({shown})"


def decibels(loss: float) -> float:
    """Return a relative squared error in dB.

    >>> decibels(0.001)
    -30.0
    """
    return 10 * math.log10(max(loss, 1e-30))


def loss_at(distance: float) -> float:
    """Return the loss of an error so many dB below the outputs.

    >>> loss_at(30)
    0.001
    """
    return float(10 ** (-distance / 10))


def output_loss(reference: Sequence[dict[str, Value]], found: Sequence[dict[str, Value]]) -> float:
    """Return the mean over outputs of the relative squared error, in [0, 1] for what is worth keeping.

    Outputs of three and more axes are compared slice by slice along axis 1 (channels, time steps, tokens),
    so that small ones count beside large ones: the scores of a detector beside its boxes. Of distributions
    (which sum to 1 along the last axis) the logarithms count as well, by the divergence of Kullback and
    Leibler: squares see nothing but the classes that are all but certain. Classes and other integers do not
    count.

    >>> round(output_loss([{"y": np.float32([3, 4])}], [{"y": np.float32([3, 3])}]), 6)
    0.04
    """
    losses = []
    for name, first in reference[0].items() if reference else ():
        if not isinstance(first, np.ndarray) or first.dtype.kind != "f":
            continue
        energy: dict[tuple[int, ...], tuple[Array, Array]] = {}
        for want, have in zip(reference, found, strict=True):
            pair = _errors(want[name], have[name])
            shape = pair[0].shape
            before = energy.get(shape)
            energy[shape] = pair if before is None else (before[0] + pair[0], before[1] + pair[1])
        wanted = np.concatenate([pair[0] for pair in energy.values()])
        errors = np.concatenate([pair[1] for pair in energy.values()])
        floor = _FLOOR * wanted.sum() + np.finfo(np.float64).tiny
        losses.append(float(np.mean(np.minimum(errors / (wanted + floor), 1e6))))
        if all(_is_distribution(want[name]) for want in reference):
            pairs = zip(reference, found, strict=True)
            losses[-1] = (losses[-1] + float(np.mean([_divergence(a[name], b[name]) for a, b in pairs]))) / 2
    return float(np.mean(losses)) if losses else 0.0


def _errors(want: Value, have: Value) -> tuple[Array, Array]:
    """Return the energies of each slice of an output and of its error."""
    first, second = (np.nan_to_num(np.asarray(value, np.float64)) for value in (want, have))
    if first.shape != second.shape:
        return np.ones(1), np.ones(1)
    rows = first.shape[1] if first.ndim > 2 else 1
    first, second = (
        (np.moveaxis(value, 1, 0) if value.ndim > 2 else value).reshape(rows, -1) for value in (first, second)
    )
    return np.sum(first**2, axis=1), np.sum((first - second) ** 2, axis=1)


def _is_distribution(value: Value) -> bool:
    """Whether the last axis of an output holds probabilities that sum to 1."""
    if not isinstance(value, np.ndarray) or not value.ndim or value.shape[-1] < 2 or not value.size:
        return False
    return bool(value.min() >= 0 and np.allclose(value.sum(axis=-1, dtype=np.float64), 1, atol=1e-2))


def _divergence(want: Value, have: Value) -> float:
    """Return the mean over distributions of sum p log(p / q), in nats.

    >>> round(_divergence(np.float32([[0.5, 0.5]]), np.float32([[0.25, 0.75]])), 4)
    0.1438
    """
    first, second = (np.maximum(np.asarray(v, np.float64), _LEAST_PROBABILITY) for v in (want, have))
    if first.shape != second.shape or not np.isfinite(second).all():
        return 1.0
    return max(0.0, float(np.mean(np.sum(first * np.log(first / second), axis=-1))))
