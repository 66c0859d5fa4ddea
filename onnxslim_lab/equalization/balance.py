"""Balance: the scales of all regions of a model, found together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from onnxslim_lab.equalization.ends import by_channel, channel_axis, on_matrix
from onnxslim_lab.equalization.region import LayerEnd, Region
from onnxslim_lab.equalization.scales import (
    ALPHAS,
    Doubles,
    Noise,
    Sink,
    Source,
    candidates,
    equalizing,
    expected_error,
    settled,
)
from onnxslim_lab.statistics import Statistics, ValueStatistics

FINE = 64  # grid points per octave of a scale
_ROWS = 256  # output channels of a weight that the expected error is computed on
_BEGIN, _GO_ON = 0.05, 0.01  # improvement that is worth starting for, and going on for
_FAR, _NEAR = 0.5, 0.125  # octaves from equal ranges, likewise


@dataclass
class Plan:
    """A region and the scales found for it.

    Attributes:
        region: The region.
        logs: log2 of its scales.
        steps: Grid points per octave.
        method: How they were chosen.
        before, after: Expected error without and with them; NaN when only weights were looked at.
    """

    region: Region
    logs: Doubles
    steps: int
    method: str = ""
    before: float = math.nan
    after: float = math.nan

    def vector(self, end: LayerEnd) -> Doubles:
        """Return what a layer's channels are multiplied by."""
        scale = np.exp2(self.logs[self.region.scales_of(end.index)])
        return np.asarray(scale if end.side == "in" else 1 / scale)


