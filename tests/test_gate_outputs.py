"""What the gate writes: valid by the published schemas, and harmless whatever a model's names are."""

import json
import re
from html import unescape
from io import StringIO
from urllib.parse import unquote

import pytest
from gate_reports import HOSTILE, hostile, item, junit_schema, report, sarif_schema
from lxml import etree
from rich.console import Console

from onnxslim_lab.errors import SaveError
from onnxslim_lab.gate.outputs import FORMATS
from onnxslim_lab.gate.outputs.table import table
from onnxslim_lab.gate.result import CAUSES, EXIT_CODES, GateReport
from onnxslim_lab.gate.writing import write_atomic

REPORTS = {
    "hostile": hostile(),
    "passed": report(item(), item("parameters")),
    "empty": report(),
    "warned": report(item("top1", "undecided", "quality"), undecided="warning"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_junit_is_valid(name):
    text = FORMATS["junit"](REPORTS[name])
    tree = etree.fromstring(text.encode())
    assert junit_schema().validate(tree), junit_schema().error_log
    suite = tree[0]
    cases = suite.findall("testcase")
    assert len(cases) == int(suite.get("tests")) == len(REPORTS[name].budgets)
    assert len(suite.findall("testcase/failure")) == int(suite.get("failures"))
    assert len(suite.findall("testcase/error")) == int(suite.get("errors"))


def test_the_junit_schema_can_refuse():
    text = FORMATS["junit"](REPORTS["passed"]).replace(' hostname="', ' host="')
    assert not junit_schema().validate(etree.fromstring(text.encode()))


@pytest.mark.parametrize("name", REPORTS)
def test_sarif_is_valid(name):
    log = json.loads(FORMATS["sarif"](REPORTS[name]))
    assert list(sarif_schema().iter_errors(log)) == []
    run = log["runs"][0]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert re.fullmatch(r"[A-Za-z0-9._~/%-]*", uri)
    assert run["invocations"][0]["exitCode"] == REPORTS[name].exit_code


def test_the_sarif_schema_can_refuse():
    log = json.loads(FORMATS["sarif"](REPORTS["passed"]))
    log["runs"][0]["results"][0]["level"] = "grave"
    assert list(sarif_schema().iter_errors(log))


def test_sarif_names_path_and_levels():
    log = json.loads(
        FORMATS["sarif"](report(item(status="fail", where=("conv",)), item("macs", "undecided")))
    )
    first, second = log["runs"][0]["results"]
    assert unquote(first["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]).endswith(
        "mödel:1,2.onnx"
    )
    assert first["locations"][0]["logicalLocations"][0]["name"] == "conv"
    assert (first["level"], second["level"]) == ("error", "error")
    log = json.loads(FORMATS["sarif"](REPORTS["warned"]))
    assert log["runs"][0]["results"][0]["level"] == "warning"


def test_github_commands_are_escaped():
    text = FORMATS["github"](hostile())
    lines = text.splitlines()
    assert len(lines) == 2 * len(HOSTILE) == text.count("\n")
    for line in lines:
        found = re.fullmatch(r"::(error|warning) file=([^:,]*),title=([^:,]*)::(.*)", line)
        assert found, line
        assert not re.search(r"[\r\n]", line)
        assert re.search(r"%(?!25|0D|0A|3A|2C)", line) is None
    assert "%25" in FORMATS["github"](report(item(status="fail", cause="5% over")))
    assert FORMATS["github"](REPORTS["passed"]).startswith("::notice ")
    assert FORMATS["github"](REPORTS["warned"]).startswith("::warning ")


def test_summary_shows_names_as_text():
    text = FORMATS["summary"](hostile())
    assert "<script" not in text
    assert "\x1b" not in text
    assert "](http" not in text
    assert "@someone" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3 * len(HOSTILE)
    assert {row.replace("\\|", "").count("|") for row in rows} == {8}
    assert "<script>alert(1)</script>" in unescape(text)


def test_gitlab_issues():
    found = json.loads(FORMATS["gitlab"](hostile()))
    assert len(found) == 2 * len(HOSTILE)
    for issue in found:
        assert issue.keys() == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in {"info", "minor", "major", "critical", "blocker"}
        assert issue["location"]["lines"]["begin"] == 1
    two = json.loads(FORMATS["gitlab"](report(item("a", "fail"), item("b", "undecided"), item("c"))))
    assert [issue["severity"] for issue in two] == ["critical", "major"]
    assert len({issue["fingerprint"] for issue in two}) == 2
    again = json.loads(FORMATS["gitlab"](report(item("a", "fail", cause="another figure"))))
    assert again[0]["fingerprint"] == two[0]["fingerprint"]


def test_table_shows_names_as_text():
    console = Console(file=StringIO(), width=160, force_terminal=False)
    console.print(table(hostile()))
    shown = console.file.getvalue()
    assert "[red]rich" in shown
    assert "\x1b" not in shown
    assert "NOT ship" in shown


def test_json_is_read_back():
    text = FORMATS["json"](REPORTS["warned"])
    assert GateReport.model_validate_json(text) == REPORTS["warned"]
    assert (
        json.loads(FORMATS["json"](report(item(observed=float("inf")))))["budgets"][0]["observed"]
        == "Infinity"
    )


def test_every_format_stays_small():
    for name, write in FORMATS.items():
        if name != "json":
            assert len(write(hostile())) < 250_000, name


def test_exit_codes():
    assert EXIT_CODES.keys() == CAUSES.keys()
    assert len({*EXIT_CODES.values(), 0, 1, 2, 3, 20}) == len(EXIT_CODES) + 5
    assert report(item()).exit_code == 0
    for kind, code in EXIT_CODES.items():
        assert report(item(), item(status="fail", kind=kind)).exit_code == code
    assert report(item(status="fail", kind="size"), item(status="fail", kind="values")).exit_code == 12
    assert report(item(status="undecided")).exit_code == 20
    assert report(item(status="undecided"), undecided="warning").exit_code == 0
    assert report(item(status="undecided"), item(status="fail")).exit_code == EXIT_CODES["size"]


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "gate.xml"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["gate.xml"]
