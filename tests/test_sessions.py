"""sessions.py: values of every kind, crashes, time limits, memory, caching."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim_lab.errors import DataError, ParameterError, SessionError
from onnxslim_lab.graph import Graph
from onnxslim_lab.sessions import Runner, SessionTooLarge
from onnxslim_lab.worker.binding import pack, unpack
from onnxslim_lab.worker.child import Child
from onnxslim_lab.worker.messages import dtype_named

SMALL = """<ir_version: 9, opset_import: ["" : 18]>
small (float[n, 2] x, float[2] b) => (float[n, 2] y) { h = Add(x, b)  y = Relu(h) }"""

ENDLESS = """<ir_version: 9, opset_import: ["" : 18]>
endless (float[64, 64] x) => (float[64, 64] y) {
  trips = Constant <value = int64 {1000000000}> ()
  yes = Constant <value = bool {1}> ()
  y = Loop (trips, yes, x) <body = inner (int64 i, bool c, float[64, 64] s) => (bool c2, float[64, 64] t) {
    c2 = Identity(c)
    t = MatMul(s, s)
  }>
}"""


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as shared:
        yield shared


def identity(kind, opset=23, name="identity"):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        name,
        [helper.make_value_info("x", kind)],
        [helper.make_value_info("y", kind)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    return Graph.load(helper.make_model(graph, opset_imports=opsets, ir_version=11))


def tensor(element, shape=(2,)):
    return helper.make_tensor_type_proto(element, shape)


@pytest.mark.parametrize(
    ("element", "values"),
    [
        (TensorProto.FLOAT, np.array([1.5, -2], np.float32)),
        (TensorProto.DOUBLE, np.array([1.5, np.nan])),
        (TensorProto.FLOAT16, np.array([1.5, np.inf], np.float16)),
        (TensorProto.BFLOAT16, np.array([1.5, -2], ml_dtypes.bfloat16)),
        (TensorProto.FLOAT8E4M3FN, np.array([1.5, -2], ml_dtypes.float8_e4m3fn)),
        (TensorProto.BOOL, np.array([True, False])),
        (TensorProto.INT8, np.array([-3, 4], np.int8)),
        (TensorProto.UINT64, np.array([2**63, 4], np.uint64)),
        (TensorProto.STRING, np.array(["a\nb", "é"], dtype=object)),
    ],
)
def test_tensors_of_every_type_come_back(runner, element, values):
    (result,) = runner.run(identity(tensor(element)), [{"x": values}])
    assert result["y"].dtype == values.dtype
    np.testing.assert_array_equal(result["y"], values)


@pytest.mark.parametrize("name", ["int4", "uint4", "float4_e2m1fn", "int2", "uint2"])
def test_packed_types_come_back(name):
    dtype = dtype_named(name)
    values = np.arange(-7, 8).astype(dtype)[: 5 if "2" in name[-1:] else 15]
    bits = 2 if name.endswith("t2") else 4
    assert unpack(pack(values, bits).tobytes(), name, bits, values.shape).tolist() == values.tolist()


def test_four_bit_inputs_and_outputs(runner):
    graph = Graph.parse(
        '<ir_version: 10, opset_import: ["" : 21]> g (int4[3] x, float[3] f) => (float[3] y, int4[3] z)'
        "{ c = Cast<to = 1>(x) y = Add(c, f) z = Cast<to = 22>(y) }"
    )
    feed = {"x": np.array([-8, 7, 1], ml_dtypes.int4), "f": np.array([1, 0, 2], np.float32)}
    (result,) = runner.run(graph, [feed])
    assert result["y"].tolist() == [-7, 7, 3]
    assert result["z"].dtype == ml_dtypes.int4
    assert result["z"].tolist() == [-7, 7, 3]


def test_sequences_optionals_and_empty_ones(runner):
    sequence = helper.make_sequence_type_proto(tensor(TensorProto.FLOAT))
    one = np.ones(2, np.float32)
    filled, empty = runner.run(identity(sequence), [{"x": [one, one * 2]}, {"x": []}])
    assert [v.tolist() for v in filled["y"]] == [[1, 1], [2, 2]]
    assert empty["y"] == []
    optional = identity(helper.make_optional_type_proto(tensor(TensorProto.FLOAT)))
    filled, empty = runner.run(optional, [{"x": one}, {"x": None}])
    assert filled["y"].tolist() == [1, 1]
    assert empty["y"] is None


def test_maps_in_and_out(runner):
    ml = {"domain": "ai.onnx.ml"}
    zipped = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.STRING, tensor(TensorProto.FLOAT, ()))
    )
    taken = helper.make_map_type_proto(TensorProto.STRING, tensor(TensorProto.FLOAT, ()))
    graph = helper.make_graph(
        [
            helper.make_node("DictVectorizer", ["x"], ["v"], string_vocabulary=["a", "b"], **ml),
            helper.make_node("ZipMap", ["v"], ["y"], classlabels_strings=["c", "d"], **ml),
        ],
        "maps",
        [helper.make_value_info("x", taken)],
        [helper.make_value_info("y", zipped)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    model = Graph.load(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    (result,) = runner.run(model, [{"x": {np.str_("a"): 1.0, "b": np.float32(2.5)}}])
    assert result["y"] == [{"c": 1.0, "d": 2.5}]


def test_scalars_and_empty_tensors(runner):
    graph = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float x, float[n] z) => (float y, float[n] w)'
        "{ y = Neg(x)  w = Neg(z) }"
    )
    (result,) = runner.run(graph, [{"x": np.array(2, np.float32), "z": np.zeros(0, np.float32)}])
    assert result["y"].shape == ()
    assert result["y"] == -2
    assert result["w"].shape == (0,)


def test_intermediate_values_and_order_of_outputs(runner):
    feed = {"x": np.array([[-1, 2]], np.float32), "b": np.zeros(2, np.float32)}
    (result,) = runner.run(Graph.parse(SMALL), [feed], outputs=["y", "h"])
    assert list(result) == ["y", "h"]
    assert result["h"].tolist() == [[-1, 2]]
    with pytest.raises(ParameterError, match=r"no value 'hh' in its main graph"):
        runner.run(Graph.parse(SMALL), [feed], outputs=["hh"])


def test_feeds_with_wrong_names(runner):
    x, b = np.zeros((1, 2), np.float32), np.zeros(2, np.float32)
    with pytest.raises(DataError, match=r"feed 0: no input 'xx'; did you mean 'x'\?"):
        runner.run(Graph.parse(SMALL), [{"xx": x, "b": b}])
    with pytest.raises(DataError, match=r"feed 1: input 'b' \(tensor\(float\)\) is missing"):
        runner.run(Graph.parse(SMALL), [{"x": x, "b": b}, {"x": x}])


def test_feeds_of_things_that_are_no_values(runner):
    feed = {"x": np.zeros((1, 2), np.float32), "b": object()}
    runner.load_seconds(Graph.parse(SMALL))
    pid = runner._child.pid
    with pytest.raises(DataError, match=r"feed 0: a object is not a tensor, list, dict or None"):
        runner.run(Graph.parse(SMALL), [feed])
    assert runner._child.pid == pid


def test_refusals_are_one_line_and_the_child_lives_on(runner):
    graph = Graph.parse(SMALL)
    feed = {"x": np.zeros((1, 3), np.float32), "b": np.zeros(2, np.float32)}
    pid = runner._child.pid
    with pytest.raises(SessionError, match="onnxruntime failed running model 'small' on feed 0: ") as caught:
        runner.run(graph, [feed])
    assert "\n" not in str(caught.value)
    bad = helper.make_graph([helper.make_node("Nonsense", ["x"], ["y"])], "bad", [], [])
    bad.input.append(helper.make_tensor_value_info("x", 1, [1]))
    bad.output.append(helper.make_tensor_value_info("y", 1, [1]))
    model = Graph.load(helper.make_model(bad, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    with pytest.raises(SessionError, match=r"failed loading model 'bad': .*Nonsense"):
        runner.load_seconds(model)
    assert runner._child.pid == pid


def test_runs_are_timed_in_the_child(runner):
    graph = Graph.parse(SMALL)
    feed = {"x": np.zeros((1, 2), np.float32), "b": np.zeros(2, np.float32)}
    runner.run(graph, [feed])
    start = time.perf_counter()
    runner.run(graph, [feed])
    whole = time.perf_counter() - start
    assert 0 < runner.run_seconds(graph, feed) < whole, "no messages in it"
    with pytest.raises(DataError, match="input 'b'"):
        runner.run_seconds(graph, {"x": feed["x"]})
    with pytest.raises(DataError, match="is not a tensor"):
        runner.run_seconds(graph, feed | {"b": object()})


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_crash_is_an_error_and_the_next_call_starts_afresh():
    feed = {"x": np.ones((1, 2), np.float32), "b": np.zeros(2, np.float32)}
    with Runner(threads=1) as runner:
        runner.run(Graph.parse(SMALL), [feed])
        os.kill(runner._child.pid, signal.SIGSEGV)
        with pytest.raises(
            SessionError, match=r"ended its process \(signal 11\) while running model 'small'"
        ):
            runner.run(Graph.parse(SMALL), [feed])
        assert runner.run(Graph.parse(SMALL), [feed])[0]["y"].tolist() == [[1, 1]]
        os.kill(runner._child.pid, signal.SIGSEGV)
        with pytest.raises(SessionError, match="while loading model 'identity'"):
            runner.load_seconds(identity(tensor(TensorProto.FLOAT)))


def test_a_timeout_stops_the_child():
    with Runner(threads=1, timeout=1.0) as runner:
        feed = {"x": np.zeros((64, 64), np.float32)}
        with pytest.raises(
            SessionError, match=r"took more than 1 s running model 'endless' .* raise the timeout"
        ):
            runner.run(Graph.parse(ENDLESS), [feed])
        assert runner._child is None


def test_options_are_checked(runner):
    with pytest.raises(
        ParameterError, match=r"'CPUExecutionProvidor' is not available.*mean 'CPUExecutionProvider'"
    ):
        Runner(providers=["CPUExecutionProvidor"]).load_seconds(Graph.parse(SMALL))
    with pytest.raises(ParameterError, match=r"no optimization level 'extendd'; did you mean 'extended'\?"):
        runner.load_seconds(Graph.parse(SMALL), optimization="extendd")
    with pytest.raises(ParameterError, match="threads"):
        Runner(threads=-1)
    with pytest.raises(ParameterError, match="timeout"):
        Runner(timeout=0)


def test_a_model_over_the_memory_budget_starts_nothing():
    graph = Graph.parse(SMALL)
    graph.set_constant("w", np.zeros((100, 100), np.float32))
    runner = Runner(memory=90_000)
    with pytest.raises(
        SessionTooLarge, match=r"40000 bytes of weights.* more than the memory budget of 90000"
    ):
        runner.load_seconds(graph)
    assert runner._child is None


def test_the_memory_budget_limits_the_sessions_kept():
    graphs = []
    for number in range(2):
        graph = Graph.parse(SMALL.replace("small", f"small{number}"))
        graph.set_constant("w", np.zeros((100, 100), np.float32))
        graphs.append(graph)
    with Runner(threads=1, memory=150_000) as runner:
        for graph in graphs:
            runner.load_seconds(graph)
        assert len(runner._sessions) == 1
    with Runner(threads=1, memory=250_000) as runner:
        for graph in graphs:
            runner.load_seconds(graph)
        assert len(runner._sessions) == 2


def test_the_same_content_is_loaded_once_and_an_edit_is_seen(runner):
    graph = Graph.parse(SMALL)
    feed = {"x": np.array([[-1, 2]], np.float32), "b": np.zeros(2, np.float32)}
    runner.run(graph, [feed])
    known = len(runner._models), runner._count
    runner.run(graph, [feed])
    assert (len(runner._models), runner._count) == known
    relu = graph.producer("y")
    graph.remove(relu)
    graph.emit("Neg", ["h"], ["y"])
    assert runner.run(graph, [feed])[0]["y"].tolist() == [[1, -2]]


def test_only_a_few_models_are_kept_and_a_stream_survives_that(runner):
    feed = {"x": np.array([[-1, 2]], np.float32), "b": np.zeros(2, np.float32)}
    stream = runner.stream(Graph.parse(SMALL), [feed] * 2)
    next(stream)
    for number in range(6):
        runner.load_seconds(identity(tensor(TensorProto.FLOAT, (number + 1,))))
    assert len(list(runner._folder.glob("model_*"))) <= 4
    assert next(stream)["y"].tolist() == [[0, 2]]


def test_external_data_is_shared_by_variants(runner, monkeypatch):
    monkeypatch.setattr("onnxslim_lab.worker.files.EXTERNAL_ABOVE", 1000)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> big (float[1, 64] x) => (float[1, 64] y)'
        "{ h = MatMul(x, w)  y = Neg(h) }"
    )
    weight = np.eye(64, dtype=np.float32) * 3
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    graph = Graph.load(model)
    (result,) = runner.run(graph, [{"x": np.ones((1, 64), np.float32)}], outputs=["h"])
    assert result["h"].tolist() == [[3] * 64]
    folder = next(reversed(runner._models.values())).path.parent
    assert all(file.stat().st_size < 2000 for file in folder.glob("*.onnx"))


RANDOM = """<ir_version: 9, opset_import: ["" : 18]>
chance (float[8] x) => (float[8] y) { z = Neg(x) n = Neg(z) %s r = RandomNormalLike(n) y = Add(r, n) }"""


def test_random_nodes_repeat_and_do_not_depend_on_their_position(runner):
    feed = {"x": np.zeros(8, np.float32)}
    first = runner.run(Graph.parse(RANDOM % ""), [feed] * 2)
    again = runner.run(Graph.parse(RANDOM % ""), [feed] * 2)
    moved = runner.run(
        Graph.parse(RANDOM % "d = RandomNormalLike(z) e = RandomNormalLike(z) f = Add(d, e)"), [feed] * 2
    )
    assert first[0]["y"].tolist() != first[1]["y"].tolist()
    for other in (again, moved):
        assert [o["y"].tolist() for o in other] == [o["y"].tolist() for o in first]


def test_noise_is_small_and_ignores_what_is_not_rounding(runner):
    graph = Graph.parse(SMALL)
    feeds = [{"x": np.ones((1, 2), np.float32), "b": np.zeros(2, np.float32)}]
    assert 0 <= runner.noise(graph, feeds) < 1e-6
    feeds[0]["x"] = np.full((1, 2), np.nan, np.float32)
    assert runner.noise(graph, feeds) == 0


def test_bodies_cannot_be_run(runner):
    graph = Graph.parse(ENDLESS)
    (body,) = (g for g in graph.walk() if g.parent is not None)
    with pytest.raises(SessionError, match="run the whole model"):
        runner.load_seconds(body)


def test_nothing_is_left_behind_and_nothing_beside_the_model(tmp_path, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    source = tmp_path / "models" / "m.onnx"
    source.parent.mkdir()
    onnx.save(onnx.parser.parse_model(SMALL), source)
    with Runner(threads=1) as runner:
        assert runner.load_seconds(Graph.load(source)) > 0
        assert list(temporary.iterdir())
    assert not list(temporary.iterdir())
    assert [f.name for f in source.parent.iterdir()] == ["m.onnx"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_parent_leaves_no_folder(tmp_path):
    script = (
        "import os, tempfile; tempfile.tempdir = os.environ['FOLDER']\n"
        "from onnxslim_lab.graph import Graph; from onnxslim_lab.sessions import Runner\n"
        f"runner = Runner(); runner.load_seconds(Graph.parse('''{SMALL}'''))\n"
        "print(os.listdir(tempfile.tempdir)); os.kill(os.getpid(), 9)"
    )
    search = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FOLDER": str(tmp_path), "PYTHONPATH": search},
        capture_output=True,
        check=False,
        text=True,
    )
    assert "onnxslim_lab-" in done.stdout, done.stderr
    for _ in range(100):
        if not list(tmp_path.glob("onnxslim_lab-*")):
            break
        time.sleep(0.05)
    assert not list(tmp_path.glob("onnxslim_lab-*"))


def test_the_parent_never_imports_onnxruntime():
    script = "import sys, onnxslim_lab.sessions, onnxslim_lab.evaluate; print('onnxruntime' in sys.modules)"
    search = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == "False"


PROBE = """
import json, pathlib, runpy, sys
import numpy as np
from threadpoolctl import threadpool_info
np.ones((4, 4)) @ np.ones((4, 4))
found = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
(pathlib.Path(sys.argv[1]).parent / "blas.json").write_text(json.dumps(found))
runpy.run_module("onnxslim_lab.worker.main", run_name="__main__")
"""


def test_workers_run_blas_with_one_thread(tmp_path, monkeypatch):
    (tmp_path / "blas_probe.py").write_text(PROBE)
    (tmp_path / "private").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("OPENBLAS", "MKL", "OMP"):
        monkeypatch.setenv(f"{name}_NUM_THREADS", "2")
    child = Child(tmp_path / "private", 60.0, "blas_probe")
    child.close()
    found = json.loads((tmp_path / "blas.json").read_text())
    assert found, "no BLAS was loaded"
    assert set(found) == {1}
