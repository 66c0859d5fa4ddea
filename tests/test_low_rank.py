"""The maths of factorization against the formulas, written plainly; every form at full rank is the layer."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_helper import assert_equal_outputs
from test_layers import random_array, single

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.low_rank import bases
from onnxslim_lab.low_rank.bases import Metric, balanced, find_basis
from onnxslim_lab.low_rank.choose import allocate, cheapest_within, frontier
from onnxslim_lab.low_rank.forms import column_gram, factors, prepare, product
from onnxslim_lab.low_rank.places import arranged, forms_of, site_of
from onnxslim_lab.low_rank.sites import Candidate, Search, Site
from onnxslim_lab.low_rank.tucker import channel_gram
from onnxslim_lab.low_rank.write import write_factors
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.selection import Target

QUICK = settings(max_examples=30, deadline=None, derandomize=True)


def case(seed, groups=1, out=6, inputs=9, rows=40):
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, rows, inputs)) @ random.normal(size=(groups, inputs, inputs))
    return random.normal(size=(groups, out, inputs)), x


def cut(basis, matrix, rank):
    columns = basis.columns[..., :rank]
    return columns @ (columns.swapaxes(1, 2) @ matrix)


@QUICK
@given(seed=st.integers(0, 10**6), out=st.integers(1, 9), inputs=st.integers(1, 9), rank=st.integers(1, 9))
def test_whitened_is_the_formula_of_svd_llm(seed, out, inputs, rank):
    matrix, x = case(seed, 1, out, inputs)
    gram = x[0].T @ x[0]
    lower = np.linalg.cholesky(gram)
    left, values, right = np.linalg.svd(matrix[0] @ lower, full_matrices=False)
    rank = min(rank, len(values))
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(lower)
    basis = find_basis(matrix, "whitened", Metric.of(gram[None]))
    found = cut(basis, matrix, rank)
    np.testing.assert_allclose(x[0] @ found[0].T, x[0] @ expected.T, atol=1e-7 * np.abs(values).max())
    np.testing.assert_allclose(basis.energy, values**2, rtol=1e-6, atol=1e-9 * values[0] ** 2)
    loss = ((x[0] @ (matrix[0] - expected).T) ** 2).sum()
    assert basis.losses()[rank] == pytest.approx(loss, rel=1e-6, abs=1e-9 * basis.total)
    assert basis.total == pytest.approx(((x[0] @ matrix[0].T) ** 2).sum())


@QUICK
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 3),
    method=st.sampled_from(["svd", "qr", "whitened"]),
    rank=st.integers(0, 6),
    damping=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_predicted_losses_are_the_measured_ones_for_every_method(seed, groups, method, rank, damping):
    matrix, x = case(seed, groups)
    basis = find_basis(matrix, method, Metric.of(x.swapaxes(1, 2) @ x, damping=damping))
    measured = ((x @ (matrix - cut(basis, matrix, rank)).swapaxes(1, 2)) ** 2).sum()
    assert basis.losses()[rank] == pytest.approx(measured, rel=1e-6, abs=1e-9 * basis.total)


def test_without_data_losses_are_of_the_weight_and_svd_is_the_best():
    matrix, _ = case(3)
    losses = {method: find_basis(matrix, method, None).losses() for method in ("svd", "qr")}
    values = np.linalg.svd(matrix[0], compute_uv=False)
    np.testing.assert_allclose(losses["svd"][:-1], np.cumsum(values[::-1] ** 2)[::-1])
    assert (losses["qr"] >= losses["svd"] - 1e-9).all()
    assert losses["qr"][3] > losses["svd"][3]


def test_no_basis_beats_the_whitened_one():
    matrix, x = case(5)
    metric = Metric.of(x.swapaxes(1, 2) @ x)
    losses = {method: find_basis(matrix, method, metric).losses() for method in ("svd", "qr", "whitened")}
    assert (losses["whitened"] <= losses["svd"] + 1e-6).all()
    assert (losses["whitened"] <= losses["qr"] + 1e-6).all()
    assert losses["whitened"][2] < 0.9 * losses["svd"][2]


def test_a_diagonal_is_the_gram_matrix_it_is_the_diagonal_of():
    matrix, _ = case(1, groups=2)
    diagonal = np.random.default_rng(0).random((2, 9))
    whole = np.einsum("gi,ij->gij", diagonal, np.eye(9))
    one, two = (find_basis(matrix, "whitened", Metric.of(gram, counts=0.5)) for gram in (diagonal, whole))
    np.testing.assert_allclose(one.losses(), two.losses(), rtol=1e-9, atol=1e-9)


def test_inputs_the_data_never_showed_survive_at_full_rank():
    matrix, x = case(2, out=12)
    x[..., 4] = 0
    metric = Metric.of(x.swapaxes(1, 2) @ x, damping=1e-3)
    np.testing.assert_allclose(cut(find_basis(matrix, "whitened", metric), matrix, 9), matrix, atol=1e-9)


def test_randomized_svd_finds_the_same_directions(monkeypatch):
    random = np.random.default_rng(0)
    matrix = random.normal(size=(1, 60, 8)) @ random.normal(size=(1, 8, 70))
    matrix += 1e-3 * random.normal(size=matrix.shape)
    exact = find_basis(matrix, "svd", None, components=8)
    monkeypatch.setattr(bases, "LARGE", 32)
    fast = find_basis(matrix, "svd", None, components=8)
    assert not fast.complete
    np.testing.assert_allclose(fast.losses(), exact.losses(), rtol=1e-6, atol=1e-9 * fast.total)
    np.testing.assert_allclose(cut(fast, matrix, 8), cut(exact, matrix, 8), atol=1e-6)
    again = find_basis(matrix, "svd", None, components=8)
    np.testing.assert_array_equal(again.columns, fast.columns)


def test_balanced_factors_have_equal_norms():
    first, second = balanced(random_array(0, 2, 3, 5) * 100.0, random_array(1, 2, 4, 3))
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-2), rtol=1e-5)


SITE = Site(2, 6, 4 * 3 * 3, (3, 3))


@pytest.mark.parametrize("form", ["matrix", "spatial", "tucker"])
@pytest.mark.parametrize("method", ["svd", "qr", "whitened"])
@pytest.mark.parametrize("measured", [False, True])
def test_losses_of_every_form_are_those_of_its_factors(form, method, measured):
    if method == "whitened" and not measured:
        pytest.skip("whitening needs data")
    matrix, x = case(0, 2, 6, 36, rows=50)
    metric = Metric.of(x.swapaxes(1, 2) @ x, damping=1e-3) if measured else None
    prepared = prepare(form, SITE, matrix, metric, Search(method, multiple=1))
    assert prepared.candidates
    x = x if measured else np.eye(36)[None]
    energy = ((x @ matrix.swapaxes(1, 2)) ** 2).sum()
    for candidate in prepared.candidates:
        made = factors(SITE, matrix, prepared.arrays, candidate)
        assert sum(array.size for array in made.values()) == candidate.parameters < matrix.size
        lost = ((x @ (matrix - product(SITE, made)).swapaxes(1, 2)) ** 2).sum()
        assert candidate.loss == pytest.approx(lost / energy, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("whole", [True, False])
def test_gram_matrices_of_columns_and_channels_are_those_of_the_parted_patches(whole):
    site = Site(2, 4, 3 * 2 * 5, (2, 5))
    x = np.random.default_rng(0).normal(size=(2, 20, 30))
    gram = x.swapaxes(1, 2) @ x
    patches = x.reshape(2, 20, 3, 2, 5)
    columns = patches.transpose(0, 1, 4, 2, 3).reshape(2, -1, 6)
    channels = patches.transpose(0, 1, 3, 4, 2).reshape(2, -1, 3)
    for rows, summed in ((columns, column_gram), (channels, channel_gram)):
        expected = rows.swapaxes(1, 2) @ rows
        if whole:
            np.testing.assert_allclose(summed(site, gram), expected)
        else:
            diagonal = summed(site, np.einsum("gii->gi", gram))
            np.testing.assert_allclose(diagonal, np.einsum("gii->gi", expected))


def test_macs_count_the_positions_that_a_stride_drops():
    plain = Site(1, 32, 32 * 9, (3, 3))
    strided = Site(1, 32, 32 * 9, (3, 3), spread=4.0, row_spread=2.0)
    matrix, _ = case(0, 1, 32, 288)
    for form, more in (("spatial", 32 * 3), ("tucker", 32 * 3)):
        few, many = (
            prepare(form, site, matrix, None, Search("svd", rank=4)).candidates[0]
            for site in (plain, strided)
        )
        assert few.parameters == many.parameters == few.macs
        assert many.macs - few.macs == more * 4


def point(parameters, loss):
    return Candidate("matrix", (1,), parameters, parameters, loss)


def cost(candidate):
    return candidate.parameters


@QUICK
@given(
    layers=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    budget=st.integers(1, 30),
)
def test_allocation_meets_the_budget_and_is_near_the_best(layers, budget):
    found = [[point(size, loss / 20) for size, loss in points] for points in layers]
    chosen = allocate(found, [10] * len(found), budget, [cost] * len(found))

    def totals(choice):
        return (
            sum(10 if one is None else one.parameters for one in choice),
            sum(0 if one is None else one.loss for one in choice),
        )

    spent, lost = totals(chosen)
    every = [totals(choice) for choice in itertools.product(*[[None, *points] for points in found])]
    if any(size <= budget for size, _ in every):
        assert spent <= budget
        best = min(loss for size, loss in every if size <= budget)
        assert lost <= best + max(one.loss for points in found for one in points) + 1e-12


def test_frontier_is_convex_and_begins_with_the_cheapest_step():
    points = [point(9, 0.5), point(5, 0.1), point(3, 0.4), point(4, 0.9), point(1, 0.8)]
    assert [one.parameters for one in frontier(points, 10, cost)] == [5, 3, 1]
    assert frontier([point(10, 0.1)], 10, cost) == []
    assert cheapest_within(points, 0.45, cost).parameters == 3
    assert cheapest_within(points, 0.05, cost) is None


def at_full_rank(graph, form=None):
    """Write every layer at full rank, whether that pays or not; return the new model."""
    result = graph.copy()
    layers = find_layers(result)[0]
    users = {}
    for layer in layers:
        users.setdefault((id(layer.weight_graph), layer.weight), []).append(layer)
    for group in users.values():
        found = arranged(Target(tuple(group), None))
        assert not isinstance(found, str), found
        site, matrix = site_of(found), group[0].matrix
        forms = forms_of(site, "auto", ranked=False)
        for one in forms if form is None else [form]:
            assert one in forms
        chosen = form or forms[-1]
        ranks = {
            "matrix": (min(site.out, site.inputs),),
            "spatial": (
                (min(site.out * site.kernel[-1], site.channels * site.kernel[0]),) if site.kernel else ()
            ),
            "tucker": (
                min(site.channels, site.out * (site.inputs // max(site.channels, 1))),
                min(site.out, site.inputs),
            ),
        }[chosen]
        if chosen == "matrix":
            arrays = {"columns": find_basis(matrix, "svd", None).columns}
        elif chosen == "spatial":
            arrays = _spatial_arrays(site, matrix)
        else:
            arrays = prepare("tucker", site, matrix, None, Search("svd", rank=1)).arrays
        made = factors(site, matrix, arrays, Candidate(chosen, ranks, 0, 0.0, 0.0))
        old = group[0].weight
        store = write_factors(found, made)
        assert store.names
        assert not any(inner.defines(old) for inner in result.walk())
    return result


def _spatial_arrays(site, matrix):
    height, width = site.kernel
    split = np.asarray(matrix, np.float64).reshape(site.groups, site.out, site.channels, height, width)
    upright = split.transpose(0, 1, 4, 2, 3).reshape(site.groups, -1, site.channels * height)
    return {"columns": find_basis(upright, "svd", None).columns}


def assert_same(graph, result, x):
    assert_equal_outputs(graph, result, [{"x": x}], relative=1e-4)
    (wanted,) = Interpreter(graph).run({"x": x}, graph.outputs).values()
    (found,) = Interpreter(result).run({"x": x}, result.outputs).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@st.composite
def convolutions(draw):
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 2)) for _ in range(rank)]
    attributes = {"strides": strides, "group": groups, "dilations": [1] * rank}
    padding = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding.startswith("SAME"):
        strides[:] = [min(pair) for pair in zip(strides, kernel, strict=True)]
    else:
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    if padding == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attributes["auto_pad"] = padding
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    channels, out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    seed = draw(st.integers(0, 1000))
    x = random_array(seed, 2, channels, *(draw(st.integers(5, 6)) for _ in range(rank)))
    bias = (random_array(seed + 1, out),) if draw(st.booleans()) else ()
    form = draw(st.sampled_from(["matrix", "spatial", "tucker"]))
    return x, random_array(seed + 2, out, channels // groups, *kernel), bias, attributes, form


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions())
def test_conv_at_full_rank_is_the_conv(made):
    x, weight, bias, attributes, form = made
    graph = single("Conv", x, weight, bias, **attributes)
    (layer,), _ = find_layers(graph)
    forms = forms_of(site_of([(layer, False)]), "auto", ranked=False)
    assert_same(graph, at_full_rank(graph, form if form in forms else "matrix"), x)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize("bias", [(), (4,), (3, 1)])
def test_gemm_at_full_rank_is_the_gemm(left, own, other, bias):
    weight_shape, x_shape = ((3, 5), (5, 4)) if left else ((5, 4), (3, 5))
    weight_shape, x_shape = weight_shape[:: -1 if own else 1], x_shape[:: -1 if other else 1]
    sides = {"transA": own if left else other, "transB": other if left else own, "alpha": 0.5, "beta": 2.0}
    x, c = random_array(0, *x_shape), (random_array(2, *bias),) if bias else ()
    graph = single("Gemm", x, random_array(1, *weight_shape), c, slot=0 if left else 1, **sides)
    assert_same(graph, at_full_rank(graph), x)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "left"),
    [
        ((3, 4), (4, 5), False),
        ((2, 3, 4), (4, 5), False),
        ((4,), (4, 5), False),
        ((2, 1, 3, 4), (2, 4, 5), False),
        ((3, 4), (2, 1, 4, 5), False),
        ((4, 3), (5, 4), True),
        ((2, 4, 3), (5, 4), True),
        ((2, 4, 3), (2, 5, 4), True),
        ((4,), (5, 4), True),
    ],
)
def test_matmul_at_full_rank_is_the_matmul(x_shape, weight_shape, left):
    x = random_array(0, *x_shape)
    graph = single("MatMul", x, random_array(1, *weight_shape), slot=0 if left else 1)
    assert_same(graph, at_full_rank(graph), x)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_lookup_at_full_rank_is_the_lookup(shape):
    x = np.random.default_rng(0).integers(-7, 7, shape)
    graph = single("Gather", x, random_array(1, 7, 4), slot=0)
    assert_same(graph, at_full_rank(graph), x)


OLD = """<ir_version: {ir}, opset_import: ["" : {opset}]>
g (float[2, 4] x{inputs}) => (float[2, 3] y) <float[4, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 0, 2}}, float[3] b = {{1, 2, 3}}>
{{ y = Gemm(x, w, b) }}"""


@pytest.mark.parametrize(
    ("ir", "opset", "inputs"),
    [(3, 7, ", float[4, 3] w, float[3] b"), (3, 9, ", float[4, 3] w, float[3] b"), (8, 11, "")],
)
def test_old_models(ir, opset, inputs):
    graph = Graph.parse(OLD.format(ir=ir, opset=opset, inputs=inputs))
    assert_same(graph, at_full_rank(graph), random_array(0, 2, 4))
