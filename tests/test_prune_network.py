"""Layer after layer against the original: where the values come from, and what each layer is to make good for."""

import math

import numpy as np
import pytest
from passes_helper import runner

from onnxslim_lab import Context, Graph
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError
from onnxslim_lab.layers import find_layers
from onnxslim_lab.passes.prune import Prune
from onnxslim_lab.second_order.frontier import Frontier, part_of
from onnxslim_lab.second_order.landing import Landing
from onnxslim_lab.second_order.obs import eliminate, output_loss
from onnxslim_lab.second_order.repair import Moments, moments, repaired
from onnxslim_lab.second_order.wide import wide_losses, wide_scores
from onnxslim_lab.statistics import Calibration, Gram

SHAPES = {"a": (12, 16), "p": (16,), "b": (16, 12), "q": (12,), "c": (12, 12)}
BLOCKS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 12] x, bool which) => (float[N, 12] y) <CONSTANTS> {
  h0 = MatMul(x, a)
  h1 = Add(h0, p)
  h2 = Relu(h1)
  h3 = MatMul(h2, b)
  h4 = Add(q, h3)
  h5 = Add(h4, x)
  h6 = If (which) <
    then_branch = t () => (float[N, 12] u) { u = Tanh(h5) },
    else_branch = e () => (float[N, 12] v) { v = Mul(h5, x) }
  >
  h7 = MatMul(h6, c)
  y = Add(h7, h5)
}"""


def blocks(seed=0):
    """Two residual blocks with a body that captures values of the first."""
    constants = [
        f"float{list(shape)} {name} = {{{','.join('0' * math.prod(shape))}}}"
        for name, shape in SHAPES.items()
    ]
    graph = Graph.parse(BLOCKS.replace("CONSTANTS", ", ".join(constants)))
    random = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        graph.set_constant(name, (random.standard_normal(shape) / 3).astype(np.float32))
    return graph


def feeds(count=6):
    random = np.random.default_rng(1)
    mixing = random.standard_normal((12, 12)) / 3
    return [
        {
            "x": (random.standard_normal((50, 12)) @ mixing).astype(np.float32),
            "which": np.array(bool(number % 2)),
        }
        for number in range(count)
    ]


def calibration(data=None):
    return Calibration(runner(), Dataset(feeds() if data is None else data, source="test"))


def maker(graph, value):
    return graph.producer(value)


def test_the_frontier_gives_the_values_of_the_whole_model(tmp_path):
    graph, data = blocks(), calibration()
    frontier = Frontier(graph, data, tmp_path)
    for value, wanted in (("h0", ["x"]), ("h3", ["h2", "x"]), ("h7", ["h6", "h5"]), ("h3", ["h2"])):
        found = list(frontier.advance(maker(graph, value), wanted))
        expected = list(data.stream(graph, wanted))
        assert len(found) == len(expected) == 6
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name in wanted:
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.rglob("*"))) <= 7 + 3  # one set of files, and the empty folders of the others


def test_the_frontier_sees_weights_changed_ahead_of_it_and_runs_nothing_behind(tmp_path):
    graph, data = blocks(), calibration()
    frontier = Frontier(graph, data, tmp_path)
    list(frontier.advance(maker(graph, "h3"), ["h2"]))
    graph.set_constant("b", np.zeros((16, 12), np.float32))
    graph.set_constant("a", np.full((12, 16), np.nan, np.float32))  # behind: must not be read again
    for feed, found in zip(feeds(), frontier.advance(maker(graph, "h7"), ["h5"]), strict=True):
        np.testing.assert_allclose(found["h5"], feed["x"] + graph.constant("q"), rtol=1e-5)
    start = {"h5": np.zeros((1, 12), np.float32), "which": np.array(True), "x": np.zeros((1, 12), np.float32)}
    part = part_of(graph, start, ["y"])
    assert {node.op_type for node in part.nodes} == {"If", "MatMul", "Add"}
    assert len(part.nodes) == 3
    assert part.initializers == ["c"]


def test_no_feeds_is_an_error(tmp_path):
    graph = blocks()
    with pytest.raises(DataError, match="no feeds"):
        list(Frontier(graph, calibration([]), tmp_path).advance(maker(graph, "h3"), ["h2"]))


def test_where_outputs_land():
    graph = blocks()
    found = {layer.weight: Landing.of(layer) for layer in find_layers(graph)[0]}
    assert [found[name].added for name in "abc"] == ["", "x", "h5"]
    assert [found[name].bias is not None for name in "abc"] == [True, True, False]
    np.testing.assert_allclose(found["b"].bias.read(), graph.constant("q")[None])
    found["b"].bias.write(np.arange(12.0)[None])
    assert graph.constant("q").dtype == np.float32
    assert graph.constant("q").tolist() == list(range(12))


def test_a_layer_makes_good_for_what_the_stream_beside_it_lost():
    graph, data = blocks(), calibration()
    edited = graph.copy()
    edited.set_constant("b", (graph.constant("b") * 0.7).astype(np.float32))  # h5 loses something
    layers = [next(one for one in find_layers(part)[0] if one.weight == "c") for part in (edited, graph)]
    plain = moments(data, *layers)
    whole = moments(data, *layers, added="h5")
    assert plain.moved is None
    assert whole.moved.shape == (1, 12, 13)
    matrix, mask = layers[0].matrix, np.ones((1, 12, 12), bool)
    errors = []
    for found in (plain, whole):
        edited.set_constant("c", layers[0].with_matrix(repaired(matrix, None, mask, found, damping=1e-9)[0]))
        pairs = zip(data.outputs(graph), data.outputs(edited), strict=True)
        errors.append(sum(float(((one["y"] - two["y"]) ** 2).sum()) for one, two in pairs))
    assert errors[1] < 0.7 * errors[0]
    both = zip(data.stream(graph, ["h5", "y"]), data.stream(edited, ["h5", "h6"]), strict=True)
    x, y = (
        np.concatenate(side) for side in zip(*((b["h6"], a["y"] - b["h5"]) for a, b in both), strict=True)
    )
    best = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(edited.constant("c"), best, rtol=1e-3, atol=1e-4)


def test_moments_without_a_stream_move_nothing():
    found = Moments(np.zeros((1, 3, 3)), np.zeros((1, 3, 3)))
    found.add(np.ones((1, 4, 2), np.float32), np.ones((1, 4, 2), np.float32), np.ones((1, 4, 5), np.float32))
    assert found.moved.tolist() == [[[4.0] * 3] * 5]


def test_pruning_through_the_network_beats_each_layer_alone():
    original, data = blocks(3), calibration()
    errors = []
    for refit in ("layer", "network"):
        graph = original.copy()
        Prune(criterion="obs", pattern="2:4", refit=refit).run(graph, Context(calibration=data))
        for name in "abc":
            assert ((graph.constant(name).T.reshape(-1, 4) != 0).sum(axis=1) == 2).all()
        pairs = zip(data.outputs(original), data.outputs(graph), strict=True)
        errors.append(sum(float(((one["y"] - two["y"]) ** 2).sum()) for one, two in pairs))
    assert errors[1] < 0.9 * errors[0]


def test_losses_of_wide_layers_add_up_like_those_of_narrow_ones():
    random = np.random.default_rng(4)
    x = random.standard_normal((600, 160)) @ (np.eye(160) + 0.2 * random.standard_normal((160, 160)))
    gram = Gram((x.T @ x)[None], x.sum(axis=0)[None], 600)
    matrix = random.standard_normal((1, 12, 160))
    wide, alone = wide_losses(matrix, gram, 1e-6), wide_scores(matrix, gram, 1e-6)
    order = np.argsort(alone, axis=None, kind="stable")
    assert (np.diff(wide.reshape(-1)[order]) >= 0).all()
    exact = np.sort(eliminate(matrix, gram.xtx).thresholds(160), axis=None)
    for part in (0.5, 0.8):
        count = int(part * exact.size)
        ratio = np.sort(wide, axis=None)[:count].sum() / exact[:count].sum()
        assert 0.5 < ratio < 4, ratio
    assert np.sort(alone, axis=None)[: exact.size // 2].sum() < 0.5 * exact[: exact.size // 2].sum()
    whole = output_loss(matrix, gram.xtx).sum()
    assert wide.sum() == pytest.approx(whole, rel=0.5)
