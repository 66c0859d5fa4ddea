"""Judging: whether two results are equal, or how far a lossy one is from its reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxslim_lab.errors import one_line
from onnxslim_lab.metrics import OutputError
from onnxslim_lab.report import OutputReport, Verdict

TOLERANCE = 1e-4  # relative difference that float32 rounding explains
NOISE_FACTOR = 3.0  # times the difference between onnxruntime's own optimization levels


def judge(errors: Sequence[OutputError], tolerance: float) -> Verdict:
    """Return passed when every output is within the tolerance, failed with the worst one otherwise."""
    outputs = tuple(map(_output_report, errors))
    for error in sorted(errors, key=lambda item: -_size(item)):
        problem = departure(error, tolerance)
        if problem:
            return Verdict(status="failed", reason=problem, tolerance=tolerance, outputs=outputs)
    return Verdict(status="passed", reason="outputs are equal", tolerance=tolerance, outputs=outputs)


def measure(errors: Sequence[OutputError]) -> Verdict:
    """Return what a lossy step did to the outputs; it fails only on another structure or new NaNs."""
    outputs = tuple(map(_output_report, errors))
    for error in errors:
        name = one_line(error.name)
        if error.structure:
            return Verdict(status="failed", reason=f"output '{name}': {error.structure}", outputs=outputs)
        if error.nonfinite:
            reason = f"output '{name}': {error.nonfinite} values became or ceased to be finite"
            return Verdict(status="failed", reason=reason, outputs=outputs)
    return Verdict(status="measured", reason="", outputs=outputs)


def departure(error: OutputError, tolerance: float) -> str:
    """Return why an output is not equal within the tolerance, "" when it is."""
    name = one_line(error.name)
    if error.structure:
        return f"output '{name}': {error.structure}"
    if error.nonfinite:
        return f"output '{name}': {error.nonfinite} values are finite on one side only"
    if error.mismatches:
        return f"output '{name}': {error.mismatches} of {error.count} values differ"
    if error.relative > tolerance:
        return f"output '{name}': relative difference {error.relative:.2e} is over {tolerance:.1e}"
    return ""


def _size(error: OutputError) -> float:
    return math.inf if error.structure or error.nonfinite else error.relative


def _output_report(error: OutputError) -> OutputReport:
    return OutputReport(
        name=error.name,
        max_abs=error.max_abs,
        relative=error.relative,
        sqnr_db=error.sqnr_db if math.isfinite(error.sqnr_db) else None,
        cosine=error.cosine if error.floating else None,
        exact_mismatches=error.mismatches + error.nonfinite,
    )
