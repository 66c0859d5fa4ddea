"""The command line as a person uses it."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from test_engine import network
from typer.testing import CliRunner

from onnxslim_lab.cli import app

HELP = ["optimize", "inspect", "compare", "passes", "recipe", "demo"]


def run(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "onnxslim_lab", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(network(), path)
    return path


@pytest.mark.parametrize("command", HELP)
def test_help_teaches(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert len(done.output) > 200


def test_optimize_inspect_compare(model, tmp_path):
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    done = run("optimize", model, "-o", out, "-p", "simplify", "-p", "prune:sparsity=0.8", "--report", report)
    assert "RANDOM" in done.stdout
    assert json.loads(report.read_text())["schema_version"] == 1
    inspection = json.loads(run("inspect", out, "--json").stdout)
    assert inspection["operators"]["MatMul"] == 2
    assert inspection["parameters"] == 2 * 64 * 64
    assert inspection["layers"][0]["density"] == pytest.approx(0.2, abs=0.1)
    assert "MatMul" in run("inspect", out).stdout
    done = run("compare", model, out, code=1)
    assert "first differing value: a" in done.stdout
    assert run("compare", model, model).returncode == 0


def test_quiet_prints_nothing(model, tmp_path):
    done = run("optimize", model, "-o", tmp_path / "o.onnx", "-q")
    assert done.stdout == done.stderr == ""


def test_data_and_metric(model, tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(50) % 64)
    done = run(
        "optimize",
        model,
        "--dry-run",
        "--data",
        tmp_path / "d.npz",
        "--eval",
        tmp_path / "d.npz",
        "--metric",
        "top1",
    )
    assert "top1" in done.stdout
    assert "RANDOM" not in done.stdout
    assert "nothing was saved" in done.stdout


def test_recipe_commands(model, tmp_path):
    recipe = tmp_path / "r.yaml"
    run("recipe", "init", recipe)
    run("recipe", "init", recipe, code=2)
    assert "prune" in run("recipe", "check", recipe).stdout
    assert json.loads(run("recipe", "schema").stdout)["title"] == "onnxslim_lab recipe"
    run("optimize", model, "--recipe", recipe, "-o", tmp_path / "o.onnx", "-q")


def test_passes_are_listed_and_explained():
    assert "fold-constants" in run("passes").stdout
    text = run("passes", "prune").stdout
    assert "sparsity" in text
    assert "refuses" in text
    assert json.loads(run("passes", "--json").stdout)[0]["name"] == "simplify"


WRONG = {
    ("optimize", "MODEL", "-o", "OUT", "-p", "simplfy"): "did you mean 'simplify'",
    ("optimize", "MODEL", "-o", "OUT", "-p", "prune:sparsty=1"): "did you mean 'sparsity'",
    ("optimize", "MODEL", "-o", "OUT", "-p", "prune:include=fisrt"): "'fisrt'",
    ("optimize", "MODEL", "-o", "OUT", "--data", "DATA", "--metric", "tpo1"): "did you mean 'top1'",
    ("optimize", "MODEL", "-o", "OUT", "--data", "BADDATA"): "did you mean 'x'",
    ("optimize", "MODEL", "-o", "OUT", "--dim", "m=3"): "choose from n",
    ("optimize", "MODEL", "-o", "OUT", "--memory", "lots"): "512MB",
    ("optimize", "MODEL"): "--dry-run",
    ("optimize", "nothing.onnx", "-o", "OUT"): "No such file",
    ("passes", "simplfy"): "did you mean 'simplify'",
    ("recipe", "check", "none.yaml"): "No such file",
    ("compare", "MODEL", "OTHER"): "is in one model only",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_mistake_gives_one_line_that_helps(arguments, model, tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 64), np.float32))
    np.savez(tmp_path / "bad.npz", xx=np.zeros((2, 64), np.float32))
    other = network()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    onnx.save(other, tmp_path / "other.onnx")
    places = {
        "MODEL": model,
        "OUT": tmp_path / "o.onnx",
        "DATA": tmp_path / "d.npz",
        "BADDATA": tmp_path / "bad.npz",
        "OTHER": tmp_path / "other.onnx",
    }
    done = run(*(places.get(word, word) for word in arguments), code=2)
    assert WRONG[arguments] in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o.onnx").exists()


def test_debug_shows_where():
    assert "Traceback" in run("--debug", "passes", "nothing", code=2).stderr


def test_demo():
    done = run("demo")
    assert "demo passed" in done.stdout
