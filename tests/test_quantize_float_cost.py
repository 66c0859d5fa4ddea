"""What staying float is held to cost: products, weights and the conversions around it."""

import pytest
from test_quantize import context_of, feeds_of, model_of

from onnxslim_lab.base import Outcome
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.float_cost import FloatCost
from onnxslim_lab.quantization.static import plan_static, scheme_of

CALL, ELEMENT, WEIGHT, RESULT, FASTER = 200_000, 60, 15, 80, 0.12


def planned(body, sizes, shape, outputs="float[N,4,8,8] y"):
    graph = model_of(body, sizes, outputs=outputs, inputs=f"float[{','.join(map(str, shape))}] x")
    step = Quantize(target="onnxruntime-x86-vnni", ranges="minmax", rounding="nearest")
    return plan_static(graph, step, scheme_of(step), context_of(feeds_of((2, *shape[1:]))), Outcome()).plan


def cost_of(*model, **options):
    return FloatCost(planned(*model, **options))


def conversions(*elements):
    return sum(CALL + ELEMENT * size for size in elements)


CHAIN = "a = Conv(x, w) b = Conv(a, v) c = Relu(b) y = Conv(c, u)"
SIZES = {"w": (16, 4, 1, 1), "v": (32, 16, 1, 1), "u": (4, 32, 1, 1)}
CELLS = 2 * 8 * 8  # of a batch of two


@pytest.mark.parametrize("symbol", ["N", "2"])
def test_a_layer_between_layers_on_codes_is_converted_to_and_from(symbol):
    cost = cost_of(CHAIN, SIZES, (symbol, 4, 8, 8))
    middle = CELLS * 16 * 32 + WEIGHT * 16 * 32
    assert cost.of(["b"]) == middle + conversions(16 * CELLS, 32 * CELLS)
    first = CELLS * 4 * 16 + WEIGHT * 4 * 16
    assert cost.of(["a"]) == first + conversions(16 * CELLS) - conversions(4 * CELLS)
    both = first + middle + conversions(32 * CELLS) - conversions(4 * CELLS)
    assert cost.of(["a", "b"]) == both, "neighbours share a conversion"
    assert cost.of([]) == 0
    assert cost.of(["a", "b", "y"]) < sum(cost.of([name]) for name in ("a", "b", "y"))


def test_products_of_depthwise_layers_take_as_long_on_codes():
    body = "a = Conv(x, w) b = Conv<group = 16, pads = [1,1,1,1]>(a, v) y = Conv(b, u)"
    cost = cost_of(body, {"w": (16, 4, 1, 1), "v": (16, 1, 3, 3), "u": (4, 16, 1, 1)}, ("N", 4, 8, 8))
    assert cost.of(["b"]) == WEIGHT * 16 * 9 + conversions(16 * CELLS, 16 * CELLS)


def test_a_value_that_float_operators_read_anyway_costs_nothing_more():
    body = "a = Conv(x, w) t = Tanh(a) b = Conv(a, v) y = Add(b, t)"
    sizes = {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1)}
    cost = cost_of(body, sizes, ("N", 4, 8, 8))
    assert cost.of(["b"]) == CELLS * 16 + WEIGHT * 16 - conversions(4 * CELLS)


def test_a_float_result_costs_by_its_size_and_saves_by_its_products():
    body = "a = Conv(x, w) t = Tanh(a) y = Conv(t, v)"
    plan = planned(body, {"w": (16, 4, 1, 1), "v": (4, 16, 1, 1)}, ("N", 4, 8, 8))
    cost = FloatCost(plan)
    (layer,) = [one.name for one in plan.layers if one.layer.node.output[0] == "a"]
    plan.summed = {layer}
    assert cost.of([]) == pytest.approx(RESULT * 16 * CELLS - FASTER * 4 * 16 * CELLS)
    assert cost.of([layer]) == CELLS * 4 * 16 + WEIGHT * 4 * 16 - conversions(4 * CELLS, 16 * CELLS)
