"""One thing that a target will not do well with a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

Severity = Literal["fails", "float", "slow", "inaccurate"]
"""fails: is refused, stops, or gives wrong results; float: runs, but not in integers; slow; inaccurate."""

SEVERITIES: tuple[Severity, ...] = ("fails", "inaccurate", "float", "slow")


class Finding(BaseModel):
    """What a target will not run, not fuse, or run badly.

    Attributes:
        kind: A stable word for what is wrong, such as "float-output".
        severity: What it leads to.
        nodes: Names of the nodes concerned (of their first output where they have none).
        op_type: Their operator; "" when it is about the model.
        what: What is wrong, and what the target does about it.
        remedy: What to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    severity: Severity
    nodes: tuple[str, ...]
    op_type: str
    what: str
    remedy: str


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with those that differ only in their nodes made one, gravest first."""
    groups: dict[tuple[str, str, str, str, str], list[str]] = {}
    for item in findings:
        key = (item.kind, item.severity, item.op_type, item.what, item.remedy)
        groups.setdefault(key, []).extend(item.nodes)
    result = [
        Finding.model_validate(
            {"kind": k[0], "severity": k[1], "nodes": nodes, "op_type": k[2], "what": k[3], "remedy": k[4]}
        )
        for k, nodes in groups.items()
    ]
    return sorted(result, key=lambda item: SEVERITIES.index(item.severity))
