"""How many channels each group gives up: always from where the work that is saved costs least.

Work is multiply-accumulates and elements written: a narrow layer with a large output (a first convolution, a
depthwise one with what follows it place by place) is slow for its few multiply-accumulates, since its time goes
into memory. Written elements decide only where channels go, not how many multiply-accumulates must: that is the
budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.channels.groups import Group

Doubles = NDArray[np.float64]
PER_ELEMENT = 128  # multiply-accumulates of a core in the time that one float32 is written and read again:
# about 100 GMAC/s with 256-bit vectors against 8 bytes at 6 to 10 GB/s, the memory shared with other cores


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order in which the channels of a group go, and what each removal costs.

    Attributes:
        order: Numbers of channels, those that matter least first; those that are not named stay.
        losses: The cost of each of these removals.
    """

    order: NDArray[np.int64]
    losses: Doubles


@dataclass
class _Weight:
    """One layer: its multiply-accumulates shrink with each axis of its weight.

    Attributes:
        macs: How many there are to begin with.
        outputs: Elements of its output to begin with.
        rows: Whether each axis is that of its outputs.
        axes: For each axis its size and how many of its places a channel of each group is.
        left: Places that are left along each axis.
    """

    macs: float
    outputs: float
    rows: list[bool]
    axes: list[tuple[int, dict[int, int]]]
    left: list[int]

    def now(self, group: int = -1, more: int = 0) -> tuple[float, float]:
        """Return (MACs, work) that is left, with so many more channels of a group removed."""
        macs, outputs = self.macs, self.outputs
        for left, row, (size, parts) in zip(self.left, self.rows, self.axes, strict=True):
            factor = (left - more * parts.get(group, 0)) / size
            macs *= factor
            if row:
                outputs *= factor
        return macs, macs + PER_ELEMENT * outputs

    def remove(self, group: int, count: int) -> None:
        """Remove so many channels of a group."""
        self.left = [
            left - count * parts.get(group, 0) for left, (_, parts) in zip(self.left, self.axes, strict=True)
        ]


class Allocation:
    """Counts of channels to remove, group by group.

    Args:
        groups: The groups.
        rankings: Their rankings.
        macs: Multiply-accumulates of each layer by its identity.
        outputs: Elements of each layer's output, likewise.
        multiple: Widths are rounded to a multiple of it.
        least: Part of a group's channels that stays at least.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rankings: Sequence[Ranking],
        macs: Mapping[int, int],
        outputs: Mapping[int, int],
        *,
        multiple: int,
        least: float,
    ) -> None:
        self.removed = [0] * len(groups)
        self._groups = groups
        self._sums = [np.concatenate([[0.0], np.cumsum(ranking.losses)]) for ranking in rankings]
        self._limits = []
        self._steps = []
        for group, ranking in zip(groups, rankings, strict=True):
            step = multiple // math.gcd(multiple, group.width)
            self._steps.append(step)
            self._limits.append(min(ranking.order.size, group.size - max(1, math.ceil(least * group.size))))
        self._weights = _weights(groups, macs, outputs)
        self._readers: list[list[_Weight]] = [[] for _ in groups]
        for weight in self._weights:
            for number in {number for _, parts in weight.axes for number in parts}:
                self._readers[number].append(weight)

    @property
    def macs(self) -> float:
        """Multiply-accumulates that are left in the layers of the groups."""
        return sum(weight.now()[0] for weight in self._weights)

    def reach(self, target: float) -> bool:
        """Remove channels until so few multiply-accumulates are left; returns whether that is possible."""
        left = self.macs
        while left > target:
            choices = [found for number in range(len(self._groups)) if (found := self._next(number))]
            if not choices:
                return False
            _, saved, number, count = min(choices)
            self._remove(number, count)
            left -= saved
        return True

    def fit(self, wanted: Sequence[int]) -> None:
        """Remove about so many channels of each group, not more."""
        for number, count in enumerate(wanted):
            while (after := self._after(number)) is not None and after <= count:
                self._remove(number, after)

    def _remove(self, number: int, count: int) -> None:
        for weight in self._readers[number]:
            weight.remove(number, count - self.removed[number])
        self.removed[number] = count

    def _after(self, number: int) -> int | None:
        """Return the next count of removals after which the width is a multiple, None when there is none."""
        size, step, removed = self._groups[number].size, self._steps[number], self.removed[number]
        after = size - (size - removed - 1) // step * step
        return after if after <= self._limits[number] and after < size else None

    def _next(self, number: int) -> tuple[float, float, int, int] | None:
        """Return (loss for the work saved, multiply-accumulates saved, group, removals after it)."""
        before, after = self.removed[number], self._after(number)
        if after is None:
            return None
        more = after - before
        pairs = [(weight.now(), weight.now(number, more)) for weight in self._readers[number]]
        saved = sum(old[0] - new[0] for old, new in pairs)
        work = sum(old[1] - new[1] for old, new in pairs)
        if saved <= 0:
            return None
        loss = self._sums[number][after] - self._sums[number][before]
        return float(loss / work), saved, number, after


def _weights(groups: Sequence[Group], macs: Mapping[int, int], outputs: Mapping[int, int]) -> list[_Weight]:
    found: dict[int, _Weight] = {}
    numbers: dict[tuple[int, int], int] = {}
    for number, group in enumerate(groups):
        numbers.update({(id(group.part), int(label)): number for label in group.classes})
    for part in {id(group.part): group.part for group in groups}.values():
        for layer, tensor in part.layers:
            axes, rows = [], []
            for axis, atoms in enumerate(tensor):
                if atoms is None or atoms.size < 2:
                    continue
                parts: dict[int, int] = {}
                counts: dict[int, set[int]] = {}
                labels = part.closure.labels[atoms]
                for label in labels:
                    held = numbers.get((id(part), int(label)))
                    if held is not None:
                        parts[held] = parts.get(held, 0) + 1
                        counts.setdefault(held, set()).add(int(label))
                if parts:
                    times = {held: parts[held] // len(counts[held]) for held in parts}
                    axes.append((atoms.size, times))
                    rows.append((id(layer), axis) in part.rows)
            found[id(layer)] = _Weight(
                float(macs.get(id(layer), 0)),
                float(outputs.get(id(layer), 0)),
                rows,
                axes,
                [size for size, _ in axes],
            )
    return list(found.values())
