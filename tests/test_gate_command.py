"""The gate as a CI job calls it."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import typer
from gate_reports import junit_schema, sarif_schema
from lxml import etree
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from onnxslim_lab.cli import app, main
from onnxslim_lab.gate.result import EXIT_CODES

HOSTILE = "a|b<script>\n::error::x%"


def network(scale=1.0, node="dense"):
    weight = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32) * np.float32(scale)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], node)],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 8])],
        [helper.make_tensor_value_info("y", 1, ["n", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def folder(tmp_path):
    onnx.save(network(), tmp_path / "base.onnx")
    onnx.save(network(node="other"), tmp_path / "same.onnx")
    onnx.save(network(-1.0, HOSTILE), tmp_path / "bad.onnx")
    x = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    (tmp_path / "gate.yaml").write_text(
        "budgets: {agreement: {least: 0.98}, output_error: [{relative: 0.01}], operators: [MatMul], file_bytes: 2kB}\n"
    )
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """A function that runs the command in the folder, in this process, and returns what it printed."""
    monkeypatch.chdir(folder)

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["onnxslim-lab", "gate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capfd.readouterr()
        assert (ended.value.code or 0) == code, told.out + told.err
        return told

    return call


def test_pass_and_lock(folder, run):
    plain = run("same.onnx", "-b", "base.onnx", "--data", "data.npz", "--update-baseline")
    assert "may ship" in plain.out
    lock = json.loads((folder / "onnxslim-lab.lock").read_text())
    assert lock["figures"]["agreement.least"]["observed"] == 1.0
    lock["figures"]["file_bytes"]["observed"] -= 1
    (folder / "onnxslim-lab.lock").write_text(json.dumps(lock))
    drift = run("same.onnx", "-b", "base.onnx", "--data", "data.npz", "--json", code=EXIT_CODES["drift"])
    found = {item["budget"]: item for item in json.loads(drift.out)["budgets"]}
    assert found["drift.file_bytes"]["status"] == "fail"


def test_a_bad_candidate_in_every_format(folder, run):
    outputs = ["junit=j.xml", "sarif=s.sarif", "github=g.txt", "summary=s.md", "gitlab=q.json", "json=r.json"]
    options = [part for text in outputs for part in ("-o", text)]
    run(
        "bad.onnx",
        "-b",
        "base.onnx",
        "--data",
        "data.npz",
        *options,
        "-q",
        code=EXIT_CODES["quality"],
    )
    tree = etree.parse(folder / "j.xml")
    assert junit_schema().validate(tree), junit_schema().error_log
    assert tree.getroot()[0].get("failures") == "2"
    assert not list(sarif_schema().iter_errors(json.loads((folder / "s.sarif").read_text())))
    assert len(json.loads((folder / "q.json").read_text())) == 2
    commands = (folder / "g.txt").read_text().splitlines()
    assert len(commands) == 2
    assert all(line.startswith("::error file=bad.onnx,title=") for line in commands)
    assert "<script>" not in (folder / "s.md").read_text()
    assert json.loads((folder / "r.json").read_text())["schema_version"] == 1
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_the_exit_code_reaches_the_shell(folder):
    arguments = ["bad.onnx", "-b", "base.onnx", "--data", "data.npz", "-q"]
    done = subprocess.run([sys.executable, "-m", "onnxslim_lab", "gate", *arguments], cwd=folder, check=False)
    assert done.returncode == EXIT_CODES["quality"]


def test_undecided_is_a_failure_unless_asked(folder, run):
    few = ["same.onnx", "-b", "base.onnx", "--data", "data.npz", "--limit", "50"]
    done = run(*few, code=20)
    assert "more samples" in done.out
    run(*few, "--undecided", "warning")
    run(*few, "--minimum-samples", "60", "--confidence", "0.5", code=20)
    run(*few, "--confidence", "0.5")


def test_a_broken_candidate_has_a_verdict(folder, run):
    (folder / "bad.onnx").write_bytes((folder / "bad.onnx").read_bytes()[:-40])
    run("bad.onnx", "-b", "base.onnx", "--data", "data.npz", "-o", "junit=j.xml", code=EXIT_CODES["runs"])
    assert etree.parse(folder / "j.xml").find(".//failure").get("type") == "runs.fail"


def test_bad_usage_is_one_line(folder, run):
    for arguments, message in (
        (["same.onnx", "-b", "base.onnx", "-c", "none.yaml"], "cannot read gate configuration"),
        (["same.onnx", "-b", "base.onnx", "-o", "junt=x"], "did you mean 'junit'?"),
        (["same.onnx", "-b", "base.onnx", "-o", "junit=no/x"], "no such folder"),
        (["base.onnx", "-b", "base.onnx"], "same file"),
        (["none.onnx", "-b", "base.onnx"], "no such file"),
        (["same.onnx", "-b", "none.onnx"], "cannot read"),
        (["same.onnx", "-b", "base.onnx", "--lock", "no.lock"], "cannot read lock file"),
    ):
        done = run(*arguments, code=2)
        assert message in done.err
        assert done.err.count("\n") == 1


def test_help_lists_every_exit_code(folder, run):
    text = run("--help").out
    for code in EXIT_CODES.values():
        assert f"\n  {code}  " in text


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_help_shows_examples_as_lines(command):
    shown = CliRunner().invoke(app, [command, "--help"]).output
    assert "\\b" not in shown
    assert "\b" not in shown


def test_the_example_and_the_schema_need_no_model(folder, run):
    assert "file_bytes: 5MB" in run("--example").out
    assert json.loads(run("--schema").out)["title"] == "GateConfig"
