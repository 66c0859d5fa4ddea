"""Sensitivity finds the layer that was made sensitive, says why, and its remedy works."""

import json
import shlex

import numpy as np
import onnx
import pytest
import typer
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from onnxslim_lab import Dataset, Graph, Runner, recipe
from onnxslim_lab.base import Context
from onnxslim_lab.commands.sensitivity import sensitivity as command
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.passes.equalize import Equalize
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.causes import overflows
from onnxslim_lab.quantization.output_error import OutputJudge
from onnxslim_lab.quantization.sensitivity import sensitivity
from onnxslim_lab.quantization.variants import variants_of
from onnxslim_lab.statistics import Calibration, ValueStatistics, Want

TARGET = "onnxruntime-x86-vnni"


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as made:
        yield made


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The steps of the command lines below exist whatever the registry says."""
    for kind in (Quantize, Equalize):
        monkeypatch.setitem(recipe.BY_NAME, kind.pass_name(), kind)


def network(spoil=None, channels=16, seed=0):
    """Three layers; `spoil(weights)` makes one of them hard to quantize."""
    random = np.random.default_rng(seed)
    weights = {
        "first": random.normal(size=(8, 3, 3, 3)) * 0.2,
        "second": random.normal(size=(channels, 8, 3, 3)) * 0.1,
        "third": random.normal(size=(5, channels, 1, 1)) * 0.2,
    }
    if spoil:
        spoil(weights)
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "second"], ["c"], "second", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], "relu2"),
        helper.make_node("Conv", ["d", "third"], ["y"], "third"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", 1, [1, 5, 12, 12])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return Graph.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def data(samples=4):
    random = np.random.default_rng(1)
    return Dataset([{"x": random.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(samples)])


def step(**options):
    return Quantize(**{"target": TARGET, "ranges": "minmax", **options})


def outlier(weights):
    """One channel between the second and third layer is 200 times the others, and hardly matters."""
    weights["second"][3] *= 200
    weights["third"][:, 3] /= 200


def test_the_spoilt_layer_ranks_first_with_its_channel(runner):
    report = sensitivity(network(outlier), [step()], Calibration(runner, data()))
    assert {layer.name for layer in report.layers} == {"first", "second", "third"}
    assert {report.layers[0].name, report.layers[1].name} == {"second", "third"}
    assert report.layers[-1].alone_db > report.layers[0].alone_db + 10
    by_name = {layer.name: layer for layer in report.layers}
    cause = by_name["third"].causes[0]
    assert (cause.kind, cause.part, cause.channels) == ("outlier-channels", "input", (3,))
    assert by_name["third"].remedy.startswith("-p equalize -p ")
    assert sum(layer.macs_share for layer in report.layers) == pytest.approx(1)
    healthy = sensitivity(network(), [step()], Calibration(runner, data()))
    assert healthy.all_db > report.all_db + 5


def test_leaving_a_layer_out_is_what_without_says(runner):
    model, calibration = network(outlier), Calibration(runner, data())
    report = sensitivity(model, [step()], calibration)
    judge = OutputJudge(calibration.outputs(model))
    for layer in report.layers:
        result = model.copy()
        step(exclude=(layer.name,)).run(result, Context(calibration=calibration))
        weight_only = [n.op_type for n in result.nodes if n.name == layer.name]
        assert weight_only == ["Conv"]
        error = judge.judge(runner.run(result, calibration.data.feeds))
        if layer.without_db is None:  # alone it costs next to nothing
            assert layer.alone_db > report.all_db + 20
            assert error.sqnr_db == pytest.approx(report.all_db, abs=1)
            continue
        assert error.sqnr_db == pytest.approx(layer.without_db, abs=0.5)
        assert layer.gain_db == pytest.approx(layer.without_db - report.all_db)


def test_wide_weights_per_tensor_get_scales_per_channel(runner):
    def spread(weights):
        half = len(weights["second"]) // 2
        weights["second"][:half] /= 300
        weights["third"][:, :half] *= 300

    calibration = Calibration(runner, data())
    report = sensitivity(network(spread), [step(granularity="tensor")], calibration)
    second = next(layer for layer in report.layers if layer.name == "second")
    assert (second.causes[0].kind, second.causes[0].part) == ("wide-spread", "weight")
    line = shlex.split(second.remedy)
    assert line[1].startswith("quantize:")
    assert "granularity" not in line[1]  # channel is the default
    cured = sensitivity(network(spread), [recipe.parse_step(line[1])], calibration)
    cured_second = next(layer for layer in cured.layers if layer.name == "second")
    assert "wide-spread" not in {c.kind for c in cured_second.causes if c.part == "weight"}


def test_a_cut_range_is_called_saturated_and_the_remedy_cures_it(runner):
    cut = step(ranges="percentile", percentile=60.0)
    calibration = Calibration(runner, data())
    report = sensitivity(network(), [cut], calibration)
    causes = [c for layer in report.layers for c in layer.causes[:1]]
    assert {c.kind for c in causes} == {"saturated-range"}
    line = shlex.split(report.layers[0].remedy)
    assert line[0] == "-p"
    cured = sensitivity(network(), [recipe.parse_step(line[1])], calibration)
    assert cured.all_db > report.all_db + 10


def cured(model, remedy, calibration):
    """Return the SQNR of all layers under the steps of a remedy's command line."""
    words = shlex.split(remedy)
    assert words[::2] == ["-p"] * (len(words) // 2)
    steps = [recipe.parse_step(word) for word in words[1::2]]
    return sensitivity(model, steps, calibration).all_db


def spread_over(weights):
    """Half of the channels have small weights, which matter as much: what reads them makes up for it."""
    half = len(weights["second"]) // 2
    weights["second"][:half] /= 30
    weights["third"][:, :half] *= 30


@pytest.mark.parametrize(
    ("spoil", "options", "kind", "least"),
    [
        (outlier, {}, "outlier-channels", 5),
        (spread_over, {"granularity": "tensor"}, "wide-spread", 2),
        (None, {"ranges": "percentile", "percentile": 60.0}, "saturated-range", 10),
    ],
)
def test_the_remedy_of_each_cause_helps_when_it_is_run(runner, spoil, options, kind, least):
    calibration, model = Calibration(runner, data()), network(spoil)
    report = sensitivity(model, [step(**options)], calibration)
    found = [layer for layer in report.layers if layer.causes and layer.causes[0].kind == kind]
    remedies = {layer.remedy for layer in found if "exclude" not in layer.remedy}
    assert remedies, [(layer.name, layer.causes) for layer in report.layers]
    assert min(cured(model, remedy, calibration) for remedy in remedies) > report.all_db + least


def test_leaving_in_float_helps_where_nothing_else_is_named(runner):
    calibration, model = Calibration(runner, data()), network(outlier)
    report = sensitivity(model, [step()], calibration)
    excluding = [layer for layer in report.layers if "exclude" in layer.remedy]
    assert excluding
    for layer in excluding:
        if layer.gain_db is not None and layer.gain_db > 1:
            assert cured(model, layer.remedy, calibration) > report.all_db + 0.5


def test_what_overflows_float16_stays_float_by_itself(runner):
    """Values of a million between two layers: float16 has no code for them, and convert-precision leaves them."""

    def loud(weights):
        weights["second"] *= 3e5
        weights["third"] /= 3e5

    calibration, model = Calibration(runner, data()), network(loud)
    statistics = calibration.collect(model, [Want(model, "c")])
    assert overflows(statistics[model, "c"]).remedy == "exclude"
    report = sensitivity(model, [recipe.parse_step("convert-precision")], calibration)
    assert "second" not in {layer.name for layer in report.layers}
    assert report.all_db > 40


def test_an_output_of_mixed_scales_is_judged_by_slices():
    random = np.random.default_rng(0)
    reference = np.concatenate([random.uniform(0, 320, (1, 4, 50)), random.uniform(0, 1, (1, 6, 50))], axis=1)
    judge = OutputJudge([{"y": reference.astype(np.float32)}])
    assert judge.axis("y") == 1
    scores_lost = reference.copy()
    scores_lost[:, 4:] = 0
    error = judge.judge([{"y": scores_lost.astype(np.float32)}])
    assert error.noise == pytest.approx(0.6)  # six of ten slices, whatever their size
    assert error.where == "axis 1, index 4"
    alike = np.random.default_rng(1).normal(size=(1, 10, 50)).astype(np.float32)
    plain = OutputJudge([{"y": alike}])
    assert plain.axis("y") is None
    noise = plain.judge([{"y": alike + np.float32(0.1)}])
    assert noise.sqnr_db == pytest.approx(20, abs=1)
    assert plain.judge([{"y": alike}]).sqnr_db == float("inf")


def test_values_that_are_lost_make_the_error_infinite():
    reference = np.ones((2, 8), np.float32)
    judge = OutputJudge([{"y": reference, "z": [np.zeros(3)], "s": np.array(["a"], object)}])
    broken = reference.copy()
    broken[0, 0] = np.nan
    result = {"y": broken, "z": [np.zeros(3)], "s": np.array(["b"], object)}
    assert judge.judge([result]).sqnr_db == -float("inf")
    assert judge.judge([{"y": reference[:1], "z": [np.zeros(3)]}]).output == "y"
    assert judge.judge([{"y": reference, "z": [np.ones(3)]}]).noise == float("inf")


def test_overflow_of_float16_is_named():
    big = ValueStatistics(4, 0, -1.0, 1e6, -1.0, 1e6, 1)
    assert overflows(big).kind == "fp16-overflow"
    assert overflows(ValueStatistics(4, 0, -1.0, 6e4, -1.0, 6e4, 1)) is None
    assert overflows(None) is None


def test_weight_only_steps_are_explained_too(runner):
    calibration = Calibration(runner, data())
    lossy = step(mode="weight-only", weights="int4", granularity="block", block=16)
    report = sensitivity(network(channels=32), [lossy], calibration)
    assert len(report.layers) >= 2
    assert all(layer.alone_db >= report.all_db - 3 for layer in report.layers)


def test_a_step_without_layers_is_an_error(runner):
    calibration = Calibration(runner, data())
    with pytest.raises(ParameterError, match="needs the step"):
        sensitivity(network(), [], calibration)
    with pytest.raises(ParameterError, match="cannot be told apart"):
        variants_of(network(), recipe.parse_step("simplify"), Context(calibration=calibration), {})
    with pytest.raises(ParameterError, match="changes no layer"):
        sensitivity(network(), [step(exclude=("*",))], calibration)


def test_weights_that_constantofshape_makes_are_looked_at_as_well(runner):
    model = network()
    shape = model.constant("second").shape
    model.remove_constant("second")
    model.set_constant("sizes", np.array(shape, np.int64))
    model.emit("ConstantOfShape", ["sizes"], ["second"], value=numpy_helper.from_array(np.float32([0.5])))
    found = variants_of(model, step(), Context(calibration=Calibration(runner, data())), data().feeds[0])
    assert [layer.name for layer in found.layers] == ["first", "second", "third"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(tmp_path, as_json):
    app = typer.Typer()
    app.command()(command)
    onnx.save(network(outlier).to_model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.concatenate([feed["x"] for feed in data().feeds]))
    options = [
        "--data",
        str(tmp_path / "d.npz"),
        "-p",
        f"quantize:target={TARGET},ranges=minmax",
        "--threads",
        "1",
    ]
    flags = ["--json"] if as_json else []
    result = CliRunner().invoke(app, [str(tmp_path / "m.onnx"), *options, *flags], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    if as_json:
        told = json.loads(result.output)
        assert told["schema_version"] == 1
        assert len(told["layers"]) == 3
        assert told["data"]["random"] is False
    else:
        assert "outlier-channels" in result.output
        assert "-p equalize" in result.output
