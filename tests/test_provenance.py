"""Provenance: what optimize writes about itself, and that the same run writes the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_engine import network
from typer.testing import CliRunner

from onnxslim_lab import Graph, Runner, optimize
from onnxslim_lab.cli import app
from onnxslim_lab.errors import ModelError
from onnxslim_lab.gate.checks_origin import provenance_problem
from onnxslim_lab.provenance import KEY, Provenance, content_sha256, current_versions, weights_sha256
from onnxslim_lab.reproduction import EXIT_CODES, reproduce

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as made:
        yield made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model and data, and a calibration cache of its own."""
    monkeypatch.setenv("ONNXSLIM_LAB_CALIBRATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = network()
    model.metadata_props.add(key="classes", value="a,b")
    onnx.save(model, tmp_path / "in.onnx")
    x = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path


def command(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_a_result_says_how_it_was_made(folder, runner):
    result = optimize("in.onnx", "out.onnx", steps=["simplify", "share:bits=4", "encode"], runner=runner)
    saved = Graph.load("out.onnx")
    made = Provenance.read(saved)
    assert made.versions() == current_versions()
    assert made.recipe == {"steps": ["simplify", "share", "encode"]}
    assert made.source_sha256 == content_sha256(Graph.load("in.onnx"))
    assert made.weights_sha256 == weights_sha256(saved) == weights_sha256(result.graph)
    assert made.data is None  # nothing was measured
    assert saved.metadata["classes"] == "a,b"
    text = saved.metadata[KEY]
    assert len(text) < 600
    assert str(folder) not in text
    assert os.uname().nodename not in text
    assert result.report.bytes_after == Path("out.onnx").stat().st_size
    assert result.report.bytes_provenance > len(text)


def test_it_can_be_left_out(folder, runner):
    result = optimize("in.onnx", "out.onnx", steps=["share"], provenance=False, runner=runner)
    assert KEY not in Graph.load("out.onnx").metadata
    assert result.report.bytes_provenance == 0
    command("optimize", "in.onnx", "-o", "plain.onnx", "-p", "share", "--no-provenance")
    assert Path("plain.onnx").read_bytes() == Path("out.onnx").read_bytes()
    optimize("in.onnx", "with.onnx", steps=["share"], runner=runner)
    optimize("with.onnx", "without.onnx", steps=["share"], provenance=False, runner=runner)
    assert KEY not in Graph.load("without.onnx").metadata  # that of the source is not true of the result


def test_it_never_makes_a_file_larger_than_its_source_unless_asked(folder, runner):
    model = network()
    del model.graph.node[2]  # nothing is left to gain
    model.graph.node[2].input[0] = "b"
    onnx.save(model, "tight.onnx")
    before = Path("tight.onnx").stat().st_size
    result = optimize("tight.onnx", "auto.onnx", steps=["simplify", "encode"], runner=runner)
    assert Path("auto.onnx").stat().st_size <= before
    assert any("provenance was left out" in notice for notice in result.report.notices)
    result = optimize(
        "tight.onnx", "asked.onnx", steps=["simplify", "encode"], provenance=True, runner=runner
    )
    assert Path("asked.onnx").stat().st_size == result.report.bytes_after > before
    assert result.report.bytes_after - result.report.bytes_provenance <= before
    assert Provenance.read(Graph.load("asked.onnx")).recipe["steps"] == ["simplify", "encode"]


def test_where_tensors_lie_makes_no_difference(folder):
    embedded = onnx.load("in.onnx")
    onnx.save(
        onnx.load("in.onnx"),
        "apart.onnx",
        save_as_external_data=True,
        location="apart.data",
        size_threshold=0,
    )
    assert Path("apart.data").stat().st_size >= 2 * 64 * 64 * 4
    again = onnx.load("apart.onnx")  # marks each tensor as embedded
    onnx.save(again, "again.onnx")
    hashes = {content_sha256(Graph.load(name)) for name in ("in.onnx", "apart.onnx", "again.onnx")}
    assert len(hashes) == 1
    changed = numpy_helper.to_array(embedded.graph.initializer[0]).copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 1)
    embedded.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, "w0"))
    assert content_sha256(Graph.load(embedded)) not in hashes


