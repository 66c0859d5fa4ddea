"""Grids, QuantizeLinear and DequantizeLinear against onnxruntime and onnx's reference."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from runtime_version import INSTALLED

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization.numerics import Grid, dequantize, grid_of, quantize, weight_grid, zero_code
from onnxslim_lab.quantization.types import QUANT_TYPES, find_type
from onnxslim_lab.sessions import Runner

KINDS = [kind for kind in QUANT_TYPES.values() if kind.name != "int32"]
INTEGERS = [kind for kind in KINDS if not kind.floating]


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as opened:
        yield opened


def model_of(grid, shape, elem):
    """x -> QuantizeLinear -> DequantizeLinear with both results as outputs; codes cast where they cannot leave."""
    attributes = {} if grid.axis is None else {"axis": grid.axis}
    if grid.block:
        attributes["block_size"] = grid.block
    name = onnx.helper.np_dtype_to_tensor_dtype(grid.scale.dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    constants = [
        onnx.numpy_helper.from_array(grid.scale, "s"),
        onnx.numpy_helper.from_array(grid.zero_point, "z"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", name, shape)],
        [
            helper.make_tensor_value_info("q", elem, shape),
            helper.make_tensor_value_info("y", name, shape),
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)


def hard_values(shape, scale, seed=0, most=1e30):
    """Values on ties, outside of the range, tiny, huge and ordinary."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 60, shape) * scale
    flat = x.reshape(-1)
    flat[::3] = (np.rint(flat[::3] / scale) + 0.5) * scale
    flat[:6] = [0.0, most, -most, 1e-40, -300 * scale, 70000 * scale]
    return x


