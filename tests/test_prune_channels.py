"""prune-channels: budgets, criteria, refit, and models whose sizes and attributes follow."""

import doctest

import numpy as np
import onnx
import pytest
from channel_graphs import HEADER, made
from passes_helper import random_feed, runner
from pydantic import ValidationError

from onnxslim_lab.base import Context, silent
from onnxslim_lab.channels.allocation import Allocation, Ranking
from onnxslim_lab.channels.groups import find_groups
from onnxslim_lab.channels.scores import by_loss, by_magnitude, ranked
from onnxslim_lab.channels.sensitivity import by_sensitivity
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.macs import model_macs
from onnxslim_lab.passes import prune_channels
from onnxslim_lab.passes.inline_functions import InlineFunctions
from onnxslim_lab.passes.prune_channels import PruneChannels
from onnxslim_lab.statistics import Calibration, Gram

NET = """g (float[4,3,8,8] x, float[16,3,3,3] w1, float[16] w2, float[24,16,3,3] w3, float[24] w4,
           float[24,24,1,1] w5, float[24] w6, float[24,10] w7, float[10] w8) => (float[4,10] y) {
  a = Conv <pads=[1,1,1,1]>(x, w1, w2) b = Relu(a) c = Conv <pads=[1,1,1,1]>(b, w3, w4) d = Relu(c)
  e = Conv(d, w5, w6) f = Relu(e) r = Add(d, f) p = GlobalAveragePool(r) q = Flatten(p) y = Gemm(q, w7, w8) }"""


def context(model, count=12):
    feeds = [random_feed(model, seed, {}) for seed in range(count)]
    return Context(calibration=Calibration(runner(), Dataset(feeds)))


def outputs(model, seeds=range(50, 56)):
    feeds = [random_feed(model, seed, {}) for seed in seeds]
    return np.concatenate(
        [np.asarray(run["y"], np.float64).reshape(-1) for run in runner().run(model, feeds)]
    )


def error(model, result):
    wanted = outputs(model)
    return np.linalg.norm(outputs(result) - wanted) / np.linalg.norm(wanted - wanted.mean())


def test_doctests():
    assert not doctest.testmod(prune_channels).failed


@pytest.mark.parametrize("criterion", ["l1", "l2", "activation", "sensitivity", "obs"])
def test_the_budget_is_met(criterion):
    model = made(NET)
    result = model.copy()
    outcome = PruneChannels(macs=0.4, criterion=criterion, multiple=2).run(result, context(model))
    onnx.checker.check_model(result.to_model(), full_check=True)
    left = model_macs(result).total / model_macs(model).total
    assert 0.5 < left <= 0.6
    assert outcome.changes[0].detail["multiply-accumulates left"] == pytest.approx(left, abs=1e-4)
    for name in ("w1", "w3"):
        assert result.constant_type(name)[1][0] % 2 == 0


def test_refit_and_obs_pay():
    model = made(NET)
    found = {}
    for criterion, refit in (("l2", "none"), ("l2", "network"), ("obs", "network")):
        result = model.copy()
        PruneChannels(macs=0.4, criterion=criterion, refit=refit, multiple=1).run(result, context(model, 40))
        found[criterion, refit] = error(model, result)
    assert found["l2", "network"] < 0.7 * found["l2", "none"]
    assert found["obs", "network"] < 1.1 * found["l2", "network"]


def test_copies_cost_nothing():
    """Channels that are there twice: obs removes one of each pair and refit restores the outputs."""
    model = made(NET)
    for name in ("w1", "w2"):
        array = np.array(model.constant(name))
        array[8:] = array[:8]
        model.set_constant(name, array)
    result = model.copy()
    PruneChannels(macs=0.3, criterion="obs", multiple=1, least=0.5, damping=1e-8, include="w1").run(
        result, context(model)
    )
    assert result.constant_type("w1")[1][0] < 16
    assert error(model, result) < 1e-2


def test_dead_channels_go_first_by_activation_and_by_threshold():
    model = made(NET)
    weight, bias = np.array(model.constant("w3")), np.array(model.constant("w4"))
    weight[5:9], bias[5:9] = 0, -1
    for name, array in (("w3", weight), ("w4", bias)):
        model.set_constant(name, array)
    five, six = np.array(model.constant("w5")), np.array(model.constant("w6"))
    five[5:9], six[5:9] = 0, -1
    model.set_constant("w5", five)
    model.set_constant("w6", six)
    result = model.copy()
    PruneChannels(criterion="activation", threshold=1e-6, refit="none", multiple=4).run(
        result, context(model)
    )
    assert result.constant_type("w3")[1] == (20, 16, 3, 3)
    assert error(model, result) < 1e-5


