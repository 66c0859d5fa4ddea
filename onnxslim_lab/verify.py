"""Verification: a model loads, and gives what it gave before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto, TensorProto

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import LabError, ModelError, SessionError, one_line
from onnxslim_lab.graph import Graph
from onnxslim_lab.judging import NOISE_FACTOR, TOLERANCE, judge, measure
from onnxslim_lab.metrics import Feed, compare_outputs
from onnxslim_lab.modelfile import all_tensors
from onnxslim_lab.report import Verdict
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.second_opinion import second_opinion
from onnxslim_lab.sessions import Runner, SessionTooLarge
from onnxslim_lab.weights import stub_location

MOST_FEEDS = 32  # compared after each step
STREAMED_MEMORY = 64 << 20  # bytes of weights kept when models are too large for a session


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

    Models run on onnxruntime; where a session would not fit the memory, on the NumPy runtime, which
    reads the weights layer by layer. The reference moves: after a lossy step it is that step's own
    output, so that an exact step is held to what it was given.
    """

    runner: Runner
    data: Dataset
    notices: list[str] = field(default_factory=list)
    tolerance: float = TOLERANCE
    original: list[Feed] | None = None
    reference: list[Feed] | None = None
    _source: Graph | None = None
    _streamed: bool = False
    _known: str = ""  # what the ONNX checker says of the original
    _lossy: Graph | None = None  # the last lossy result, whose codes flip by what rounding leaves of a sum

    @property
    def feeds(self) -> Sequence[Feed]:
        """The feeds that models are compared on: the first of the data."""
        return self.data.feeds[:MOST_FEEDS]

    def start(self, graph: Graph) -> None:
        """Run the original; what it gives is the reference, and its noise widens the tolerance."""
        self._source = graph.copy()
        try:
            check_model(graph)
        except ModelError as error:
            self._known = str(error)
        if len(self.data.feeds) > MOST_FEEDS:
            self.notices.append(
                f"outputs were compared on the first {MOST_FEEDS} of {len(self.data.feeds)} feeds"
            )
        try:
            self.original = self.reference = self.runner.run(graph, self.feeds)
            self.tolerance = max(TOLERANCE, NOISE_FACTOR * self.runner.noise(graph, self.feeds))
        except SessionTooLarge as error:
            self.notices.append(f"{error}; outputs were compared on the NumPy runtime alone")
            self._streamed = True
            self._run_original_streamed(graph)
        except SessionError as error:
            self.notices.append(f"the original does not run, so outputs were not compared: {error}")

    def _run_original_streamed(self, graph: Graph) -> None:
        try:
            self.original = self.reference = self._run(graph)
        except LabError as error:
            self.notices.append(f"the original does not run there, so outputs were not compared: {error}")

    def _run(self, graph: Graph) -> list[Feed]:
        if not self._streamed:
            return self.runner.run(graph, self.feeds)
        interpreter = Interpreter(graph, memory=STREAMED_MEMORY)
        return [interpreter.run(feed) for feed in self.feeds]

    def step(self, graph: Graph, *, exact: bool) -> Verdict:
        """Compare with the last reference (exact) or measure against the original (lossy)."""
        try:
            check_model(graph)
        except ModelError as error:
            if str(error) != self._known or self.original is None:
                return Verdict(status="failed", reason=str(error))
            notice = f"the checker refuses the original too, which runs all the same: {error}"
            if notice not in self.notices:
                self.notices.append(notice)
        if self.reference is None or self.original is None:
            return Verdict(status="skipped", reason="the original was not run")
        try:
            result = self._run(graph)
        except LabError as error:
            return Verdict(status="failed", reason=str(error))
        errors = compare_outputs(self.reference if exact else self.original, result)
        verdict = judge(errors, self.tolerance) if exact else measure(errors)
        if verdict.status == "failed" and exact and self._lossy is not None:
            noise = NOISE_FACTOR * self.runner.noise(self._lossy, self.feeds)
            verdict = judge(errors, max(self.tolerance, noise))
        if verdict.status != "failed":
            self.reference = result
            if not exact and not self._streamed:
                self._lossy = graph.copy()
        return verdict

    def final(self, graph: Graph, *, exact: bool) -> tuple[Verdict, Verdict]:
        """Compare the result with the original, and both engines on the result.

        With only exact steps the result must equal the original. Where the engines disagree on the
        original too, that is no fault of the result: it is said, and not held against it.
        """
        unknown = Verdict(status="skipped", reason="the original was not run")
        if self.original is None or self.reference is None or self._source is None:
            return unknown, unknown
        try:
            result = self._run(graph)
        except LabError as error:
            failed = Verdict(status="failed", reason=str(error))
            return failed, failed
        errors = compare_outputs(self.original, result)
        verdict = judge(errors, self.tolerance) if exact else measure(errors)
        if self._streamed:
            return verdict, Verdict(status="skipped", reason="onnxruntime was not run")
        opinion = second_opinion(graph, self.feeds, result, self.runner, self.tolerance)
        if opinion.status == "failed":
            before = second_opinion(self._source, self.feeds, self.original, self.runner, self.tolerance)
            if before.status != "passed":
                reason = f"as on the original, {opinion.reason}"
                opinion = opinion.model_copy(update={"status": "measured", "reason": reason})
                self.notices.append(reason)
        elif opinion.status == "skipped":
            self.notices.append(f"no second opinion: {opinion.reason}")
        return verdict, opinion
