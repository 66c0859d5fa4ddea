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
from onnxslim_lab.quantization.float_choice import Choice, Price, Restored, pack
from onnxslim_lab.quantization.float_layers import choose_float, more_layers
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
    units = {one.names: -(-one.macs * 1000 // budget) for one in candidates}
    best = max(
        sum(one.caused for one in part)
        for size in range(len(candidates) + 1)
        for part in itertools.combinations(candidates, size)
        if sum(units[one.names] for one in part) <= 1000
    )
    assert sum(one.caused for one in chosen) == pytest.approx(best)


@pytest.mark.parametrize("better", ["percentile", "minmax"])
def test_layers_are_chosen_under_ranges_that_clip_and_under_those_that_do_not(monkeypatch, better):
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 64), "v": (64, 16)},
        inputs="float[N,16] x",
        outputs="float[N,16] y",
    )
    step = Quantize(target="onnxruntime-x86-vnni")
    judge = plan_static(graph, step, scheme_of(step), context_of(feeds_of((4, 16))), Outcome()).judge
    first, second = (layer.name for layer in judge.plan.layers)
    judge.plan.use_ranges("percentile")
    named = {"percentile": first, "minmax": second}
    losses = {first: 2.0, second: 2.0} | {named[better]: 1.0}

    def found(judge, price, context):
        return Choice((Restored((named[judge.plan.method],), 1, 0.5),), 3.0, 2.5)

    monkeypatch.setattr(float_layers, "float_layers", found)
    monkeypatch.setattr(float_layers, "loss_without", lambda _, names, *, coded: losses[names[0]] + 0 * coded)
    choice = choose_float(judge, 0.5, Context(), ranges=True)
    assert choice.names == [named[better]]
    assert (choice.before, choice.after) == (3.0, 1.0)
    assert judge.plan.method in choice.ranges.split(",")[0]


def costs(**each):
    """Return costs by layer; a and b, neighbours, cost no more than one of them."""

    class Cost:
        def of(self, names):
            shared = min(each["a"], each["b"]) if {"a", "b"} <= set(names) else 0
            return sum(each[name] for name in names) - shared

    return Cost()


def test_layers_are_taken_in_the_order_of_what_they_gain_for_their_time():
    candidates = [
        Restored(("a",), 1, 0.3),
        Restored(("b",), 1, 0.3),
        Restored(("c",), 1, 0.05),
        Restored(("d",), 1, 0.2),
    ]
    start = Choice((), 1.0, 1.0)

    def names(enough=0.0, budget=10, all_of=False, **each):
        price = Price(costs(**each), budget, enough, 0.9)
        return "".join(one.names[0] for one in price.path(candidates, start, all_of=all_of))

    assert names(a=10, b=10, c=1, d=1) == "abdc", "neighbours share what they cost"
    assert names(a=100, b=100, c=1, d=1) == "dc", "1 - 0.9 ** 10 is more than both gain"
    assert names(a=100, b=100, c=1, d=1, all_of=True)[:2] == "dc"
    assert sorted(names(a=100, b=100, c=1, d=1, all_of=True)) == list("abcd")
    assert names(a=10, b=10, c=30, d=1) == "abd", "c is not worth its time"
    assert names(enough=0.5, a=1, b=1, c=1, d=1) == "ab", "that is enough"
    assert names(budget=2, a=1, b=1, c=1, d=1) == "ab", "the multiply-accumulates are all taken"


def judged(monkeypatch, losses):
    """Return a judge of a plan of layers a, b, c, d of which some stay float, with these losses."""

    class Layer:
        def __init__(self, name):
            self.name, self.macs = name, 1

    class Plan:
        layers = tuple(Layer(name) for name in "abcd")

    class Judge:
        plan = Plan()

    monkeypatch.setattr(
        float_layers, "loss_without", lambda _, names, *, coded: losses["".join(sorted(names))] + 0 * coded
    )
    return Judge()


@pytest.mark.parametrize("enough", [0.0, 0.5, 0.45])
def test_what_else_stays_float_is_measured_beside_what_does(monkeypatch, enough):
    judge = judged(monkeypatch, {"ab": 0.48, "ac": 0.4, "ad": 0.499, "abc": 0.35, "acd": 0.4})
    price = Price(costs(a=1, b=1, c=1, d=1), 10, enough, 0.9)
    start = Choice((Restored(("a",), 1, 0.5),), 1.0, 0.5)
    more = more_layers(judge, start, price, Context())
    wanted = {0.0: ["a", "c", "b"], 0.5: ["a"], 0.45: ["a", "c"]}
    assert more.names == wanted[enough]
    assert more.after == {0.0: 0.35, 0.5: 0.5, 0.45: 0.4}[enough]
    assert [one.beside for one in more.restored] == [False] + [True] * (len(more.names) - 1)


def test_layers_stay_float_until_the_output_error_is_small_enough():
    graph = model_of(
        "a = MatMul(x, w) t = Tanh(a) y = MatMul(t, v)",
        {"w": (16, 64), "v": (64, 8)},
        inputs="float[N,16] x",
        outputs="float[N,8] y",
    )
    step = Quantize(target="onnxruntime-x86-vnni", float_macs=0.9)
    outcomes = []
    for until in (10, 60):
        part = step.model_copy(update={"float_until": until})
        outcomes.append(part.run(graph.copy(), context_of(feeds_of((4, 16)))))
    told = [
        [refusal.reason for refusal in outcome.refusals if "stays float" in refusal.reason]
        for outcome in outcomes
    ]
    (one,) = told[0]
    assert one.startswith("no layer stays float: the output error is -")
    assert any("quantized alone it causes" in reason for reason in told[1])
