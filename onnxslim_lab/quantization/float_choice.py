"""What may stay float and what it is worth: a choice of layers, and its price in time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from onnxslim_lab.quantization.float_cost import FloatCost

GROUPS = 100
"""Most sets of layers whose effect is measured; longer models are cut into runs of neighbours."""

_Item = TypeVar("_Item")
_LEAST_LEFT = 0.02  # part of the loss that stays whatever is restored: what layers cause alone is an estimate
_LARGEST_EXPONENT = 700.0  # that a float holds the power of; a price that high is never paid
_ROOM = 1000  # units of the budget that sets of layers are packed by


@dataclass(frozen=True)
class Restored:
    """Layers that stay float.

    Attributes:
        names: The layers.
        macs: Their multiply-accumulates.
        caused: The part of the loss that there is when they alone are quantized.
        beside: Whether it is the part that goes when they stay float beside those chosen before.
    """

    names: tuple[str, ...]
    macs: int
    caused: float
    beside: bool = False


@dataclass(frozen=True)
class Choice:
    """What stays float, and what that gains.

    Attributes:
        restored: The layers, those first that are worth most for their time.
        before: The loss with all layers quantized.
        after: The loss without these, their weights stored as they will be.
        coded: Whether that is in codes like the other weights.
        ranges: How the ranges were chosen behind it, in words; "" where that was not asked.
    """

    restored: tuple[Restored, ...]
    before: float
    after: float
    coded: bool = True
    ranges: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return names_of(self.restored)

    @property
    def macs(self) -> int:
        """Their multiply-accumulates."""
        return sum(one.macs for one in self.restored)


def groups_of(items: Sequence[_Item], most: int = GROUPS) -> list[tuple[_Item, ...]]:
    """Return layers, or what has them, as runs of neighbours of equal length, at most so many."""
    size = max(1, math.ceil(len(items) / most))
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def pack(candidates: Sequence[Restored], budget: float) -> list[Restored]:
    """Return the set within a budget of multiply-accumulates that causes most in all.

    >>> first, second = Restored(("a",), 10, 0.5), Restored(("b",), 1, 0.2)
    >>> [one.names for one in pack([first, second], 10)]
    [('a',)]
    """
    best: list[tuple[float, tuple[Restored, ...]]] = [(0.0, ())] * (_ROOM + 1)  # by units of the budget taken
    for one in candidates:
        size = math.ceil(one.macs * _ROOM / max(budget, 1))
        for room in range(_ROOM, size - 1, -1):
            caused, taken = best[room - size]
            if caused + one.caused > best[room][0]:
                best[room] = caused + one.caused, (*taken, one)
    return list(best[_ROOM][1])


class Price:
    """What a loss is worth beside the time that it takes to have no more.

    Args:
        cost: Tells what layers cost in float.
        budget: Of multiply-accumulates.
        enough: The loss that is as good as none.
        worth: What the time of the budget must bring the loss down to, as a factor.
    """

    def __init__(self, cost: FloatCost, budget: float, enough: float, worth: float) -> None:
        self.budget, self.enough = budget, enough
        self._cost, self._worth = cost, worth

    def of(self, loss: float, names: Collection[str]) -> float:
        """Return the loss that would be as good if no layer stayed float."""
        time = self._cost.of(names) / max(self.budget, 1)
        return max(loss, self.enough) * math.exp(min(-math.log(self._worth) * time, _LARGEST_EXPONENT))

    def path(self, candidates: Sequence[Restored], start: Choice, *, all_of: bool) -> list[Restored]:
        """Return candidates in the order in which to restore them, each what gains most behind those before.

        Args:
            candidates: What may be restored, with the part of `start.after` that each causes.
            start: What stays float already.
            all_of: Whether to go on with what is not worth its time.
        """
        rest, chosen, names = list(candidates), list[Restored](), start.names
        best, budget = self.of(start.after, names), self.budget - start.macs
        while rest := [one for one in rest if one.macs <= budget]:
            left = 1 - sum(one.caused for one in chosen)
            prices = [
                self.of(start.after * max(left - one.caused, _LEAST_LEFT), [*names, *one.names])
                for one in rest
            ]
            price = min(prices)
            if price >= best and not all_of:
                break
            best, one = price, rest.pop(prices.index(price))
            chosen.append(one)
            names += one.names
            budget -= one.macs
        return chosen


def names_of(restored: Collection[Restored]) -> list[str]:
    """Return the names of the layers of several sets."""
    return [name for one in restored for name in one.names]
