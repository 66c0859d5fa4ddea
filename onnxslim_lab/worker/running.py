"""Ranges alone, in the child process: the least and greatest elements so far of values reduced to scalars."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxslim_lab.worker.tally import Array

HUGE = 1e9  # products of two smaller numbers, and sums of these, stay far from overflow


class RunningRanges:
    """The extremes of many values over all feeds taken.

    Args:
        lows, highs: By value, the output (one element) with its least and its greatest element.
        sums: By value that could hold NaN, the output with the sum of its elements, which shows it.
        sizes: By value whose size does not follow from the feed, the output with its number of elements.
    """

    def __init__(
        self, lows: dict[str, str], highs: dict[str, str], sums: dict[str, str], sizes: dict[str, str]
    ) -> None:
        self._outputs = lows, highs, sums, sizes
        self._low = np.full(len(lows), np.inf)
        self._high = np.full(len(highs), -np.inf)
        self._count = np.zeros(len(sizes), np.int64)

    @property
    def outputs(self) -> list[str]:
        """The outputs that a run must give."""
        return [name for part in self._outputs for name in part.values()]

    def take(self, outputs: dict[str, Array]) -> list[str]:
        """Take the outputs of one run; return the values that are doubtful, for which nothing was taken."""
        lows, highs, sums = (
            np.array([outputs[name].item() for name in part.values()], np.float64)
            for part in self._outputs[:3]
        )
        tests = (np.abs(lows) < HUGE, np.abs(highs) < HUGE, np.isfinite(sums))
        if not all(test.all() for test in tests):
            found = [
                name
                for part, test in zip(self._outputs[:3], tests, strict=True)
                for name, is_sound in zip(part, test.tolist(), strict=True)
                if not is_sound
            ]
            return list(dict.fromkeys(found))
        np.minimum(self._low, lows, out=self._low)
        np.maximum(self._high, highs, out=self._high)
        for index, name in enumerate(self._outputs[3].values()):
            self._count[index] += int(outputs[name].item())
        return []

    def state(self) -> dict[str, Any]:
        """Return the extremes and the sizes, by value."""
        lows, highs, _, sizes = self._outputs
        return {
            "lows": dict(zip(lows, self._low.tolist(), strict=True)),
            "highs": dict(zip(highs, self._high.tolist(), strict=True)),
            "counts": dict(zip(sizes, self._count.tolist(), strict=True)),
        }
