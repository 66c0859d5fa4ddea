"""The gate where people work: GitHub, GitLab, pre-commit and pytest, each by running what it would run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from lxml import etree
from test_gate_command import network

REPOSITORY = Path(__file__).resolve().parent.parent
ACTION = yaml.safe_load((REPOSITORY / "action.yml").read_text())
GITLAB = yaml.safe_load((REPOSITORY / "onnxslim_lab" / "integrations" / "gitlab-ci.yml").read_text())[
    "onnx-gate"
]
HOOKS = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text())
PIP = {"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # what it depends on is here already
if int(version("setuptools").partition(".")[0]) >= 77:  # and so is what builds it; else pip fetches that
    PIP |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}


@pytest.fixture
def project(tmp_path):
    """A folder with models, data and budgets, as a repository that uses the gate has them."""
    folder = tmp_path / "it's a project"
    folder.mkdir()
    onnx.save(network(), folder / "base.onnx")
    onnx.save(network(node="other"), folder / "same.onnx")
    onnx.save(network(-1.0), folder / "bad.onnx")
    x = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    (folder / "gate.yaml").write_text(
        "budgets: {agreement: {least: 0.98}, output_error: [{relative: 0.01}], operators: [MatMul], file_bytes: 2kB}\n"
    )
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The repository's files that a package is built from: building writes beside them."""
    copy = tmp_path_factory.mktemp("copy") / "onnxslim_lab"
    copy.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("onnxslim_lab", "passes", "kernels"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    return copy


@pytest.fixture(scope="module")
def site(package, tmp_path_factory):
    """Where the action's own install step put the package."""
    target = tmp_path_factory.mktemp("site")
    step = ACTION["runs"]["steps"][0]
    done = bash(step["run"], REPOSITORY, GITHUB_ACTION_PATH=package, PIP_TARGET=target, **PIP)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def environment(**changed):
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    path = os.pathsep.join((str(Path(sys.executable).parent), kept["PATH"]))
    return {**kept, "PATH": path, **{key: str(value) for key, value in changed.items()}}


def bash(script, folder, **changed):
    """Run a script as GitHub's `shell: bash` does."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(**changed),
        capture_output=True,
        text=True,
        check=False,
    )


def act(project, site, **given):
    """Run the action's last step with these inputs; return the process, its outputs and its summary."""
    inputs = {name: item.get("default", "") for name, item in ACTION["inputs"].items()} | given
    step = ACTION["runs"]["steps"][1]
    values = {}
    for key, text in step["env"].items():
        name = text.removeprefix("${{ inputs.").removesuffix(" }}")
        values[key] = inputs[name]
    assert "${{" not in step["run"]  # nothing that a caller says becomes part of the script
    (project / "temp").mkdir()
    output, told = project / "output", project / "summary"
    output.touch()
    told.touch()
    done = bash(
        step["run"],
        project,
        PYTHONPATH=site,
        RUNNER_TEMP=project / "temp",
        GITHUB_OUTPUT=output,
        GITHUB_STEP_SUMMARY=told,
        **values,
    )
    return done, dict(line.split("=", 1) for line in output.read_text().splitlines()), told.read_text()


def test_github_passes(project, site):
    done, outputs, told = act(
        project, site, candidate="same.onnx", baseline="base.onnx", config="gate.yaml", data="data.npz"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("::notice ")
    assert "Gate passed" in told
    assert set(outputs) == set(ACTION["outputs"])
    assert outputs["exit-code"] == "0"
    assert json.loads(Path(outputs["report"]).read_text())["budgets"]
    assert etree.parse(outputs["junit"]).getroot().tag == "testsuites"
    assert json.loads(Path(outputs["sarif"]).read_text())["version"] == "2.1.0"


def test_github_fails(project, site):
    (project / "bad.onnx").rename(project / "$(touch hacked).onnx")
    done, outputs, told = act(
        project, site, candidate="$(touch hacked).onnx", baseline="base.onnx", data="data.npz"
    )
    assert done.returncode == 13
    assert outputs["exit-code"] == "13"
    assert "::error " in done.stdout
    assert "Gate failed" in told
    assert not (project / "hacked").exists()


def test_github_says_so_when_there_is_no_verdict(project, site):
    done, outputs, told = act(project, site, candidate="none.onnx", baseline="base.onnx")
    assert done.returncode == 2
    assert outputs == {"exit-code": "2"}
    assert "no such file" in done.stderr
    assert told == ""


def test_the_package_brings_the_integrations(site):
    assert (site / "onnxslim_lab" / "integrations" / "gitlab-ci.yml").is_file()
    entry = next(site.glob("onnxslim_lab-*.dist-info")) / "entry_points.txt"
    assert "[pytest11]\nonnxslim-lab = onnxslim_lab.pytest_plugin" in entry.read_text()


@pytest.mark.parametrize(("candidate", "code"), [("same.onnx", 0), ("bad.onnx", 13)])
def test_gitlab(project, package, tmp_path, candidate, code):
    variables = {**GITLAB["variables"], "ONNX_CANDIDATE": candidate, "ONNX_BASELINE": "base.onnx"}
    variables |= {"ONNX_DATA": "data.npz", "ONNXSLIM_LAB": package}
    scripts = GITLAB["script"] if candidate == "bad.onnx" else [*GITLAB["before_script"], *GITLAB["script"]]
    search = REPOSITORY if candidate == "bad.onnx" else tmp_path / "site"
    done = subprocess.run(  # GitLab writes the lines into one script, which ends at the first that fails
        ["sh", "-e", "-c", "\n".join(scripts)],
        cwd=project,
        env=environment(PIP_TARGET=tmp_path / "site", PYTHONPATH=search, **PIP, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    reports = GITLAB["artifacts"]["reports"]
    failures = etree.parse(project / reports["junit"]).findall(".//failure")
    findings = json.loads((project / reports["codequality"]).read_text())
    assert len(failures) == len(findings) == (2 if code else 0)
    for path in GITLAB["artifacts"]["paths"]:
        assert (project / path).is_file()


@pytest.mark.parametrize(("candidate", "code"), [("same.onnx", 0), ("bad.onnx", 13)])
def test_pre_commit(project, candidate, code):
    (hook,) = HOOKS
    assert hook["pass_filenames"] is False
    arguments = [candidate, "--baseline", "base.onnx", "--config", "gate.yaml", "--data", "data.npz"]
    done = subprocess.run(
        [*shlex.split(hook["entry"]), *arguments],
        cwd=project,
        env=environment(PYTHONPATH=REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    import re

    for name in ("a/small.onnx", "gate.yaml", "gate.toml", "onnxslim-lab.lock", "m.onnx.data"):
        assert re.search(hook["files"], name)
    assert not re.search(hook["files"], "a.onnx.txt")


def test_pre_commit_accepts_the_manifest():
    clientlib = pytest.importorskip("pre_commit.clientlib")
    assert [hook["id"] for hook in clientlib.load_manifest(str(REPOSITORY / ".pre-commit-hooks.yaml"))] == [
        "onnx-gate"
    ]


def run_pytest(project, *arguments, plugin=True):
    loaded = ["-p", "onnxslim_lab.pytest_plugin"] if plugin else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *loaded, *arguments]
    return subprocess.run(
        command,
        cwd=project,
        env=environment(PYTHONPATH=REPOSITORY, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
        capture_output=True,
        text=True,
        check=False,
    )


def options(candidate):
    return [
        *("--onnx-gate", "gate.yaml", "--onnx-candidate", candidate, "--onnx-baseline", "base.onnx"),
        *("--onnx-data", "data.npz"),
    ]


def test_pytest_has_one_test_for_each_budget(project):
    done = run_pytest(project, *options("same.onnx"), "-v")
    assert done.returncode == 0, done.stdout + done.stderr
    for budget in ("runs", "agreement", "output_error", "operators", "file_bytes"):
        assert f"gate.yaml::{budget} PASSED" in done.stdout
    assert "5 passed" in done.stdout


def test_pytest_fails_with_the_cause_alone(project):
    (project / "test_other.py").write_text("def test_other(): pass\n")
    done = run_pytest(project, *options("bad.onnx"))
    assert done.returncode == 1
    assert "2 failed, 4 passed" in done.stdout
    assert "agreement.least: fail: " in done.stdout
    assert "Traceback" not in done.stdout
    done = run_pytest(project, *options("bad.onnx"), "-k", "file_bytes")
    assert "1 passed, 5 deselected" in done.stdout


def test_pytest_of_a_candidate_that_does_not_load(project):
    (project / "broken.onnx").write_bytes((project / "same.onnx").read_bytes()[:-30])
    done = run_pytest(project, *options("broken.onnx"))
    assert "5 failed" in done.stdout
    assert "not judged: " in done.stdout


def test_pytest_reads_its_configuration(project):
    (project / "pytest.ini").write_text(
        "[pytest]\nonnx_candidate = same.onnx\nonnx_baseline = base.onnx\nonnx_data = data.npz\n"
    )
    (project / "inner").mkdir()
    done = run_pytest(project / "inner", "--onnx-gate", "../gate.yaml")
    assert "5 passed" in done.stdout, done.stdout + done.stderr
    few = "budgets: {agreement: {least: 0.99}, file_bytes: 2kB}\nundecided: warning\nminimum_samples: 1000\n"
    (project / "gate.yaml").write_text(few)
    done = run_pytest(project, "--onnx-gate", "gate.yaml")
    assert "3 passed, 1 warning" in done.stdout, done.stdout
    assert "agreement.least: undecided" in done.stdout


def test_pytest_says_what_is_wrong(project):
    done = run_pytest(project, "--onnx-gate", "none.yaml")
    assert done.returncode == 4
    assert "no file 'none.yaml'" in done.stderr
    done = run_pytest(project, "--onnx-gate", "gate.yaml", "--onnx-candidate", "same.onnx")
    assert "give --onnx-baseline PATH" in done.stdout
    (project / "gate.yaml").write_text("budgets: {file_byte: 3}")
    done = run_pytest(project, *options("same.onnx"))
    assert "did you mean 'file_bytes'?" in done.stdout


def test_pytest_without_the_option_imports_nothing(project):
    (project / "test_plain.py").write_text(
        "import sys\n\n\ndef test_plain():\n"
        "    ours = [name for name in sys.modules if name.startswith('onnxslim_lab')]\n"
        "    assert sorted(ours) == ['onnxslim_lab', 'onnxslim_lab.pytest_plugin']\n"
        "    assert not {'onnx', 'numpy', 'onnxruntime'} & set(sys.modules)\n"
    )
    done = run_pytest(project)
    assert "1 passed" in done.stdout, done.stdout
