"""The lock file: what was measured when a candidate was accepted, so that later runs see a drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from onnxslim_lab.errors import ParameterError, one_line, quote
from onnxslim_lab.gate.result import BudgetResult, GateReport, number
from onnxslim_lab.gate.writing import write_atomic

NAME = "onnxslim-lab.lock"
_LARGEST_FILE = 1 << 20
_ROUNDING = 1e-3  # relative difference of a figure that other kernels may compute a little differently


class LockError(ParameterError):
    """A lock file cannot be used."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Figure(_Part):
    """What was measured for a budget; see `BudgetResult`."""

    observed: float
    bound: float | None
    unit: str
    samples: int | None
    better: Literal["less", "more"]


class Lock(_Part):
    """A lock file."""

    version: Literal[1] = 1
    tool_version: str
    baseline_sha256: str
    data: str | None
    figures: dict[str, Figure]

    @classmethod
    def of(cls, report: GateReport) -> Lock:
        """Return what a report measured."""
        figures = {
            item.budget: Figure(
                observed=item.observed,
                bound=item.bound,
                unit=item.unit,
                samples=item.samples,
                better=item.better,
            )
            for item in report.budgets
            if isinstance(item.observed, float | int) and item.kind != "drift"
        }
        return cls(
            tool_version=report.tool_version,
            baseline_sha256=report.baseline_sha256,
            data=None if report.data is None else report.data.source,
            figures=dict(sorted(figures.items())),
        )

    @classmethod
    def load(cls, path: Path) -> Lock:
        """Read a lock file; raises LockError."""
        where = f"lock file {quote(str(path))}"
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise LockError(f"{where} is larger than {_LARGEST_FILE} bytes")
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise LockError(f"cannot read {where}: {reason}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"])) or "the file"
            raise LockError(
                f"{where}: {one_line(place)}: {problem['msg']}; write it anew with --update-baseline"
            ) from error

    def save(self, path: Path) -> None:
        """Write the lock file atomically; raises SaveError."""
        write_atomic(path, self.model_dump_json(indent=2) + "\n")

    def differences(self, baseline_sha256: str, data: str) -> list[str]:
        """Return what the figures were measured on that is not so now."""
        found = []
        if baseline_sha256 != self.baseline_sha256:
            found.append("the lock file was written with another baseline: --update-baseline renews it")
        if data != self.data:
            found.append(f"the lock file was written on other data: {one_line(str(self.data))}")
        return found


def check_drift(lock: Lock, results: Sequence[BudgetResult]) -> Iterator[BudgetResult]:
    """Yield a verdict for each figure of the lock file: worse than it was, or not measured any more.

    A statistical figure drifts when it is beyond the bound it had; one that is computed, when it differs; one
    that was timed once, when it is worse by more than a third.
    """
    now = {item.budget: item for item in results}
    for key, before in lock.figures.items():
        item = now.get(key)
        if item is None or not isinstance(item.observed, float | int):
            cause = f"{key} was {number(before.observed, before.unit)} and is not measured any more"
            yield BudgetResult(budget=f"drift.{key}", kind="drift", status="undecided", cause=cause)
            continue
        allowed = _allowed(before, timed=item.kind == "speed")
        worse = item.observed > allowed if before.better == "less" else item.observed < allowed
        told = f"{key} was {number(before.observed, before.unit)} and is {number(item.observed, item.unit)}"
        more = f"; up to {number(allowed, before.unit)} is no drift" if before.better == "less" else ""
        more = f"; down to {number(allowed, before.unit)} is no drift" if before.better == "more" else more
        yield BudgetResult(
            budget=f"drift.{key}",
            kind="drift",
            status="fail" if worse else "pass",
            cause=told + (f"{more}: --update-baseline accepts it" if worse else ""),
            observed=float(item.observed),
            limit=allowed,
            unit=item.unit,
            samples=item.samples,
            better=before.better,
        )


def _allowed(before: Figure, *, timed: bool) -> float:
    """Return the worst figure that is no drift."""
    sign = 1.0 if before.better == "less" else -1.0
    if before.bound is not None:
        reach = abs(before.bound - before.observed)
        return before.observed + sign * reach
    share = 1 / 3 if timed else 0.0 if before.unit == "bytes" or before.samples is None else _ROUNDING
    return before.observed + sign * share * abs(before.observed)
