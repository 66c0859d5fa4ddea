"""segments.py, saturation.py: quantized models on two engines that round to different sides."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxslim_lab.graph import Graph
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.saturation import overflow
from onnxslim_lab.second_opinion import second_opinion
from onnxslim_lab.segments import apart, borders, hidden
from onnxslim_lab.sessions import Runner

HEAD = '<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>'
LAYERS = f"""{HEAD} g (float[n, 4] x) => (float[n, 4] y)
<float s = {{0.01}}, float wide = {{4.0}}, uint8 z = {{0}}, int8 zw = {{0}}, float sw = {{1.0}}, float wider = WIDER> {{
  [q0] x8 = QuantizeLinear(x, s, z)  x1 = DequantizeLinear(x8, s, z)  w1 = DequantizeLinear(w, sw, zw)
  [first] a = MatMul(x1, w1)  [q1] a8 = QuantizeLinear(a, wide, z)  a1 = DequantizeLinear(a8, wide, z)
  [second] b = MatMul(a1, w1)  [q2] b8 = QuantizeLinear(b, wider, z)  [last] y = DequantizeLinear(b8, wider, z) }}"""
FEEDS = [{"x": np.linspace(0, 2.5, 24, dtype=np.float32).reshape(6, 4)}]


def parse(text, **constants):
    """Return a graph from text and initializers."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, k) for k, array in constants.items())
    return Graph.load(model)


def layers(weight, text=LAYERS):
    """Return two layers with the same weights, all of one value."""
    text = text.replace("WIDER", f"{{{4.0 if weight < 10 else 2100.0}}}")
    return parse(text, w=np.full((4, 4), weight, np.int8))


class Fake:
    """A runner that gives what the NumPy runtime does, but for the outputs of one node."""

    def __init__(self, node, change):
        self.node, self.change = node, change
        self.asked = []  # outputs and level of each run

    def run(self, graph, feeds, *, outputs=None, optimization="all"):
        def exchange(node, values):
            return self.change(*values) if node.name == self.node else None

        self.asked.append((outputs, optimization))
        return [Interpreter(graph).run(feed, outputs, exchange=exchange) for feed in feeds]


def opinion(graph, fake, feeds=FEEDS):
    given = fake.run(graph, feeds)
    fake.asked.clear()
    return second_opinion(graph, feeds, given, fake, 1e-4)


def test_a_layer_that_saturates_is_named():
    graph = layers(127)
    fake = Fake("q1", lambda codes: [np.minimum(codes, 164)])  # (32767 + 32767) * 0.01 / 4
    verdict = opinion(graph, fake)
    assert verdict.status == "failed"
    assert "MatMul node 'first' departs by 91 steps" in verdict.reason
    assert "value 'a8'" in verdict.reason
    assert f"sums of two products reach {127 * (250 + 239)}" in verdict.reason
    assert len(fake.asked) == 1
    assert fake.asked[0][1] == "all"


def test_a_departure_that_does_not_saturate_says_no_more():
    graph = layers(1)
    verdict = opinion(graph, Fake("q2", lambda codes: [codes + np.uint8(3)]))
    assert verdict.status == "failed"
    assert verdict.reason == (
        "the engines disagree: MatMul node 'second' departs by 3 steps (24 of 24 values differ) at value 'b8'"
    )


def test_single_steps_that_grow_in_later_layers_pass():
    verdict = opinion(layers(1), Fake("q1", lambda codes: [codes + np.uint8(1)]))
    assert verdict.status == "passed"
    assert verdict.reason == (
        "every quantized segment agrees within one step (3 values); outputs differ by 4 steps through cascading"
    )


def test_what_follows_the_last_quantized_value_is_compared_exactly():
    text = LAYERS.replace("[last] y =", "c =").replace(" }", " [last] y = Neg(c) }")
    verdict = opinion(layers(1, text), Fake("last", lambda y: [y * np.float32(1.01)]))
    assert verdict.status == "failed"
    assert "after the last quantized values, which agree" in verdict.reason


@pytest.mark.parametrize(("shift", "status"), [(1, "passed"), (0, "failed")])
def test_dynamically_quantized_values_are_compared_without_their_zero_points(shift, status):
    graph = parse(
        f"""{HEAD} g (float[n, 4] x) => (float[n, 4] y) {{
          h = Neg(x)  [q] h8, s, z = DynamicQuantizeLinear(h)
          i = MatMulInteger(h8, w, z)  f = Cast<to = 1>(i)  y = Mul(f, s) }}""",
        w=np.full((4, 4), 3, np.int8),
    )
    assert list(borders(graph)) == ["h8", "s", "z"]
    fake = Fake("q", lambda codes, s, z: [np.maximum(codes, 2) - np.uint8(2), s, z - np.uint8(shift)])
    verdict = opinion(graph, fake)
    assert verdict.status == status, verdict.reason