TWO_WAYS = """g (float[4,8] x, float[8,16] w1, float[8,16] w2, float[16,6] w3, float[16,6] w4) => (float[4,6] y) {
  a = MatMul(x, w1) ra = Relu(a) b = MatMul(x, w2) rb = Relu(b)
  p = MatMul(ra, w3) q = MatMul(rb, w4) y = Add(p, q) }"""


def test_sensitivity_spares_the_group_that_the_output_depends_on():
    """Two hidden layers of equal activations; what reads one of them is a thousand times smaller."""
    model = made(TWO_WAYS)
    model.set_constant("w2", np.array(model.constant("w1")))
    model.set_constant("w4", np.array(model.constant("w3")) / 1000)
    before = {name: np.array(model.constant(name)) for name in model.initializers}
    widths = {}
    for criterion in ("activation", "sensitivity"):
        result = model.copy()
        PruneChannels(criterion=criterion, macs=0.3, refit="none", multiple=1).run(result, context(model))
        widths[criterion] = result.constant_type("w3")[1][0], result.constant_type("w4")[1][0]
    assert widths["sensitivity"][0] == 16
    assert widths["activation"][0] < 16
    assert widths["sensitivity"][1] < 8
    assert all((model.constant(name) == value).all() for name, value in before.items())


def test_sensitivity_is_measured_without_the_cheapest_quarter():
    model = made(TWO_WAYS)
    before = {name: np.array(model.constant(name)) for name in model.initializers}
    groups = find_groups(model, widths=False)[0]
    order = np.arange(16)
    alone = [Ranking(order, np.ones(16))] * len(groups)
    data = context(model).calibration
    found = by_sensitivity(model, groups, alone, data, silent)
    feeds = list(data.data.feeds)[:8]
    for group, ranking in zip(groups, found, strict=True):
        edited = model.copy()
        name = {"w1": "w3", "w2": "w4"}[group.makers[0].layer.weight]
        zeroed = before[name].copy()
        zeroed[:4] = 0
        edited.set_constant(name, zeroed)
        one, two = (np.stack([run["y"] for run in runner().run(m, feeds)]) for m in (model, edited))
        change = ((one - two) ** 2).sum() / ((one - one.mean()) ** 2).sum()
        np.testing.assert_allclose(ranking.losses, min(1, change) / 4, rtol=1e-4)
    assert all((model.constant(name) == value).all() for name, value in before.items())


def test_patterns_and_data():
    model = made(NET)
    with pytest.raises(ParameterError, match="matches no layer"):
        PruneChannels(criterion="l2", exclude="conv9").run(model.copy())
    with pytest.raises(ParameterError, match="needs calibration data"):
        PruneChannels().run(model.copy())
    with pytest.raises(ValidationError, match="goes with criterion activation"):
        PruneChannels(threshold=1.0)
    result = model.copy()
    outcome = PruneChannels(criterion="l2", multiple=1, exclude="w3").run(result)
    assert not outcome.changes
    assert any("excluded by pattern" in refusal.reason for refusal in outcome.refusals)
    assert result.to_model() == model.to_model()


def test_what_cannot_be_reached_is_said():
    model = made(NET)
    outcome = PruneChannels(macs=0.99, criterion="l2", multiple=1, least=0.5).run(model)
    assert any(refusal.where == "model" for refusal in outcome.refusals)
    assert all(model.constant_type(name)[1][0] >= size for name, size in (("w1", 8), ("w3", 12)))


def test_weights_that_callers_give_stay():
    text = (
        HEADER
        + """g (float[2,6] x, float[6,8] v1 , float[8,4] w2) => (float[2,4] y)
      { h = MatMul(x, v1) t = Relu(h) y = MatMul(t, w2) }"""
    )
    groups, refusals = find_groups(made(text), widths=False)
    assert not groups
    assert any("output of the graph" in refusal.reason for refusal in refusals)


