"""The engine: steps run, promises are checked, growth and lies are refused, nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxslim_lab import Dataset, Graph, Report, Runner, optimize
from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.errors import ParameterError, SaveError, VerificationError

RNG = np.random.default_rng(0)


def network(width=64, dynamic=True):
    weights = [
        numpy_helper.from_array(RNG.normal(size=(width, width)).astype(np.float32), f"w{i}") for i in range(2)
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w1"], ["y"], "second"),
    ]
    batch = "n" if dynamic else 2
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, [batch, width])],
        [helper.make_tensor_value_info("y", 1, [batch, width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as made:
        yield made


class Lie(Pass):
    """Claims to be exact and is not."""

    exact: ClassVar[bool] = True

    def apply(self, graph, context):
        outcome = Outcome()
        for name in graph.initializers:
            graph.set_constant(name, graph.constant(name) * 1.01)
            outcome.change(name, "spoilt")
        return outcome


class Grow(Pass):
    """Adds a useless tensor."""

    exact: ClassVar[bool] = True

    def apply(self, graph, context):
        graph.set_constant("useless", np.zeros(1000, np.float32))
        return Outcome()


class Poison(Pass):
    """Makes one weight NaN."""

    exact: ClassVar[bool] = False

    def apply(self, graph, context):
        weight = np.array(graph.constant("w1"))
        weight[0, 0] = np.nan
        graph.set_constant("w1", weight)
        return Outcome()


def test_prune_share_encode_makes_a_smaller_plain_model(tmp_path, runner):
    steps = ["simplify", "prune:sparsity=0.8", "share:bits=4", "encode"]
    result = optimize(network(), tmp_path / "small.onnx", steps=steps, runner=runner)
    report = result.report
    assert report.ratio > 4
    assert (tmp_path / "small.onnx").stat().st_size == report.bytes_after
    assert [step.verdict.status for step in report.steps] == ["passed", "measured", "measured", "passed"]
    assert report.steps[1].coverage.weights == pytest.approx(1.0)
    assert report.steps[1].coverage.macs == pytest.approx(1.0)
    assert report.data.random
    assert Report.model_validate_json(report.to_json()) == report
    onnx.checker.check_model(tmp_path / "small.onnx")


def test_the_source_file_is_untouched_and_a_dry_run_saves_nothing(tmp_path, runner):
    path = tmp_path / "in.onnx"
    onnx.save(network(), path)
    before = path.read_bytes()
    result = optimize(path, steps=["simplify"], runner=runner)
    assert result.files is None
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_a_pass_that_lies_is_caught_and_named(tmp_path, runner):
    with pytest.raises(VerificationError, match="step 'lie'.*output 'y'.*relative difference"):
        optimize(network(), tmp_path / "out.onnx", steps=[Lie()], runner=runner)
    assert not (tmp_path / "out.onnx").exists()


def test_growth_is_an_error_unless_accepted(tmp_path, runner):
    with pytest.raises(VerificationError, match="larger than the source"):
        optimize(network(), tmp_path / "out.onnx", steps=[Grow()], runner=runner)
    assert not (tmp_path / "out.onnx").exists()
    optimize(network(), tmp_path / "out.onnx", steps=[Grow()], runner=runner, allow_growth=True)
    assert (tmp_path / "out.onnx").exists()


def test_new_nans_fail_even_a_lossy_step(runner):
    with pytest.raises(VerificationError, match="finite"):
        optimize(network(), steps=[Poison()], runner=runner)


def test_metrics_are_paired(runner):
    x = RNG.normal(size=(200, 64)).astype(np.float32)
    data = Dataset([{"x": x}], RNG.integers(0, 64, 200), source="test")
    result = optimize(
        network(), steps=["prune:sparsity=0.5"], data=data, metrics=["agreement", "top1"], runner=runner
    )
    agreement, top1 = result.report.metrics
    assert 0 < agreement.result <= 1
    assert agreement.samples == 200
    assert top1.low <= top1.difference <= top1.high
    assert not result.report.data.random


def test_wrong_options_are_refused_before_any_work(tmp_path, runner):
    with pytest.raises(ParameterError, match="did you mean 'top1'"):
        optimize(network(), steps=["simplify"], data=Dataset([{}]), metrics=["tpo1"], runner=runner)
    with pytest.raises(ParameterError, match="metrics need data"):
        optimize(network(), steps=["simplify"], metrics=["top1"], runner=runner)
    with pytest.raises(SaveError, match="existing folder"):
        optimize(network(), tmp_path / "no" / "out.onnx", runner=runner)
    onnx.save(network(), tmp_path / "in.onnx")
    with pytest.raises(ParameterError, match="is the source"):
        optimize(tmp_path / "in.onnx", tmp_path / "." / "in.onnx", runner=runner)


def test_a_model_that_does_not_fit_the_memory_runs_on_numpy_and_says_so():
    with Runner(threads=1, memory=1000) as small:
        result = optimize(network(), steps=["simplify", "prune:sparsity=0.5", "encode"], runner=small)
        with pytest.raises(VerificationError, match="step 'lie'"):
            optimize(network(), steps=[Lie()], runner=small)
    assert result.report.final.status == "measured"
    assert result.report.engines.status == "skipped"
    assert any("NumPy runtime alone" in notice for notice in result.report.notices)


def test_a_result_counts_only_when_two_engines_agree(runner, monkeypatch):
    assert optimize(network(), steps=["simplify"], runner=runner).report.engines.status == "passed"
    from onnxslim_lab import second_opinion

    honest = second_opinion.Interpreter.run

    def wrong(self, feeds, *arguments, **options):
        factor = 1.01 if len(self.graph.nodes) in spoilt else 1
        return {name: value * factor for name, value in honest(self, feeds, *arguments, **options).items()}

    monkeypatch.setattr(second_opinion.Interpreter, "run", wrong)
    spoilt = {3}  # the result, which has lost its Identity
    with pytest.raises(VerificationError, match="not to be trusted: the engines disagree, output 'y'"):
        optimize(network(), steps=["simplify"], runner=runner)
    spoilt = {3, 4}
    report = optimize(network(), steps=["simplify"], runner=runner).report
    assert report.engines.status == "measured"  # the original differs just as much
    assert any("engines disagree" in notice for notice in report.notices)


@pytest.mark.parametrize("delay", [0.3, 0.8, 1.2, 1.6, 2.0])
def test_killed_at_any_moment_the_output_is_absent_or_complete(tmp_path, delay):
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(network(512), source)
    before = source.read_bytes()
    command = [sys.executable, "-m", "onnxslim_lab", "optimize", str(source), "-o", str(target)]
    command += ["-p", "prune:sparsity=0.5", "-p", "encode", "--verify", "off"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert source.read_bytes() == before
    if target.exists():
        onnx.checker.check_model(target)
        assert Graph.load(target).outputs == ["y"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_gives_one_line(tmp_path, monkeypatch):
    graph = Graph.load(network())

    def full(*_args, **_kwargs):
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / ".part")

    monkeypatch.setattr("onnxslim_lab.modelfile.tempfile.mkstemp", full)
    with pytest.raises(SaveError, match="No space left") as caught:
        graph.save(tmp_path / "out.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_steps_see_the_seed_and_the_memory():
    seen = {}

    class Look(Pass):
        """Look at the context."""

        exact: ClassVar[bool] = True

        def apply(self, graph, context: Context):
            seen.update(seed=context.seed, memory=context.memory)
            return Outcome()

    from onnxslim_lab.recipe import Recipe

    optimize(network(), recipe=Recipe(steps=(Look(),), seed=5, memory=1 << 22, verify="off"))
    assert seen == {"seed": 5, "memory": 1 << 20}


def test_inputs_that_become_16_bit_are_compared_on_the_same_data(tmp_path, runner):
    target = tmp_path / "half.onnx"
    data = Dataset([{"x": RNG.normal(size=(2, 64)).astype(np.float32)}], source="float32")
    result = optimize(network(), target, steps=["convert-precision:io=convert"], data=data, runner=runner)
    assert result.report.engines.status == "passed"
    assert {kind.tensor_type.elem_type for kind in result.graph.input_types().values()} == {10}


def test_a_lossy_step_that_changes_nothing_makes_no_file_larger(tmp_path, runner):
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    optimize(network(), source, steps=["simplify"], runner=runner, provenance=False)
    step = "quantize:mode=weight-only,weights=float8e4m3fn"  # needs a newer opset
    result = optimize(source, target, steps=[step], runner=runner)
    assert not result.report.steps[0].changes
    assert target.stat().st_size <= source.stat().st_size


def test_what_the_checker_says_of_the_original_is_not_blamed_on_a_step(tmp_path, runner):
    proto = network()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    result = optimize(proto, tmp_path / "y.onnx", steps=["quantize:mode=dynamic"], runner=runner)
    assert result.report.steps[0].changes
    assert any("the checker refuses the original too" in notice for notice in result.report.notices)


def test_products_of_16_bit_codes_that_onnxruntime_rounds_to_8_are_explained(tmp_path, runner):
    data = Dataset([{"x": RNG.normal(size=(2, 64)).astype(np.float32)} for _ in range(4)], source="normal")
    result = optimize(
        network(), tmp_path / "y.onnx", steps=["quantize:activations=uint16"], data=data, runner=runner
    )
    assert result.report.engines.status == "passed"
    assert "rounds the inputs of 2 products" in result.report.engines.reason