def test_operators_that_quantize_inside_start_from_the_same_floats():
    graph = parse(
        f"""{HEAD} g (float[n, 4] x) => (float[n, 4] y) <float s = {{0.5}}> {{
      h = Neg(x)  [inner] m = com.microsoft.DynamicQuantizeMatMul(h, w, s)  y = Abs(m) }}""",
        w=np.full((4, 4), 3, np.int8),
    )
    assert list(borders(graph)) == ["h", "m"]
    verdict = opinion(graph, Fake("inner", lambda y: [y * np.float32(1.01)]))
    assert "DynamicQuantizeMatMul node 'inner' departs by a relative difference of" in verdict.reason


BODY = f"""{HEAD} g (float[n] x, bool c) => (float[n] y) <float s = {{0.1}}, uint8 z = {{0}}> {{
  [choose] h = If(c) <
    then_branch = t () => (float[n] p) {{ q = QuantizeLinear(x, s, z)  p = DequantizeLinear(q, s, z) }},
    else_branch = e () => (float[n] r) {{ r = Identity(x) }}>
  REST }}"""


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("y = Neg(h)", "quantized values are in bodies or functions"),
        ("q8 = QuantizeLinear(h, s, z)  y = DequantizeLinear(q8, s, z)", "cannot be looked into"),
    ],
)
def test_what_is_quantized_in_bodies_is_not_judged(rest, reason):
    graph = Graph.parse(BODY.replace("REST", rest))
    assert hidden(graph)
    feeds = [{"x": np.ones(3, np.float32), "c": np.array(True)}]
    verdict = opinion(graph, Fake("choose", lambda h: [h + np.float32(0.5)]), feeds)
    assert verdict.status == "skipped"
    assert reason in verdict.reason


def test_constants_are_no_borders():
    graph = layers(1)
    assert list(borders(graph)) == ["x8", "a8", "b8"]
    folded = "w8 = QuantizeLinear(f, sw, zw)  w1 = DequantizeLinear(w8, "
    graph = parse(
        LAYERS.replace("WIDER", "{1.0}").replace("w1 = DequantizeLinear(w, ", folded),
        f=np.ones((4, 4), np.float32),
    )
    assert list(borders(graph)) == ["x8", "a8", "b8"]


@pytest.mark.parametrize(
    ("weight", "high", "expected"), [(127, 255, 64770), (64, 255, 0), (-128, 255, 65280), (127, 100, 0)]
)
def test_the_bound_on_sums_of_pairs(weight, high, expected):
    text = f"{HEAD} g (uint8[n, 3] x) => (int32[n, 2] y) {{ [m] y = MatMulInteger(x, w) }}"
    graph = parse(text, w=np.full((3, 2), weight, np.int8))
    x = np.full((5, 3), high, np.uint8)
    assert overflow(graph, graph.nodes[0], {"x": x}) == expected


def test_neighbours_of_a_convolution_are_channels():
    text = f"{HEAD} g (uint8[1, 2, 5, 5] x) => (int32[1, 1, 3, 3] y) {{ [c] y = ConvInteger(x, w) }}"
    weights = np.zeros((1, 2, 3, 3), np.int8)
    weights[:, 0] = 127
    graph = parse(text, w=weights)
    x = np.full((1, 2, 5, 5), 255, np.uint8)
    assert overflow(graph, graph.nodes[0], {"x": x}) == 0
    weights[:, 1] = 127
    graph = parse(text, w=weights)
    assert overflow(graph, graph.nodes[0], {"x": x}) == 2 * 255 * 127


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_have_steps(name):
    dtype = getattr(ml_dtypes, name)
    values = np.array([-1, -0.0, 0, 1], dtype)
    after = (values.view(np.uint8) + np.array([1, 0, 1, 1], np.uint8)).view(dtype)
    assert not apart("y", values, after, 1e-4)
    assert apart("y", values, values[::-1].copy(), 1e-4).endswith("(2 of 4 values differ)")


def test_shapes_that_differ_depart():
    assert apart("y", np.zeros(2, np.int8), np.zeros(3, np.int8), 1e-4) == "shape (3,) became (2,)"


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_onnxruntime_agrees_within_a_step(kind):
    graph = layers(5, LAYERS.replace("uint8", kind))
    with Runner(threads=1) as runner:
        given = runner.run(graph, FEEDS)
        assert second_opinion(graph, FEEDS, given, runner, 1e-4).status == "passed"
