"""What the gate judges: both models, the data, and what was measured on them, each thing once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.bench import bench
from onnxslim_lab.bench_report import BenchReport
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import LabError, one_line, quote, suggest
from onnxslim_lab.gate.config import GateConfig
from onnxslim_lab.gate.weights import Weights, decoded_weights
from onnxslim_lab.graph import Graph
from onnxslim_lab.judging import NOISE_FACTOR, TOLERANCE
from onnxslim_lab.metrics import Feed, OutputError, compare_outputs
from onnxslim_lab.sessions import Runner

_BENCHED = 4  # feeds that are timed
_FEW_PAIRS = 10  # when only memory and load time are asked for


class NotMeasured(Exception):  # noqa: N818 - no error: a verdict that cannot be given
    """Something could not be measured; says why, in one line."""


@dataclass
class Subject:
    """A candidate, its baseline, and the data they are judged on.

    Attributes:
        candidate_path, baseline_path: The files.
        candidate, baseline: The models.
        data: Feeds for both; made up when `data.random`.
        runner: Where outputs are computed.
        config: The gate's configuration.
        progress: Told what is done.
        notices: What a reader of the report must know.
    """

    candidate_path: Path
    baseline_path: Path
    candidate: Graph
    baseline: Graph
    data: Dataset
    runner: Runner
    config: GateConfig
    progress: Progress = silent
    notices: list[str] = field(default_factory=list)
    explained: list[Any] = field(default_factory=list)  # the cause of wrong outputs, once it was looked for

    @property
    def feeds(self) -> Sequence[Feed]:
        """Inputs of both models."""
        return self.data.feeds

    @cached_property
    def reference(self) -> list[Feed]:
        """The baseline's outputs; raises SessionError where it does not run, which is no verdict."""
        self.progress(0, 3, "running the baseline")
        return self.runner.run(self.baseline, self.feeds)

    @cached_property
    def problem(self) -> str:
        """Why the candidate cannot be run on the data; "" when it can."""
        wanted, given = set(self.candidate.input_types()), set(self.baseline.input_types())
        for name in sorted(wanted - given):
            return f"the candidate's input {quote(name)} is not the baseline's{suggest(name, given)}"
        for name in sorted(given - wanted):
            return f"the candidate lacks the baseline's input {quote(name)}{suggest(name, wanted)}"
        self.progress(1, 3, "running the candidate")
        try:
            self.__dict__["_result"] = self.runner.run(self.candidate, self.feeds)
        except LabError as error:
            return str(error)
        return ""

    @property
    def result(self) -> list[Feed]:
        """The candidate's outputs.

        Raises:
            NotMeasured: It does not run.
        """
        if self.problem:
            raise NotMeasured(f"the candidate was not run: {self.problem}")
        found: list[Feed] = self.__dict__["_result"]
        return found

    @cached_property
    def errors(self) -> dict[str, OutputError]:
        """How far each output is from the baseline's; raises NotMeasured."""
        return {error.name: error for error in compare_outputs(self.reference, self.result)}

    @cached_property
    def tolerance(self) -> float:
        """The relative difference that rounding explains."""
        return max(TOLERANCE, NOISE_FACTOR * self.runner.noise(self.candidate, self.feeds[:_BENCHED]))

    @cached_property
    def weights(self) -> Weights:
        """The candidate's weights as they are when it runs."""
        return decoded_weights(self.candidate, self.feeds[0])

    @cached_property
    def timing(self) -> BenchReport:
        """Both models timed in turn.

        Raises:
            NotMeasured: The candidate does not run.
        """
        if self.problem:
            raise NotMeasured(f"the candidate was not timed: {self.problem}")
        budget = self.config.budgets.latency
        few = Dataset(self.feeds[:_BENCHED], None, self.data.source, self.data.random)
        return bench(
            self.baseline_path,
            self.candidate_path,
            few,
            runs=budget.pairs if budget else _FEW_PAIRS,
            threads=budget.threads if budget else 1,
            progress=self.progress,
        )

    def notice(self, text: str) -> None:
        """Add a notice once."""
        text = one_line(text, 600)
        if text not in self.notices:
            self.notices.append(text)
