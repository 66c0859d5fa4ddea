"""statistics.range_pass: ranges alone are those of all elements, whatever is left out of measuring."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_calibration import BODIES, NANS, bodies_of, body_feeds, images, net

from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration, Want
from onnxslim_lab.statistics.extremes import Reached, measure_extremes
from onnxslim_lab.statistics.formulas import dip_of, formula_of
from onnxslim_lab.statistics.sizes import Sizes

VALUES = ("x", "p", "c", "a", "m", "d", "r", "s", "q", "y")

GATES = """<ir_version: 9, opset_import: ["" : 18]>
gates (float[n, 4, h, 8] x) => (float[n, k, h, 8] y)
  <float six = {6.0}, float three = {3.0}, float zero = {0.0}, float minus = {-2.0}, int64[1] ends = {3},
   int64[1] starts = {1}, int64[1] axes = {1}> {
  t = Mul (x, three)
  u = Sub (six, t)
  v = Div (u, minus)
  h = HardSigmoid <alpha = 0.16666667, beta = 0.5> (v)
  w = Mul (v, h)
  s = Sigmoid (x)
  z = Mul (s, x)
  e = Tanh (z)
  n1 = Neg (e)
  c = Concat <axis = 1> (w, n1)
  g = Slice (c, starts, ends, axes)
  y = Add (g, g)
}"""


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as shared:
        yield shared


def seen(graph, feeds, value):
    """The interpreter's elements of a value."""
    interpreter = Interpreter(graph)
    with np.errstate(all="ignore"):
        return np.concatenate([interpreter.run(feed, [value])[value].reshape(-1) for feed in feeds])


def check(runner, graph, feeds, values, sizes=None, **options):
    calibration = Calibration(runner, Dataset(feeds), **options)
    found = calibration.collect(graph, [Want(graph, value, average=False) for value in values])
    for value in values:
        elements = seen(graph, feeds, value)
        finite = elements[np.isfinite(elements)]
        got = found[graph, value]
        assert (got.count, got.nonfinite, got.samples) == (elements.size, elements.size - finite.size, 0), (
            value
        )
        np.testing.assert_allclose([got.low, got.high], [finite.min(), finite.max()], rtol=2e-5, atol=1e-6)
        assert np.isnan(got.average_low)
    return found


@pytest.fixture
def soon(monkeypatch):
    """A second session after few feeds, as for a large data set."""
    monkeypatch.setattr("onnxslim_lab.statistics.range_pass._TWICE", 4)
    monkeypatch.setattr("onnxslim_lab.statistics.range_pass._FIRST", (2, 2))


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("chosen", [VALUES, ("p", "a", "r", "q"), ("c", "a")])
@pytest.mark.parametrize("batches", [(1, 1), (1, 2, 1, 1, 3), (2, 2, 2, 2)])
def test_ranges_are_those_of_the_values(runner, soon, opset, chosen, batches):
    check(runner, net(opset), images(*batches), chosen)


def test_the_split_into_batches_changes_nothing(runner, soon):
    graph = net()
    results = []
    for batches in ((1,) * 6, (6,), (2, 2, 2), (1, 4, 1)):
        wants = [Want(graph, value, average=False) for value in VALUES]
        found = Calibration(runner, Dataset(images(*batches))).collect(graph, wants)
        results.append([(found[graph, v].low, found[graph, v].high, found[graph, v].count) for v in VALUES])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-6, atol=1e-6)


def test_what_is_reached_is_not_measured_again():
    graph = net()
    sizes = Sizes(graph, VALUES)
    shapes = {name: sizes.shape(name, images(1)[0]) for name in VALUES}
    first = measure_extremes(graph, ["p", "a"], sizes, shapes, witness=("a",))
    assert first.witnessed == {"a": 0.0}
    assert {node.op_type for node in first.instruments.nodes if "a" in node.input} == {
        "MaxPool",
        "GlobalMaxPool",
    }
    assert list(first.formulas) == ["p"]  # follows from x
    assert list(first.instruments.running["lows"]) == ["x", "a"]
    second = measure_extremes(graph, ["p", "a"], sizes, shapes, reached={"a": Reached(0.0, 6.0)})
    assert not any("a" in node.input for node in second.instruments.nodes)
    half = measure_extremes(graph, ["p", "a"], sizes, shapes, reached={"a": Reached(0.0)})
    assert {node.op_type for node in half.instruments.nodes if "a" in node.input} == {"GlobalMaxPool"}


