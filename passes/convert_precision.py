"""Convert a model to float16 or bfloat16, keeping in float32 what needs it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.errors import ModelError, ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.opset import raise_opset
from onnxslim_lab.passes.inline_functions import InlineFunctions
from onnxslim_lab.precision import rules
from onnxslim_lab.precision.half import HALVES, Half
from onnxslim_lab.precision.measure import measure_ranges
from onnxslim_lab.precision.model import Anatomy
from onnxslim_lab.precision.search import Search, Trial
from onnxslim_lab.precision.writer import Plan, plan_of, write
from onnxslim_lab.selection import Patterns, matches
from onnxslim_lab.statistics import Calibration

_STORED = "only its weights are stored in 16 bits"  # what was asked for, or said once for all
BFLOAT16_OPSET = 13  # the first whose Cast knows it


class ConvertPrecision(Pass):
    """Compute in float16 or bfloat16 where that is safe, and store the weights in it.

    before: x -> Conv(float W) -> y
    after:  x -> Cast(float16) -> Conv(float16 W) -> Cast(float) -> y

    Nodes stay float32, with Casts around them, when they are no standard operators or take no 16-bit floats,
    when a constant does not fit (beyond 65504, or an epsilon that becomes zero), when their result becomes an
    integer, and when the calibration data drives a value beyond half the format's range or below its digits.
    The result is run on that data: more nodes return to float32, those first that add most to the
    error, until every output agrees with the original's. Without data, operators that easily overflow stay.

    A weight is stored once: in 16 bits, with a Cast for readers in float32, unless its values do not fit or a
    reader must be exact. A Cast is written once for each value and graph, and none undoes another.
    Local functions are inlined, since a call can be both.

    refuses: each node that stays float32, with the reason; bfloat16 arithmetic where onnxruntime cannot load
    it: the weights are stored in bfloat16 then and computed with in float32.

    >>> ConvertPrecision(to="bfloat16").needs_calibration
    True
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    to: Literal["float16", "bfloat16"] = Field("float16", description="the 16-bit format")
    io: Literal["keep", "convert"] = Field(
        "keep", description="whether the model's float32 inputs and outputs stay so or become 16-bit"
    )
    compute: Literal["auto", "half", "float32"] = Field(
        "auto",
        description="compute in 16 bits (half), or only store weights in them (float32); "
        "auto: half wherever onnxruntime loads it",
    )
    min_cosine: float = Field(
        0.9999, gt=0, le=1, description="least cosine of every output with the original's on the data"
    )
    samples: int = Field(8, ge=1, description="feeds of the data to compare on")
    allow_growth: bool = Field(False, description="convert also when the file becomes larger")
    include: Patterns = Field((), description="patterns of the nodes to convert; empty means all")
    exclude: Patterns = Field((), description="patterns of the nodes that stay float32")
    op_types: Patterns = Field((), description="operators that stay float32, besides those that must")

    @property
    def needs_calibration(self) -> bool:
        """Ranges and agreement are measured."""
        return True

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Convert the whole model in place; see the class.

        Raises:
            ParameterError: A pattern matches no node, or an operator type is not in the model.
        """
        outcome, half = Outcome(), HALVES[self.to]
        if self.to == "bfloat16" and not self._opset_for(graph, context, outcome):
            return outcome
        outcome.merge(InlineFunctions().run(graph, context))
        graph.infer()
        calibration, trial = context.calibration, None
        anatomy = self._taken_apart(graph, half, ranged=calibration is not None)
        if calibration is None:
            plan = self._unmeasured(anatomy)
        else:
            plan, trial = self._measured(anatomy, calibration, outcome)
            if trial.score < self.min_cosine:
                reason = trial.refused or f"output {quote(trial.output)} agrees to {trial.score:.6f} only"
                outcome.refuse(graph.name, f"nothing was converted: {reason}")
                return outcome
        if not self.allow_growth and (larger := _growth(graph, anatomy, plan, trial)):
            outcome.refuse(graph.name, f"nothing was converted: the file would grow by {larger:,} bytes")
            return outcome
        _report(anatomy, write(graph, anatomy, plan), trial, outcome)
        graph.infer()
        return outcome

    def _opset_for(self, graph: Graph, context: Context, outcome: Outcome) -> bool:
        """Return whether the model's opset knows bfloat16, raising it where the run allows that."""
        before = graph.opset()
        if before >= BFLOAT16_OPSET or not before:
            return True
        if not context.allow_opset_raise:
            outcome.refuse(
                graph.name, f"bfloat16 needs opset {BFLOAT16_OPSET}, the model has {before}: allow raising it"
            )
            return False
        try:
            raise_opset(graph, BFLOAT16_OPSET)
        except ModelError as error:
            outcome.refuse(graph.name, f"bfloat16 needs opset {BFLOAT16_OPSET}: {error}")
            return False
        outcome.change(graph.name, f"raised the opset from {before} to {BFLOAT16_OPSET}")
        return True

    def _taken_apart(self, graph: Graph, half: Half, *, ranged: bool) -> Anatomy:
        """Return the model's nodes with the reasons that need no data."""
        model = graph.copy()
        model.infer()
        anatomy = Anatomy.of(model, half)
        self._keep_chosen(anatomy)
        rules.keep_by_structure(anatomy, ranged=ranged)
        return anatomy

    def _keep_chosen(self, anatomy: Anatomy) -> None:
        """Keep what the user wants kept."""
        names = {item.number: [item.name, *filter(None, item.node.output)] for item in anatomy.items}
        known = [name for group in names.values() for name in group]
        for kind, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not matches(pattern, known):
                    raise ParameterError(
                        f"convert-precision: {kind} pattern {quote(pattern)} matches no node of the model"
                        + suggest(pattern, known)
                    )
        operators = {item.node.op_type for item in anatomy.items}
        for op_type in self.op_types:
            if op_type not in operators:
                raise ParameterError(
                    f"convert-precision: op_types {quote(op_type)} is no operator of the model"
                    + suggest(op_type, operators)
                )
        for item in anatomy.items:
            barred = next((p for p in self.exclude if matches(p, names[item.number])), None)
            if not item.slots.any:
                continue
            if barred is not None:
                item.keep(f"excluded by pattern {quote(barred)}", whole=True)
            elif self.include and not any(matches(p, names[item.number]) for p in self.include):
                item.keep("no include pattern matches it", whole=True)
            elif item.node.op_type in self.op_types:
                item.keep("its operator is in op_types", whole=True)

    def _unmeasured(self, anatomy: Anatomy) -> Plan:
        """Return what to convert as far as it is known without data."""
        if self.compute == "float32" or (self.compute == "auto" and anatomy.half.name == "bfloat16"):
            _store_only(anatomy)
        _settle(anatomy)
        return plan_of(anatomy, io=self.io)

    def _measured(self, anatomy: Anatomy, calibration: Calibration, outcome: Outcome) -> tuple[Plan, Trial]:
        """Return what to convert so that the model loads and its outputs agree."""
        if self.compute == "float32":
            _store_only(anatomy)
        else:
            ranges, odd = measure_ranges(anatomy, calibration)
            rules.keep_by_range(anatomy, ranges, odd)
        _settle(anatomy)
        search = Search(anatomy, calibration, self.min_cosine, self.samples)
        if anatomy.half.name == "bfloat16" and self.compute != "float32":
            refused = search.attempt().refused
            if refused and self.compute == "half":
                raise ParameterError(
                    f"convert-precision: this onnxruntime cannot compute in bfloat16: {refused}"
                )
            if refused:
                outcome.refuse(
                    anatomy.model.name,
                    f"onnxruntime cannot compute it in bfloat16, so only its weights are stored so: {refused}",
                )
                _store_only(anatomy)
        trial = search.best()
        return plan_of(anatomy, io=self.io), trial


