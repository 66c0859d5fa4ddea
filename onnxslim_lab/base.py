"""What a pass is: its parameters, what it is given and what it returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from onnxslim_lab.graph import Graph

if TYPE_CHECKING:  # statistics report their progress with the type below
    from onnxslim_lab.statistics import Calibration


@dataclass(frozen=True)
class Change:
    """One edit of the model.

    Attributes:
        where: Name of the node or tensor that was edited.
        what: What was done, in a few words.
        weights: Initializers this edit touched; coverage is computed from them.
        bytes_before, bytes_after: Stored bytes of what was edited.
        nonzeros_before, nonzeros_after: Nonzero parameters, where the edit changes values.
        detail: Further figures by name (sparsity, bits, encoding, error ...).
    """

    where: str
    what: str
    weights: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    nonzeros_before: int | None = None
    nonzeros_after: int | None = None
    detail: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """Something a pass left alone, and why."""

    where: str
    reason: str


@dataclass
class Outcome:
    """What a pass did, what it refused to do, and what else the user should know."""

    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def change(self, where: str, what: str) -> None:
        """Record a change without figures."""
        self.changes.append(Change(where, what))

    def refuse(self, where: str, reason: str) -> None:
        """Record that `where` was left alone, with the reason."""
        self.refusals.append(Refusal(where, reason))

    def merge(self, other: Outcome) -> None:
        """Append the other's changes, refusals and notices."""
        self.changes += other.changes
        self.refusals += other.refusals
        self.notices += other.notices


Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what) on long work."""


def silent(done: int, total: int, what: str) -> None:
    """Report progress to nobody."""


@dataclass
class Context:
    """What the engine gives a pass besides the graph.

    Attributes:
        progress: Called as progress(done, total, what) on long work.
        seed: Seed of everything random.
        allow_opset_raise: Whether the user permits a pass to raise the model's opset.
        memory: Working memory in bytes that a pass may use beyond one layer.
        calibration: The data to measure activations on; None when no step of the run needs any.
        original: The model as it was before the first lossy step; None when a pass is run by itself.
    """

    progress: Progress = silent
    seed: int = 0
    allow_opset_raise: bool = False
    memory: int = 256 << 20
    calibration: Calibration | None = None
    original: Graph | None = None


class Pass(BaseModel):
    """A graph pass; its fields are its parameters.

    Subclasses set `exact` (True promises the same function to float rounding) and `level`: "graph"
    passes are applied to the main graph, every subgraph body and every local function in turn;
    "model" passes once, to the main graph, and walk the rest themselves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exact: ClassVar[bool]
    level: ClassVar[Literal["graph", "model"]] = "graph"

    @classmethod
    def pass_name(cls) -> str:
        """Return the kebab-case name: FuseBatchnorm -> fuse-batchnorm."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations: the engine then gives it a `Context.calibration`."""
        return False

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Edit the graph in place and say what was done."""
        raise NotImplementedError

    def run(self, model: Graph, context: Context | None = None) -> Outcome:
        """Apply to a whole model: to each of its graphs, or once when `level` is "model"."""
        context = context or Context()
        if self.level == "model":
            return self.apply(model, context)
        outcome = Outcome()
        for graph in model.walk():
            outcome.merge(self.apply(graph, context))
        return outcome