def test_reductions_run_where_values_are_made():
    """Nodes of the deepest values come first: onnxruntime runs the last of the list first."""
    made = measure_extremes(net(), ["c", "d", "s"], Sizes(net(), VALUES), {})
    assert [node.input[0] for node in made.instruments.nodes if node.op_type == "ReduceMin"] == list("sdcx")


def test_onnxruntime_runs_reductions_where_values_are_made(runner, tmp_path):
    """The order of onnxruntime itself, which a new version could change."""
    import onnxruntime

    names = [f"v{n}" for n in range(12)]
    body = "\n".join(
        f"{name} = MatMul ({before}, w)" for before, name in zip(["x", *names], names, strict=False)
    )
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] y) '
        f"<float[3, 3] w = {{1.,2.,3.,4.,5.,6.,7.,8.,9.}}> {{ {body}\n y = Identity ({names[-1]}) }}"
    )
    graph = Graph.load(model)
    made = measure_extremes(graph, names, Sizes(graph, names), {}).instruments
    model.graph.node.extend(made.nodes)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made.outputs)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    session.run(made.outputs, {"x": np.ones((2, 3), np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"]["op_name"] for e in events if e["name"].endswith("kernel_time")]
    last = len(ran) - 1 - ran[::-1].index("MatMul")
    assert sum(operator.startswith("Reduce") for operator in ran[:last]) >= 2 * (len(names) - 1)


def test_a_least_element_that_the_sample_misses_is_found(runner, soon):
    graph, feeds = net(), images(1, 1, 1, 1, 1)
    graph.set_constant("six", np.array(1e6, np.float32))
    graph.set_constant("w", np.abs(graph.constant("w")))
    for feed in feeds:
        feed["x"] = np.abs(feed["x"]) * (0.1 if feed is feeds[0] else 1)  # found in the first session
    found = check(runner, graph, feeds, ("a", "p"))
    assert found[graph, "a"].low > 0


@pytest.mark.parametrize("scale", [1, 5])
def test_formulas_follow_from_other_ranges(runner, soon, scale):
    graph = Graph.parse(GATES)
    random = np.random.default_rng(3)
    feeds = [
        {"x": (random.standard_normal((n, 4, 16, 8)) * scale).astype(np.float32)} for n in (1, 3, 1, 2, 1, 1)
    ]
    values = ("x", "t", "u", "v", "h", "w", "s", "z", "e", "n1", "c", "g", "y")
    for value in ("t", "u", "v", "h", "s", "e", "n1", "c"):
        assert formula_of(graph, value, values), value
    for value in ("w", "z"):
        assert formula_of(graph, value, values) is None
        assert dip_of(graph, value), value
    assert formula_of(graph, "g", values) is None
    check(runner, graph, feeds, values)
    check(runner, graph, [{"x": np.abs(feed["x"]) - 1} for feed in feeds], values)


def test_a_dip_that_was_reached_is_not_measured_again():
    graph = Graph.parse(GATES)
    sizes = Sizes(graph, ["x", "z"])
    made = measure_extremes(graph, ["x", "z"], sizes, {}, reached={"z": Reached(-0.2784645)})
    assert "z" in made.formulas
    assert made.formulas["z"].range([(-3.0, 2.0)]) == pytest.approx((-0.2784645, 2 / (1 + np.exp(-2))))
    made = measure_extremes(graph, ["x", "z"], sizes, {}, reached={"z": Reached()})
    assert "z" not in made.formulas


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_what_is_not_finite_is_counted_and_left_out(runner, soon, bad):
    graph = Graph.parse(NANS)
    feeds = [{"x": np.array([[1, 2, 3]], np.float32) + n} for n in range(6)]
    feeds[bad]["x"][0, :2] = -1, 0  # NaN and -inf
    found = check(runner, graph, feeds, ("x", "l", "z"))
    assert found[graph, "l"].nonfinite == 2


@pytest.mark.parametrize("bad", [0, 4])
def test_huge_numbers_are_measured_in_full(runner, soon, bad):
    graph = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y, int64[n] j) '
        "<float[1] k = {3.0}, float b = {-2e10}, float t = {10.0}> "
        "{ y = Mul (x, k)  r = Relu (y)  c = Clip (x, b, t)  j = Cast <to = 7> (c) }"
    )
    feeds = [{"x": np.arange(4, dtype=np.float32)} for _ in range(6)]
    feeds[bad]["x"][0] = 3e38  # tripled, it is infinite
    feeds[bad]["x"][1] = -2e10
    found = Calibration(runner, Dataset(feeds)).collect(
        graph, [Want(graph, value, average=False) for value in ("x", "y", "r", "j")]
    )
    assert found[graph, "x"].high == np.float32(3e38)
    assert (found[graph, "y"].nonfinite, found[graph, "y"].high, found[graph, "y"].count) == (1, 9, 24)
    assert found[graph, "y"].low == np.float32(-2e10) * 3
    assert found[graph, "r"].nonfinite == 1
    assert (found[graph, "r"].low, found[graph, "r"].high) == (0, 9)
    assert (found[graph, "j"].low, found[graph, "j"].high) == (float(np.float32(-2e10)), 10)


@pytest.mark.parametrize("bad", [0, 4])
@pytest.mark.parametrize("place", [0, 21, 63])
def test_one_nan_among_many_is_found(runner, soon, bad, place):
    """onnxruntime's reductions drop it or not, as it falls."""
    graph = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) { l = Log (x)  y = Relu (l) }'
    )
    feeds = [{"x": np.arange(2, 66, dtype=np.float32) + n} for n in range(6)]
    feeds[bad]["x"][place] = -1
    found = check(runner, graph, feeds, ("x", "l"))
    assert found[graph, "l"].nonfinite == 1


