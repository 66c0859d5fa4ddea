"""Symbolic sizes: the algebra against plain integers, and propagation against what onnxruntime computes."""

from __future__ import annotations

import contextlib
import itertools
import time

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from symbolic_graphs import shape_models, value_of

from onnxslim_lab.graph import Graph
from onnxslim_lab.symbols import dimensions as d
from onnxslim_lab.symbols import propagation as symbolic

N, S = d.symbol("n"), d.symbol("s")
HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'


def facts_of(text: str) -> symbolic.Facts:
    graph = Graph.parse(HEADER + text)
    graph.infer()
    return symbolic.propagate(graph)


def written(facts: symbolic.Facts, value: str) -> list[str]:
    return [str(size) for size in facts.shape(value) or ()]


# ---------------------------------------------------------------------- algebra

NAMES = ("n", "s", "t")
OPERATIONS = {
    "add": (d.add, lambda a, b: a + b),
    "subtract": (d.subtract, lambda a, b: a - b),
    "multiply": (d.multiply, lambda a, b: a * b),
    "minimum": (d.minimum, min),
    "maximum": (d.maximum, max),
    "floor": (d.floor_divide, lambda a, b: a // b),
    "truncate": (d.truncate_divide, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    "modulo": (d.modulo, lambda a, b: a % b),
}
CONCRETE = [dict(zip(NAMES, sizes, strict=True)) for sizes in itertools.product((0, 1, 2, 5), repeat=3)]


@st.composite
def computed(draw: st.DrawFn) -> tuple[d.Size, list[int]]:
    """A size and what it is for each choice of symbols."""
    pool: list[tuple[d.Size, list[int]]] = [
        (d.symbol(name), [symbols[name] for symbols in CONCRETE]) for name in NAMES
    ] + [(number, [number] * len(CONCRETE)) for number in (-2, 1, 3)]
    for _ in range(draw(st.integers(1, 8))):
        (first, firsts), (second, seconds) = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        symbolically, plainly = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
        if plainly not in (min, max) and symbolically in (d.floor_divide, d.truncate_divide, d.modulo):
            divisor = draw(st.integers(1, 4))
            second, seconds = divisor, [divisor] * len(CONCRETE)
        pool.append(
            (symbolically(first, second), [plainly(a, b) for a, b in zip(firsts, seconds, strict=True)])
        )
    return pool[-1]


@settings(max_examples=150, deadline=None)
@given(computed(), computed())
def test_algebra_agrees_with_integers(one, other):
    (first, firsts), (second, seconds) = one, other
    for symbols, expected in zip(CONCRETE, firsts, strict=True):
        if "#" not in str(first):  # a very long text is written as its hash
            assert value_of(first, symbols) == expected
    low = d.low_of(first)
    assert low is None or low <= min(firsts)
    pairs = list(zip(firsts, seconds, strict=True))
    assert d.equal(first, second) in (None, all(a == b for a, b in pairs))
    assert d.equal(first, second) is not False or not any(a == b for a, b in pairs)
    if (less := d.less(first, second)) is not None:
        assert {a < b for a, b in pairs} == {less}
    if first == second:
        assert firsts == seconds


def test_equal_polynomials_have_one_form():
    square = d.multiply(d.add(N, S), d.add(N, S))
    longer = d.add(d.add(d.multiply(N, N), d.multiply(d.multiply(N, S), 2)), d.multiply(S, S))
    assert square == longer
    assert hash(square) == hash(longer)
    assert d.subtract(square, longer) == 0


def test_a_size_may_be_zero_but_not_negative():
    assert d.equal(N, 0) is None
    assert d.equal(N, -1) is False
    assert d.equal(d.add(N, 1), 0) is False
    assert d.equal(d.symbol("k", None), -1) is None
    assert d.low_of(d.floor_divide(d.add(N, -1), 2)) == -1


def test_quotients():
    assert d.exact_quotient(d.multiply(d.multiply(N, S), 12), d.multiply(N, 4)) == d.multiply(S, 3)
    assert d.exact_quotient(d.add(N, 1), N) is None
    assert d.exact_quotient(N, 0) is None
    assert d.floor_divide(d.add(d.multiply(N, 4), 6), 4) == d.add(N, 1)
    assert d.truncate_divide(d.symbol("k", None), 2) != d.floor_divide(d.symbol("k", None), 2)


def test_hostile_products_stay_small():
    size: d.Size = d.add(N, 1)
    began = time.perf_counter()
    for _ in range(200):
        size = d.add(d.multiply(size, d.add(size, S)), d.minimum(size, S))
    assert len(str(size)) < 20_000
    assert time.perf_counter() - began < 5


# ---------------------------------------------------------------------- propagation


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape_models())
def test_propagation_agrees_with_onnxruntime(model):
    names = {name for node in model.graph.node for name in node.output}
    listed = {value.name for value in model.graph.output}
    graph = Graph.load(model)
    graph.infer()
    facts = symbolic.propagate(graph)
    kinds = {name: graph.dtype_of(name) for name in names - listed}
    ranks = {name: len(facts.shape(name) or ()) for name in names - listed}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, kinds[name], [None] * ranks[name])
        for name in sorted(kinds)
        if kinds[name]
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    except Exception:  # noqa: BLE001 - onnxruntime raises its own kinds
        return
    for n, s in ((1, 1), (2, 3), (5, 2), (4, 4)):
        feed = {"x": np.ones((n, 4, s), np.float32), "y": np.ones((n, s), np.float32)}
        try:
            results = session.run(None, feed)
        except Exception:  # noqa: BLE001 - onnxruntime raises its own kinds
            continue
        for output, found in zip(session.get_outputs(), results, strict=True):
            shape, values = facts.shape(output.name), facts.values(output.name)
            pairs = list(zip(shape or (), found.shape, strict=shape is not None))
            if values is not None:
                assert values.shape == found.shape
                pairs += list(zip(values.reshape(-1).tolist(), found.reshape(-1).tolist(), strict=True))
            for size, actual in pairs:
                with contextlib.suppress(NameError, SyntaxError):  # a size that nothing is known of
                    assert value_of(size, {"n": n, "s": s}) == actual, (output.name, str(size))


