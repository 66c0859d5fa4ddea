"""Sums of residual connections that stay float: which, that nothing rounds them, and when they are chosen."""

import numpy as np
import onnx
import pytest
from test_quantize import context_of, feeds_of, model_of, quantized

from onnxslim_lab.base import Outcome
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.float_choice import Choice
from onnxslim_lab.quantization.float_results import summable_layers
from onnxslim_lab.quantization.residuals import float_residuals, residual_chains, residual_sums
from onnxslim_lab.quantization.result_choice import float_results
from onnxslim_lab.quantization.static import plan_static, scheme_of

STAGE = """a = Conv(x, w0, b0) r1 = Conv(a, w1, b1) s1 = Add(a, r1) r2 = Conv(s1, w2, b2) s2 = Add(s1, r2)
    r3 = Conv(s2, w3, b3) s3 = Add(r3, s2) y = Conv(s3, w4, b4)"""
SIZES = {f"w{n}": (4, 4, 1, 1) for n in range(5)} | {f"b{n}": (4,) for n in range(5)}


def stage(body=STAGE):
    return model_of(body, SIZES, outputs="float[N,M,H,W] y")


def planned(graph, feeds):
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax")
    found = plan_static(graph, step, scheme_of(step), context_of(feeds), Outcome())
    return found.plan


def test_chains_are_adds_that_read_each_other():
    plan = planned(stage(), feeds_of())
    (placed,) = plan.placements()
    assert [[node.output[0] for node in chain] for chain in residual_chains(placed)] == [["s1", "s2", "s3"]]
    apart = planned(stage(STAGE.replace("s3 = Add(r3, s2)", "q = Relu(s2) s3 = Add(r3, q)")), feeds_of())
    (placed,) = apart.placements()
    assert [[node.output[0] for node in chain] for chain in residual_chains(placed)] == [["s1", "s2"]]


def test_two_chains_that_meet_are_one():
    body = """a = Conv(x, w0, b0) c = Conv(x, w1, b1) d = Conv(x, w2, b2) s1 = Add(a, c) s2 = Add(c, d)
        s3 = Add(s1, s2) y = Conv(s3, w4, b4)"""
    (placed,) = planned(stage(body), feeds_of()).placements()
    (chain,) = residual_chains(placed)
    assert sorted(node.output[0] for node in chain) == ["s1", "s2", "s3"]


@pytest.mark.parametrize("summed", ["", "r1", "a", "a r1 r2 r3"])
def test_float_sums_round_each_part_once(summed):
    graph, feeds = stage(), feeds_of(count=3)
    model = graph.copy()
    plan = planned(model, feeds)
    (sums,) = residual_sums(plan)
    assert sums == {((), f"s{number}") for number in (1, 2, 3)}
    plan.residuals = set(sums)
    able = {layer.layer.node.output[0]: layer.name for layer in summable_layers(plan, ())}
    assert list(able) == ["a", "r1", "r2", "r3", "y"], "the model gives the last in float"
    plan.summed = {able[value] for value in summed.split()}
    result = plan.model.copy()
    plan.write(result)
    onnx.checker.check_model(result.to_model(), full_check=True)
    nodes = {node.output[0]: node for node in result.nodes}
    assert nodes["s2"].input[0] == "s1"
    assert "s2" in nodes["s3"].input
    for value in ("s1", "s2", "s3"):
        (reader,) = [node for node in result.consumers(value) if node.op_type != "Add"]
        assert reader.op_type == "QuantizeLinear"

    def on_grid(values, name):
        grids = plan.grids(plan.placements()[0])
        grid = grids[plan.placements()[0].roots[name]]
        codes = np.clip(np.rint(values / grid.scale) + float(grid.zero_point), 0, 255)
        return (codes - float(grid.zero_point)) * grid.scale

    def conv(values, number):
        layer = next(one for one in plan.layers if one.layer.weight == f"w{number}")
        codes, grid = plan.weight(layer, layer.layer)
        weight = codes.astype(np.float64)[:, :, 0, 0] * np.asarray(grid.scale, np.float64).reshape(-1, 1)
        return np.einsum("oc,ncij->noij", weight, values) + graph.constant(f"b{number}").reshape(-1, 1, 1)

    def result_of(values, number, name):
        made = conv(values, number)
        return made if name in summed.split() else on_grid(made, name)

    x = on_grid(feeds[0]["x"], "x")
    total = result_of(x, 0, "a")
    for number in (1, 2, 3):
        read = on_grid(total, f"s{number - 1}" if number > 1 else "a")
        total = total + result_of(read, number, f"r{number}")
    expected = conv(on_grid(total, "s3"), 4)
    found = context_of(feeds).calibration.runner.run(result, feeds[:1], optimization="off")[0]["y"]
    np.testing.assert_allclose(found, on_grid(expected, "y"), atol=np.abs(expected).max() / 100)


class Free:
    """A price list on which time costs nothing, or everything."""

    def __init__(self, *, free=True):
        self.free = free

    def of(self, loss, _names):
        return loss if self.free else -loss


@pytest.mark.parametrize("free", [True, False])
def test_results_are_float_where_their_time_is_worth_it(free):
    context = context_of(feeds_of(count=8))
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax")
    judge = plan_static(stage(), step, scheme_of(step), context, Outcome()).judge
    judge.plan.residuals = set().union(*residual_sums(judge.plan))
    before = judge.loss()
    choice = float_results(judge, Choice((), before, before), Free(free=free), context)
    assert choice.after == pytest.approx(judge.loss())
    assert (choice.after < before, bool(judge.plan.summed)) == (free, free)


@pytest.mark.parametrize("options", [{"symmetric": False}, {"weights": "uint8"}, {"weights": "int16"}])
def test_results_of_weights_that_no_product_takes_are_rounded(options):
    context = context_of(feeds_of())
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax", **options)
    judge = plan_static(stage(), step, scheme_of(step), context, Outcome()).judge
    before = judge.loss()
    float_results(judge, Choice((), before, before), Free(), context)
    assert not judge.plan.summed


@pytest.mark.parametrize("free", [True, False])
def test_they_are_chosen_where_their_time_is_worth_it(free):
    feeds = feeds_of(count=8)
    context = context_of(feeds)
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax")
    judge = plan_static(stage(), step, scheme_of(step), context, Outcome()).judge
    whole = judge.loss()
    choice = float_residuals(judge, Choice((), whole, whole), Free(free=free), context)
    assert len(judge.plan.residuals) == (3 if free else 0)
    assert choice.after == pytest.approx(judge.loss())
    assert (choice.after < whole) == free


def test_a_small_model_has_no_time_for_them():
    _, outcome = quantized(stage(), feeds_of(), rounding="nearest", float_macs=1e-6, float_until=80)
    assert not [change.what for change in outcome.changes if "residual" in change.what]
