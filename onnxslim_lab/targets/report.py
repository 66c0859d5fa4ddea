"""What a target makes of a model, as a report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.markup import escape

from onnxslim_lab.errors import one_line
from onnxslim_lab.targets.finding import SEVERITIES, Finding, Severity

SCHEMA_VERSION = 1
_SHOWN = 6  # nodes named in a line
_COLOURS: dict[Severity, str] = {"fails": "red", "inaccurate": "yellow", "float": "yellow", "slow": "cyan"}


class TargetReport(BaseModel):
    """What a target makes of a model.

    Attributes:
        target: The profile.
        notice: Why this profile, where it was not named.
        data: Where the data came from on which saturation was looked for; None without data.
        random: Whether that data was made up.
        groups: Nodes between DQ and Q, or with quantized activations, that were looked at.
        integer: How many of these run in integers.
        findings: What is wrong, gravest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    target: str
    notice: str
    data: str | None
    random: bool
    groups: int
    integer: int
    findings: list[Finding]

    @property
    def runs(self) -> bool:
        """Whether nothing was found that the target refuses or gets wrong."""
        return all(finding.severity != "fails" for finding in self.findings)

    def table(self) -> Group:
        """Return what a person wants to see."""
        lines: list[str] = [escape(self.notice)] if self.notice else []
        for finding in self.findings:
            named = ", ".join(one_line(name, 40) for name in finding.nodes[:_SHOWN])
            more = len(finding.nodes) - _SHOWN
            where = " ".join(
                filter(None, (finding.op_type, named + (f" and {more} more" if more > 0 else "")))
            )
            lines.append(
                f"[{_COLOURS[finding.severity]}]{finding.severity:<10}[/] {escape(where or 'the model')}\n"
                f"{'':<11}{escape(finding.what)}\n{'':<11}remedy: {escape(finding.remedy)}"
            )
        if self.random:
            lines.append("[yellow]saturation on RANDOM data; give --data for a real check[/yellow]")
        counts = {kind: sum(f.severity == kind for f in self.findings) for kind in SEVERITIES}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "nothing found"
        lines.append(f"{told}; {self.integer} of {self.groups} quantized nodes run in integers")
        return Group(*lines)
