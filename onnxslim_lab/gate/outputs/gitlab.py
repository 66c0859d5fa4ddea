"""GitLab: the JSON of its code quality reports."""

from __future__ import annotations

import json

from onnxslim_lab.gate.outputs.plain import fingerprint, line, relative_path
from onnxslim_lab.gate.result import GateReport


def code_quality(report: GateReport) -> str:
    """Return the budgets that did not pass as code quality issues: critical, major, or minor for warnings."""
    path = relative_path(report.candidate)
    found = [
        {
            "description": line(f"{item.budget}: {item.cause}"),
            "check_name": line(item.budget, 200),
            "fingerprint": fingerprint(report, item),
            "severity": "critical" if item.status == "fail" else "major" if report.counts(item) else "minor",
            "location": {"path": line(path), "lines": {"begin": 1}},
        }
        for item in report.budgets
        if item.status != "pass"
    ]
    return json.dumps(found, indent=2, ensure_ascii=True) + "\n"
