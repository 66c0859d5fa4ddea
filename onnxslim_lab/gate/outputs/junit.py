"""JUnit XML: one test case for each budget, as the schema of Ant's JUnit reports wants it."""

from __future__ import annotations

import platform
from xml.etree import ElementTree as ET

from onnxslim_lab.gate.outputs.plain import line
from onnxslim_lab.gate.result import GateReport

_SUITE = "onnxslim-lab.gate"


def junit(report: GateReport) -> str:
    """Return the report as JUnit XML; an undecided budget is an error where it counts, else it passes."""
    failures, undecided = report.of("fail"), report.of("undecided")
    counted = [item for item in undecided if report.counts(item)]
    root = ET.Element("testsuites")
    suite = ET.SubElement(
        root,
        "testsuite",
        {
            "name": "gate",
            "package": _SUITE,
            "id": "0",
            "timestamp": report.started,
            "hostname": line(platform.node(), 200) or "localhost",
            "tests": str(len(report.budgets)),
            "failures": str(len(failures)),
            "errors": str(len(counted)),
            "time": f"{report.seconds:.3f}",
        },
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("candidate", report.candidate),
        ("baseline", report.baseline),
        ("config", report.config),
        ("confidence", f"{report.confidence:g}"),
        ("tool_version", report.tool_version),
    ):
        ET.SubElement(properties, "property", {"name": name, "value": line(value)})
    for item in report.budgets:
        case = ET.SubElement(
            suite,
            "testcase",
            {"name": line(item.budget, 500), "classname": f"{_SUITE}.{item.kind}", "time": "0"},
        )
        if report.counts(item):
            what = "failure" if item.status == "fail" else "error"
            problem = ET.SubElement(
                case, what, {"message": line(item.cause), "type": f"{item.kind}.{item.status}"}
            )
            problem.text = "\n".join(
                [line(item.cause), *(f"at {line(name, 500)}" for name in item.where[:20])]
            )
    told = [f"{line(item.budget, 500)}: {item.status}: {line(item.cause)}" for item in report.budgets]
    ET.SubElement(suite, "system-out").text = "\n".join(told)
    ET.SubElement(suite, "system-err").text = "\n".join(map(line, report.notices))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