def test_weights_hash_ignores_all_but_tensors(folder):
    model = onnx.load("in.onnx")
    first = weights_sha256(Graph.load(model))
    model.doc_string = "x"
    model.graph.initializer.reverse()
    assert weights_sha256(Graph.load(model)) == first
    model.graph.initializer[0].name += "_"
    model.graph.node[0].input[1] += (
        "_" if model.graph.node[0].input[1] + "_" == model.graph.initializer[0].name else ""
    )
    model.graph.node[3].input[1] += (
        "_" if model.graph.node[3].input[1] + "_" == model.graph.initializer[0].name else ""
    )
    assert weights_sha256(Graph.load(model)) != first


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"source_sha256": "x"}', "[" * 5000, '{"a":' * 3000, "x" * (2 << 20), "\udc80"],
)
def test_a_bad_entry_is_one_line(text):
    with pytest.raises(ModelError, match="not what optimize writes") as caught:
        Provenance.parse(text)
    assert "\n" not in str(caught.value)


def test_the_gate_knows_source_and_weights(folder, runner):
    optimize("in.onnx", "out.onnx", steps=["share"], runner=runner)
    source, result = Graph.load("in.onnx"), Graph.load("out.onnx")
    assert provenance_problem(result, source) == ""
    assert "no entry" in provenance_problem(source, source)
    other = Graph.load(network())
    assert "made from another model" in provenance_problem(result, other)
    name = result.initializers[0]
    result.set_constant(name, result.constant(name) * 2)
    assert "weights were changed" in provenance_problem(result, source)


def test_reproduce_gives_the_same_bytes(folder):
    steps = ("-p", "simplify", "-p", "prune:criterion=wanda,sparsity=0.5", "-p", "encode")
    command("optimize", "in.onnx", "-o", "out.onnx", *steps, "--data", "data.npz", "--limit", 40, "--seed", 3)
    assert Provenance.read(Graph.load("out.onnx")).data.feeds == 40
    said = command("reproduce", "out.onnx", "--source", "in.onnx", "--data", "data.npz", "-o", "again.onnx")
    assert "every byte is the same" in said
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    assert "give --data" in str(CliRunner().invoke(app, ["reproduce", "out.onnx", "-s", "in.onnx"]).exception)


def test_reproduce_names_what_differs(folder):
    command(
        "optimize",
        "in.onnx",
        "-o",
        "out.onnx",
        "-p",
        "prune:criterion=wanda,sparsity=0.5",
        "--data",
        "data.npz",
    )
    other = network()
    onnx.save(other, "other.onnx")
    np.savez("noise.npz", x=np.zeros((64, 64), np.float32))
    said = command("reproduce", "out.onnx", "-s", "other.onnx", "--data", "noise.npz", "--json", code=10)
    found = json.loads(said)
    assert found["status"] == "other-inputs"
    assert ["SHA-256 of the source" in found["differences"][0], "data" in found["differences"][1]] == [
        True,
        True,
    ]

    model = onnx.load("out.onnx")  # its own weights
    array = numpy_helper.to_array(model.graph.initializer[0]) * 2
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))
    onnx.save(model, "poisoned.onnx")
    said = command("reproduce", "poisoned.onnx", "-s", "in.onnx", "--data", "data.npz", code=10)
    assert "model's weights" in said

    model = onnx.load("out.onnx")  # something else than weights
    model.doc_string = "edited"
    onnx.save(model, "edited.onnx")
    said = command("reproduce", "edited.onnx", "-s", "in.onnx", "--data", "data.npz", code=1)
    assert "the weights are the same" in said

    for entry in model.metadata_props:  # versions explain it
        if entry.key == KEY:
            entry.value = json.dumps({**json.loads(entry.value), "numpy": "1.0"}, separators=(",", ":"))
    onnx.save(model, "older.onnx")
    said = command("reproduce", "older.onnx", "-s", "in.onnx", "--data", "data.npz", code=11)
    assert "recorded 1.0" in said


def test_random_data_and_external_data_are_made_again(folder):
    command("optimize", "in.onnx", "-o", "out.onnx", "-p", "prune:criterion=wanda,sparsity=0.5", "--external")
    made = Provenance.read(Graph.load("out.onnx"))
    assert made.data.random
    assert len(list(folder.glob("out.onnx*.data"))) == 1
    assert reproduce("out.onnx", "in.onnx").status == "identical"


