"""SARIF 2.1.0: a rule for each budget, a result for each verdict, nodes as logical locations."""

from __future__ import annotations

import json
from typing import Any

from onnxslim_lab.gate.outputs.plain import fingerprint, line, uri
from onnxslim_lab.gate.result import CAUSES, BudgetResult, GateReport

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LOCATIONS = 20  # nodes named in a result


def sarif(report: GateReport) -> str:
    """Return the report as SARIF; passed budgets are results of the kind "pass"."""
    rules = list(dict.fromkeys(line(item.budget, 500) for item in report.budgets))
    kinds = {line(item.budget, 500): item.kind for item in report.budgets}
    run = {
        "tool": {
            "driver": {
                "name": "onnxslim-lab gate",
                "version": line(report.tool_version),
                "rules": [
                    {
                        "id": rule,
                        "shortDescription": {"text": f"Budget {rule}"},
                        "fullDescription": {"text": f"Fails when: {CAUSES[kinds[rule]]}"},
                        "properties": {"cause": kinds[rule]},
                    }
                    for rule in rules
                ],
            }
        },
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": True,
                "exitCode": report.exit_code,
                "startTimeUtc": f"{report.started}Z",
                "toolExecutionNotifications": [
                    {"level": "warning", "message": {"text": line(text)}} for text in report.notices
                ],
            }
        ],
        "results": [_result(report, item, rules) for item in report.budgets],
    }
    return (
        json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=True) + "\n"
    )


def _result(report: GateReport, item: BudgetResult, rules: list[str]) -> dict[str, Any]:
    rule = line(item.budget, 500)
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": uri(report.candidate)}, "region": {"startLine": 1}}
    }
    if item.where:
        location["logicalLocations"] = [
            {"name": line(name, 500), "kind": "member"} for name in item.where[:_LOCATIONS]
        ]
    found: dict[str, Any] = {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "message": {"text": line(f"{item.budget}: {item.cause}")},
        "locations": [location],
        "partialFingerprints": {"budget/v1": fingerprint(report, item)},
        "properties": {
            "status": item.status,
            **{
                key: value
                for key in ("observed", "limit", "bound", "samples", "needed", "method")
                if (value := _plain(getattr(item, key))) is not None
            },
        },
    }
    if item.status == "pass":
        return found | {"kind": "pass", "level": "none"}
    if not report.counts(item):
        return found | {"kind": "fail", "level": "warning"}
    return found | {"kind": "fail", "level": "error"}


def _plain(value: Any) -> Any:
    """Return a figure that JSON can say: Inf and NaN as text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):  # noqa: PLR0124
        return str(value)
    return line(value) if isinstance(value, str) else value
