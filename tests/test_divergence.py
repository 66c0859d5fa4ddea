"""divergence.py: the node where the two engines part."""

import dataclasses
import inspect
import math

import numpy as np
import pytest

from onnxslim_lab.divergence import PROBES, first_divergence
from onnxslim_lab.graph import Graph
from onnxslim_lab.kernels import lookup
from onnxslim_lab.running import plan as runtime_plan
from onnxslim_lab.sessions import Runner

HEAD = '<ir_version: 9, opset_import: ["": 17]>'


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as shared:
        yield shared


def chain(length, odd):
    """Return a chain of nodes v1, v2, ... with a Tanh at one place."""
    nodes = "\n".join(
        f"[n{i}] v{i + 1} = {'Tanh(v' + str(i) + ')' if i == odd else 'Add(v' + str(i) + ', half)'}"
        for i in range(length)
    )
    return Graph.parse(
        f"{HEAD} g (float[n] v0) => (float[n] v{length}) <float half = {{0.01}}> {{ {nodes} }}"
    )


def spoil(monkeypatch, op_type, change):
    """Make a kernel give another result."""

    def wrong(name, domain="", opset=1):
        found = lookup(name, domain, opset)
        if name != op_type:
            return found
        right = inspect.unwrap(found.function)
        return dataclasses.replace(found, function=lambda *inputs, **given: change(right(*inputs, **given)))

    monkeypatch.setattr(runtime_plan, "lookup", wrong)


FEED = [{"v0": np.linspace(-1, 1, 5, dtype=np.float32)}]


@pytest.mark.parametrize("place", [0, 1, 17, 99, 199])
def test_the_node_is_found_by_bisection(runner, monkeypatch, place):
    spoil(monkeypatch, "Tanh", lambda y: y * np.float32(1.01))
    found = first_divergence(chain(200, place), FEED, runner, 1e-4)
    assert (found.value, found.node, found.op_type) == (f"v{place + 1}", f"n{place}", "Tanh")
    assert found.relative == pytest.approx(0.01, rel=0.01)
    assert found.alone == pytest.approx(0.01, rel=0.01)
    assert found.compared <= 4 * (PROBES + 1) < 200
    assert f"value 'v{place + 1}' of Tanh node 'n{place}'" in str(found)


def test_equal_engines_have_no_divergence(runner):
    assert first_divergence(chain(40, 7), FEED, runner, 1e-4) is None


def test_a_difference_that_later_nodes_hide_is_found(runner, monkeypatch):
    spoil(monkeypatch, "Tanh", lambda y: y * np.float32(1.01))
    rest = "\n".join(f"v{i + 2} = Neg(v{i + 1})" for i in range(40))
    graph = Graph.parse(f"""{HEAD} g (float[n] v0) => (bool[n] y, float[n] v41) <float low = {{-2}}> {{
      a = Neg(v0)  v1 = Neg(a)  [odd] b = Tanh(a)  {rest}  y = Greater(b, low) }}""")
    assert 2 not in range(44 // PROBES - 1, 44, 44 // PROBES)  # it is not among the values probed at first
    found = first_divergence(graph, FEED, runner, 1e-4)
    assert found.node == "odd"


def test_a_node_that_amplifies_is_told_from_one_that_errs(runner, monkeypatch):
    spoil(monkeypatch, "Tanh", lambda y: y + np.float32(1e-6))
    graph = Graph.parse(f"""{HEAD} g (float[n] v0) => (float[n] y) <float big = {{1e6}}> {{
      [small] a = Tanh(v0)  [large] y = Mul(a, big)  }}""")
    feeds = [{"v0": np.full(3, 2e-2, np.float32)}]
    found = first_divergence(graph, feeds, runner, 3e-5)
    assert found.node == "small"
    graph = Graph.parse(f"""{HEAD} g (float[n] v0) => (float[n] y) <float one = {{0.02}}> {{
      [small] a = Tanh(v0)  [cancel] y = Sub(a, one)  }}""")
    found = first_divergence(graph, feeds, runner, 1e-4)
    assert found.node == "cancel"
    assert found.alone < 1e-6 < found.relative


def test_bytes_agree_within_one_step(runner, monkeypatch):
    text = f"""{HEAD} g (float[n] v0) => (int8[n] y) <float s = {{0.1}}, int8 z = {{0}}> {{
      [q] y = QuantizeLinear(v0, s, z) }}"""
    spoil(monkeypatch, "QuantizeLinear", lambda y: (y + 1).astype(np.int8))
    assert first_divergence(Graph.parse(text), FEED, runner, 1e-4) is None
    spoil(monkeypatch, "QuantizeLinear", lambda y: (y + 2).astype(np.int8))
    assert first_divergence(Graph.parse(text), FEED, runner, 1e-4).node == "q"


def test_other_shapes_and_failures_are_infinite(runner, monkeypatch):
    spoil(monkeypatch, "Tanh", lambda y: y[:-1])
    found = first_divergence(chain(5, 2), FEED, runner, 1e-4)
    assert (found.node, found.relative) == ("n2", math.inf)
    spoil(monkeypatch, "Tanh", lambda _: 1 // 0)
    found = first_divergence(chain(5, 2), FEED, runner, 1e-4)
    assert (found.node, found.relative) == ("n2", math.inf)
    assert math.isnan(found.alone)