def test_help_lists_every_exit_code():
    text = command("reproduce", "--help")
    for code in EXIT_CODES.values():
        assert f"\n  {code:2}  " in text


def threaded(threads):
    """Return an environment in which BLAS starts so many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **dict.fromkeys(names, str(threads))}


SPECTRUM = """
import hashlib
from typing import ClassVar
import numpy as np
from onnxslim_lab import Outcome, Pass, Recipe, optimize

class Spectrum(Pass):
    exact: ClassVar[bool] = False

    def apply(self, graph, context):
        matrix = graph.constant("w0").astype(np.float64)
        vectors = np.linalg.eigh(matrix @ matrix.T)[1]  # differ with the threads of BLAS
        graph.set_metadata("spectrum", hashlib.sha256(vectors.tobytes()).hexdigest())
        return Outcome()

recipe = Recipe(steps=(Spectrum(),), verify="off")
print(optimize("large.onnx", recipe=recipe, allow_growth=True).graph.metadata["spectrum"])
"""


def test_the_threads_of_blas_change_nothing(folder):
    onnx.save(network(300), "large.onnx")
    found = [
        subprocess.run(
            [sys.executable, "-c", SPECTRUM],
            env=threaded(threads),
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 2)
    ]
    assert len(found[0]) == 65
    assert found[0] == found[1]


RECIPES = {
    "exact": ["simplify", "encode"],
    "prune": ["prune:sparsity=0.7,criterion=obs", "share:bits=4", "encode"],
    "static": ["quantize:float_macs=0.1"],
    "gptq": ["quantize:mode=weight-only,weights=int4,rounding=gptq"],
    "factorize": ["factorize:energy=0.9"],
    "half": ["convert-precision"],
    "channels": ["prune-channels:macs=0.3"],
    "pattern": ["prune:criterion=obs,pattern=2:4", "share:bits=3,compensate=true", "encode"],
    "entropy": ["share:bits=4,entropy=0.5", "encode"],
    "bias": ["quantize:rounding=nearest", "correct-bias"],
    "all": ["simplify", "prune-channels:macs=0.2", "factorize:energy=0.95", "quantize:float_macs=0.1"],
}

SCRIPT = """
import hashlib, json, sys
import numpy as np
from onnxslim_lab import Dataset, Runner, optimize
threads, recipes = int(sys.argv[1]), json.loads(sys.argv[2])
x = np.random.default_rng(7).normal(size=(80, 1, 12, 12)).astype(np.float32)
data = Dataset([{"x": part} for part in np.split(x, 10)])
found = {}
with Runner(threads=threads) as runner:
    for name, steps in recipes.items():
        result = optimize("net.onnx", f"{name}.onnx", steps=steps, data=data, runner=runner, cache=False, provenance=True, allow_growth=True)
        idle = [step.name for step in result.report.steps if not step.changes]
        assert name == "exact" or not set(idle) - {"simplify"}, (name, idle)  # what does nothing shows nothing
        found[name] = hashlib.sha256(open(f"{name}.onnx", "rb").read()).hexdigest()
print(json.dumps(found))
"""


def convolutional():
    random = np.random.default_rng(0)

    def normal(name, *shape):
        return numpy_helper.from_array(random.normal(size=shape).astype(np.float32) / 8, name)

    nodes = [
        helper.make_node("Conv", ["x", "c", "cb"], ["a"], "conv", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["d"]),
        helper.make_node("Gemm", ["d", "w", "wb"], ["e"], "dense"),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["y"], "last"),
    ]
    weights = [
        normal("c", 6, 1, 3, 3),
        normal("cb", 6),
        normal("w", 600, 24),
        normal("wb", 24),
        normal("v", 24, 20),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, ["n", 1, 12, 12])],
        [helper.make_tensor_value_info("y", 1, ["n", 20])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_two_runs_are_byte_identical_at_any_thread_count(tmp_path):
    onnx.save(convolutional(), tmp_path / "net.onnx")
    found = []
    for threads, seed in ((1, "1"), (2, "2")):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(threads), json.dumps(RECIPES)],
            cwd=tmp_path,
            env={**threaded(threads), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(RECIPES)