def _growth(graph: Graph, anatomy: Anatomy, plan: Plan, trial: Trial | None) -> int:
    """Return by how many bytes the file would grow, 0 when it would not."""
    if trial is None:
        model = anatomy.model.copy()
        write(model, anatomy, plan)
    else:
        model = trial.model
    return max(0, model.file_bytes() - graph.file_bytes())


def _settle(anatomy: Anatomy) -> None:
    """Keep what would be 16-bit for nothing."""
    rules.keep_empty_branches(anatomy)
    rules.keep_islands(anatomy, rules.pays(anatomy))


def _store_only(anatomy: Anatomy) -> None:
    for item in anatomy.items:
        if item.low:
            item.keep(_STORED)


def _report(anatomy: Anatomy, changes: list[Change], trial: Trial | None, outcome: Outcome) -> None:
    """Say what was converted, what stayed, and how the outputs agree."""
    for item in anatomy.items:
        if item.reason and item.reason != _STORED:
            outcome.refuse(item.name, f"stays float32: {item.reason}")
    low = sum(item.low for item in anatomy.items)
    outcome.changes += changes
    if not low and not changes:
        return
    detail: dict[str, float | int | str] = {
        "nodes": low,
        "float32": sum(bool(i.reason) for i in anatomy.items),
    }
    if trial is not None:
        detail |= {"least agreement": trial.score, "output": trial.output}
    what = f"{low} nodes compute in {anatomy.half.name}"
    outcome.changes.append(Change(anatomy.model.name, what, detail=detail))
