"""GitHub: annotations as workflow commands, and a step summary in Markdown."""

from __future__ import annotations

import html

from onnxslim_lab.gate.outputs.plain import headline, line, relative_path
from onnxslim_lab.gate.result import GateReport, number

_MARKS = {"pass": "✅", "fail": "❌", "undecided": "⚠️"}
_SPECIAL = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_{}[]!|~@$"}  # to Markdown; HTML is escaped before


def workflow_commands(report: GateReport) -> str:
    """Return one workflow command for each budget that did not pass, and a notice when all did."""
    file = escape_property(line(relative_path(report.candidate)))
    commands = []
    for item in report.budgets:
        if item.status != "pass":
            level = "error" if report.counts(item) else "warning"
            title = escape_property(headline(item))
            commands.append(f"::{level} file={file},title={title}::{escape_data(line(item.cause))}")
    if not commands:
        told = escape_data(f"all {len(report.budgets)} budgets passed")
        commands.append(f"::notice file={file},title=gate::{told}")
    return "\n".join(commands) + "\n"


def escape_data(text: str) -> str:
    r"""Return text for the message of a workflow command.

    >>> escape_data("100%\n")
    '100%25%0A'
    """
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Return text for a property of a workflow command.

    >>> escape_property("a:b,c")
    'a%3Ab%2Cc'
    """
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def summary(report: GateReport) -> str:
    """Return a step summary: the verdict, then the budgets that did not pass first."""
    verdict = "passed" if report.passed else "failed"
    mark = _MARKS["pass" if report.passed else "fail"]
    lines = [f"## {mark} Gate {verdict}: {markdown(relative_path(report.candidate))}", ""]
    lines += [f"against {markdown(relative_path(report.baseline))}, confidence {report.confidence:g}", ""]
    lines += [
        "| | budget | observed | bound | limit | samples | cause |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for status in ("fail", "undecided", "pass"):
        for item in report.of(status):
            figures = (number(value, item.unit) for value in (item.observed, item.bound, item.limit))
            cells = [
                markdown(item.budget),
                *map(markdown, figures),
                str(item.samples or ""),
                markdown(item.cause),
            ]
            lines.append(f"| {_MARKS[status]} | {' | '.join(cells)} |")
    lines += [f"\n> {markdown(text)}" for text in report.notices]
    return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is: neither markup, HTML, links nor mentions.

    >>> markdown("<b>|x|")
    '&lt;b&gt;&#124;x&#124;'
    """
    return html.escape(line(text, 600), quote=True).replace("&#x27;", "'").translate(_SPECIAL)
