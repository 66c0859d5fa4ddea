"""statistics.Calibration: one pass over the data, in sessions and in the interpreter, cached, within memory."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError, ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration, MissingStatistics, Want, default_folder
from onnxslim_lab.statistics.cache import data_digest, model_digest
from onnxslim_lab.statistics.instrument import instrument
from onnxslim_lab.worker.tally import Tally

NET = """<ir_version: 9, opset_import: ["" : OPSET]>
net (float[n, 4, 16, 16] x) => (float[n, 8, 8, 8] y)
  <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, float six = {6.0},
   float zero = {0.0}> {
  p = Pad (x, pads)
  c = Conv (p, w)
  a = Clip (c, zero, six)
  m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
  d = Conv (m, v)
  r = Relu (d)
  s = Add (r, m)
  q = Identity (s)
  y = Sub (q, d)
}"""

NANS = """<ir_version: 9, opset_import: ["" : 17]>
nans (float[n, 3] x) => (float[n, 3] y) { l = Log (x)  y = Relu (l)  z = Neg (x) }"""

BODIES = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
bodies (float[2, 3] x, bool c, float[3, 3] other) => (float[2, 3] y, float z) {
  b = If (c) <
    then_branch = yes () => (float[2, 3] t) <float[3, 3] u = {1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0}> { k = Relu (x)  t = MatMul (k, u) },
    else_branch = no () => (float[2, 3] e) { h = Neg (x)  e = Abs (h) }>
  trips = Constant <value = int64 {3}> ()
  go = Constant <value = bool {1}> ()
  l = Loop (trips, go, b) <body = turn (int64 i, bool g, float[2, 3] s) => (bool g2, float[2, 3] n) {
    one = Constant <value_float = 1.0> ()
    two = Add (one, one)
    n = Add (s, two)
    g2 = Identity (g)
  }>
  y = own.twice (l)
  z = ReduceMax <keepdims = 0> (y)
}
<domain: "own", opset_import: ["" : 17]> twice (a) => (o) { d = Add (a, a)  o = Identity (d) }"""


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=2) as shared:
        yield shared


def net(opset=17):
    model = onnx.parser.parse_model(NET.replace("OPSET", str(opset)))
    random = np.random.default_rng(0)
    w = random.standard_normal((8, 4, 3, 3)).astype(np.float32) / 3
    v = random.standard_normal((8, 8, 1, 1)).astype(np.float32)
    model.graph.initializer.extend(
        [onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(v, "v")]
    )
    return Graph.load(model)


def images(*batches, seed=1):
    x = np.random.default_rng(seed).standard_normal((sum(batches), 4, 16, 16)).astype(np.float32)
    return [{"x": part} for part in np.split(x, np.cumsum(batches)[:-1])]


VALUES = ("x", "p", "c", "a", "m", "d", "r", "s", "q", "y")


