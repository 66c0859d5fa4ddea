"""Layers that stay float: what is known beforehand of the weights that their file will have."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_quantize import context_of, feeds_of, model_of

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization import float_layers, float_weights
from onnxslim_lab.quantization.float_layers import Choice, Restored, choose_float, pack
from onnxslim_lab.quantization.float_weights import round_in_float
from onnxslim_lab.quantization.numerics import dequantize
from onnxslim_lab.quantization.static import plan_static, scheme_of


@pytest.mark.parametrize("spared", [False, True])
def test_they_are_tried_with_the_weights_of_their_codes_but_for_the_smallest(monkeypatch, spared):
    monkeypatch.setattr(float_weights, "_SPARE", 0.5 if spared else 0.0)
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 64), "v": (64, 8)},
        inputs="float[N,16] x",
        outputs="float[N,8] y",
    )
    step = Quantize(target="onnxruntime-x86-vnni", ranges="minmax")
    planned = plan_static(graph, step, scheme_of(step), context_of(feeds_of((4, 16))), Outcome())
    plan = planned.plan
    result = plan.model.copy()
    round_in_float(result, [layer.name for layer in plan.layers], plan)
    codes = {layer.layer.weight: dequantize(*plan.rounded[layer.name]) for layer in plan.layers}
    assert np.array_equal(result.constant("w"), codes["w"])
    assert np.array_equal(result.constant("v"), graph.constant("v") if spared else codes["v"])
    assert not np.array_equal(codes["v"], graph.constant("v"))


@given(
    st.lists(st.tuples(st.integers(0, 900), st.floats(0, 2)), max_size=8), st.sampled_from([300, 1000, 2000])
)
def test_what_causes_most_in_all_is_packed_into_the_budget(sizes, budget):
    candidates = [Restored((str(n),), macs, caused) for n, (macs, caused) in enumerate(sizes)]
    chosen = pack(candidates, budget)
    assert len({one.names for one in chosen}) == len(chosen)
    assert sum(one.macs for one in chosen) <= budget
    worth = candidates
    units = {one.names: -(-one.macs * 1000 // budget) for one in worth}
    best = max(
        sum(one.caused for one in part)
        for size in range(len(worth) + 1)
        for part in itertools.combinations(worth, size)
        if sum(units[one.names] for one in part) <= 1000
    )
    assert sum(one.caused for one in chosen) == pytest.approx(best)


@pytest.mark.parametrize("better", ["percentile", "minmax"])
def test_layers_are_chosen_under_ranges_that_clip_and_under_those_that_do_not(monkeypatch, better):
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 64), "v": (64, 8)},
        inputs="float[N,16] x",
        outputs="float[N,8] y",
    )
    step = Quantize(target="onnxruntime-x86-vnni")
    judge = plan_static(graph, step, scheme_of(step), context_of(feeds_of((4, 16))), Outcome()).judge
    first, second = (layer.name for layer in judge.plan.layers)
    judge.plan.use_ranges("percentile")
    named = {"percentile": first, "minmax": second}
    losses = {first: 2.0, second: 2.0} | {named[better]: 1.0}

    def found(judge, share, context):
        return Choice((Restored((named[judge.plan.method],), 1, 0.5),), 3.0, 2.5)

    monkeypatch.setattr(float_layers, "float_layers", found)
    monkeypatch.setattr(
        float_layers, "_loss_without", lambda _, names, *, coded: losses[names[0]] + 0 * coded
    )
    choice = choose_float(judge, 0.5, Context(), ranges=True)
    assert choice.names == [named[better]]
    assert (choice.before, choice.after) == (3.0, 1.0)
    assert judge.plan.method in choice.ranges.split(",")[0]
