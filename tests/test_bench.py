"""Bench tells what it measured and no more. No assertion here depends on how fast this machine is."""

import json
import re

import numpy as np
import onnx
import pytest
import typer
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from onnxslim_lab import Dataset
from onnxslim_lab.bench import bench, by_operator, file_bytes, plain
from onnxslim_lab.bench_report import NodeTime
from onnxslim_lab.commands.bench import bench as command
from onnxslim_lab.errors import DataError, ModelError, ParameterError, SessionError
from onnxslim_lab.pairing import Pairs, measure_pairs, ratio_of
from onnxslim_lab.worker.timing import node_times


def chain(width=16, layers=1, kind=onnx.TensorProto.FLOAT, name="x"):
    dtype = np.float32 if kind == onnx.TensorProto.FLOAT else np.float16
    weight = np.eye(width, dtype=dtype)
    nodes = [
        helper.make_node("MatMul", [name if i == 0 else f"v{i}", "w"], [f"v{i + 1}"], f"layer{i}")
        for i in range(layers)
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(name, kind, ["n", width])],
        [helper.make_tensor_value_info(f"v{layers}", kind, ["n", width])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def files(tmp_path):
    onnx.save(chain(), tmp_path / "a.onnx")
    onnx.save(chain(layers=3), tmp_path / "b.onnx")
    return tmp_path / "a.onnx", tmp_path / "b.onnx"


class Clock:
    """Something that takes a known time, with noise shared by all, and records what it is asked."""

    def __init__(self, seconds, noise):
        self.seconds, self.noise, self.calls = seconds, noise, []

    def __call__(self, feed, count):
        self.calls.append((feed, count))
        return self.seconds * count * self.noise()


def timed(ratio, scatter, pairs=40, seed=0):
    random = np.random.default_rng(seed)
    clocks = [Clock(seconds, lambda: random.lognormal(0, scatter)) for seconds in (0.02, 0.02 * ratio)]
    return ratio_of(measure_pairs(*clocks, pairs=pairs, warmup=2)), clocks


def test_a_clear_difference_is_told_and_a_doubtful_one_is_not():
    assert timed(0.5, 0.05)[0].verdict == "faster"
    assert timed(2.0, 0.05)[0].verdict == "slower"
    found = timed(1.0, 0.3)[0]
    assert found.verdict == "undecided"
    assert found.low < 1 < found.high


def test_equal_models_are_rarely_called_different():
    verdicts = [timed(1.0, 0.2, pairs=20, seed=seed)[0].verdict for seed in range(60)]
    assert verdicts.count("undecided") >= 50  # a 95 % interval


def test_runs_alternate_after_warming_up_and_feeds_take_turns():
    order = []
    clocks = [lambda feed, count, who=who: order.append((who, feed, count)) or 0.001 * count for who in "ab"]
    found = measure_pairs(*clocks, pairs=4, warmup=3, feeds=2)
    assert order[:4] == [("a", 0, 3), ("b", 0, 3), ("a", 1, 3), ("b", 1, 3)]
    assert found.block == 10  # ten milliseconds
    runs = [(who, feed) for who, feed, count in order[6:]]
    assert [who for who, _ in runs] == list("abbaabba")
    assert [feed for _, feed in runs] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert {count for *_, count in order[6:]} == {10}
    np.testing.assert_allclose(found.first, 0.001)


def test_the_interval_narrows_with_pairs():
    wide, narrow = timed(1.1, 0.2, pairs=10)[0], timed(1.1, 0.2, pairs=400)[0]
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2
    assert ratio_of(Pairs(np.ones(9), np.full(9, 2.0), 1)).ratio == 2


def test_integer_forms_count_with_their_operator():
    first = [
        NodeTime(name="c", op_type="Conv", seconds=5.0),
        NodeTime(name="m", op_type="MatMul", seconds=1.0),
    ]
    second = [
        NodeTime(name="c", op_type="QLinearConv", seconds=2.0),
        NodeTime(name="m", op_type="MatMulIntegerToFloat", seconds=1.0),
        NodeTime(name="q", op_type="QuantizeLinear", seconds=4.0),
    ]
    found = {item.op_type: (item.first, item.second, item.difference) for item in by_operator(first, second)}
    assert found == {"QuantizeLinear": (0, 4, 4), "MatMul": (1, 1, 0), "Conv": (5, 2, -3)}
    assert by_operator(first, second)[0].op_type == "QuantizeLinear"
    assert plain("QLinearAdd") == "Add"


def test_node_times_leave_warming_up_out():
    def event(name, op, microseconds):
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": op}}

    events = [
        event("slow", "Conv", 9000),
        event("body", "Add", 9000),
        event("body", "Add", 9000),
        *[event("slow", "Conv", 100) for _ in range(4)],
        *[event("body", "Add", 30) for _ in range(8)],
        {"cat": "Session", "name": "model_run", "dur": 5},
        {"cat": "Node", "name": "slow_fence_before", "dur": 5, "args": {"op_name": "Conv"}},
    ]
    assert node_times(events, 1, 4) == [
        ["slow", "Conv", pytest.approx(1e-4)],
        ["body", "Add", pytest.approx(6e-5)],
    ]


def test_a_report_has_everything_and_is_consistent(files):
    first, second = files
    data = Dataset([{"x": np.ones((n, 16), np.float32)} for n in (1, 4)], random=True)
    report = bench(first, second, data, runs=6, warmup=1)
    assert report.pairs == 6
    assert report.low <= report.ratio <= report.high
    assert (report.verdict == "undecided") == (report.low <= 1 <= report.high)
    for model, path in ((report.first, first), (report.second, second)):
        assert model.file_bytes == path.stat().st_size
        assert 0 < model.low_seconds <= model.median_seconds <= model.high_seconds
        assert model.load_seconds > 0
        assert model.peak_bytes is None or model.peak_bytes > 10**6
        assert {node.op_type for node in model.slowest} == {"MatMul"}
    assert (len(report.first.slowest), len(report.second.slowest)) == (1, 3)
    (operator,) = report.operators
    assert operator.op_type == "MatMul"
    assert operator.first > 0
    again = type(report).model_validate_json(report.model_dump_json())
    assert again == report


@pytest.mark.parametrize(
    ("low", "high", "verdict", "word"),
    [
        (1.2, 1.4, "slower", "SLOWER"),
        (0.9, 1.1, "undecided", "no difference can be told"),
        (0.4, 0.5, "faster", "faster"),
    ],
)
def test_the_table_says_it_in_words(files, low, high, verdict, word):
    from rich.console import Console

    report = bench(*files, Dataset([{"x": np.ones((1, 16), np.float32)}]), runs=5, warmup=1)
    slow = {"op_type": "DequantizeLinear", "first": 0.0, "second": report.first.median_seconds}
    told = report.model_copy(
        update={
            "ratio": (low + high) / 2,
            "low": low,
            "high": high,
            "verdict": verdict,
            "operators": [type(report.operators[0])(**slow)],
        }
    )
    console = Console(width=200)
    with console.capture() as captured:
        console.print(told.table())
    text = captured.get()
    assert word in text
    assert ("DequantizeLinear" in text) == (verdict == "slower")


def test_half_models_get_halves_and_other_inputs_are_refused(tmp_path, files):
    onnx.save(chain(kind=onnx.TensorProto.FLOAT16), tmp_path / "half.onnx")
    onnx.save(chain(name="other"), tmp_path / "other.onnx")
    data = Dataset([{"x": np.ones((2, 16), np.float32)}])
    assert bench(files[0], tmp_path / "half.onnx", data, runs=5, warmup=1).second.median_seconds > 0
    with pytest.raises(DataError, match="takes other inputs than the first model: 'other'"):
        bench(files[0], tmp_path / "other.onnx", data, runs=5)


def test_external_data_counts(tmp_path):
    model = chain(width=64)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert file_bytes(path) == path.stat().st_size + (tmp_path / "m.data").stat().st_size > 64 * 64 * 4
    (tmp_path / "no.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not an ONNX model"):
        file_bytes(tmp_path / "no.onnx")
    with pytest.raises(ModelError, match="No such file"):
        file_bytes(tmp_path / "missing.onnx")


def test_bad_requests_are_one_line(files, tmp_path):
    data = Dataset([{"x": np.ones((1, 16), np.float32)}])
    with pytest.raises(ParameterError, match="runs must be 5 or more"):
        bench(*files, data, runs=2)
    with pytest.raises(DataError, match="no feeds"):
        bench(*files, Dataset([]))
    with pytest.raises(ParameterError, match="'CpuProvider' is not available"):
        bench(*files, data, provider="CpuProvider")
    broken = chain()
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(SessionError, match="NoSuchOperator"):
        bench(files[0], tmp_path / "broken.onnx", data)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(files, as_json):
    app = typer.Typer()
    app.command()(command)
    flags = ["--json"] if as_json else []
    result = CliRunner().invoke(
        app, [*map(str, files), "--runs", "5", "--warmup", "1", "--dim", "n=2", *flags]
    )
    assert result.exit_code == 0, result.output
    if as_json:
        told = json.loads(result.output)
        assert told["verdict"] in ("faster", "slower", "undecided")
        assert told["data"]["random"] is True
        assert told["threads"] == 1
    else:
        assert re.search(r"faster|SLOWER|undecided", result.output)
        assert "random inputs" in result.output
