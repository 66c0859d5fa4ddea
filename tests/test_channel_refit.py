"""The refit of prune-channels: least squares, rows of layers, recurrent states, bodies, and the memory it takes."""

import doctest
import tracemalloc

import numpy as np
import onnx
import pytest
from channel_graphs import HEADER, made
from passes_helper import random_feed, runner

from onnxslim_lab.base import Context
from onnxslim_lab.channels import rows
from onnxslim_lab.channels.least_squares import Sums, fitted
from onnxslim_lab.channels.rows import Rows
from onnxslim_lab.data import Dataset
from onnxslim_lab.layer_views.convolutions import ConvKind, ConvTransposeKind
from onnxslim_lab.layers import find_layers
from onnxslim_lab.passes.prune_channels import PruneChannels
from onnxslim_lab.statistics import Calibration


def test_doctests():
    assert not doctest.testmod(rows).failed


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shifts", [False, True])
def test_sums_give_least_squares(groups, shifts):
    random = np.random.default_rng(0)
    x = random.standard_normal((groups, 200, 5))
    x[..., 3] = 0  # a column that is always zero keeps the prior
    wanted = x @ random.standard_normal((groups, 5, 2)) + 2 + random.standard_normal((groups, 200, 2))
    prior = random.standard_normal((groups, 2, 5))
    sums = Sums.empty(groups, 2, 5, shifts=shifts)
    for part in (slice(0, 70), slice(70, 200)):
        sums.add(x[:, part], wanted[:, part])
    found, bias = sums.solve(prior, 1e-12)
    for group in range(groups):
        inputs = np.delete(x[group], 3, axis=1)
        inputs = np.concatenate([inputs, np.ones((200, 1))], axis=1) if shifts else inputs
        best = np.linalg.lstsq(inputs, wanted[group], rcond=None)[0]
        np.testing.assert_allclose(np.delete(found[group], 3, axis=1), best[:4].T, atol=1e-9)
        np.testing.assert_allclose(found[group, :, 3], prior[group, :, 3], atol=1e-9)
        np.testing.assert_allclose(bias[group], best[4] if shifts else 0, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_error_is_that_of_the_rows(groups):
    random = np.random.default_rng(1)
    x, wanted = random.standard_normal((groups, 50, 4)), random.standard_normal((groups, 50, 3))
    sums = Sums.empty(groups, 3, 4, shifts=True)
    sums.add(x, wanted)
    cases = [(random.standard_normal((groups, 3, 4)), random.standard_normal((groups, 3))) for _ in range(2)]
    errors = [((x @ w.swapaxes(1, 2) + b[:, None] - wanted) ** 2).sum() for w, b in cases]
    told = [sums.error(w, b) for w, b in cases]
    assert told[1] - told[0] == pytest.approx(errors[1] - errors[0])


def test_rows_held_back_choose_the_damping():
    """Eight noisy rows for eight columns: what fits them is worse than the prior, the truth but for a tenth."""
    random = np.random.default_rng(2)
    truth = random.standard_normal((1, 2, 8))
    prior = truth + 0.1 * random.standard_normal(truth.shape)

    def made_of(rows, noise):
        x = random.standard_normal((1, rows, 8))
        sums = Sums.empty(1, 2, 8, shifts=False)
        sums.add(x, x @ truth.swapaxes(1, 2) + noise * random.standard_normal((1, rows, 2)))
        return sums

    few, many = made_of(8, 3.0), made_of(4000, 3.0)
    alone, _ = few.copy().solve(prior, 1e-3)
    assert np.linalg.norm(alone - truth) > 2 * np.linalg.norm(prior - truth)
    found, _ = fitted(few, made_of(40, 0.1), prior, 1e-3)
    assert np.linalg.norm(found - truth) < 1.2 * np.linalg.norm(prior - truth)
    found, _ = fitted(many, made_of(1000, 3.0), prior, 1e-3)
    assert np.linalg.norm(found - truth) < np.linalg.norm(prior - truth)


def test_damping_pulls_to_the_prior():
    sums = Sums.empty(1, 1, 2, shifts=False)
    sums.add(np.array([[[2.0, 0.0], [0.0, 2.0]]]), np.array([[[4.0], [4.0]]]))
    found, _ = sums.solve(np.array([[[1.0, 0.0]]]), 0.5)  # mean energy 4, pull 2: (4 w + ...) = 8 + 2 prior
    np.testing.assert_allclose(found, [[[10 / 6, 8 / 6]]])


@pytest.mark.parametrize(
    "kind",
    [
        ConvKind((4, 2, 3, 3), 2, (2, 1), (1, 2), (1, 0, 1, 2)),
        ConvKind((4, 4, 3), 1, (1,), (1,), (0, 0), "SAME_UPPER"),
        ConvTransposeKind((4, 2, 3, 3), 2, (2, 2), (1, 1), (0, 1, 0, 1)),
    ],
)
def test_rows_at_places(kind):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 4, 9, 8)[: len(kind.weight_shape)])
    whole = kind.rows(x)
    rows = Rows(kind, x)
    assert rows.count == whole.shape[1]
    places = random.choice(whole.shape[1], 7)
    found = np.concatenate(list(rows.blocks(places, step=3)), axis=1)
    assert (found == whole[:, places]).all()


