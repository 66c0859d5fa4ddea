"""The commonest operators that compute, against onnxruntime: every shape, axis, dtype, NaN and infinity.

Those that move values are in test_kernels_movement.py. Conv, ConvTranspose, MaxPool, AveragePool,
GlobalAveragePool, BatchNormalization, LayerNormalization, InstanceNormalization, Resize, TopK, Sigmoid, LSTM
and GRU are in test_kernels_nn.py; here only their empty tensors.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import SEEDS, agree, broadcast, common, shapes, values

from onnxslim_lab.kernels import lookup, run
from onnxslim_lab.kernels.dtypes import NUMBERS

FLOATS = [np.float32, np.float64, np.float16]
INTEGERS = [np.int8, np.uint8, np.int32, np.int64, np.uint32, np.uint64]
EMPTY_STACK = "cannot broadcast on dim"  # onnxruntime refuses 1 against 0 matrices, NumPy and Add do not
flags = st.sampled_from([0, 1])


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@common
@given(broadcast(), SEEDS, st.sampled_from(FLOATS + INTEGERS), flags)
def test_arithmetic(op_type, pair, seed, dtype, spoiled):
    rng = np.random.default_rng(seed)
    left, right = (values(rng, shape, dtype, spoiled=spoiled) for shape in pair)
    if op_type == "Div" and right.dtype.kind in "iu":
        right[right == 0] = 3  # by zero is undefined
    agree(op_type, [left, right])


@common
@given(broadcast(), SEEDS, st.sampled_from([*FLOATS, np.int32, np.int64]), st.sampled_from(FLOATS), flags)
def test_power(pair, seed, dtype, exponent_dtype, spoiled):
    rng = np.random.default_rng(seed)
    x = values(rng, pair[0], dtype, spoiled=spoiled)
    whole = x.dtype.kind == "i"
    y = values(rng, pair[1], np.uint8 if whole else exponent_dtype, spoiled=spoiled, high=4)
    agree("Pow", [x, y.astype(exponent_dtype)], opset=15)


UNARY = {
    "Sqrt": {},
    "Exp": {},
    "Log": {},
    "Neg": {},
    "Abs": {},
    "Relu": {},
    "LeakyRelu": {"alpha": 0.3},
    "Sigmoid": {},
    "Tanh": {},
    "Erf": {},
}


@pytest.mark.parametrize("op_type", UNARY)
@common
@given(shapes(), SEEDS, st.sampled_from(FLOATS), flags)
def test_unary(op_type, shape, seed, dtype, spoiled):
    x = values(np.random.default_rng(seed), shape, dtype, spoiled=spoiled)
    agree(op_type, [x], UNARY[op_type])


@pytest.mark.parametrize("op_type", ["Neg", "Abs", "Relu"])
@common
@given(shapes(), SEEDS, st.sampled_from(INTEGERS))
def test_unary_integers(op_type, shape, seed, dtype):
    if op_type == "Neg" and np.dtype(dtype).kind == "u":
        dtype = np.int64
    agree(op_type, [values(np.random.default_rng(seed), shape, dtype)])


@common
@given(shapes(), SEEDS, st.sampled_from(FLOATS + INTEGERS), flags, flags, flags)
def test_clip(shape, seed, dtype, spoiled, low, high):
    x = values(np.random.default_rng(seed), shape, dtype, spoiled=spoiled)
    agree("Clip", [x, np.array(1, dtype) if low else None, np.array(4, dtype) if high else None])


@common
@given(shapes(1), SEEDS, st.sampled_from([np.float32, np.float64]), st.data(), flags, flags)
def test_softmax(shape, seed, dtype, data, spoiled, first):
    x = values(np.random.default_rng(seed), shape, dtype, spoiled=spoiled)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    agree("Softmax", [x], {"axis": axis}, opset=11 if first else 13)


@common
@given(shapes(), SEEDS, st.data())
def test_cast(shape, seed, data):
    kinds = [*FLOATS, *INTEGERS, np.int16, np.bool_]
    source, target = (data.draw(st.sampled_from(kinds)) for _ in range(2))
    x = values(np.random.default_rng(seed), shape, source, spoiled=np.dtype(target).kind == "f")
    if np.dtype(target).kind in "iu" and np.dtype(source).kind == "f":
        x = np.abs(x)  # what does not fit is undefined
    agree("Cast", [x], {"to": int(NUMBERS[np.dtype(target)])})


@common
@given(shapes(), SEEDS, st.sampled_from([*FLOATS[:2], np.int32, np.int64]), st.data())
def test_integers_wrap_in_casts(shape, seed, dtype, data):
    rng = np.random.default_rng(seed)
    wide = rng.integers(-(2**40), 2**40, shape).astype(np.int64)
    target = data.draw(st.sampled_from([np.int8, np.uint8, np.int32, dtype]))
    agree("Cast", [wide], {"to": int(NUMBERS[np.dtype(target)])})


@pytest.mark.parametrize("op_type", ["Equal", "Less", "Greater", "LessOrEqual"])
@common
@given(broadcast(), SEEDS, st.sampled_from([*FLOATS, np.int32, np.int64, np.bool_, object]), flags)
def test_comparisons(op_type, pair, seed, dtype, spoiled):
    if op_type != "Equal" and dtype in {np.bool_, object}:
        dtype = np.float32
    rng = np.random.default_rng(seed)
    agree(op_type, [values(rng, shape, dtype, spoiled=spoiled) for shape in pair], opset=19)


@common
@given(broadcast(3), SEEDS, st.sampled_from([*FLOATS[:2], np.uint8, np.int32, np.int64, object]), flags)
def test_where(three, seed, dtype, spoiled):
    rng = np.random.default_rng(seed)
    x, y = (values(rng, shape, dtype, spoiled=spoiled) for shape in three[1:])
    agree("Where", [values(rng, three[0], np.bool_), x, y])


@st.composite
def reductions(draw):
    """Draw a shape and some of its axes, or None for all."""
    shape = draw(shapes())
    axes = draw(st.lists(st.integers(0, max(len(shape) - 1, 0)), unique=True, max_size=len(shape)))
    if not all(shape[axis] for axis in axes or range(len(shape))):
        axes = axes[:1]  # onnxruntime reduces only the empty axes where one is
    if not axes or (all(shape) and draw(flags)):
        return tuple(max(n, 1) for n in shape), None
    return shape, [axis - len(shape) * draw(flags) for axis in axes]


@pytest.mark.parametrize("op_type", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])
@common
@given(reductions(), SEEDS, st.sampled_from([*FLOATS[:2], np.int32, np.int64]), flags, flags, flags)
def test_reductions(op_type, reduction, seed, dtype, keepdims, noop, spoiled):
    shape, axes = reduction
    if op_type in {"ReduceMax", "ReduceMin"}:
        shape = tuple(max(n, 1) for n in shape)  # of nothing: onnxruntime's shapes depend on the axis
    x = values(np.random.default_rng(seed), shape, dtype, spoiled=spoiled)
    if op_type in {"ReduceMax", "ReduceMin"}:
        x = np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf)  # onnxruntime: NaN counts by its place
    if not x.size:
        keepdims, noop = (
            1,
            0,
        )  # without the first onnxruntime keeps some axes; with it onnxruntime returns an empty tensor as it is
    given_axes = None if axes is None else np.array(axes, np.int64)
    agree(op_type, [x, given_axes], {"keepdims": keepdims, "noop_with_empty_axes": noop}, opset=18)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@common
@given(shapes(1), SEEDS, st.sampled_from([*FLOATS[:2], np.int32, np.int8]), st.data(), flags, flags)
def test_positions(op_type, shape, seed, dtype, data, keepdims, last):
    shape = tuple(max(n, 1) for n in shape)  # onnxruntime reduces no axis of an empty tensor
    x = np.round(values(np.random.default_rng(seed), shape, dtype))  # with ties
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    agree(op_type, [x], {"axis": axis, "keepdims": keepdims, "select_last_index": last})


@st.composite
def products(draw):
    """Draw the shapes of two matrices, vectors or broadcast stacks of matrices."""
    rows, inner, columns = (draw(st.integers(0, 5)) for _ in range(3))
    left, right = draw(broadcast())
    if draw(flags):
        return [(inner,), draw(st.sampled_from([(inner,), (*right, inner, columns)]))]
    if draw(flags):
        return [(*left, rows, inner), (inner,)]
    return [(*left, rows, inner), (*right, inner, columns)]


@common
@given(products(), SEEDS, st.sampled_from([*FLOATS[:2], np.int32, np.uint32, np.int64]), flags)
def test_matmul(pair, seed, dtype, spoiled):
    rng = np.random.default_rng(seed)
    agree(
        "MatMul",
        [values(rng, shape, dtype, spoiled=spoiled) for shape in pair],
        atol=1e-4,
        refused=[EMPTY_STACK],
    )


BIASES = [None, "scalar", "row", "column", "one", "vector"]


@common  # sums of at least one product: onnxruntime forgets beta where there is none
@given(SEEDS, st.sampled_from(FLOATS[:2]), flags, flags, st.sampled_from(BIASES), st.data())
def test_gemm(seed, dtype, left, right, bias, data):
    rng = np.random.default_rng(seed)
    rows, inner, columns = (data.draw(st.integers(low, 5)) for low in (0, 1, 0))
    a = values(rng, (inner, rows) if left else (rows, inner), dtype)
    b = values(rng, (columns, inner) if right else (inner, columns), dtype)
    shape = {"scalar": (), "row": (1, columns), "column": (rows, 1), "one": (1,), "vector": (columns,)}
    c = None if bias is None else values(rng, shape[bias], dtype, spoiled=True)
    attributes = {"alpha": 0.5, "beta": 2.0, "transA": left, "transB": right}
    agree("Gemm", [a, b, c], attributes, atol=1e-4)


@common
@given(shapes(1), SEEDS, st.sampled_from([*FLOATS[:2], np.int32, np.int64]), st.data(), flags, flags, flags)
def test_cumulative_sum(shape, seed, dtype, data, exclusive, reverse, spoiled):
    x = values(np.random.default_rng(seed), shape, dtype, spoiled=spoiled)
    axis = np.array(data.draw(st.integers(-len(shape), len(shape) - 1)), np.int32)
    agree("CumSum", [x, axis], {"exclusive": exclusive, "reverse": reverse}, atol=1e-5)


@common
@given(shapes(1, 3), SEEDS, st.sampled_from([*FLOATS[:2], np.int32, np.int64]), st.data(), flags)
def test_top_k(shape, seed, dtype, data, largest):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = np.array([data.draw(st.integers(0, shape[axis] + 1))], np.int64)
    x = values(np.random.default_rng(seed), shape, dtype)
    agree("TopK", [x, k], {"axis": axis, "largest": largest}, outputs=2)


def ones(*shape):
    return np.ones(shape, np.float32)


EMPTY = {
    "Conv": ([ones(0, 2, 5), ones(3, 2, 2)], {"pads": [1, 0]}),
    "Conv of no rows": ([ones(2, 2, 5), ones(0, 2, 2)], {}),
    "ConvTranspose": ([ones(0, 2, 5), ones(2, 3, 2)], {"strides": [2]}),
    "MaxPool": ([ones(0, 2, 5)], {"kernel_shape": [2]}),
    "AveragePool": ([ones(0, 2, 5)], {"kernel_shape": [2]}),
    "GlobalAveragePool": ([ones(0, 2, 5)], {}),
    "BatchNormalization": ([ones(0, 2, 5), ones(2), ones(2), ones(2), ones(2)], {}),
    "LayerNormalization": ([ones(0, 2, 5), ones(5), ones(5)], {}),
    "InstanceNormalization": ([ones(0, 2, 5), ones(2), ones(2)], {}),
    "Resize": ([ones(0, 2, 5), None, np.array([1, 1, 2], np.float32)], {}),
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_batches(case):
    agree(case.split()[0], *EMPTY[case])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize("last", [False, True])
def test_reductions_over_nothing(shape, last):
    axis = len(shape) - 1 if last else 0  # from a negative one onnxruntime makes another shape
    for dtype in (np.float32, np.int32, np.int64):
        x = np.zeros(shape, dtype)
        for op_type in ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceProd"):
            agree(op_type, [x, np.array([axis])], opset=20)
    for op_type in ("ArgMax", "ArgMin"):
        kept = np.delete(shape, axis).prod() == 0
        if kept or shape[axis]:
            agree(op_type, [np.zeros(shape, np.float32)], {"axis": axis}, opset=13)
        else:
            with pytest.raises(ValueError, match="is empty: it has no"):
                run(lookup(op_type, "", 13), [np.zeros(shape, np.float32)], {"axis": axis})
