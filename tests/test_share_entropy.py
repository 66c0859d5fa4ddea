"""Entropy-constrained sharing: against the plain formula, and smaller once coded."""

import doctest
import math
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_helper import runner
from pydantic import ValidationError

from onnxslim_lab import Context, Graph
from onnxslim_lab.codebook import share_values
from onnxslim_lab.data import Dataset
from onnxslim_lab.passes.share import Share
from onnxslim_lab.second_order import entropy as module
from onnxslim_lab.second_order.entropy import Code, entropy, entropy_code
from onnxslim_lab.second_order.sharing import weighted_codebook
from onnxslim_lab.statistics import Calibration


def huffman(index):
    """Bits that a Huffman code takes for these indices, its table not counted."""
    counts = sorted(Counter(index.reshape(-1).tolist()).values())
    bits = 0
    while len(counts) > 1:
        both = counts.pop(0) + counts.pop(0)
        bits += both
        counts = sorted([*counts, both])
    return bits


def laplacian(size, seed=0):
    return np.random.default_rng(seed).laplace(size=size).astype(np.float32)


def indices(values):
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def test_doctests():
    assert not doctest.testmod(module).failed


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9), multiplier=st.floats(0, 2))
def test_each_weight_takes_the_value_of_least_cost(seed, size, multiplier):
    random = np.random.default_rng(seed)
    weights, masses = random.standard_normal(50), random.random(50) + 0.1
    values, bits = np.sort(random.standard_normal(size)), random.random(size) * 5
    found = Code(values, bits, multiplier).assign(weights, masses)
    for weight, mass, index in zip(weights, masses, found, strict=True):
        costs = [mass * (weight - v) ** 2 + multiplier * b for v, b in zip(values, bits, strict=True)]
        assert costs[index] == pytest.approx(min(costs), rel=1e-12)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), most=st.floats(0.5, 3.5))
def test_no_mean_and_no_assignment_is_cheaper_within_the_bits(seed, most):
    random = np.random.default_rng(seed)
    weights, masses = random.laplace(size=3000), random.random(3000) + 0.5
    code = entropy_code(weights, masses, 16, most, zero=False)
    index = code.assign(weights, masses)
    assert entropy(index) <= most

    def cost(values, index):
        chance = np.bincount(index, minlength=values.size)[index] / index.size
        return (masses * (weights - values[index]) ** 2 - code.multiplier * np.log2(chance)).sum()

    mass = np.bincount(index, masses, code.values.size)
    means = np.bincount(index, masses * weights, code.values.size) / np.maximum(mass, 1e-300)
    assert cost(means, index) > 0.998 * cost(code.values, index)
    start = weighted_codebook(weights, masses, 16, init="linear", seed=0)
    nearest = np.abs(weights[:, None] - start).argmin(axis=1)
    assert cost(code.values, index) <= cost(start, nearest)


def test_entropy_is_the_plain_formula():
    index = np.random.default_rng(0).integers(0, 5, 1000) ** 2 // 4
    plain = -sum(n / 1000 * math.log2(n / 1000) for n in Counter(index.tolist()).values())
    assert entropy(index) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("bits", [2, 3])
def test_at_equal_error_the_coded_size_is_lower(bits):
    """Against k-means of so many bits, coded by Huffman and by zlib: the error no larger, the code smaller."""
    weights = laplacian(12_000)
    plain = share_values(weights, 2**bits).values
    error = float(((plain - weights) ** 2).mean())
    ones, double = np.ones(weights.size), weights.astype(np.float64)
    code = entropy_code(double, ones, 2 ** (bits + 1), 0.9 * entropy(indices(plain)), zero=False)
    best = code.assign(double, ones)
    assert ((code.values[best] - weights) ** 2).mean() <= error
    assert huffman(best) < 0.95 * huffman(indices(plain))
    packed = [len(zlib.compress(one.astype(np.uint8).tobytes(), 9)) for one in (best, indices(plain))]
    assert packed[0] < 0.97 * packed[1]


def model_of(weight):
    rows, columns = weight.shape
    graph = Graph.parse(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, {rows}] x) => (float[N, {columns}] y) <float[1] w = {{0}}> {{ y = MatMul(x, w) }}""")
    graph.set_constant("w", weight)
    graph.infer()
    return graph


def test_the_pass_keeps_to_the_bits_and_to_the_zeros():
    weight = laplacian((100, 200))
    weight[np.random.default_rng(1).random(weight.shape) < 0.6] = 0
    graph = model_of(weight)
    (change,) = Share(bits=5, entropy=1.5).run(graph).changes
    shared = graph.constant("w")
    assert (shared[weight == 0] == 0).all()
    assert np.unique(shared).size <= 32
    assert entropy(indices(shared)) == pytest.approx(1.5, abs=0.05)
    assert change.detail["entropy"] == pytest.approx(entropy(indices(shared)), rel=1e-9)
    wide = model_of(weight)
    Share(bits=5, entropy=5).run(wide)
    assert ((wide.constant("w") - weight) ** 2).sum() < ((shared - weight) ** 2).sum()


def test_inputs_of_more_energy_count_more():
    weight = laplacian((64, 64), 3)
    x = np.random.default_rng(4).standard_normal((400, 64)).astype(np.float32)
    x[:, :8] *= 20
    errors = []
    for weighting in ("none", "activation"):
        graph = model_of(weight)
        data = Calibration(runner(), Dataset([{"x": x}], source="test"))
        Share(bits=4, entropy=1.5, weighting=weighting).run(graph, Context(calibration=data))
        errors.append(float(((x @ (graph.constant("w") - weight)) ** 2).sum()))
        assert entropy(indices(graph.constant("w"))) < 1.7
    assert errors[1] < 0.7 * errors[0]


def test_what_does_not_go_together_is_refused():
    for options in ({"rows": 4}, {"compensate": True}):
        with pytest.raises(ValidationError, match="entropy goes"):
            Share(entropy=2, **options)
