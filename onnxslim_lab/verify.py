"""Verification: a model loads, and gives what it gave before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto, TensorProto

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ModelError, SessionError, one_line
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import Feed, OutputError, compare_outputs
from onnxslim_lab.modelfile import all_tensors
from onnxslim_lab.report import OutputReport, Verdict
from onnxslim_lab.sessions import Runner, SessionTooLarge
from onnxslim_lab.weights import stub_location

TOLERANCE = 1e-4  # relative difference that float32 rounding explains
NOISE_FACTOR = 3.0  # times the difference between onnxruntime's own optimization levels


def check_model(graph: Graph) -> None:
    """Run the ONNX checker on the whole model without its large tensors.

    Raises:
        ModelError: the checker's complaint, in one line.
    """
    light = graph.light_model()
    for tensor in all_tensors(light):
        if stub_location(tensor):
            _empty(tensor)
    _drop_empty_sparse(light)
    try:
        onnx.checker.check_model(light)
    except onnx.checker.ValidationError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"not a valid ONNX model: {one_line(first, 400)}") from error


def _empty(tensor: TensorProto) -> None:
    """Make a stub a tensor without elements: the checker looks for the file of external data."""
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    del tensor.dims[:]
    tensor.dims.append(0)


def _drop_empty_sparse(light: ModelProto) -> None:
    """Show sparse tensors without data as dense ones: their parts no longer fit each other."""
    kept = []
    for sparse in light.graph.sparse_initializer:
        if 0 in (*sparse.values.dims, *sparse.indices.dims):
            light.graph.initializer.append(sparse.values)
        else:
            kept.append(sparse)
    if len(kept) < len(light.graph.sparse_initializer):
        copies = onnx.GraphProto(sparse_initializer=kept)
        del light.graph.sparse_initializer[:]
        light.graph.sparse_initializer.extend(copies.sparse_initializer)


@dataclass
class Verifier:
    """Compares models with a reference on the same feeds.

    The reference moves: after a lossy step it is that step's own output, so that an exact step is
    held to what it was given.
    """

    runner: Runner
    data: Dataset
    notices: list[str] = field(default_factory=list)
    tolerance: float = TOLERANCE
    original: list[Feed] | None = None
    reference: list[Feed] | None = None

    def start(self, graph: Graph) -> Verdict:
        """Run the original; what it gives is the reference, and its noise widens the tolerance."""
        feeds = self.data.feeds
        try:
            self.original = self.reference = self.runner.run(graph, feeds)
            self.tolerance = max(TOLERANCE, NOISE_FACTOR * self.runner.noise(graph, feeds))
        except SessionTooLarge as error:
            self.notices.append(f"outputs were not compared: {error}")
            return Verdict(status="skipped", reason=str(error))
        except SessionError as error:
            self.notices.append(f"the original does not run, so outputs were not compared: {error}")
            return Verdict(status="skipped", reason=f"the original does not run: {error}")
        return Verdict(status="passed", reason="the original runs", tolerance=self.tolerance)

    def step(self, graph: Graph, *, exact: bool) -> Verdict:
        """Compare with the last reference (exact) or measure against the original (lossy)."""
        try:
            check_model(graph)
        except ModelError as error:
            return Verdict(status="failed", reason=str(error))
        if self.reference is None or self.original is None:
            return Verdict(status="skipped", reason="the original was not run")
        try:
            result = self.runner.run(graph, self.data.feeds)
        except SessionError as error:
            return Verdict(status="failed", reason=str(error))
        errors = compare_outputs(self.reference if exact else self.original, result)
        verdict = judge(errors, self.tolerance) if exact else measure(errors)
        if verdict.status != "failed":
            self.reference = result
        return verdict

    def final(self, graph: Graph, *, exact: bool) -> Verdict:
        """Compare the result with the original; with only exact steps it must be equal."""
        if self.original is None or self.reference is None:
            return Verdict(status="skipped", reason="the original was not run")
        try:
            result = self.runner.run(graph, self.data.feeds)
        except SessionError as error:
            return Verdict(status="failed", reason=str(error))
        errors = compare_outputs(self.original, result)
        return judge(errors, self.tolerance) if exact else measure(errors)


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