def test_symbols_of_inputs():
    facts = facts_of("g (float[n, 4, ?, n_1] x, float[?, n] z) => (float[?] y) { y = Relu(x) }")
    assert written(facts, "x")[:2] == ["n", "4"]
    assert facts.shape("x")[2] not in facts.shape("z")
    assert facts.shape("z")[1] == facts.shape("x")[0]


def test_a_name_on_two_axes_of_an_input_is_not_trusted():
    facts = facts_of("g (float[N, 3, N, N] x) => (float[?, 3, ?, ?] y) { y = Relu(x) }")
    n, _, height, width = facts.shape("y")
    assert len({n, height, width}) == 3


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (
            "y = Conv<strides = [2, 2], pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(x, k)",
            "n 6 floor((h + 1)/2) floor((w + 1)/2)",
        ),
        ("y = MaxPool<strides = [2, 2], kernel_shape = [2, 2]>(x)", "n 3 floor((h)/2) floor((w)/2)"),
        ("y = Flatten<axis = 2>(x)", "3*n h*w"),
        ("a = Constant<value_ints = [0, -1]>() y = Reshape(x, a)", "n 3*h*w"),
        ("y = Concat<axis = 2>(x, x)", "n 3 2*h w"),
        ("s = Shape<start = 2>(x) y = Expand(o, s)", "h w"),
        ("y = Transpose<perm = [0, 2, 3, 1]>(x)", "n h w 3"),
        ("y = ReduceMax<axes = [1, 2], keepdims = 0>(x)", "n w"),
    ],
)
def test_shapes(body, shape):
    text = f"g (float[n, 3, h, w] x, float[6, 3, 3, 3] k, float[1] o) => (float[?] y) {{ {body} }}"
    assert " ".join(written(facts_of(text), "y")) == shape


def test_a_position_table_cut_to_the_sequence_broadcasts_to_it():
    facts = facts_of(
        """g (float[n, s, 8] x, float[1, 512, 8] table) => (float[?] y) <int64[1] zero = {0}, int64[1] one = {1}> {
            end = Shape<start = 1, end = 2>(x)  cut = Slice(table, zero, end, one)  y = Add(x, cut) }"""
    )
    assert written(facts, "cut") == ["1", "min(512, s)", "8"]
    assert written(facts, "y") == ["n", "s", "8"]


def test_integers_from_data_are_unknown_but_the_same():
    facts = facts_of(
        """g (float[n, 4] x, int64[1] k) => (float[?] y) <int64[1] one = {1}> {
            a = Concat<axis = 0>(k, one)  b = Concat<axis = 0>(k, one)  y = Reshape(x, a) }"""
    )
    assert (facts.values("a") == facts.values("b")).all()
    assert d.low_of(facts.values("a")[0]) is None


def test_int64_overflow_is_not_computed():
    big = 2**62
    facts = facts_of(f"g (float[n] x) => (int64[1] y) <int64[1] c = {{{big}}}> {{ y = Mul(c, c) }}")
    assert not isinstance(facts.values("y")[0], int)


def test_branches_that_agree_and_the_rank_that_must_be():
    facts = facts_of(
        """g (float[n, 4, s] x, float[1, 8, 4] w, float[1, 8, 2] r) => (float[?] y, float[?] z)
           <int64[1] last = {2}, int64[1] one = {1}, int64[1] zero = {0}> {
            end = Shape<start = 2>(x)
            is_one = Equal(end, one)
            part = If(is_one) <then_branch = t () => (float[?] t1) { t1 = Squeeze(x, last) },
                               else_branch = e () => (float[?] e1) { e1 = Identity(x) }>
            sequence = Unsqueeze(part, zero)
            y, z = LSTM<hidden_size = 2>(sequence, w, r)
        }"""
    )
    (decided,) = facts.decided.values()
    assert decided is True  # of rank 3, the LSTM would get an input of rank 4
    assert written(facts, "sequence") == ["1", "n", "4"]


def test_an_open_condition_stays_open():
    facts = facts_of(
        """g (float[n, 4] x, bool c) => (float[?] y) <int64[1] zero = {0}> {
            y = If(c) <then_branch = t () => (float[?] t1) { t1 = Unsqueeze(x, zero) },
                       else_branch = e () => (float[?] e1) { e1 = Identity(x) }> }"""
    )
    assert not facts.decided
    assert facts.shape("y") is None


def test_long_chains_take_linear_time():
    nodes = [helper.make_node("Shape", ["x"], ["v0"])]
    nodes += [helper.make_node("Mul", [f"v{i}", "v0"], [f"v{i + 1}"]) for i in range(3000)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c"])],
        [helper.make_tensor_value_info("v3000", TensorProto.INT64, [3])],
    )
    loaded = Graph.load(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))
    loaded.infer()
    began = time.perf_counter()
    symbolic.propagate(loaded)
    assert time.perf_counter() - began < 10