def smooth(seed, steps=40, batch=3):
    """Sequences of six values that three slow ones make."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((steps, batch, 3))
    for step in range(1, steps):
        hidden[step] = 0.8 * hidden[step - 1] + 0.6 * hidden[step]
    return (hidden @ np.random.default_rng(7).standard_normal((3, 6))).astype(np.float32)


def recurrent(op_type, gates, options="", inputs="", directions=1, last=False):
    """Return a recurrent layer of 24 units and a product, with states that do not overflow.

    With `last` only the state after the last step is read.
    """
    units, wide = 24, 24 * directions
    ends = "h" if not last else ", h"
    split = (
        "s = Transpose <perm=[0,2,1,3]>(h) t = Reshape(s, merge)"
        if not last
        else "s = Transpose <perm=[1,0,2]>(h) t = Reshape(s, merge)"
    )
    shape = f"40,3,{wide}" if not last else f"3,{wide}"
    model = made(
        f"""g (float[40,3,6] x, float[{directions},{gates * units},6] w1,
        float[{directions},{gates * units},{units}] w2, float[{directions},{2 * gates * units}] w3,
        float[{wide},3] w9) => (float[{shape.replace(str(wide), "3") if wide != 3 else shape}] y)
        <int64[{2 if last else 3}] merge = {{{shape}}}, int32[3] lengths = {{40, 25, 9}}> {{
        {ends} = {op_type} <hidden_size={units}{options}>(x, w1, w2, w3{inputs}) {split} y = MatMul(t, w9) }}"""
    )
    model.set_constant("w2", np.array(model.constant("w2")) * np.float32(0.4))
    return model


RECURRENT = {
    "LSTM": ("LSTM", 4),
    "LSTM, backwards": ("LSTM", 4, ', direction="reverse"'),
    "LSTM, both ways": ("LSTM", 4, ', direction="bidirectional"', "", 2),
    "LSTM, last state": ("LSTM", 4, "", "", 1, True),
    "LSTM, lengths": ("LSTM", 4, ', direction="bidirectional"', ", lengths", 2),
    "GRU": ("GRU", 3),
    "GRU, reset after the product": ("GRU", 3, ", linear_before_reset=1"),
    "GRU, clipped": ("GRU", 3, ", clip=1.5"),
    "RNN": ("RNN", 1),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_hidden_units_are_refitted(name):
    model = recurrent(*RECURRENT[name])
    context = Context(calibration=Calibration(runner(), Dataset([{"x": smooth(seed)} for seed in range(20)])))
    tests = [{"x": smooth(seed)} for seed in range(100, 106)]
    wanted = np.stack([run["y"] for run in runner().run(model, tests)])
    errors = {}
    for refit in ("none", "network"):
        result = model.copy()
        outcome = PruneChannels(macs=0.4, refit=refit, multiple=1).run(result, context)
        onnx.checker.check_model(result.to_model(), full_check=True)
        assert result.constant_type("w2")[1][2] < 20
        assert not [refusal for refusal in outcome.refusals if "not refitted" in refusal.reason]
        found = np.stack([run["y"] for run in runner().run(result, tests)])
        errors[refit] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted - wanted.mean())
        assert len(result.nodes) == len(model.nodes)
        assert [list(node.output) for node in result.nodes] == [list(node.output) for node in model.nodes]
    assert errors["network"] < 0.6 * errors["none"], errors
    weights = {name: np.array(result.constant(name)) for name in ("w1", "w2")}
    whole = {name: np.array(model.constant(name)) for name in weights}
    assert not any(np.isin(weights[name], whole[name]).all() for name in weights)


def test_copies_of_hidden_units_cost_nothing():
    """Every unit is there twice: those that are left take over what their twins gave."""
    model = recurrent("LSTM", 4)
    for name, axes in (("w1", (1,)), ("w2", (1,)), ("w3", (1,))):
        array = np.array(model.constant(name))
        for axis in axes:
            gates = array.shape[axis] // 24
            split = np.moveaxis(array, axis, 0).reshape(gates, 24, -1)
            split[:, 12:] = split[:, :12]
            array = np.moveaxis(split.reshape(np.moveaxis(array, axis, 0).shape), 0, axis)
        model.set_constant(name, np.ascontiguousarray(array))
    context = Context(calibration=Calibration(runner(), Dataset([{"x": smooth(seed)} for seed in range(20)])))
    result = model.copy()
    PruneChannels(macs=0.3, multiple=1, least=0.5, damping=1e-9).run(result, context)
    assert result.constant_type("w2")[1][2] < 24
    wanted, found = (runner().run(graph, [{"x": smooth(100)}])[0]["y"] for graph in (model, result))
    assert np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)


BODIES = """g (bool c, float[4,12] x, float[12,32] w1, float[32,5] w2) => (float[4,5] y) {
  y = If (c) <then_branch = a () => (float[4,5] o) { h = MatMul(x, w1) t = Relu(h) o = MatMul(t, w2) },
              else_branch = b () => (float[4,5] p) { k = MatMul(x, w1) u = Tanh(k) p = MatMul(u, w2) }> }"""


def test_bodies_are_refitted():
    model = made(BODIES)
    random = np.random.default_rng(0)
    basis = random.standard_normal((6, 12)).astype(np.float32)

    def feed(number):
        return {
            "c": np.array(number % 2 == 0),
            "x": random.standard_normal((4, 6)).astype(np.float32) @ basis,
        }

    context = Context(calibration=Calibration(runner(), Dataset([feed(number) for number in range(80)])))
    tests = [feed(number) for number in range(10)]
    wanted = np.stack([run["y"] for run in runner().run(model, tests)])
    errors = {}
    for refit in ("none", "network"):
        result = model.copy()
        outcome = PruneChannels(macs=0.4, refit=refit, multiple=1).run(result, context)
        assert outcome.changes
        assert not [refusal for refusal in outcome.refusals if "not refitted" in refusal.reason]
        found = np.stack([run["y"] for run in runner().run(result, tests)])
        errors[refit] = np.linalg.norm(found - wanted, axis=(1, 2))
    ratio = errors["network"].reshape(-1, 2).mean(0) / errors["none"].reshape(-1, 2).mean(0)
    assert (ratio < 0.85).all(), ratio


def test_a_branch_never_taken_is_said():
    model = made(BODIES)
    random = np.random.default_rng(0)
    feeds = [
        {"c": np.array(True), "x": random.standard_normal((4, 12)).astype(np.float32)} for _ in range(30)
    ]
    context = Context(calibration=Calibration(runner(), Dataset(feeds)))
    outcome = PruneChannels(macs=0.4, criterion="l2", refit="network", multiple=1).run(model, context)
    assert {r.where for r in outcome.refusals if "no feed reaches it" in r.reason} == {"p"}


WIDE = """g (float[8,16,12,12] x, float[80,16,3,3] w1, float[80] w2, float[64,80,3,3] w3, float[64] w4,
  float[8,64,1,1] w5) => (float[8,8,12,12] y) {
  a = Conv <pads=[1,1,1,1]>(x, w1, w2) b = Relu(a) c = Conv <pads=[1,1,1,1]>(b, w3, w4) d = Relu(c)
  y = Conv(d, w5) }"""


DENSE = """g (float[32,16] x, float[16,32] w1, float[32] w2, float[32,32] w3, float[32,9] w4) => (float[32,9] y) {
  a = Gemm(x, w1, w2) b = Tanh(a) c = MatMul(b, w3) d = Relu(c) y = MatMul(d, w4) }"""


def wide_context(model, memory):
    feeds = [random_feed(model, seed, {}) for seed in range(4)]
    return Context(calibration=Calibration(runner(), Dataset(feeds), memory=memory))


@pytest.mark.parametrize("memory", [48 << 20, 16 << 20])
def test_memory_stays_within_the_budget(memory):
    model = made(WIDE)
    context = wide_context(model, memory)
    tracemalloc.start()
    PruneChannels(macs=0.3, multiple=1).run(model, context)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory, peak / 2**20


def test_what_does_not_fit_the_memory_is_said():
    model = made(WIDE)
    size = max(layer.shape[2] for layer in find_layers(model)[0])
    context = wide_context(model, 16 << 20)
    context.calibration.memory = 8 * size * size // 4
    outcome = PruneChannels(macs=0.3, criterion="l2", refit="network", multiple=1).run(model, context)
    assert any("the memory budget is" in refusal.reason for refusal in outcome.refusals)


@pytest.mark.parametrize(("text", "dtype"), [(WIDE, np.float16), (DENSE, np.float64)])
def test_other_types_are_refitted(text, dtype):
    model = made(text, dtype)
    context = wide_context(model, 1 << 28)
    errors = {}
    feeds = [random_feed(model, seed, {}) for seed in range(50, 53)]
    wanted = np.stack([run["y"] for run in runner().run(model, feeds)]).astype(np.float64)
    for refit in ("none", "network"):
        result = model.copy()
        PruneChannels(macs=0.3, refit=refit, multiple=1).run(result, context)
        found = np.stack([run["y"] for run in runner().run(result, feeds)]).astype(np.float64)
        errors[refit] = np.linalg.norm(found - wanted)
    assert errors["network"] < 0.95 * errors["none"], errors
    assert result.constant("w3").dtype == dtype


def test_weights_of_several_layers_are_not_refitted():
    model = made(
        HEADER
        + """g (float[4,8] x, float[8,16] w1, float[16,5] w2) => (float[4,5] y) {
        a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) d = Neg(x) e = MatMul(d, w1) f = Relu(e) h = MatMul(f, w2)
        y = Add(c, h) }"""
    )
    context = wide_context(model, 1 << 28)
    outcome = PruneChannels(macs=0.3, multiple=1).run(model, context)
    assert outcome.changes
    assert [r.where for r in outcome.refusals if "other layers use its weight" in r.reason]