def agree(found, expected, rtol=1e-5):
    for name in ("count", "nonfinite", "samples"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("low", "high", "average_low", "average_high"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-6)


def expectation(graph, feeds, value, **options):
    """What a tally of the interpreter's values says."""
    interpreter = Interpreter(graph)
    tally = Tally(**options)
    for feed in feeds:
        tally.add(interpreter.run(feed, [value])[value], len(next(iter(feed.values()))))
    from onnxslim_lab.statistics import ValueStatistics

    return ValueStatistics.of(tally.state())


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("chosen", [VALUES, ("p", "a", "r", "q"), ("c", "a")])
def test_ranges_are_those_of_the_values(runner, opset, chosen):
    graph, feeds = net(opset), images(1, 1, 1)
    found = Calibration(runner, Dataset(feeds)).collect(graph, [Want(graph, value) for value in chosen])
    assert len(found) == len(chosen)
    for value in chosen:
        agree(found[graph, value], expectation(graph, feeds, value))


def test_histograms_and_channels_are_those_of_the_values(runner):
    graph, feeds = net(), images(2, 3)
    wants = [Want(graph, value, histogram=value != "p", axis=1) for value in VALUES]
    found = Calibration(runner, Dataset(feeds)).collect(graph, wants)
    for value in VALUES:
        expected = expectation(graph, feeds, value, histogram=True, axis=1)
        agree(found[graph, value], expected)
        np.testing.assert_allclose(found[graph, value].channels.mean, expected.channels.mean, atol=1e-4)
        if value == "p":
            assert found[graph, value].histogram is None
        else:
            assert found[graph, value].histogram.total == expected.count
            assert found[graph, value].histogram.quantile(0.9) == pytest.approx(
                expected.histogram.quantile(0.9), rel=0.02
            )


@pytest.mark.parametrize("histogram", [False, True])
def test_the_split_into_batches_changes_nothing(runner, histogram):
    graph = net()
    results = []
    for batches in ((1, 1, 1, 1, 1), (5,), (2, 2, 1), (1, 4)):
        wants = [Want(graph, value, histogram=histogram) for value in VALUES]
        results.append(Calibration(runner, Dataset(images(*batches))).collect(graph, wants))
    for other in results[1:]:
        for value in VALUES:
            agree(other[graph, value], results[0][graph, value])


def test_the_image_of_a_convolution_and_a_relu_is_only_sampled_for_its_least_element():
    graph = net()
    shapes = {"a": (1, 8, 16, 16), "c": (1, 8, 16, 16), "p": (1, 4, 18, 18)}
    made = instrument(
        graph, {"p": Tally(), "a": Tally()}, full=frozenset(), axes={}, shapes=shapes, steady=True
    )
    assert made.reduced["a"]["bound"] == 0
    assert {node.op_type for node in made.nodes if "a" in node.input} == {"MaxPool", "GlobalMaxPool"}
    assert not any("p" in node.input for node in made.nodes)  # follows from x
    assert made.derived["p"]["source"] == "x"
    assert not made.exposed


def test_a_least_element_that_the_sample_misses_is_found(runner):
    """Nothing is clipped in most images: the sample never shows the bound."""
    graph, feeds = net(), images(1, 1, 1, 1)
    graph.set_constant("six", np.array(1e6, np.float32))
    for feed in feeds[1:]:
        feed["x"] = np.abs(feed["x"])
    graph.set_constant("w", np.abs(graph.constant("w")))
    found = Calibration(runner, Dataset(feeds)).collect(graph, [Want(graph, "a"), Want(graph, "p")])
    agree(found[graph, "a"], expectation(graph, feeds, "a"))
    assert found[graph, "a"].average_low > 0
    agree(found[graph, "p"], expectation(graph, feeds, "p"))


@pytest.mark.parametrize("bad", [0, 2])
def test_what_is_not_finite_is_counted_and_left_out(runner, bad):
    graph = Graph.parse(NANS)
    feeds = [{"x": np.array([[1, 2, 3]], np.float32) + n} for n in range(4)]
    feeds[bad]["x"][0, :2] = -1, 0  # NaN and -inf
    found = Calibration(runner, Dataset(feeds)).collect(graph, [Want(graph, v) for v in ("x", "l", "z")])
    assert found[graph, "l"].nonfinite == 2
    assert found[graph, "l"].count == 12
    assert found[graph, "l"].samples == 4
    assert found[graph, "l"].low == pytest.approx(np.log(1 if bad else 2))
    assert found[graph, "z"].high == 1  # made by a node that no output needs


def bodies_of(graph):
    return {part.name: part for part in graph.walk()}


def body_feeds(choices):
    random = np.random.default_rng(2)
    return [
        {
            "x": random.standard_normal((2, 3)).astype(np.float32),
            "c": np.array(choice),
            "other": np.eye(3, dtype="f"),
        }
        for choice in choices
    ]


def branching():
    graph = Graph.parse(BODIES)
    return graph, bodies_of(graph)


def test_bodies_and_functions_are_measured(runner):
    graph, parts = branching()
    feeds = body_feeds([True, False, True])
    wants = [("yes", "k"), ("yes", "t"), ("no", "h"), ("turn", "s"), ("turn", "n"), ("turn", "two")]
    wants += [("twice", "a"), ("twice", "d"), ("bodies", "l"), ("yes", "x")]
    found = Calibration(runner, Dataset(feeds)).collect(graph, [Want(parts[p], v) for p, v in wants])
    taken = np.stack([feed["x"] for feed in feeds if feed["c"]])
    assert found[parts["yes"], "k"].high == np.maximum(taken, 0).max()
    assert found[parts["yes"], "k"].count == 12
    assert found[parts["no"], "h"].low == (-feeds[1]["x"]).min()
    assert found[parts["turn"], "n"].count == 3 * 3 * 6  # feeds, turns, elements
    assert found[parts["turn"], "s"].high == pytest.approx(found[parts["turn"], "n"].high - 2)
    assert found[parts["turn"], "two"].low == 2  # made of constants: seen where it is read
    assert found[parts["twice"], "a"].high == found[graph, "l"].high
    assert found[parts["no"], "x"].count == 18  # a body reads it, the main graph defines it
    copied = bodies_of(graph.copy())
    assert found[copied["yes"], "k"] is found[parts["yes"], "k"]


def test_a_branch_never_taken_has_no_statistics(runner):
    graph, parts = branching()
    found = Calibration(runner, Dataset(body_feeds([False]))).collect(graph, [Want(parts["yes"], "k")])
    assert found.get(parts["yes"], "k") is None
    assert (parts["yes"], "k") not in found
    with pytest.raises(MissingStatistics, match="'k' of graph 'yes': no run computed it") as caught:
        found[parts["yes"], "k"]
    assert isinstance(caught.value, KeyError)
    assert found.get(parts["yes"], "x") is None  # defined in the graph around, and not asked for
    with pytest.raises(ParameterError, match="was not asked for"):
        found[graph, "y"]


def test_a_model_too_large_for_a_session_is_interpreted():
    graph, feeds = net(), images(2, 1)
    wants = [Want(graph, value, histogram=True) for value in ("x", "p", "a", "y")]
    with Runner(memory=100) as small:
        calibration = Calibration(small, Dataset(feeds))
        found = calibration.collect(graph, wants)
        layers, _ = find_layers(graph)
        grams = list(calibration.grams(graph, layers))
        outputs = calibration.outputs(graph, limit=1)
    for value in ("x", "p", "a", "y"):
        agree(found[graph, value], expectation(graph, feeds, value))
    assert [gram.count for _, gram in grams] == [3 * 256, 3 * 64]
    np.testing.assert_allclose(outputs[0]["y"], Interpreter(graph).run(feeds[0])["y"], rtol=1e-4, atol=1e-4)


def test_groups_within_the_memory_give_the_same(runner, monkeypatch):
    graph, feeds = net(), images(1, 1)
    calls = []
    measure = Runner.measure
    monkeypatch.setattr(Runner, "measure", lambda *a, **k: calls.append(1) or measure(*a, **k))
    wants = [Want(graph, value, histogram=True) for value in VALUES]
    whole = Calibration(runner, Dataset(feeds)).collect(graph, wants)
    few = len(calls)
    monkeypatch.setattr("onnxslim_lab.statistics.pass_over.BINS", 1 << 18)  # as if histograms were larger
    parted = Calibration(runner, Dataset(feeds), memory=16 << 20).collect(graph, wants)
    assert len(calls) > 2 * few
    for value in VALUES:
        agree(parted[graph, value], whole[graph, value], rtol=1e-5)


def test_grams_of_all_kinds_of_graphs_come_in_order(runner):
    graph, parts = branching()
    feeds = body_feeds([True, True, False])
    layers = find_layers(parts["yes"])[0]
    ((layer, gram),) = Calibration(runner, Dataset(feeds)).grams(graph, layers)
    rows = np.maximum(np.concatenate([feed["x"] for feed in feeds[:2]]), 0).astype(np.float64)
    assert layer is layers[0]
    np.testing.assert_allclose(gram.xtx[0], rows.T @ rows, rtol=1e-5)
    assert gram.count == 4


def test_grams_are_of_the_model_as_it_was(runner, monkeypatch):
    graph, feeds = net(), images(2, 1)
    layers, _ = find_layers(graph)
    calibration = Calibration(runner, Dataset(feeds), memory=16 << 20)
    expected = [gram.matrix for _, gram in calibration.grams(graph, layers)]
    monkeypatch.setattr("onnxslim_lab.statistics.gathering._SHARE", 1 << 9)
    found = []
    for layer, gram in calibration.grams(graph, layers):
        layer.set(np.zeros_like(layer.with_matrix(layer.matrix)))
        found.append(gram.matrix)
    for first, second in zip(expected, found, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6)


def test_a_matrix_larger_than_the_memory_keeps_its_diagonal(runner, monkeypatch):
    graph, feeds = net(), images(1)
    monkeypatch.setattr("onnxslim_lab.statistics.gathering._SHARE", 1 << 14)
    grams = [
        gram
        for _, gram in Calibration(runner, Dataset(feeds), memory=16 << 20).grams(
            graph, find_layers(graph)[0]
        )
    ]
    assert [gram.full for gram in grams] == [False, True]
    assert grams[0].diagonal.shape == (1, 36)


def test_the_limit_takes_the_first_feeds(runner):
    graph, feeds = net(), images(1, 1, 1)
    calibration = Calibration(runner, Dataset(feeds))
    assert len(calibration.outputs(graph, limit=2)) == 2
    assert len(list(calibration.stream(graph, ["x", "a"]))) == 3
    assert next(calibration.stream(graph, ["x", "a"]))["x"] is feeds[0]["x"]
    ((_, gram),) = calibration.grams(graph, find_layers(graph)[0][:1], limit=1)
    assert gram.count == 256


def test_the_cache_answers_for_the_same_model_data_and_options(runner, tmp_path, monkeypatch):
    graph, feeds = net(), images(1, 1)
    wants = [Want(graph, "a", histogram=True, axis=1), Want(graph, "none")]
    layers = find_layers(graph)[0]
    calibration = Calibration(runner, Dataset(feeds), cache=tmp_path / "kept")
    first = calibration.collect(graph, wants[:1])
    grams = list(calibration.grams(graph, layers))
    measure = Runner.measure
    calls = []
    monkeypatch.setattr(Runner, "measure", lambda *a, **k: calls.append(1) or measure(*a, **k))

    again = Calibration(runner, Dataset(images(1, 1)), cache=tmp_path / "kept")
    second = again.collect(net(), wants[:1])
    agree(second[graph, "a"], first[graph, "a"], rtol=0)
    np.testing.assert_array_equal(second[graph, "a"].histogram.counts, first[graph, "a"].histogram.counts)
    np.testing.assert_array_equal(second[graph, "a"].channels.mean, first[graph, "a"].channels.mean)
    for (_, kept), (_, gram) in zip(again.grams(graph, layers), grams, strict=True):
        np.testing.assert_array_equal(kept.matrix, gram.matrix)
    assert not calls

    other = net()
    other.set_constant("w", other.constant("w") + 1)
    again.collect(other, wants[:1])
    again.collect(graph, [Want(graph, "a")])
    Calibration(runner, Dataset(images(1, 1, seed=3)), cache=tmp_path / "kept").collect(graph, wants[:1])
    assert len(calls) >= 3


def one_entry(folder, notices=None, **options):
    """A cache with one entry, and a list that what is read is put into."""
    from onnxslim_lab.statistics.cache import Cache

    cache = Cache(folder, notices, **options)
    cache.put("a", {"values": np.arange(1000.0)})
    return cache


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:100]
    elif how == "one bit":
        data[-100] ^= 1
    elif how == "header":
        data[8] ^= 1
    elif how == "length":
        data[0] ^= 0x80
    elif how == "longer":
        data += b"x"
    else:
        data = bytearray()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "one bit", "header", "length", "longer", "empty"])
