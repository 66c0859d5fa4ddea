"""A pytest plugin: `pytest --onnx-gate gate.yaml` collects one test for each budget of the gate.

Nothing but pytest is imported, and nothing done, by runs that do not use the option.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from onnxslim_lab.gate.result import BudgetResult, GateReport

_OPTIONS = {
    "onnx_candidate": "the .onnx file that is to ship",
    "onnx_baseline": "the .onnx file it replaces",
    "onnx_data": "inputs and labels, as `onnxslim-lab gate --data`; without it random inputs are made",
}


class BudgetFailed(Exception):  # noqa: N818 - a verdict, not an error
    """A budget holds the candidate back."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; those that name files can also stand in pytest's configuration, relative to it."""
    group = parser.getgroup("onnx", "the gate for ONNX models (onnxslim_lab)")
    group.addoption("--onnx-gate", metavar="FILE", help="budgets; each becomes a test")
    for name, text in _OPTIONS.items():
        group.addoption(f"--{name.replace('_', '-')}", metavar="PATH", help=text)
        parser.addini(name, text, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Let the configuration be collected, whatever else is."""
    given = config.getoption("--onnx-gate")
    if given:
        path = Path(given)
        if not path.is_file():
            raise pytest.UsageError(f"--onnx-gate: no file {given!r}")
        if str(path.resolve()) not in config.args:
            config.args.append(str(path.resolve()))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> GateFile | None:
    """Collect the configuration that the option names."""
    given = parent.config.getoption("--onnx-gate")
    if given and file_path == Path(given).resolve():
        collected: GateFile = GateFile.from_parent(parent, path=file_path)
        return collected
    return None


class GateFile(pytest.File):
    """A gate configuration; the gate runs once, when the first of its tests does."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield a test for each budget, and one for what is judged always."""
        from onnxslim_lab.gate.config import GateConfig, GateConfigError  # noqa: PLC0415 - see above
        from onnxslim_lab.gate.keys import budget_prefixes  # noqa: PLC0415

        try:
            budgets = GateConfig.load(self.path).budgets
        except GateConfigError as error:
            raise self.CollectError(str(error)) from error
        self.prefixes = budget_prefixes(budgets)
        for prefix in ("runs", *self.prefixes):
            yield BudgetItem.from_parent(self, name=prefix)

    def setting(self, name: str) -> str:
        """Return what an option or pytest's configuration says."""
        given = self.config.getoption(f"--{name.replace('_', '-')}")
        if given:
            return str(given)
        text = str(self.config.getini(name))
        if not text or self.config.inipath is None:
            return text
        beside = self.config.inipath.parent / text
        return str(beside) if beside.exists() else text

    @cached_property
    def report(self) -> GateReport:
        """What the gate found."""
        from onnxslim_lab.gate.config import GateConfig  # noqa: PLC0415 - see above
        from onnxslim_lab.gate.lock import NAME, Lock  # noqa: PLC0415
        from onnxslim_lab.gate.run import run_gate  # noqa: PLC0415

        paths = {name: self.setting(name) for name in _OPTIONS}
        for name in ("onnx_candidate", "onnx_baseline"):
            if not paths[name]:
                option = name.replace("_", "-")
                raise pytest.UsageError(f"give --{option} PATH, or {name} in pytest's configuration")
        lock = self.path.parent / NAME
        return run_gate(
            Path(paths["onnx_candidate"]),
            Path(paths["onnx_baseline"]),
            GateConfig.load(self.path),
            config_name=str(self.path),
            data=paths["onnx_data"] or None,
            lock=Lock.load(lock) if lock.exists() else None,
        )

    def results(self, prefix: str) -> list[BudgetResult]:
        """Return the verdicts of a budget; under "runs" also those that no budget asked for."""
        found = []
        for item in self.report.budgets:
            owner = max((p for p in self.prefixes if _is_under(item.budget, p)), key=len, default="runs")
            if owner == prefix:
                found.append(item)
        return found


class BudgetItem(pytest.Item):
    """One budget."""

    def runtest(self) -> None:
        """Fail where the gate would; warn of what is undecided and does not count."""
        file = self.parent
        assert isinstance(file, GateFile)
        results = file.results(self.name)
        if not results and self.name != "runs":
            causes = (
                "; ".join(item.cause for item in file.results("runs")) or "the gate gave no verdict on it"
            )
            raise BudgetFailed(f"not judged: {causes}")
        held = [item for item in results if file.report.counts(item)]
        if held:
            raise BudgetFailed("\n".join(f"{item.budget}: {item.status}: {item.cause}" for item in held))
        for item in results:
            if item.status != "pass":
                warnings.warn(
                    pytest.PytestWarning(f"{item.budget}: {item.status}: {item.cause}"), stacklevel=1
                )

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the cause without a traceback, which says nothing to whoever reads it."""
        from onnxslim_lab.errors import LabError  # noqa: PLC0415 - see above

        if isinstance(excinfo.value, (BudgetFailed, LabError, pytest.UsageError)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return where it comes from."""
        return self.path, None, f"budget {self.name}"


def _is_under(budget: str, prefix: str) -> bool:
    return budget == prefix or budget.startswith(f"{prefix}.")
