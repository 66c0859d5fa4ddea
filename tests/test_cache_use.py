"""The calibration cache where users meet it: `optimize` and `sensitivity`, from Python and the command line."""

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from onnxslim_lab import engine
from onnxslim_lab.cli import app
from onnxslim_lab.data import Dataset

STEPS = ["quantize:ranges=minmax"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setenv("ONNXSLIM_LAB_CALIBRATION_CACHE", str(kept))
    return kept


@pytest.fixture
def model(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[1, 40] x) => (float[1, 40] y) '
        "{ h = MatMul (x, w)  r = Relu (h)  y = MatMul (r, w) }"
    )
    w = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture
def data():
    random = np.random.default_rng(1)
    return Dataset([{"x": random.standard_normal((1, 40)).astype(np.float32)} for _ in range(3)])


def entries(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} if folder.exists() else {}


def test_optimize_keeps_what_it_measures_and_uses_it(model, data, folder):
    def result(**options):
        return engine.optimize(model, steps=STEPS, data=data, allow_growth=True, **options)

    first = result(cache=False)
    assert not entries(folder)
    second = result()
    kept = entries(folder)
    assert kept
    third = result()
    assert entries(folder).keys() == kept.keys()
    saved = [found.graph.to_model().SerializeToString() for found in (first, second, third)]
    assert saved[0] == saved[1] == saved[2]


def test_what_is_kept_is_really_used(model, data, folder, monkeypatch):
    from onnxslim_lab.statistics.range_pass import RangePass

    calls = []
    measure = RangePass.ranges
    monkeypatch.setattr(RangePass, "ranges", lambda *given: calls.append(1) or measure(*given))
    for expected in (1, 1):
        engine.optimize(model, steps=STEPS, data=data, allow_growth=True)
        assert len(calls) == expected
    engine.optimize(model, steps=STEPS, data=data, allow_growth=True, cache=False)
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_to_is_told_in_the_report(model, data, folder):
    folder.write_text("in the way")
    report = engine.optimize(model, steps=STEPS, data=data, allow_growth=True).report
    assert sum("not kept" in notice for notice in report.notices) == 1


@pytest.mark.parametrize("command", ["optimize", "sensitivity"])
def test_the_command_line_turns_the_cache_off(model, data, folder, tmp_path, command):
    feeds = tmp_path / "data.npz"
    np.savez(feeds, x=np.concatenate([feed["x"] for feed in data.feeds]))
    arguments = [command, str(model), "--data", str(feeds), "-p", *STEPS, "--quiet"]
    if command == "optimize":
        arguments += ["--dry-run", "--allow-growth", "--memory", "256MB"]
    run = CliRunner().invoke(app, [*arguments, "--no-cache"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert not entries(folder)
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert entries(folder)


def test_sensitivity_tells_what_is_wrong_with_the_folder(model, folder):
    folder.write_text("in the way")
    run = CliRunner().invoke(
        app, ["sensitivity", str(model), "--limit", "2", "--json"], catch_exceptions=False
    )
    assert run.exit_code == 0
    assert "note: " in run.stderr
    assert run.stdout.startswith("{")


def test_memory_reaches_calibration(model, data, monkeypatch):
    seen = []
    make = engine.Calibration

    def watched(*given, **options):
        seen.append(options["memory"])
        return make(*given, **options)

    monkeypatch.setattr(engine, "Calibration", watched)
    recipe = engine.Recipe.of(STEPS).model_copy(update={"memory": 200 << 20})
    engine.optimize(model, recipe=recipe, data=data, allow_growth=True)
    assert seen == [100 << 20]


def test_the_tests_keep_nothing_in_the_users_folder():
    import tempfile

    from onnxslim_lab.statistics import default_folder

    assert default_folder().is_relative_to(tempfile.gettempdir())