def test_a_damaged_entry_is_told_and_counts_as_none(tmp_path, how):
    notices = []
    cache = one_entry(tmp_path, notices)
    assert cache.get("a", dict)["values"][-1] == 999
    damage(tmp_path / "a.bin", how)
    assert cache.get("a", dict) is None
    assert len(notices) == 1
    assert "damaged" in notices[0]
    assert cache.get("other", dict) is None
    assert len(notices) == 1


def test_damaged_results_are_measured_again_and_kept(runner, tmp_path):
    graph, feeds, notices = net(), images(1, 1), []
    layers = find_layers(graph)[0]
    calibration = Calibration(runner, Dataset(feeds), cache=tmp_path, notices=notices)
    first = calibration.collect(graph, [Want(graph, "a", histogram=True)])
    list(calibration.grams(graph, layers))
    assert not notices
    for path in tmp_path.iterdir():
        damage(path, "one bit")
    agree(
        calibration.collect(graph, [Want(graph, "a", histogram=True)])[graph, "a"], first[graph, "a"], rtol=0
    )
    assert [gram.count for _, gram in calibration.grams(graph, layers)] == [512, 128]
    assert len(notices) == 1 + len(layers)
    calibration.collect(graph, [Want(graph, "a", histogram=True)])
    list(calibration.grams(graph, layers))
    assert len(notices) == 1 + len(layers)


