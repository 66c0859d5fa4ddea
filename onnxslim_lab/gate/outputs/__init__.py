"""A gate report as text for people and for CI: JSON, JUnit, SARIF, GitHub, GitLab."""

from collections.abc import Callable

from onnxslim_lab.gate.outputs.github import summary, workflow_commands
from onnxslim_lab.gate.outputs.gitlab import code_quality
from onnxslim_lab.gate.outputs.junit import junit
from onnxslim_lab.gate.outputs.sarif import sarif
from onnxslim_lab.gate.result import GateReport

FORMATS: dict[str, Callable[[GateReport], str]] = {
    "json": lambda report: report.to_json() + "\n",
    "junit": junit,
    "sarif": sarif,
    "github": workflow_commands,
    "summary": summary,
    "gitlab": code_quality,
}
"""Each format by its name on the command line."""
