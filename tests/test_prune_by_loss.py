"""Pruning and sharing by what they cost at the output, as passes on models."""

import math
import re
import tracemalloc

import numpy as np
import pytest
from passes_helper import runner

from onnxslim_lab import Context, Graph
from onnxslim_lab.base import Outcome
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.passes.prune import Prune
from onnxslim_lab.passes.share import Share
from onnxslim_lab.second_order.pruning import target_grams
from onnxslim_lab.second_order.sharing import share_by_output
from onnxslim_lab.selection import find_targets
from onnxslim_lab.statistics import Calibration, Gram

MLP = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 8] x) => (float[N, 4] y)
<float[8, 16] a, float[16] b, float[16, 4] c> {
  h = Gemm(x, a, b)
  r = Relu(h)
  y = MatMul(r, c)
}"""
CONV = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4, 6, 6] x) => (float[N, 8, 6, 6] y)
<float[8, 2, 3, 3] w, float[8] b> { y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b) }"""
BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 8] x, bool which) => (float[N, 16] y) <float[8, 16] a> {
  y = If (which) <
    then_branch = t () => (float[N, 16] u) { u = MatMul(x, a) },
    else_branch = e () => (float[N, 16] v) { n = Neg(x) v = MatMul(n, a) }
  >
}"""


def filled(text, seed=0, dtype=np.float32):
    """Parse a model whose initializers are declared without values, and draw these."""

    def zeros(match):
        size = math.prod(int(size) for size in match[2].split(","))
        return f"{match[1]} = {{{', '.join('0' * size)}}}"

    random = np.random.default_rng(seed)
    graph = Graph.parse(re.sub(r"(\w+\[([\d, ]+)\] \w+)(?=[,>])", zeros, text))
    for name in graph.initializers:
        shape = graph.constant_type(name)[1]
        graph.set_constant(name, random.standard_normal(shape).astype(dtype))
    return graph


def mixed(shape, seed=1):
    """Inputs whose columns depend on each other: what makes compensation worth while."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal(shape).astype(np.float32)
    mixing = np.random.default_rng(99).standard_normal((shape[1], shape[1])).astype(np.float32)
    return np.einsum("n...,nm->m...", rows.swapaxes(0, 1), mixing).swapaxes(0, 1).astype(np.float32)


def calibration(feeds):
    return Calibration(runner(), Dataset(feeds, source="test"))


def feeds_of(text):
    if text == CONV:
        return [{"x": mixed((3, 4, 6, 6), seed)} for seed in range(4)]
    return [{"x": mixed((40, 8), seed)} for seed in range(4)]


def output_error(before, after, feeds):
    pairs = zip(runner().run(before, feeds), runner().run(after, feeds), strict=True)
    return sum(float(((a["y"] - b["y"]) ** 2).sum()) for a, b in pairs)


@pytest.mark.parametrize("text", [MLP, CONV])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("refit", ["layer", "network"])
def test_the_surgeon_zeroes_what_is_asked_for_and_loses_less(text, scope, refit):
    original, feeds = filled(text), feeds_of(text)
    errors = {}
    for criterion in ("magnitude", "wanda", "obs"):
        graph = original.copy()
        options = {"refit": refit} if criterion == "obs" else {}
        step = Prune(criterion=criterion, sparsity=0.5, scope=scope, **options)
        outcome = step.run(graph, Context(calibration=calibration(feeds)))
        zeros = [int((graph.constant(n) == 0).sum()) for n in ("a", "c", "w") if n in graph.initializers]
        sizes = [graph.constant(n).size for n in ("a", "c", "w") if n in graph.initializers]
        assert sum(zeros) == pytest.approx(sum(sizes) / 2, abs=len(sizes))
        assert len(outcome.changes) == len(sizes)
        errors[criterion] = output_error(original, graph, feeds)
    assert errors["obs"] < (0.6 if text == MLP else 0.9) * errors["magnitude"]
    assert errors["obs"] < errors["wanda"]


