"""Rounding that knows the layer's inputs, against plain loops and against rounding to nearest."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from onnxslim_lab.quantization.adaround import learn_rounding, reconstruction_target
from onnxslim_lab.quantization.block_search import search_blocks
from onnxslim_lab.quantization.codebook import round_codebook, weighted_codebook
from onnxslim_lab.quantization.columns import Columns
from onnxslim_lab.quantization.compensation import damping_for
from onnxslim_lab.quantization.fitting import fit, refit_scales
from onnxslim_lab.quantization.numerics import Grid, dequantize, quantize, weight_grid
from onnxslim_lab.quantization.rounding import descend, output_error, round_gptq, round_nearest
from onnxslim_lab.quantization.types import QUANT_TYPES

INT4, UINT4, INT8 = QUANT_TYPES["int4"], QUANT_TYPES["uint4"], QUANT_TYPES["int8"]


def layer(rows=12, columns=40, samples=300, seed=0, dead=()):
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=(samples, 8)) @ rng.normal(size=(8, columns))
        + rng.normal(size=(samples, columns)) * 0.5
    )
    x[:, list(dead)] = 0
    return rng.standard_t(4, (rows, columns)).astype(np.float32), x.T @ x


def loss(matrix, codes, grid, gram):
    change = dequantize(codes, grid).astype(np.float64) - matrix
    return np.einsum("ri,ij,rj->r", change, gram, change)


GRANULARITIES = [("tensor", 0), ("channel", 0), ("block", 16), ("block", 7)]


def grid_for(matrix, kind, granularity, block, symmetric=True):
    axis = 0 if granularity == "channel" else 1
    return weight_grid(matrix, kind, granularity=granularity, axis=axis, block=block, symmetric=symmetric)


def plain_gptq(matrix, grid, gram, damping, order):
    """The inverse of the Hessian of what is left, recomputed for every column."""
    left, codes = matrix.astype(np.float64).copy(), np.zeros(matrix.shape)
    hessian = gram.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = np.diag(gram).mean()
    hessian += damping * np.diag(gram).mean() * np.eye(len(gram))
    scale = Columns(grid, matrix.shape).scale.T
    zero = Columns(grid, matrix.shape).zero.T
    rest = list(order)
    while rest:
        column = rest[0]
        code = np.clip(np.rint(left[:, column] / scale[:, column]) + zero[:, column], *grid.limits)
        codes[:, column] = code
        error = left[:, column] - (code - zero[:, column]) * scale[:, column]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        left[:, rest] -= np.outer(error, inverse[0] / inverse[0, 0])
        rest = rest[1:]
    return codes


@pytest.mark.parametrize(("granularity", "block"), GRANULARITIES)
@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_equals_the_plain_loop(granularity, block, activation_order, symmetric):
    matrix, gram = layer(dead=(3,))
    grid = grid_for(matrix, UINT4, granularity, block, symmetric)
    order = np.argsort(-np.diag(gram), kind="stable") if activation_order else np.arange(len(gram))
    plain = plain_gptq(matrix, grid, gram, 0.01, order).astype(np.int64)
    for lazy in (1, 16, 128):
        codes = round_gptq(matrix, grid, gram, block=lazy, activation_order=activation_order)
        found = loss(matrix, codes, grid, gram)
        nearest = loss(matrix, round_nearest(matrix, grid), grid, gram)
        wanted = loss(matrix, plain.astype(UINT4.dtype), grid, gram)
        np.testing.assert_allclose(found, np.minimum(wanted, nearest), rtol=1e-6)
        same = wanted < nearest
        assert same.any()
        assert np.array_equal(codes.astype(np.int64)[same], plain[same])


@pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "float8e4m3fn"])
@pytest.mark.parametrize(("granularity", "block"), GRANULARITIES)
def test_never_worse_than_nearest(kind, granularity, block):
    kind = QUANT_TYPES[kind]
    for seed, samples in ((0, 300), (1, 6)):
        matrix, gram = layer(seed=seed, samples=samples)
        grid = grid_for(matrix, kind, granularity, block)
        nearest = round_nearest(matrix, grid)
        gptq = round_gptq(matrix, grid, gram)
        descended = descend(matrix, grid, gptq, gram)
        losses = [loss(matrix, codes, grid, gram) for codes in (nearest, gptq, descended)]
        slack = 1e-9 * losses[0]
        assert np.all(losses[1] <= losses[0] + slack)
        assert np.all(losses[2] <= losses[1] + slack)
        assert gptq.dtype == descended.dtype == kind.dtype
        if samples > 100 and kind.bits <= 4:
            assert losses[1].sum() < 0.6 * losses[0].sum()
            assert losses[2].sum() < losses[1].sum()


def test_descend_ends_where_no_single_code_helps():
    matrix, gram = layer(rows=3, columns=70)
    grid = grid_for(matrix, INT4, "channel", 0)
    gram = gram / np.mean(np.diag(gram))
    codes = descend(matrix, grid, round_nearest(matrix, grid), gram, sweeps=50, damping=0.0)
    least = loss(matrix, codes, grid, gram)
    for column in range(70):
        for step in (-1, 1):
            other = codes.astype(np.int64)
            other[:, column] = np.clip(other[:, column] + step, -8, 7)
            assert np.all(loss(matrix, other.astype(INT4.dtype), grid, gram) >= least * (1 - 1e-5))


def test_diagonal_gram_means_nearest():
    matrix, gram = layer()
    grid = grid_for(matrix, INT4, "block", 8)
    nearest = round_nearest(matrix, grid)
    for found in (round_gptq(matrix, grid, np.diag(gram)), learn_rounding(matrix, grid, np.diag(gram))):
        assert np.array_equal(found, nearest)


def test_refitted_scales_solve_the_least_squares_problem():
    matrix, gram = layer(rows=4, columns=24)
    grid = grid_for(matrix, INT4, "block", 8)
    codes = round_nearest(matrix, grid)
    fitted = refit_scales(matrix, grid, codes, gram, damping=0.0)
    root = np.linalg.cholesky(gram).T
    for row in range(4):
        steps = np.zeros((24, 3))
        for block in range(3):
            steps[8 * block : 8 * block + 8, block] = codes[row, 8 * block : 8 * block + 8].astype(float)
        wanted = np.linalg.lstsq(root @ steps, root @ matrix[row], rcond=None)[0]
        np.testing.assert_allclose(fitted.scale[row], wanted, rtol=1e-4)
    assert np.all(loss(matrix, codes, fitted, gram) <= loss(matrix, codes, grid, gram))


@pytest.mark.parametrize("block", [0, 8, 16])
@pytest.mark.parametrize(
    ("kind", "symmetric"),
    [(INT4, True), (UINT4, False), (INT8, True), (QUANT_TYPES["float8e4m3fn"], True)],
    ids=str,
)
def test_fit(block, kind, symmetric):
    matrix, gram = layer(rows=20, columns=36)
    matrix[2] = 0
    plain = grid_for(matrix, kind, "block" if block else "channel", block, symmetric)
    rtn = loss(matrix, round_nearest(matrix, plain), plain, gram).sum()
    found = fit(matrix, kind, gram, block=block, symmetric=symmetric)
    assert found.grid.scale.shape == plain.scale.shape
    assert (found.grid.axis, found.grid.block) == (plain.axis, plain.block)
    assert np.all(found.grid.scale > 0)
    assert not found.values[2].any()
    assert found.error == pytest.approx(loss(matrix, found.codes, found.grid, gram).sum(), rel=1e-9)
    searched = fit(matrix, kind, gram, block=block, symmetric=symmetric, rounding="nearest")
    assert np.array_equal(searched.codes, quantize(matrix, searched.grid)) or searched.error < rtn
    assert searched.error <= rtn
    assert found.error <= (0.25 if kind.bits == 4 else 0.9) * rtn
    for weights in (None, np.diag(gram)):
        simple = fit(matrix, kind, weights, block=block, symmetric=symmetric)
        energy = np.ones(36) if weights is None else weights
        before = (((dequantize(round_nearest(matrix, plain), plain) - matrix) ** 2) @ energy).sum()
        assert simple.error <= before


def test_reduced_range_is_kept():
    matrix, gram = layer()
    found = fit(matrix, INT8, gram, reduce_range=True)
    assert np.abs(found.codes.astype(int)).max() <= 64
    assert found.grid.bounds == (-64, 64)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_small_shapes(shape):
    matrix, gram = np.ones(shape, np.float32), np.eye(shape[1])
    for block in (0, 4):
        found = fit(matrix, INT4, gram, block=block)
        assert found.codes.shape == shape
        assert learn_rounding(matrix, found.grid, gram).shape == shape
    assert round_codebook(matrix, 2, gram).codes.shape == shape


def test_learned_rounding_is_no_worse_than_gptq_and_learns():
    matrix, gram = layer(rows=16)
    for kind, block in ((INT4, 8), (INT8, 0)):
        grid = grid_for(matrix, kind, "block" if block else "channel", block)
        nearest = round_nearest(matrix, grid)
        gptq = descend(matrix, grid, round_gptq(matrix, grid, gram), gram)
        learned = learn_rounding(matrix, grid, gram, iterations=100)
        alone = learn_rounding(matrix, grid, gram, start=nearest, iterations=300)
        losses = [loss(matrix, codes, grid, gram) for codes in (nearest, gptq, learned, alone)]
        assert np.all(losses[2] <= losses[1] * (1 + 1e-9))
        assert losses[2].sum() < losses[1].sum()
        assert losses[3].sum() < 0.6 * losses[0].sum()
        off = dequantize(alone, grid) - matrix
        assert learned.dtype == kind.dtype
        assert np.abs(off).max() < 4 * grid.scale.max()
    wide = grid_for(matrix, QUANT_TYPES["float8e5m2"], "channel", 0)
    with pytest.raises(ValueError, match="float8"):
        learn_rounding(matrix, wide, gram)


def test_reconstruction_target_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 10)) @ rng.normal(size=(10, 10))
    noisy = x + rng.normal(size=x.shape) * 0.3
    matrix = rng.normal(size=(6, 10))
    found = reconstruction_target(matrix, noisy.T @ noisy, noisy.T @ x, damping=0.0)
    wanted = np.linalg.lstsq(noisy, x @ matrix.T, rcond=None)[0].T
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    error = [np.linalg.norm(x @ matrix.T - noisy @ m.T) for m in (matrix, found)]
    assert error[1] < error[0]
    np.testing.assert_allclose(reconstruction_target(matrix, x.T @ x, x.T @ x), matrix, atol=1e-9)
    with pytest.raises(ValueError, match="diagonal"):
        reconstruction_target(matrix, np.ones(10), np.ones(10))


def test_codebook():
    matrix, gram = layer(rows=30)
    for bits in (1, 3, 5):
        even = weighted_codebook(matrix, bits)
        aware = weighted_codebook(matrix, bits, np.diag(gram))
        assert len(even) <= 1 << bits
        assert np.all(np.diff(even) > 0)

        def weighted(values):
            nearest = values[np.abs(matrix[..., None] - values).argmin(-1)]
            return (((nearest - matrix) ** 2) @ np.diag(gram)).sum()

        assert weighted(aware) <= weighted(even) * 1.001
        found = round_codebook(matrix, bits, gram)
        simple = round_codebook(matrix, bits, np.diag(gram))
        assert np.array_equal(simple.matrix, aware[np.abs(matrix[..., None] - aware).argmin(-1)])
        errors = [output_error(matrix, part.matrix, gram) for part in (found, simple)]
        assert np.all(errors[0] <= errors[1])
        assert errors[0].sum() < 0.8 * errors[1].sum()
    exact = round_codebook(np.float32([[1, 2, 0], [2, 2, 1]]), 2, np.eye(3))
    assert exact.values.tolist() == [0, 1, 2]
    assert exact.matrix.tolist() == [[1, 2, 0], [2, 2, 1]]


def test_refusals():
    matrix, gram = layer()
    grid = grid_for(matrix, INT4, "channel", 0)
    with pytest.raises(ValueError, match="40 columns"):
        round_gptq(matrix, grid, gram[:5, :5])
    with pytest.raises(ValueError, match="overflow"):
        round_gptq(matrix, grid, gram * np.inf)
    with pytest.raises(ValueError, match="NaN"):
        round_gptq(matrix * np.float32(np.nan), grid, gram)
    with pytest.raises(ValueError, match="does not fit"):
        round_gptq(matrix, Grid(INT4, np.ones(5, np.float32), np.zeros(5, INT4.dtype), 0), gram)
    with pytest.raises(ValueError, match="9 bits"):
        weighted_codebook(matrix, 9)


def test_damping_keeps_compensation_from_few_rows_honest():
    rng = np.random.default_rng(0)
    x = rng.permutation(load_digits().data / 16)
    seen, unseen = x[:32], x[32:]
    matrix = rng.normal(size=(64, 64)).astype(np.float32)
    grid = grid_for(matrix, INT4, "block", 16)
    truth = unseen.T @ unseen
    errors = [
        loss(matrix, round_gptq(matrix, grid, seen.T @ seen, damping=d), grid, truth).sum()
        for d in (0.01, damping_for(64, 32))
    ]
    assert errors[1] < 0.9 * errors[0]


def plain_block_search(matrix, grid, codes, gram, factors, shifts):
    """Row by row: every candidate of a block rounded by GPTQ, judged by the damped error of the whole row."""
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    hessian /= np.diag(hessian).mean()
    result = codes.astype(np.int64)
    scale, zero = grid.scale.astype(np.float64), grid.zero_point.astype(np.int64)

    def values(row):
        return np.concatenate(
            [
                (result[row, part] - zero[row, number]) * scale[row, number]
                for number, part in enumerate(parts)
            ]
        )

    def error(row):
        change = values(row) - matrix[row]
        return change @ hessian @ change

    parts = [slice(start, min(start + grid.block, len(gram))) for start in range(0, len(gram), grid.block)]
    for number, part in enumerate(parts):
        own = hessian[part, part]
        order = np.argsort(-np.diag(own), kind="stable")
        for row in range(len(matrix)):
            rest = values(row) - matrix[row]
            rest[part] = 0
            aim = matrix[row, part] - np.linalg.solve(own, hessian[part] @ rest)
            floor = error(row) - (values(row)[part] - aim) @ own @ (values(row)[part] - aim)
            best = error(row), scale[row, number], zero[row, number], result[row, part].copy()
            start = best
            for factor in factors:
                for shift in shifts:
                    scale[row, number] = np.float32(start[1] * factor)
                    zero[row, number] = np.clip(start[2] + shift, *grid.limits)
                    block = Grid(
                        grid.kind,
                        np.float32([[scale[row, number]]]),
                        np.array([[zero[row, number]]], grid.kind.dtype),
                        1,
                        len(own),
                    )
                    result[row, part] = plain_gptq(aim[None], block, own, 0.0, order)[0]
                    if error(row) - floor < (best[0] - floor) * (1 - 1e-4 * (best is start)):
                        best = error(row), scale[row, number], zero[row, number], result[row, part].copy()
            scale[row, number], zero[row, number], result[row, part] = best[1:]
    return scale, zero, result


@pytest.mark.parametrize("symmetric", [True, False])
def test_block_search_equals_the_plain_loop(symmetric):
    matrix, gram = layer(rows=6, columns=20)
    grid = grid_for(matrix, UINT4, "block", 8, symmetric)
    start = quantize(matrix, grid)
    found, codes = search_blocks(matrix, grid, start, gram, symmetric=symmetric)
    factors, shifts = (0.92, 0.96, 1.0, 1.04, 1.08), (0,) if symmetric else (-1, 0, 1)
    scale, zero, plain = plain_block_search(matrix, grid, start, gram, factors, shifts)
    np.testing.assert_array_equal(codes, plain)
    np.testing.assert_array_equal(found.zero_point, zero)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    assert (codes != start).any()
    assert (found.scale != grid.scale).any()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_block_search_never_adds_to_the_damped_error(symmetric, wide):
    matrix, gram = layer(rows=30, columns=70, dead=(2, 50))
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    hessian[[2, 50], [2, 50]] += np.diag(gram).mean()
    grid = grid_for(matrix, INT4, "block", 32, symmetric)
    codes = descend(matrix, grid, round_gptq(matrix, grid, gram), gram)
    before = loss(matrix, codes, grid, hessian)
    found, fresh = search_blocks(matrix, grid, codes, gram, symmetric=symmetric, wide=wide)
    after = loss(matrix, fresh, found, hessian)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()
    assert (found.scale > 0).all()
    assert found.symmetric == grid.symmetric


def test_the_search_of_blocks_lowers_the_error_of_fit(monkeypatch):
    matrix, gram = layer(rows=40, columns=128, samples=600)
    searched = fit(matrix, INT4, gram, block=32).error
    monkeypatch.setattr("onnxslim_lab.quantization.fitting._FEW_BITS", 0)
    assert searched < 0.98 * fit(matrix, INT4, gram, block=32).error
