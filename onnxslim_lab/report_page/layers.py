"""Rows of the table of layers: what all steps did to one node or weight, and what quantizing it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from onnxslim_lab.quantization.sensitivity import LayerReport
from onnxslim_lab.report import ChangeReport
from onnxslim_lab.report_page.reading import Sources

_ERRORS = ("output error", "weight error", "largest error", "expected error after")
"""Names under which passes give an error that is no signal-to-noise ratio; the first found is shown."""


@dataclass
class LayerRow:
    """A node or weight, as the steps name it.

    Attributes:
        name: Its name in the model.
        done: What each step did, in order.
        bytes_before, bytes_after: Stored, before the first edit and after the last; None where no edit has them.
        sparsity: Share of zeros, in [0, 1].
        bits: Of a code.
        rank: Of its factors.
        error: Of its weights or its output, relative; `error_kind` names it.
        sqnr_db: Of its weights against what they were before that step.
        sensitivity_db: SQNR of the model's outputs when it alone is quantized.
        op_type: Where it is known.
    """

    name: str
    done: list[str] = field(default_factory=list)
    bytes_before: int | None = None
    bytes_after: int | None = None
    sparsity: float | None = None
    bits: float | None = None
    rank: float | None = None
    error: float | None = None
    error_kind: str = ""
    sqnr_db: float | None = None
    sensitivity_db: float | None = None
    op_type: str = ""

    @property
    def figures(self) -> bool:
        """Whether anything is known of it as a weight or layer."""
        known = (self.sparsity, self.bits, self.rank, self.error, self.sqnr_db, self.sensitivity_db)
        return any(value is not None for value in known)

    def add(self, step: str, change: ChangeReport) -> None:
        """Take in one more edit."""
        self.done.append(f"{step}: {change.what}")
        if change.bytes_before or change.bytes_after:
            if self.bytes_before is None:
                self.bytes_before = change.bytes_before
            self.bytes_after = change.bytes_after
        detail = change.detail
        self.sparsity = _latest(detail.get("sparsity"), self.sparsity)
        self.bits = _latest(detail.get("bits"), self.bits)
        self.rank = _latest(detail.get("rank"), self.rank)
        self.sqnr_db = _latest(detail.get("sqnr_db"), self.sqnr_db)
        kind = next((name for name in _ERRORS if name in detail), "")
        if kind:
            self.error, self.error_kind = _latest(detail[kind], self.error), kind


def layer_rows(sources: Sources) -> list[LayerRow]:
    """Return a row for every name that a step edited or whose sensitivity is known.

    Weights come before the nodes that were folded or renamed; else in order of appearance.
    """
    rows: dict[str, LayerRow] = {}
    for step in sources.run.steps if sources.run else ():
        for change in step.changes:
            rows.setdefault(change.where, LayerRow(change.where)).add(step.name, change)
    for layer in sources.sensitivity.layers if sources.sensitivity else ():
        row = rows.setdefault(layer.name, LayerRow(layer.name))
        row.sensitivity_db, row.op_type = layer.alone_db, layer.op_type
    return sorted(rows.values(), key=lambda row: not row.figures)


def noise_by_part(layer: LayerReport) -> dict[str, float | None]:
    """Return noise over signal in dB of the model's outputs and of the layer's own input, weight and output.

    None: not measured, or nothing to report there.
    """
    found: dict[str, float | None] = {
        "model": None if layer.alone_db is None or not math.isfinite(layer.alone_db) else -layer.alone_db
    }
    for part in ("input", "weight", "output"):
        share = max((cause.share for cause in layer.causes if cause.part == part), default=0.0)
        found[part] = 10 * math.log10(share) if 0 < share < math.inf else None
    return found


def _latest(value: float | str | None, before: float | None) -> float | None:
    """Return a number a step gave, else what was known before."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else before