def grids(kind, dtype, shape, seed=1):
    rng = np.random.default_rng(seed)
    for axis, block in [(None, 0), (0, 0), (1, 0), (1, 4), (0, 2)]:
        if axis is None:
            size = ()
        elif block:
            size = tuple(-(-n // block) if i == axis else n for i, n in enumerate(shape))
        else:
            size = (shape[axis],)
        scale = rng.uniform(0.01, 0.3, size).astype(dtype)
        zero = np.full(size, 0) if kind.floating else rng.integers(kind.low, kind.high + 1, size)
        yield Grid(kind, np.asarray(scale), np.asarray(zero).astype(kind.dtype), axis, block)


def equal(a, b):
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equals_onnxruntime_and_reference(runner, kind, dtype):
    shape = (6, 8)
    for grid in grids(kind, dtype, shape):
        most = 1e30 if kind.bits >= 8 else 1e6  # onnxruntime 1.31 wraps 4-bit codes of what overflows int32
        values = hard_values(shape, 0.1, most=most)
        x = np.clip(values, np.finfo(dtype).min, np.finfo(dtype).max).astype(dtype)
        codes = quantize(x, grid)
        values = dequantize(codes, grid)
        model = model_of(grid, shape, kind.data_type)
        if grid.block != 2:  # the last block of the axis is whole either way; fewer sessions
            (result,) = runner.run(Graph.load(model), [{"x": x}], outputs=["q", "y"], optimization="off")
            assert result["q"].dtype == kind.dtype
            if dtype == np.float32 or (INSTALLED >= (1, 32) and grid.axis is not None):
                assert equal(codes, result["q"])
            else:  # divided in float32 by onnxruntime; in the scale's type by the specification
                wide = Grid(kind, grid.scale.astype(np.float32), grid.zero_point, grid.axis, grid.block)
                assert equal(quantize(x.astype(np.float32), wide), result["q"])
            assert equal(dequantize(result["q"], grid), result["y"])
        inside = np.abs(x) < 300  # the reference converts to int32 before it saturates
        q, y = ReferenceEvaluator(model).run(None, {"x": np.where(inside, x, 0).astype(dtype)})
        assert np.array_equal(codes[inside].astype(np.float32), q[inside].astype(np.float32))
        assert np.array_equal(values[inside], y[inside])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_empty(kind):
    for axis, block, size in [(None, 0, ()), (1, 0, (3,)), (0, 2, (0, 3))]:
        grid = Grid(kind, np.ones(size, np.float32), np.zeros(size, kind.dtype), axis, block)
        codes = quantize(np.zeros((0, 3), np.float32), grid)
        assert codes.shape == (0, 3)
        assert codes.dtype == kind.dtype
        assert dequantize(codes, grid).shape == (0, 3)


def test_blocks_may_end_short():
    kind = QUANT_TYPES["int4"]
    array = np.arange(10, dtype=np.float32).reshape(1, 10)
    grid = weight_grid(array, kind, granularity="block", axis=-1, block=4)
    assert grid.scale.shape == (1, 3)
    assert grid.axis == 1
    np.testing.assert_allclose(grid.scale[0], np.float32([3, 7, 9]) / 7)
    np.testing.assert_allclose(dequantize(quantize(array, grid), grid), array, atol=9 / 14)


def test_nan_is_refused():
    grid = Grid(QUANT_TYPES["int8"], np.float32(1), np.int8(0))
    bad = np.array([1.0, np.nan], np.float32)
    with pytest.raises(ValueError, match="NaN"):
        quantize(bad, grid)
    with pytest.raises(ValueError, match="not finite"):
        weight_grid(bad, QUANT_TYPES["int8"], granularity="tensor")
    with pytest.raises(ValueError, match="not finite"):
        grid_of(0.0, np.inf, QUANT_TYPES["int8"], symmetric=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_grid_covers_range_and_holds_zero(kind, symmetric, dtype):
    rng = np.random.default_rng(0)
    low, high = rng.normal(0, 3, 200), rng.normal(0, 3, 200)
    low, high = np.minimum(low, high), np.maximum(low, high)
    for reduce_range in (False, True):
        scale, zero = grid_of(low, high, kind, symmetric=symmetric, reduce_range=reduce_range, dtype=dtype)
        assert scale.dtype == dtype
        assert zero.dtype == kind.dtype
        assert np.all(scale > 0)
        for bound in (low, high, np.zeros(200)):
            grid = Grid(kind, scale, zero, 0)
            back = dequantize(quantize(bound.astype(dtype), grid), grid)
            slack = np.abs(bound) / 8 if kind.floating else scale.astype(float) * 0.51
            covered = np.clip(bound, np.minimum(low, 0), np.maximum(high, 0))
            assert np.all(np.abs(back - covered) <= slack + np.abs(bound) * 2e-3)
        assert np.all(dequantize(quantize(np.zeros(200, dtype), Grid(kind, scale, zero, 0)), grid) == 0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_ranges(kind, symmetric):
    most = float(np.finfo(np.float32).max)
    low = np.array([0.0, -most, 0.0, -1e-44, -most, 0.0])
    high = np.array([0.0, most, most, 1e-44, 0.0, 1e-300])
    scale, zero = grid_of(low, high, kind, symmetric=symmetric)
    assert np.all(np.isfinite(scale))
    assert np.all(scale >= np.finfo(np.float32).tiny)
    assert scale[0] == 1
    grid = Grid(kind, scale, zero, 0)
    x = np.array([0.0, most, most, 0.0, -most, 0.0], np.float32)
    assert np.all(np.isfinite(dequantize(quantize(x, grid), grid)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zero_channel_has_scale_one(kind):
    array = np.zeros((3, 4), np.float32)
    array[1] = 5
    for granularity, axis, block in [("channel", 0, 0), ("block", 1, 2)]:
        for method in ("minmax", "mse"):
            grid = weight_grid(array, kind, granularity=granularity, axis=axis, block=block, method=method)
            assert np.all(grid.scale[0] == 1)
            assert np.all(grid.scale[1] != 1)
            assert not dequantize(quantize(array, grid), grid)[0].any()


def test_reduced_range_fits_in_16_bits():
    array = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
    for method in ("minmax", "mse"):
        for symmetric in (True, False):
            grid = weight_grid(
                array,
                QUANT_TYPES["int8"],
                granularity="channel",
                symmetric=symmetric,
                reduce_range=True,
                method=method,
            )
            assert int(np.abs(quantize(array, grid).astype(int)).max()) <= 64
    assert zero_code(QUANT_TYPES["uint8"], reduce_range=True) == 64


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_no_worse_than_minmax_and_finds_the_plain_optimum(kind, symmetric):
    rng = np.random.default_rng(3)
    array = rng.standard_t(3, (5, 64)).astype(np.float32)
    errors = {}
    for method in ("minmax", "mse"):
        grid = weight_grid(array, kind, granularity="channel", axis=0, symmetric=symmetric, method=method)
        errors[method] = ((dequantize(quantize(array, grid), grid) - array) ** 2).sum(1)
    assert np.all(errors["mse"] <= errors["minmax"])
    if kind.bits > 4:
        return
    for row, found in zip(array, errors["mse"], strict=True):
        losses = []
        for shrink in np.linspace(0.2, 1, 200):
            scale, zero = grid_of(shrink * row.min(), shrink * row.max(), kind, symmetric=symmetric)
            codes = np.clip(np.rint(row / scale) + int(zero), kind.low, kind.high)
            losses.append((((codes - int(zero)) * scale - row) ** 2).sum())
        assert found <= 1.06 * min(losses)


def test_bias_codes_are_exact_and_saturate():
    kind = QUANT_TYPES["int32"]
    grid = Grid(kind, np.float32([1e-7, 1e-7, 1e-12]), np.zeros(3, np.int32), 0)
    codes = quantize(np.float32([1.5, -1.5, 1.0]), grid)
    assert codes.tolist() == [*np.rint(np.float64([1.5, -1.5]) / np.float64(np.float32(1e-7))), 2**31 - 1]


def test_types():
    assert QUANT_TYPES["uint2"].data_type == TensorProto.UINT2
    assert QUANT_TYPES["uint2"].dtype == ml_dtypes.uint2
    assert (QUANT_TYPES["int16"].low, QUANT_TYPES["int16"].high) == (-32768, 32767)
    with pytest.raises(ParameterError, match="did you mean 'int8'"):
        find_type("int_8")
    for kind in KINDS:  # the least opset that accepts it
        for op in ("QuantizeLinear", "DequantizeLinear"):
            name = f"tensor({kind})"
            known = [
                version
                for version in range(10, 26)
                for group in [onnx.defs.get_schema(op, version).type_constraints]
                if any(name in constraint.allowed_type_strs for constraint in group)
            ]
            assert kind.opset == min(known)