class Balance:
    """Finds scales for regions that share layers: each in turn, until no one gains.

    Args:
        regions: Closed regions with free scales.
        statistics: Ranges of the values that enter layers, by channel; None: look at weights only.
        noise: The quantizer the scales are for.
        alpha: The smoothing strength; None: the best for each region.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        statistics: Statistics | None,
        noise: Noise,
        alpha: float | None = None,
    ) -> None:
        self.plans = [Plan(region, np.zeros(region.free.size), _grid(region)) for region in regions]
        self._statistics = statistics
        self._noise = noise
        self._alphas = ALPHAS if alpha is None else (alpha,)
        self._fixed = alpha is not None
        self._ends: dict[int, list[tuple[Plan, LayerEnd]]] = {}
        for plan in self.plans:
            for end in plan.region.layers:
                self._ends.setdefault(id(end.layer.node), []).append((plan, end))

    def solve(self, sweeps: int = 50) -> None:
        """Choose all scales; those that are nearly right already are left, so that a second run does nothing."""
        if not any(self._improve(plan, begin=True) for plan in self.plans):
            return
        for _ in range(sweeps):
            improved = [self._improve(plan, begin=False) for plan in self.plans]
            if not any(improved):
                break

    def _improve(self, plan: Plan, *, begin: bool) -> bool:
        """Give a region better scales; returns whether there were any."""
        region = plan.region
        sinks, sources = self._sinks(plan), self._sources(plan)
        count = region.free.size
        if self._statistics is None or self._fixed:
            found = equalizing(sinks, sources, count) if self._statistics is None else None
            method = "equal weight ranges"
            if self._fixed:
                method, found = next(candidates(sinks, (), count, self._alphas))
            if found is None:
                return False
            if self._coupled(plan):  # its own scales are in the ranges it was computed from
                found = (found + plan.logs) / 2
            logs = settled(found, region.free, plan.steps)
            far = float(np.abs(logs - plan.logs).max(initial=0.0))
            if far <= (_FAR if begin else _NEAR):
                return False
            plan.logs, plan.method = logs, method
            return True
        now = expected_error(sinks, sources, plan.logs, self._noise)
        if math.isnan(plan.before):
            plan.before = plan.after = now
        best, method, chosen = now, "", plan.logs
        for name, found in candidates(sinks, sources, count, self._alphas):
            logs = settled(found, region.free, plan.steps)
            error = expected_error(sinks, sources, logs, self._noise)
            if error < best:
                best, method, chosen = error, name, logs
        gain = now * (_BEGIN if begin else _GO_ON)
        if best >= now - gain:
            return False
        held, total = plan.logs, self._total(plan)
        plan.logs = chosen
        if self._total(plan) >= total - gain:  # what this region gains, those that share its layers lose
            plan.logs = held
            return False
        plan.method, plan.after = method, best
        return True

    def _total(self, plan: Plan) -> float:
        """Return the expected error of a region and of those that share layers with it."""
        nodes = {id(end.layer.node) for end in plan.region.layers}
        near = {id(other): other for node in nodes for other, _ in self._ends[node]}
        return sum(
            expected_error(self._sinks(other), self._sources(other), other.logs, self._noise)
            for other in near.values()
        )

    def _coupled(self, plan: Plan) -> bool:
        nodes = [id(end.layer.node) for end in plan.region.layers]
        return len(set(nodes)) < len(nodes)

    def _sinks(self, plan: Plan) -> list[Sink]:
        """Return the region's readers, scaled by every region but this one."""
        found = []
        for end in plan.region.layers:
            if end.side == "out":
                continue
            rows = self._matrix(plan, end, few_rows=self._statistics is not None)
            labels = plan.region.scales_of(end.index)
            groups, _, channels, taps = rows.shape
            labels = np.broadcast_to(labels.reshape(-1, channels), (groups, channels))
            largest, power = np.abs(rows).max(axis=3), np.square(rows).sum(axis=3)
            sink = Sink(largest, power, labels, taps=taps)
            if self._statistics is not None:
                values = channel_statistics(self._statistics, plan.region, end.value)
                assert values is not None and values.channels is not None  # noqa: PT018
                size = end.index.size
                parts = (values.channels.low, values.channels.high, values.channels.mean_square)
                low, high, square = (
                    np.broadcast_to(np.broadcast_to(part, (size,)).reshape(-1, channels), (groups, channels))
                    for part in parts
                )
                sink = Sink(largest, power, labels, low, high, square, taps)
            found.append(sink)
        return found

    def _sources(self, plan: Plan) -> list[Source]:
        """Return the region's makers, scaled by every region but this one."""
        found = []
        for end in plan.region.layers:
            if end.side == "out":
                rows = self._matrix(plan, end)
                largest = np.abs(rows).max(axis=(2, 3)).reshape(-1)
                if end.index.size < largest.size:  # a batched weight: one scale for all batches
                    largest = largest.reshape(-1, end.index.size).max(axis=0)
                source = Source(largest, plan.region.scales_of(end.index), self._energy(end))
                values = self._statistics and channel_statistics(self._statistics, plan.region, end.value)
                if values and values.channels is not None:
                    low, high = (
                        np.broadcast_to(part, (end.index.size,))
                        for part in (values.channels.low, values.channels.high)
                    )
                    source = replace(source, low=low, high=high)
                found.append(source)
        return found

    def _energy(self, end: LayerEnd) -> float:
        """Return the mean squared length of the rows that enter a layer, 1 where it was not measured."""
        place = channel_axis(end.layer, "in")
        if self._noise.per_channel or self._statistics is None or isinstance(place, str):
            return 1.0
        values = self._statistics.get(end.layer.graph, end.layer.node.input[0])
        if values is None or values.channels is None:
            return 1.0
        squares = np.asarray(values.channels.mean_square)
        return float(squares.mean()) * end.layer.shape[2]

    def _matrix(self, plan: Plan, end: LayerEnd, *, few_rows: bool = False) -> Doubles:
        """Return a weight as (groups, out, channels, taps) with the scales it has from other ends."""
        layer = end.layer
        matrix = layer.matrix.astype(np.float64)
        for other, held in self._ends[id(layer.node)]:
            if held is not end and (other is not plan or held.side != end.side):
                matrix = matrix * on_matrix(layer, held.side, other.vector(held))
        view = by_channel(layer, matrix)
        step = -(-view.shape[1] // _ROWS) if few_rows else 1
        return view[:, ::step]


def channel_statistics(statistics: Statistics, region: Region, value: str) -> ValueStatistics | None:
    """Return a value's statistics by channel, None when it was never computed or has values not finite."""
    found = statistics.get(region.graph, value)
    if found is None or found.channels is None or not found.count:
        return None
    parts = (found.channels.low, found.channels.high, found.channels.mean_square)
    return found if all(np.isfinite(part).all() for part in parts) else None


def _grid(region: Region) -> int:
    """Return grid points per octave: narrow types are scaled by powers of two, which round nothing."""
    wide = (TensorProto.FLOAT, TensorProto.DOUBLE)
    kinds = [end.layer.stored.data_type for end in region.layers]
    kinds += [(region.graph.constant_type(end.node.input[end.slot]) or (0,))[0] for end in region.constants]
    return FINE if all(kind in wide for kind in kinds) else 1
