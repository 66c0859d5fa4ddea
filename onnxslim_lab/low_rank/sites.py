"""What a search for thinner layers is about: the place, the ways to write it, and which ranks are tried."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from onnxslim_lab.low_rank.bases import Doubles, Method

FormName = Literal["matrix", "spatial", "tucker"]


@dataclass(frozen=True)
class Site:
    """Where the factors go: sizes of the layer, and how many more positions its parts meet.

    Attributes:
        groups, out, inputs: The matrix's shape.
        kernel: Spatial sizes of a Conv, () otherwise.
        spread: Input positions for each output position of a Conv (its strides' product, about).
        row_spread: The same along the last axis alone.
        lookup: Whether the layer looks rows up, which multiplies nothing.
    """

    groups: int
    out: int
    inputs: int
    kernel: tuple[int, ...] = ()
    spread: float = 1.0
    row_spread: float = 1.0
    lookup: bool = False

    @property
    def parameters(self) -> int:
        """Weights of the layer; multiply-accumulates for each output position as well."""
        return self.groups * self.out * self.inputs

    @property
    def channels(self) -> int:
        """Input channels of each group of a Conv."""
        return self.inputs // math.prod(self.kernel)

    @property
    def break_even(self) -> float:
        """The rank at which two factors have as many weights as the matrix."""
        return self.out * self.inputs / (self.out + self.inputs)

    def pays(self, candidate: Candidate) -> bool:
        """Whether it has fewer parameters and multiply-accumulates than the layer (a lookup: parameters)."""
        cheaper = self.lookup or candidate.macs < self.parameters
        return candidate.parameters < self.parameters and cheaper


@dataclass(frozen=True)
class Candidate:
    """One way to write a layer.

    Attributes:
        form: How.
        ranks: One rank, or two: of the inputs and of the outputs (tucker).
        parameters: Weights of the factors.
        macs: Multiply-accumulates for each output position.
        loss: Energy of the output's error as part of the output's, 0 to 1 (a little more for tucker).
    """

    form: FormName
    ranks: tuple[int, ...]
    parameters: int
    macs: float
    loss: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A form of one layer, ready to be cut at any of its candidates' ranks.

    Attributes:
        candidates: What pays, by falling loss.
        arrays: What the factors are made from.
        losses: Of form matrix: relative loss at rank 0, 1, ..., as far as known.
    """

    form: FormName
    candidates: list[Candidate]
    arrays: dict[str, Doubles]
    losses: Doubles | None = None


@dataclass(frozen=True)
class Search:
    """How ranks are looked for.

    Attributes:
        method: How directions are chosen.
        rank: The only rank to look at; None for all.
        multiple: Ranks are multiples of this where the layer is large enough (four multiples pay).
        seed: Of randomized SVD.
    """

    method: Method
    rank: int | None = None
    multiple: int = 8
    seed: int = 0

    def ranks(self, largest: int) -> Iterable[int]:
        """Return the ranks to look at, up to the largest that pays."""
        if self.rank is not None:
            return [self.rank] if self.rank <= largest else []
        step = self.step(largest)
        return range(step, largest + 1, step)

    def step(self, largest: int) -> int:
        """Return the multiple that ranks of a layer keep."""
        return self.multiple if largest >= 4 * self.multiple else 1