def test_a_formula_that_overflows_is_measured(runner, soon):
    graph = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) <float k = {1e38}> { y = Mul (x, k) }'
    )
    feeds = [{"x": np.array([0.5, n], np.float32)} for n in (1, 1, 7, 1, 2)]
    assert formula_of(graph, "y", ["x"])
    found = check(runner, graph, feeds, ("x", "y"))
    assert found[graph, "y"].nonfinite == 1


def test_values_without_elements_count_nothing(runner, soon):
    graph = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[m] y) '
        "<int64[1] one = {1}, int64[1] flat = {-1}> { i = NonZero (x)  f = Reshape (i, flat)  "
        "p = Gather (x, f)  y = Neg (p) }"
    )
    feeds = [{"x": np.array(x, np.float32)} for x in ([0, 0], [1, 2, 0], [0], [5], [0, 3], [], [7])]
    for average in (True, False):
        found = Calibration(runner, Dataset(feeds)).collect(
            graph, [Want(graph, value, average=average) for value in ("x", "i", "p", "y")]
        )
        assert [found[graph, value].count for value in ("x", "i", "p", "y")] == [10, 5, 5, 5]
        assert (found[graph, "y"].low, found[graph, "p"].high) == (-7, 7)
    nothing = Calibration(runner, Dataset(feeds[:1])).collect(graph, [Want(graph, "y", average=False)])
    assert nothing[graph, "y"].empty


def test_types_that_are_not_reduced_in_the_graph(runner, soon):
    graph = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float16[n, 3] x) => (float16[n, 3] y) { y = Neg (x) }'
    )
    check(runner, graph, [{"x": np.full((1, 3), n, np.float16)} for n in range(6)], ("x", "y"))


def test_bodies_and_models_too_large_for_a_session(soon):
    graph, feeds = net(), images(2, 1, 1, 1)
    with Runner(memory=100) as small:
        check_large = Calibration(small, Dataset(feeds)).collect(graph, [Want(graph, "a", average=False)])
    assert check_large[graph, "a"].high == pytest.approx(seen(graph, feeds, "a").max(), rel=1e-5)
    graph = Graph.parse(BODIES)
    parts = bodies_of(graph)
    with Runner(threads=1) as runner:
        found = Calibration(runner, Dataset(body_feeds([True] * 5))).collect(
            graph, [Want(parts["yes"], "k", average=False), Want(graph, "l", average=False)]
        )
    assert found[parts["yes"], "k"].low == 0
    assert found[graph, "l"].count == 30


def test_ranges_without_averages_choose_no_average(runner):
    from onnxslim_lab.errors import ParameterError
    from onnxslim_lab.quantization.ranges import choose_range
    from onnxslim_lab.quantization.types import find_type

    graph = net()
    found = Calibration(runner, Dataset(images(1))).collect(graph, [Want(graph, "a", average=False)])
    with pytest.raises(ParameterError, match="average=True"):
        choose_range(found[graph, "a"], find_type("uint8"), "average", symmetric=False)


def test_sizes_follow_from_the_feed():
    graph = net()
    sizes = Sizes(graph, VALUES)
    assert sizes.shape("m", images(3)[0]) == (3, 8, 8, 8)
    assert sizes.count("p", images(3)[0]) == 3 * 4 * 18 * 18
    unknown = Graph.parse(
        '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (int64[1, m] y) { y = NonZero (x) }'
    )
    assert "y" not in Sizes(unknown, ["y"])
    assert Sizes(unknown, ["y"]).shape("y", {}) is None