def test_a_folder_that_cannot_be_written_to_stops_nothing(runner, tmp_path):
    graph, notices = net(), []
    (tmp_path / "file").write_text("in the way")
    calibration = Calibration(runner, Dataset(images(1)), cache=tmp_path / "file" / "kept", notices=notices)
    assert calibration.collect(graph, [Want(graph, "a")])[graph, "a"].count
    assert [gram.count for _, gram in calibration.grams(graph, find_layers(graph)[0])] == [256, 64]
    assert len(notices) == 1
    assert "not kept" in notices[0]


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    notices = []
    cache = one_entry(tmp_path, notices)
    monkeypatch.setattr("onnxslim_lab.statistics.cache.send", full)
    cache.put("b", {"values": np.zeros(1)})
    cache.put("c", {"values": np.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert len(notices) == 1
    assert "No space left" in notices[0]


def test_the_folder_stays_within_its_size(tmp_path):
    import time

    (tmp_path / "old.part").write_bytes(b"x")
    (tmp_path / "new.part").write_bytes(b"x")
    os.utime(tmp_path / "old.part", (0, 0))
    cache = one_entry(tmp_path, largest=20_000)
    for number, key in enumerate("bcd"):
        cache.put(key, {"values": np.arange(1000.0)})
        os.utime(tmp_path / f"{key}.bin", (number, time.time() - 100 + number))
        cache.get("a", dict)  # used: not the oldest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "d.bin", "new.part"]


def _write_often(folder, number):
    from onnxslim_lab.statistics.cache import Cache

    notices = []
    cache = Cache(folder, notices, largest=60_000)
    for turn in range(40):
        key = f"k{(turn * 7 + number) % 9}"
        cache.put(key, {"values": np.full(1000, float(key[1:]))})
        found = cache.get(f"k{turn % 9}", lambda message: message["values"])
        assert found is None or (found == turn % 9).all()
    return notices


def test_processes_share_the_folder(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        for notices in pool.map(_write_often, [tmp_path] * 3, range(3)):
            assert notices == []
    assert not list(tmp_path.glob("*.part"))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 60_000


def test_digests_tell_content_apart():
    first, second = net(), net()
    assert model_digest(first) == model_digest(second) == model_digest(first.copy())
    second.set_constant("pads", np.zeros(8, np.int64))
    assert model_digest(first) != model_digest(second)
    assert data_digest(images(1)) == data_digest(images(1))
    assert data_digest(images(1)) != data_digest(images(1, seed=5))
    assert data_digest([{"a": [1, {"b": None}]}]) != data_digest([{"a": [1, {"b": 2}]}])


def test_the_default_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONNXSLIM_LAB_CALIBRATION_CACHE", raising=False)
    assert default_folder() == tmp_path / "onnxslim_lab" / "calibration"
    monkeypatch.setenv("ONNXSLIM_LAB_CALIBRATION_CACHE", str(tmp_path / "x"))
    assert default_folder() == tmp_path / "x"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["histograms", "ranges", "grams"])
def test_memory_does_not_grow_with_the_samples(kind):
    """A feed's activations are 100 kB: 300 feeds that leave them behind would be 30 MB."""
    graph = net()
    feeds = images(*[1] * 400)
    taken = {}

    def resident(done, *_):
        if done in (100, 400):
            here = f"/proc/self/task/{os.getpid()}/children"
            processes = ["self", *(pid for pid in Path(here).read_text().split() if pid == str(child.pid))]
            pages = (int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in processes)
            taken[done] = sum(pages) * os.sysconf("SC_PAGE_SIZE")

    with Runner(threads=1) as alone:
        alone.load_seconds(graph)
        child = alone._child
        calibration = Calibration(alone, Dataset(feeds), progress=resident)
        if kind == "grams":
            list(calibration.grams(graph, find_layers(graph)[0]))
        else:
            options = {"histogram": True, "axis": 1} if kind == "histograms" else {"average": False}
            calibration.collect(graph, [Want(graph, value, **options) for value in VALUES])
    assert taken[400] - taken[100] < 8 << 20


def test_bad_requests_are_refused(runner):
    graph = net()
    with pytest.raises(DataError, match="no calibration data"):
        Calibration(runner, Dataset([])).collect(graph, [Want(graph, "a")])
    with pytest.raises(ParameterError, match="axis 0 and along axis 1"):
        Calibration(runner, Dataset(images(1))).collect(
            graph, [Want(graph, "a", axis=0), Want(graph, "a", axis=1)]
        )
    with pytest.raises(ParameterError, match="at least"):
        Calibration(runner, Dataset(images(1)), memory=1)
    with pytest.raises(ParameterError, match="no value 'none'"):
        Calibration(runner, Dataset(images(1))).collect(graph, [Want(graph, "none")])


def test_a_value_that_lacks_the_axis_says_so(runner):
    graph = net()
    found = Calibration(runner, Dataset(images(1))).collect(
        graph, [Want(graph, "a", axis=7), Want(graph, "m")]
    )
    with pytest.raises(MissingStatistics, match="axis 7 does not exist"):
        found[graph, "a"]
    assert found[graph, "m"].count == 512


def test_progress_is_shown(runner):
    graph, seen = net(), []
    calibration = Calibration(runner, Dataset(images(1, 1)), progress=lambda *what: seen.append(what))
    calibration.collect(graph, [Want(graph, "a")])
    assert seen == [(1, 2, "calibration"), (2, 2, "calibration")]


def test_the_child_does_not_import_onnx():
    import subprocess
    import sys

    code = "import sys, onnxslim_lab.worker.main; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
