"""Inputs of two terms: what they compute, that onnxruntime runs them in integers, and where they are chosen."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_quantize import context_of, feeds_of, model_of, quantized, sqnr
from test_quantize_shielding import optimized

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.layers import find_layers
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization import term_choice
from onnxslim_lab.quantization.float_results import Split, splittable
from onnxslim_lab.quantization.numerics import dequantize
from onnxslim_lab.quantization.static import plan_static, scheme_of

ASKED = {"target": "onnxruntime-x86-vnni", "rounding": "nearest", "ranges": "minmax"}
LAYERS = {  # body, sizes, input, shape fed, output, operators that multiply
    "along one axis": (
        "y = Conv<pads = [1, 2], strides = [2]>(x, w, b)",
        {"w": (6, 4, 3), "b": (6,)},
        "float[N,4,T] x",
        (2, 4, 9),
        "float[N,6,U] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of known length": (
        "y = Conv<pads = [1, 1], strides = [2], dilations = [2]>(x, w, b)",
        {"w": (6, 4, 2), "b": (6,)},
        "float[1,4,8] x",
        (1, 4, 8),
        "float[1,6,4] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of whole strides": (
        "y = Conv<strides = [4]>(x, w)",
        {"w": (6, 2, 8)},
        "float[N,2,24] x",
        (3, 2, 24),
        "float[N,6,5] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of sound": (
        "a = Constant<value_ints = [1]>() u = Unsqueeze(x, a) y = Conv<strides = [4]>(u, w)",
        {"w": (6, 1, 8)},
        "float[N,24] x",
        (3, 24),
        "float[N,6,5] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of windows side by side": (
        "y = Conv<strides = [3]>(x, w, b)",
        {"w": (6, 4, 3), "b": (6,)},
        "float[N,4,9] x",
        (2, 4, 9),
        "float[N,6,3] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of windows side by side, of any number": (
        "y = Conv<strides = [3]>(x, w, b)",
        {"w": (6, 4, 3), "b": (6,)},
        "float[N,4,T] x",
        (2, 4, 9),
        "float[N,6,U] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of one tap": (
        "y = Conv(x, w, b)",
        {"w": (6, 4, 1), "b": (6,)},
        "float[N,4,9] x",
        (2, 4, 9),
        "float[N,6,9] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of one tap, of images": (
        "y = Conv(x, w, b)",
        {"w": (6, 4, 1, 1), "b": (6,)},
        "float[N,4,8,8] x",
        (2, 4, 8, 8),
        "float[N,6,8,8] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of one tap, of videos": (
        "y = Conv(x, w)",
        {"w": (6, 4, 1, 1, 1)},
        "float[N,4,2,8,8] x",
        (2, 4, 2, 8, 8),
        "float[N,6,2,8,8] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of one tap at every other place": (
        "y = Conv<strides = [2, 2]>(x, w)",
        {"w": (6, 4, 1, 1)},
        "float[N,4,8,8] x",
        (2, 4, 8, 8),
        "float[N,6,4,4] y",
        {"ConvInteger": 2},
    ),
    "of images": (
        "y = Conv<pads = [1, 1, 1, 1]>(x, w, b)",
        {"w": (6, 4, 3, 3), "b": (6,)},
        "float[N,4,8,8] x",
        (2, 4, 8, 8),
        "float[N,6,8,8] y",
        {"ConvInteger": 2},
    ),
    "MatMul": (
        "y = MatMul(x, w)",
        {"w": (16, 6)},
        "float[4,16] x",
        (4, 16),
        "float[4,6] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "of tokens": (
        "a = MatMul(x, w) y = Add(a, b)",
        {"w": (16, 6), "b": (6,)},
        "float[1,4,16] x",
        (1, 4, 16),
        "float[1,4,6] y",
        {"MatMulIntegerToFloat": 2},
    ),
    "Gemm": (
        "y = Gemm<transB = 1>(x, w, b)",
        {"w": (6, 16), "b": (6,)},
        "float[N,16] x",
        (4, 16),
        "float[N,6] y",
        {"QGemm": 2},
    ),
}


def doubled(case):
    """Return a model, the same with its only layer of two terms, its plan and feeds."""
    body, sizes, given, shape, made, _ = LAYERS[case]
    graph = model_of(body, sizes, inputs=given, outputs=made)
    context, feeds = context_of(feeds_of(shape)), feeds_of(shape)
    plan = plan_static(graph, step := Quantize(**ASKED), scheme_of(step), context, Outcome()).plan
    plan.doubled = {plan.layers[0].name}
    result = plan.model.copy()
    outcome = plan.write(result)
    assert not outcome.refusals
    assert "of two terms" in outcome.changes[0].what
    return graph, result, plan, context, feeds


def constants(result, node):
    return (result.constant(name) for name in node.input[1:])


@pytest.mark.parametrize("case", LAYERS)
def test_two_terms_are_added_up(case):
    graph, result, plan, context, feeds = doubled(case)
    first, second = sorted(
        (node for node in result.nodes if node.op_type == "QuantizeLinear"),
        key=lambda node: -result.constant(node.input[1]),
    )
    (scale, zero), (fine, middle) = constants(result, first), constants(result, second)
    assert scale / fine == pytest.approx(254, rel=1e-6)
    assert middle == 128
    x = feeds[0]["x"]
    rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    rest = (np.clip(np.rint((x - rounded) / fine) + 128, 0, 255) - 128) * fine
    model = graph.copy()
    model.set_constant("w", dequantize(*plan.weight(plan.layers[0], plan.layers[0].layer)))
    run = context.calibration.runner.run
    (expected,) = run(model, [{"x": (rounded + rest).astype(np.float32)}])
    (one,) = run(model, [{"x": rounded.astype(np.float32)}])
    (found,) = run(result, feeds[:1])
    error = np.abs(found["y"] - expected["y"]).max()
    assert error < 2e-4 * np.abs(expected["y"]).max()
    assert np.abs(one["y"] - expected["y"]).max() > 10 * error, "a single term is told from two"


@pytest.mark.parametrize("case", LAYERS)
def test_onnxruntime_multiplies_both_in_integers(case, tmp_path):
    _, result, *_ = doubled(case)
    found, wanted = optimized(result, tmp_path), LAYERS[case][-1]
    assert {kind: found[kind] for kind in wanted} == wanted
    assert {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"}.isdisjoint(found)


@pytest.mark.parametrize(
    ("case", "moves"),
    [
        ("of sound", ["Reshape", "Gather", "Reshape"]),
        ("of windows side by side", ["Transpose", "Reshape"]),
    ],
)
def test_windows_take_no_more_nodes_than_they_need(case, moves):
    _, result, *_ = doubled(case)
    kinds = [node.op_type for node in result.nodes]
    assert kinds[: kinds.index("DequantizeLinear")] == moves


def test_a_bias_is_added_with_the_second_term():
    _, result, *_ = doubled("along one axis")
    (total,) = [node for node in result.nodes if node.op_type == "Sum"]
    assert len(total.input) == 3
    assert result.constant(total.input[2]).shape == (6,)


def test_windows_follow_the_length_at_inference():
    graph, result, *_ = doubled("along one axis")
    for length in (1, 2, 30):
        feeds = feeds_of((1, 4, length), seed=5)
        assert sqnr(graph, result, feeds) > 35, length


@pytest.mark.parametrize(("louder", "near"), [(1.9, True), (4.0, False)])
def test_inputs_twice_as_large_as_seen_are_not_clipped(louder, near):
    graph, result, *_, feeds = doubled("along one axis")
    feeds = [{"x": louder * feed["x"]} for feed in feeds]
    assert (sqnr(graph, result, feeds) > 35) == near


def test_a_convolution_that_only_two_terms_are_read_of_is_not_rounded():
    graph = model_of(
        "a = Conv(x, w) r = Relu(a) y = Conv(r, v)",
        {"w": (8, 4, 3), "v": (6, 8, 3)},
        inputs="float[N,4,T] x",
        outputs="float[N,6,U] y",
    )
    step = Quantize(**ASKED)
    plan = plan_static(graph, step, scheme_of(step), context_of(feeds_of((2, 4, 20))), Outcome()).plan
    first, second = splittable(plan, ())
    assert (first.value, first.sums) == ("x", frozenset())
    assert (second.value, second.sums) == ("r", {plan.layers[0].name})
    plan.doubled, plan.summed = {plan.layers[1].name}, set(second.sums)
    result = plan.model.copy()
    plan.write(result)
    assert [result.producer(node.input[0]).op_type for node in result.nodes if node.op_type == "Relu"] == [
        "Transpose"
    ]


SOUND = {
    "body": "a = Conv<strides = [8]>(x, w) p = Mul(a, a) s = Sqrt(p) y = Conv<group = 2>(s, v)",
    "sizes": {"w": (8, 1, 16), "v": (4, 4, 1)},
    "inputs": "float[N,1,64] x",
    "outputs": "float[N,4,7] y",
}


def sound():
    """Return feeds of which most are far quieter than the loudest."""
    feeds = feeds_of((1, 1, 64), count=24)
    for number, feed in enumerate(feeds):
        feed["x"] *= 0.9**number
    return feeds


def test_what_is_quiet_is_read_as_two_terms():
    graph, feeds = model_of(**SOUND), sound()
    plain, _ = quantized(graph, feeds, op_types="Conv", exclude="v")
    result, outcome = quantized(graph, feeds, op_types="Conv", exclude="v", terms=2, float_until=60)
    (told,) = [change for change in outcome.changes if "inputs of two terms" in change.what]
    assert "takes 100.0% of the multiply-accumulates a second time" in told.what
    assert told.detail == {"terms_macs": 1.0}
    assert sqnr(graph, result, feeds) > sqnr(graph, plain, feeds) + 6


def test_one_term_stays_where_it_is_enough():
    _, outcome = quantized(model_of(**SOUND), sound(), exclude="v", terms=2, float_until=10)
    reasons = [refusal.reason for refusal in outcome.refusals]
    assert any(reason.startswith("no input is of two terms: the output error") for reason in reasons)


@pytest.mark.parametrize(
    ("body", "sizes", "options"),
    [
        ("y = Conv<group = 4>(x, w)", {"w": (4, 1, 3)}, {}),
        ("y = Conv(x, w)", {"w": (4, 4, 3)}, {"symmetric": False}),
        ("y = Conv(x, w)", {"w": (4, 4, 3)}, {"activations": "int8"}),
    ],
)
def test_what_cannot_be_split_is_not_tried(body, sizes, options):
    graph = model_of(body, sizes, inputs="float[N,4,9] x", outputs="float[N,4,7] y")
    step = Quantize(**(ASKED | options))
    plan = plan_static(graph, step, scheme_of(step), context_of(feeds_of((1, 4, 9))), Outcome()).plan
    assert len(plan.layers) == 1
    assert splittable(plan, ()) == []


def test_two_terms_are_refused_where_they_are_not_written():
    graph, feeds = model_of(**SOUND), sound()
    _, outcome = quantized(graph, feeds, exclude="v", terms=2, activations="int8")
    assert any("no two terms" in refusal.reason for refusal in outcome.refusals)


@pytest.mark.parametrize(
    ("wide", "scales"), [(0, "a scale per channel"), (32, "blocks of"), (16, "blocks of 16")]
)
def test_recurrent_weights_have_scales_of_blocks_where_the_outputs_gain(wide, scales):
    graph = model_of(
        "y, h = LSTM<hidden_size = 8>(x, w, r) z = MatMul(y, v)",
        {"w": (1, 32, 64), "r": (1, 32, 8), "v": (8, 4)},
        inputs="float[5,1,64] x",
        outputs="float[5,1,1,4] z",
    )
    feeds = feeds_of((5, 1, 64))
    if wide:  # columns far larger than the rest, of inputs that are far smaller
        weight = np.array(graph.constant("w"))
        weight[:, :, :wide] *= 300
        graph.set_constant("w", weight)
        for feed in feeds:
            feed["x"][..., :wide] /= 300
    plain, _ = quantized(graph, feeds)
    result, outcome = quantized(graph, feeds, float_macs=0.01, float_until=60)
    told = {change.where[-2:]: change.what for change in outcome.changes if "decoded" in change.what}
    assert scales in told["/W"]
    assert "a scale per channel" in told["/R"]
    if wide:
        assert sqnr(graph, result, feeds) > sqnr(graph, plain, feeds) + 3


def test_the_gram_matrix_of_recurrent_weights_is_that_of_the_states_the_node_gives():
    graph = model_of(
        "y, h = LSTM<hidden_size = 5>(x, w, r)",
        {"w": (1, 20, 4), "r": (1, 20, 5)},
        inputs="float[T,N,4] x",
        outputs="float[T,1,N,5] y",
    )
    feeds = feeds_of((6, 2, 4), count=4)
    calibration = context_of(feeds).calibration
    (layer,) = [one for one in find_layers(graph)[0] if one.role == "R"]
    ((_, gram),) = calibration.grams(graph, [layer])
    states = np.concatenate([run["y"].reshape(-1, 5) for run in calibration.runner.run(graph, feeds)])
    assert gram.count == len(states)
    assert np.allclose(gram.xtx[0], states.T @ states, rtol=1e-4, atol=1e-5)


def test_what_the_last_choice_made_superfluous_is_taken_back(monkeypatch):
    """The layer that gained most at first is the dearest, and the other two are near enough without it."""
    layers = [SimpleNamespace(name=name, macs=macs) for name, macs in (("a", 100), ("b", 10), ("c", 1))]
    plan = SimpleNamespace(layers=layers, doubled=set(), summed=set())
    losses = {"": 1.0, "a": 0.5, "b": 0.6, "c": 0.9, "ab": 0.3, "ac": 0.4, "abc": 0.04, "bc": 0.08}
    judge = SimpleNamespace(plan=plan, loss=lambda **_: losses["".join(sorted(plan.doubled))])

    def left(plan, _without):
        return [Split(one.name, (one,), frozenset()) for one in layers if one.name not in plan.doubled]

    monkeypatch.setattr(term_choice, "splittable", left)
    monkeypatch.setattr(term_choice, "summable_layers", lambda *_: [])
    terms = term_choice.choose_terms(judge, (), Context(), 0.1)
    assert (terms.layers, terms.macs, terms.before, terms.after) == (("b", "c"), 11, 1.0, 0.08)
    assert plan.doubled == {"b", "c"}