def test_bfloat16_and_external_data(tmp_path):
    text = NET.replace("float[", "bfloat16[")
    proto = onnx.parser.parse_model(HEADER.replace("17", "22").replace("9", "10") + text)
    random = np.random.default_rng(0)
    for value in [value for value in proto.graph.input if value.name[0] == "w"]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        values = random.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(
            onnx.helper.make_tensor(value.name, onnx.TensorProto.BFLOAT16, shape, values.reshape(-1))
        )
        proto.graph.input.remove(value)
    Graph.load(proto).save(tmp_path / "model.onnx", external=True)
    model = Graph.load(tmp_path / "model.onnx")
    outcome = PruneChannels(macs=0.3, criterion="l2", multiple=4).run(model)
    assert outcome.changes
    model.save(tmp_path / "small.onnx", external=True)
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    assert sum(file.stat().st_size for file in tmp_path.glob("small*")) < 0.9 * sum(
        file.stat().st_size for file in tmp_path.glob("model*")
    )


def test_functions_without_shapes_are_refused():
    text = """<ir_version: 9, opset_import: ["" : 17, "f" : 1]>
      g (float[2,6] x) => (float[2,4] y) { y = f.net(x) }
      <domain: "f", opset_import: ["" : 17]> net (x) => (y) {
        a = Constant <value = float[6,2] {1,2,3,4,5,6,7,8,9,10,11,12}> ()
        b = Constant <value = float[2,4] {1,2,3,4,5,6,7,8}> ()
        h = MatMul(x, a) t = Relu(h) y = MatMul(t, b) }"""
    model = Graph.load(onnx.parser.parse_model(text))
    before = model.to_model()
    outcome = PruneChannels(criterion="l2", multiple=1).run(model)
    assert not outcome.changes
    assert any("inline-functions helps" in refusal.reason for refusal in outcome.refusals)
    assert model.to_model() == before
    InlineFunctions().run(model)
    assert PruneChannels(criterion="l2", multiple=1, macs=0.4).run(model).changes
    onnx.checker.check_model(model.to_model(), full_check=True)


def test_loss_of_one_channel_is_that_of_least_squares():
    """The block loss equals what is left after solving for the other weights, for taps of several columns."""
    model = made("""g (float[1,3,5,5] x, float[6,3,1,1] w1, float[5,6,2,2] w2) => (float[1,5,4,4] y)
      { h = Conv(x, w1) t = Relu(h) y = Conv(t, w2) }""")
    (group,), _ = find_groups(model, widths=False)
    side = group.readers[0]
    random = np.random.default_rng(0)
    rows = random.standard_normal((500, 24)) @ random.standard_normal((24, 24))

    def gram(_):
        return Gram((rows.T @ rows)[None], rows.sum(0)[None], 500)

    matrix = side.layer.matrix[0].astype(np.float64)
    centred = rows - rows.mean(0)
    wanted = centred @ matrix.T
    ranking = by_loss(group, gram, least=0.5, damping=1e-12, memory=0)
    for channel, loss in zip(ranking.order, ranking.losses, strict=True):
        left = centred[:, side.members != channel]
        rest = wanted - left @ np.linalg.lstsq(left, wanted, rcond=None)[0]
        assert loss == pytest.approx((rest**2).sum() / (wanted**2).sum(), rel=1e-6)
    together = by_loss(group, gram, least=0.5, damping=1e-12, memory=1 << 30)
    left = centred[:, ~np.isin(side.members, together.order)]
    rest = wanted - left @ np.linalg.lstsq(left, wanted, rcond=None)[0]
    assert together.losses.sum() == pytest.approx((rest**2).sum() / (wanted**2).sum(), rel=0.5)


def test_allocation_counts_both_sides():
    model = made(NET)
    groups, _ = find_groups(model, widths=False)
    counted = {layer.weight: count for layer, count in model_macs(model).layers}
    macs = {id(layer): counted[layer.weight] for layer, _ in groups[0].part.layers}
    allocation = Allocation(
        groups, [ranked(np.ones(group.size)) for group in groups], macs, {}, multiple=1, least=0.25
    )
    assert allocation.macs == sum(counted.values())
    allocation.fit([group.size // 2 for group in groups])
    assert allocation.removed == [group.size // 2 for group in groups]
    expected = counted["w1"] / 2 + counted["w3"] / 4 + counted["w5"] / 4 + counted["w7"] / 2
    assert allocation.macs == pytest.approx(expected)


def test_magnitudes_add_up():
    (group, *_), _ = find_groups(made(NET), widths=False)
    for criterion in ("l1", "l2"):
        ranking = by_magnitude(group, criterion)
        assert sorted(ranking.order) == list(range(group.size))
        assert (np.diff(ranking.losses) >= 0).all()
        assert ranking.losses.sum() == pytest.approx(len(group.layers))
