"""Convolutions on codes that give float sums: where they are chosen, and that they round nothing."""

import numpy as np
import pytest
from test_quantize import context_of, feeds_of, model_of, quantized

from onnxslim_lab.base import Outcome
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.float_results import summable_layers
from onnxslim_lab.quantization.output_loss import output_loss
from onnxslim_lab.quantization.ranges import allow_for_unseen
from onnxslim_lab.quantization.static import plan_static, scheme_of
from onnxslim_lab.statistics import ValueStatistics

SPECTRUM = "a = Conv<pads = [{0}, {0}, {0}, {0}]>(x, w, b) p = Mul(a, a) s = Sqrt(p) y = MatMul(s, v)"
SIZES = {"w": (8, 4, 1, 1), "b": (8,), "v": (8, 3)}


def spectrum(scale=1000.0, size=3):
    """Return a convolution whose first channel is so large that 8 bits for all lose the others."""
    sizes = SIZES | {"w": (8, 4, size, size)}
    graph = model_of(SPECTRUM.format(size // 2), sizes, outputs="float[N,8,8,3] y")
    for name in ("w", "b"):
        values = np.array(graph.constant(name))
        values[0] *= scale
        graph.set_constant(name, values)
    return graph


@pytest.mark.parametrize(("size", "product"), [(1, "MatMul"), (3, "ConvInteger")])
def test_a_result_that_rounding_spoils_stays_float(size, product):
    graph, feeds = spectrum(size=size), feeds_of()
    plain, _ = quantized(graph, feeds, exclude="v")
    result, outcome = quantized(graph, feeds, exclude="v", float_sums=True)
    assert {product, "Sqrt"} <= {node.op_type for node in result.nodes}
    assert "Conv" not in {node.op_type for node in result.nodes}
    assert any("1 convolutions on codes give float results" in change.what for change in outcome.changes)
    run = context_of(feeds).calibration.runner.run
    before, after = (output_loss(run(graph, feeds), run(one, feeds)) for one in (plain, result))
    assert after < before / 1000


def test_float_sums_are_the_products_of_the_codes():
    graph, feeds = spectrum(1.0), feeds_of(count=2)
    step = Quantize(target="onnxruntime-x86-vnni", exclude=("v",), rounding="nearest", ranges="minmax")
    context, model = context_of(feeds), graph.copy()
    planned = plan_static(model, step, scheme_of(step), context, Outcome())
    plan = planned.plan
    plan.summed = {plan.layers[0].name}
    result = plan.model.copy()
    plan.write(result)
    (product,) = [node for node in result.nodes if node.op_type == "ConvInteger"]
    codes, zero = (result.constant(product.input[index]) for index in (1, 3))
    assert codes.dtype == zero.dtype == np.uint8, "onnxruntime is slow with int8"
    scale, shift = (result.constant(name) for name in result.producer(product.input[0]).input[1:3])
    (cast,) = result.consumers(product.output[0])
    (scaled,) = result.consumers(cast.output[0])
    inputs = np.clip(np.rint(feeds[0]["x"] / scale) + shift, 0, 255) - float(shift)
    weights = codes.astype(np.float64) - float(zero)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(inputs, [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), axis=(2, 3)
    )
    sums = np.einsum("ockl,ncijkl->noij", weights, windows) * result.constant(scaled.input[1])
    expected = np.abs(sums + graph.constant("b").reshape(-1, 1, 1)) @ graph.constant("v")
    found = context.calibration.runner.run(result, feeds[:1])[0]["y"]
    assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_layer_that_gets_no_float_sums_says_why():
    graph, feeds = spectrum(1.0), feeds_of(count=2)
    asked = {"target": "onnxruntime-x86-vnni", "exclude": ("v",), "symmetric": False, "ranges": "minmax"}
    step = Quantize.model_validate(asked)
    planned = plan_static(graph, step, scheme_of(step), context_of(feeds), Outcome())
    plan = planned.plan
    plan.summed = {plan.layers[0].name}
    outcome = plan.write(plan.model.copy())
    (refusal,) = outcome.refusals
    assert refusal.where == plan.layers[0].name
    assert refusal.reason == "no float sums: the zero points of its weight differ by channel"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SPECTRUM.format(0), {"a"}),
        ("a = Conv(x, w, b) r = Relu(a) t = Tanh(r) y = MatMul(t, v)", {"a"}),
        ("a = Conv(x, w, b) c = Conv(a, u) y = Tanh(c)", {"c"}),  # a is taken in codes
        ("a = Conv<group = 4>(x, g) y = Tanh(a)", set()),
    ],
)
def test_only_what_nothing_takes_in_codes_may_stay_float(body, expected):
    sizes = {name: shape for name, shape in SIZES.items() if f"{name})" in body or f"{name}," in body}
    sizes |= {"u": (8, 8, 1, 1)} if "u)" in body else {}
    sizes |= {"g": (8, 1, 1, 1)} if "g)" in body else {}
    graph = model_of(body, sizes, outputs="float[N,8,8,3] y" if "MatMul" in body else "float[N,8,8,8] y")
    step = Quantize(target="onnxruntime-x86-vnni", ranges="minmax", rounding="nearest")
    plan = plan_static(graph, step, scheme_of(step), context_of(feeds_of(count=1)), Outcome()).plan
    assert {layer.layer.node.output[0] for layer in summable_layers(plan, ())} == expected


@pytest.mark.parametrize(
    ("ends", "count", "expected"),
    [((-1.0, 3.0), 32, (-1.5, 3.5)), ((0.0, 4.0), 16, (0.0, 5.0)), ((-1.0, 1.0), 1 << 20, (-1.0, 1.0))],
)
def test_few_elements_leave_room_for_more(ends, count, expected):
    statistics = ValueStatistics(count, 0, *ends, *ends, count)
    assert allow_for_unseen(ends, statistics) == pytest.approx(expected, abs=1e-5)


def test_float_sums_are_refused_where_they_are_not_written():
    graph, feeds = spectrum(), feeds_of(count=2)
    result, outcome = quantized(graph, feeds, exclude="v", float_sums=True, activations="int8")
    assert "ConvInteger" not in {node.op_type for node in result.nodes}
    assert any("no float sums" in refusal.reason for refusal in outcome.refusals)
    assert not any("no layer stays float" in refusal.reason for refusal in outcome.refusals)
