"""What the gate found: a verdict for each budget, the gate's own verdict, and its exit code."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from onnxslim_lab.report import DataReport

SCHEMA_VERSION: Literal[1] = 1

Status = Literal["pass", "fail", "undecided"]
Cause = Literal[
    "runs", "interface", "values", "quality", "target", "size", "speed", "coverage", "origin", "drift"
]

EXIT_CODES: dict[Cause, int] = {
    "runs": 10,
    "interface": 11,
    "values": 12,
    "quality": 13,
    "target": 14,
    "size": 15,
    "speed": 16,
    "coverage": 17,
    "origin": 18,
    "drift": 19,
}
"""What the command returns when a budget of this class fails; of several classes, the first listed."""
UNDECIDED_EXIT = 20

CAUSES: dict[Cause, str] = {
    "runs": "the candidate does not load or run",
    "interface": "inputs, outputs or open dimensions changed",
    "values": "NaN or Inf, or the two engines disagree",
    "quality": "metrics, agreement or output error",
    "target": "operators, domains, opset, types or the target's profile",
    "size": "file, transfer, parameters or multiply-accumulates",
    "speed": "latency, memory or load time",
    "coverage": "too little is quantized or pruned",
    "origin": "provenance, or random data",
    "drift": "a figure left what the lock file holds",
}


def _encodable(text: str) -> str:
    """Return text without lone surrogates, which file names can hold and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


Text = Annotated[str, AfterValidator(_encodable)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class BudgetResult(_Part):
    """The verdict on one budget.

    Attributes:
        budget: Its key in the configuration, such as "metrics.top1.drop".
        kind: The class of cause that its failure is.
        status: The verdict.
        cause: Why it failed or is undecided, in one line; what was found when it passed.
        observed, limit, bound: The figure, what it must keep to, and its one-sided confidence bound where the
            figure is statistical: upper where less is better, and to the wrong side when it fails.
        unit: Of the three: "", "bytes", "ms", "dB".
        samples: That the figure rests on; None where it rests on none.
        needed: Samples at which the verdict would fall if the rates stay as observed; None when unknown.
        method: How the bound was made.
        better: Which figures are better; the lock file knows by it what is worse.
        where: Nodes, values or operators concerned, as named in the model.
    """

    budget: Text
    kind: Cause
    status: Status
    cause: Text
    observed: float | str | None = None
    limit: float | str | None = None
    bound: float | None = None
    unit: str = ""
    samples: int | None = None
    needed: int | None = None
    method: str = ""
    better: Literal["less", "more"] = "less"
    where: tuple[Text, ...] = ()

    @classmethod
    def unmeasured(cls, budget: str, kind: Cause, error: Exception) -> BudgetResult:
        """Return that a budget is undecided because what it limits could not be measured."""
        return cls(budget=budget, kind=kind, status="undecided", cause=str(error))


class GateReport(_Part):
    """All verdicts on a candidate."""

    schema_version: Literal[1] = SCHEMA_VERSION
    tool_version: str
    candidate: Text
    baseline: Text
    baseline_sha256: str
    config: Text
    confidence: float
    undecided: Literal["failure", "warning"]
    started: str = Field(description="UTC, ISO 8601 to the second")
    seconds: float
    data: DataReport | None
    budgets: tuple[BudgetResult, ...]
    notices: tuple[Text, ...] = ()

    def of(self, status: Status) -> tuple[BudgetResult, ...]:
        """Return the budgets with this verdict."""
        return tuple(item for item in self.budgets if item.status == status)

    @property
    def passed(self) -> bool:
        """Whether the candidate may ship."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """What the command returns."""
        failed = {item.kind for item in self.of("fail")}
        for kind, code in EXIT_CODES.items():
            if kind in failed:
                return code
        return UNDECIDED_EXIT if self.of("undecided") and self.undecided == "failure" else 0

    def counts(self, item: BudgetResult) -> bool:
        """Whether a budget holds the candidate back."""
        return item.status == "fail" or (item.status == "undecided" and self.undecided == "failure")

    def to_json(self) -> str:
        """Return the report as JSON; `GateReport.model_validate_json` reads it back."""
        return self.model_dump_json(indent=2)


def number(value: float | str | None, unit: str = "") -> str:
    """Return a figure as a person reads it.

    >>> number(1234567, "bytes"), number(0.01234), number(None)
    ('1,234,567 bytes', '0.01234', '')
    """
    if value is None or isinstance(value, str):
        return value or ""
    whole = float(value).is_integer() and abs(value) < 1e15
    text = f"{int(value):,}" if whole else f"{value:.4g}"
    return f"{text} {unit}".strip()


def percent(share: float) -> str:
    """Return a share in percent.

    >>> percent(0.95), percent(0.9999)
    ('95 %', '99.99 %')
    """
    return f"{share * 100:.6g} %"
