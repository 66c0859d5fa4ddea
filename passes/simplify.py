"""Run the exact passes that shorten a graph, again and again, until none changes anything."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.errors import quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.cancel_transposes import CancelTransposes
from onnxslim_lab.passes.deduplicate import Deduplicate
from onnxslim_lab.passes.eliminate_dead import EliminateDead
from onnxslim_lab.passes.eliminate_identity import EliminateIdentity
from onnxslim_lab.passes.fold_constants import FoldConstants
from onnxslim_lab.passes.fuse_activation import FuseActivation
from onnxslim_lab.passes.fuse_batchnorm import FuseBatchnorm
from onnxslim_lab.passes.fuse_layernorm import FuseLayernorm
from onnxslim_lab.passes.fuse_linear import FuseLinear
from onnxslim_lab.passes.inline_constant_if import InlineConstantIf
from onnxslim_lab.passes.inline_functions import InlineFunctions
from onnxslim_lab.passes.simplify_shapes import SimplifyShapes

# What looks for patterns comes before what takes their constants apart.
ROUND: tuple[type[Pass], ...] = (
    FoldConstants,
    EliminateIdentity,
    SimplifyShapes,
    InlineConstantIf,
    CancelTransposes,
    FuseLayernorm,
    FuseActivation,
    FuseBatchnorm,
    FuseLinear,
    Deduplicate,
    EliminateDead,
)


class Simplify(Pass):
    """Shorten the graph without changing what it computes: all exact passes to a fixed point.

    Functions are inlined once; then folding, elimination, fusion and deduplication run in rounds until
    a round changes nothing, since each makes room for the others.

    before: a -> Identity -> Conv -> BatchNormalization -> Dropout -> b
    after:  a -> Conv -> b
    refuses: what the single passes refuse, each with its reason

    >>> Simplify(skip=["fuse-linear"]).skip
    ('fuse-linear',)
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    skip: tuple[str, ...] = Field((), description="names of passes to leave out")
    rounds: int = Field(12, ge=1, le=100, description="most rounds over the passes")
    allow_growth: bool = Field(False, description="also fold constants whose result is larger")

    @field_validator("skip", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        """Accept "a;b" from the command line; refuse names of no pass."""
        names = value.split(";") if isinstance(value, str) else value
        known = [InlineFunctions.pass_name(), *(kind.pass_name() for kind in ROUND)]
        for name in names if isinstance(names, list | tuple) else ():
            if name not in known:
                raise ValueError(f"no such pass {quote(str(name))}{suggest(str(name), known)}")
        return names

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Run the rounds; see the class."""
        outcome = Outcome()
        refusals: dict[tuple[str, str], None] = {}
        if InlineFunctions.pass_name() not in self.skip:
            outcome.merge(InlineFunctions().run(graph, context))
        steps = [
            FoldConstants(allow_growth=self.allow_growth) if kind is FoldConstants else kind()
            for kind in ROUND
            if kind.pass_name() not in self.skip
        ]
        settled: dict[str, int] = {}  # the edit at which each pass last had nothing to do
        for number in range(self.rounds):
            before = graph.version
            graph.infer()
            for step in steps:
                name = step.pass_name()
                if settled.get(name) == graph.version:
                    continue
                context.progress(number + 1, self.rounds, name)
                found = step.run(graph, context)
                outcome.changes += found.changes
                refusals.update(dict.fromkeys((r.where, r.reason) for r in found.refusals))
                settled[name] = graph.version
            if graph.version == before:
                break
        for where, reason in refusals:
            outcome.refuse(where, reason)
        return outcome