def test_wanda_is_its_formula():
    graph, feeds = filled(CONV), feeds_of(CONV)
    weight = graph.constant("w").copy()
    Prune(criterion="wanda", sparsity=0.5, scope="row").run(graph, Context(calibration=calibration(feeds)))
    rows = np.concatenate([np.pad(f["x"], ((0, 0), (0, 0), (1, 1), (1, 1))) for f in feeds])
    windows = np.lib.stride_tricks.sliding_window_view(rows, (3, 3), (2, 3))
    energy = (windows.astype(np.float64) ** 2).sum(axis=(0, 2, 3)).reshape(2, 2 * 9)
    for channel in range(8):
        scores = np.abs(weight[channel].reshape(-1)) * np.sqrt(energy[channel // 4])
        assert set(np.flatnonzero(graph.constant("w")[channel] == 0)) == set(np.argsort(scores)[:9])


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_patterns(criterion):
    graph, feeds = filled(MLP), feeds_of(MLP)
    Prune(criterion=criterion, pattern="2:4").run(graph, Context(calibration=calibration(feeds)))
    for name in ("a", "c"):
        groups = graph.constant(name).T.reshape(-1, 4)
        assert ((groups != 0).sum(axis=1) == 2).all()
    graph = filled(MLP)
    Prune(criterion=criterion, pattern="block:4", sparsity=0.5).run(
        graph, Context(calibration=calibration(feeds))
    )
    for name in ("a", "c"):
        assert set((graph.constant(name).T.reshape(-1, 4) != 0).sum(axis=1)) <= {0, 4}


def test_magnitude_in_blocks_needs_no_data():
    graph = filled(MLP)
    weight = graph.constant("a").T.reshape(-1, 4).copy()
    Prune(pattern="block:4", sparsity=0.5, include=("a",)).run(graph)
    gone = (graph.constant("a").T.reshape(-1, 4) == 0).all(axis=1)
    assert gone.sum() == len(weight) // 2
    energy = (weight.astype(np.float64) ** 2).sum(axis=1)
    assert energy[gone].max() < energy[~gone].min()


def test_layers_in_bodies_are_pruned_by_what_they_see():
    original = filled(BRANCHES)
    feeds = [{"x": mixed((40, 8), seed), "which": np.array(bool(seed % 2))} for seed in range(4)]
    errors = []
    for criterion in ("magnitude", "obs"):
        graph = original.copy()
        Prune(criterion=criterion, sparsity=0.5).run(graph, Context(calibration=calibration(feeds)))
        assert (graph.constant("a") == 0).sum() == 64
        errors.append(output_error(original, graph, feeds))
    assert errors[1] < 0.6 * errors[0]


def test_later_layers_make_good_what_earlier_ones_lose():
    original, feeds = filled(MLP, 5), feeds_of(MLP)
    errors = []
    for refit in ("layer", "network"):
        graph = original.copy()
        step = Prune(criterion="obs", sparsity=0.6, scope="layer", refit=refit)
        step.run(graph, Context(calibration=calibration(feeds)))
        errors.append(output_error(original, graph, feeds))
    assert errors[1] < errors[0]


def test_without_data_there_is_one_clear_error():
    with pytest.raises(ParameterError, match="criterion obs .* needs data"):
        Prune(criterion="obs").run(filled(MLP))
    with pytest.raises(ParameterError, match="need calibration data"):
        Share(compensate=True).run(filled(MLP))


def test_recurrent_weights_are_refused_with_the_remedy():
    graph = filled("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[5, 1, 4] x) => (float[5, 1, 1, 3] y) <float[1, 12, 4] w, float[1, 12, 3] r> {
      y = LSTM <hidden_size = 3> (x, w, r)
    }""")
    feeds = [{"x": np.random.default_rng(1).standard_normal((5, 1, 4)).astype(np.float32)}]
    outcome = Prune(criterion="wanda").run(graph, Context(calibration=calibration(feeds)))
    assert any("criterion=magnitude" in refusal.reason for refusal in outcome.refusals)
    assert [change.weights for change in outcome.changes] == [("w",)]


@pytest.mark.parametrize("compensate", [False, True])
def test_shared_values_weighted_by_inputs_lose_less(compensate):
    original, feeds = filled(MLP, 3), feeds_of(MLP)
    errors = []
    for options in ({}, {"weighting": "activation", "compensate": compensate}):
        graph = original.copy()
        Share(bits=2, **options).run(graph, Context(calibration=calibration(feeds)))
        assert all(np.unique(graph.constant(name)).size <= 4 for name in ("a", "c"))
        errors.append(output_error(original, graph, feeds))
    assert errors[1] < errors[0]


def test_sharing_keeps_zeros_and_a_row_is_never_worse_than_nearest():
    random = np.random.default_rng(0)
    matrix = random.standard_normal((1, 6, 20)).astype(np.float32)
    matrix[random.random(matrix.shape) < 0.5] = 0
    x = random.standard_normal((80, 20)) @ random.standard_normal((20, 20))
    gram = Gram((x.T @ x)[None], x.sum(axis=0)[None], 80)
    nearest = share_by_output(matrix, gram, 8, compensate=False)
    better = share_by_output(matrix, gram, 8, compensate=True)
    for found in (nearest, better):
        assert np.unique(found).size <= 8
        assert (found[matrix == 0] == 0).all()
    losses = [((x @ (found - matrix)[0].T) ** 2).sum(axis=0) for found in (better, nearest)]
    assert (losses[0] <= losses[1] * 1.001).all()
    assert losses[0].sum() < 0.9 * losses[1].sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_keep_theirs(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    graph = filled(MLP.replace("float[", f"{kind}["), dtype=dtype)
    feeds = [{"x": feed["x"].astype(dtype)} for feed in feeds_of(MLP)]
    Prune(criterion="obs", sparsity=0.5).run(graph, Context(calibration=calibration(feeds)))
    assert graph.constant("a").dtype == dtype
    assert np.isfinite(graph.constant("a").astype(np.float64)).all()


def test_gram_matrices_are_made_used_and_dropped_group_by_group():
    """24 layers of 512 inputs: 50 MB of Gram matrices under a budget of 16 MiB."""
    steps = (
        "\n".join(f"h{n + 1} = MatMul(h{n}, w{n})" for n in range(24))
        .replace("h0,", "x,")
        .replace("h24", "y")
    )
    weights = ", ".join(f"float[1] w{n} = {{0}}" for n in range(24))
    graph = Graph.parse(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 512] x) => (float[N, 512] y) <{weights}> {{ {steps} }}""")
    random = np.random.default_rng(0)
    for number in range(24):
        graph.set_constant(f"w{number}", (random.standard_normal((512, 512)) / 22.6).astype(np.float32))
    graph.infer()
    feeds = [{"x": random.standard_normal((64, 512)).astype(np.float32)}]
    budget = 16 << 20
    data = Calibration(runner(), Dataset(feeds, source="test"), memory=budget)
    targets = list(find_targets(graph, Outcome(), step="prune", include=(), exclude=(), overrides={}))
    tracemalloc.start()
    try:
        total = sum(gram.matrix.nbytes for gram in target_grams(graph, targets, data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 24 * 512 * 512 * 8
    assert peak < budget < total


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("text", [MLP, BRANCHES])
def test_entropy_in_other_types_and_in_bodies(text, dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    graph = filled(text.replace("float[", f"{kind}["), dtype=dtype)
    outcome = Share(bits=3, entropy=1.2).run(graph)
    assert outcome.changes[0].weights == ("a",)
    values, counts = np.unique(graph.constant("a"), return_counts=True)
    assert graph.constant("a").dtype == dtype
    assert values.size <= 8
    chance = counts / counts.sum()
    assert -(chance * np.log2(chance)).sum() <= 1.2
