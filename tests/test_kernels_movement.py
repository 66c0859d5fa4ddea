"""The commonest operators that move values, against onnxruntime: every shape, axis and dtype, empty or not.

Those that compute are in test_kernels_common.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import SEEDS, agree, broadcast, common, shapes, values

from onnxslim_lab.kernels import lookup, run

DTYPES = st.sampled_from(
    [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, np.bool_, object]
)
SPREAD = [np.float32, np.float64, np.int32, np.int64, np.bool_]
# Where onnxruntime refuses what the specification allows: parts of its messages
UNEVEN = "exceeds the remaining size"  # more outputs than parts of equal length: the last are empty
NOTHING = "Invalid num_outputs value"  # parts of an empty axis
HALF = "MLFloat16 data type is not supported"  # reductions of ScatterND
flags = st.sampled_from([0, 1])


def integers(items):
    return np.array(items, np.int64)


def axis_of(data, shape, *, past=0):
    return data.draw(st.integers(-len(shape), len(shape) - 1 + past))


def filled(shape):
    """Return the shape without empty axes."""
    return tuple(max(n, 1) for n in shape)


@common
@given(shapes(1), SEEDS, DTYPES, st.data(), st.integers(1, 3))
def test_concat(shape, seed, dtype, data, count):
    rng = np.random.default_rng(seed)
    axis = axis_of(data, shape)
    parts = []
    for _ in range(count):
        lengths = list(shape)
        lengths[axis] = data.draw(st.integers(0, 3))
        parts.append(values(rng, tuple(lengths), dtype))
    agree("Concat", parts, {"axis": axis})


@common
@given(shapes(1), SEEDS, DTYPES, st.data(), st.integers(1, 3))
def test_split(shape, seed, dtype, data, count):
    x = values(np.random.default_rng(seed), shape, dtype)
    axis = axis_of(data, shape)
    if data.draw(flags):
        agree(
            "Split", [x, None], {"axis": axis, "num_outputs": count}, outputs=count, refused=[UNEVEN, NOTHING]
        )
        return
    cuts = sorted(data.draw(st.integers(0, shape[axis])) for _ in range(count - 1))
    lengths = np.diff([0, *cuts, shape[axis]])
    agree("Split", [x, integers(lengths)], {"axis": axis}, outputs=count)


@common
@given(shapes(1), SEEDS, DTYPES, st.data())
def test_slice(shape, seed, dtype, data):
    count = data.draw(st.integers(1, len(shape)))
    ends = st.one_of(st.integers(-8, 8), st.sampled_from([2**63 - 1, -(2**63), 2**31 - 1]))
    starts, stops = (integers([data.draw(ends) for _ in range(count)]) for _ in range(2))
    axes = data.draw(st.permutations(range(len(shape))))[:count]
    axes = integers([axis - len(shape) * data.draw(flags) for axis in axes])
    steps = integers([data.draw(st.sampled_from([1, 1, -1, 2, -2, 9])) for _ in range(count)])
    given_axes, given_steps = (axes, steps) if data.draw(flags) else (None, None)
    agree(
        "Slice", [values(np.random.default_rng(seed), shape, dtype), starts, stops, given_axes, given_steps]
    )


@common
@given(shapes(1, 3), shapes(0, 3), SEEDS, DTYPES, st.data(), st.sampled_from([np.int32, np.int64]))
def test_gather(shape, places, seed, dtype, data, index_dtype):
    rng = np.random.default_rng(seed)
    axis = axis_of(data, shape)
    shape = shape if 0 in places else filled(shape)
    indices = rng.integers(-shape[axis], max(shape[axis], 1), places).astype(index_dtype)
    agree("Gather", [values(rng, shape, dtype), indices], {"axis": axis})


@common
@given(shapes(1, 3), SEEDS, DTYPES, st.data(), st.sampled_from([np.int32, np.int64]))
def test_gather_elements(shape, seed, dtype, data, index_dtype):
    rng = np.random.default_rng(seed)
    axis = axis_of(data, shape)
    places = list(shape)
    shape = filled(shape)
    places[axis] = data.draw(st.integers(0, 4))
    indices = rng.integers(-shape[axis], shape[axis], places).astype(index_dtype)
    agree("GatherElements", [values(rng, shape, dtype), indices], {"axis": axis})


@st.composite
def places_in(draw, shape, batch=0):
    """Draw indices into an array: of elements, or of slices along the last axes."""
    depth = draw(st.integers(1, len(shape) - batch))
    lead = (*shape[:batch], *draw(st.lists(st.integers(0, 3), max_size=2)))
    rng = np.random.default_rng(draw(SEEDS))
    columns = [rng.integers(-n, n, lead) for n in shape[batch : batch + depth]]
    return np.stack(columns, axis=-1).astype(np.int64)


@common
@given(shapes(2, 4).map(filled), SEEDS, DTYPES, st.data(), flags)
def test_gather_nd(shape, seed, dtype, data, batch):
    indices = data.draw(places_in(shape, batch))
    agree("GatherND", [values(np.random.default_rng(seed), shape, dtype), indices], {"batch_dims": batch})


@common
@given(shapes(1, 3).map(filled), SEEDS, DTYPES, st.data(), st.sampled_from(["none", "add", "mul", "max"]))
def test_scatter_nd(shape, seed, dtype, data, reduction):
    rng = np.random.default_rng(seed)
    indices = data.draw(places_in(shape))
    if reduction == "none":  # the order of writes to one place is not specified
        flat = indices.reshape(-1, indices.shape[-1]) % np.array(shape[: indices.shape[-1]])
        indices = np.unique(flat, axis=0)
    elif np.dtype(dtype).kind in "bO":
        dtype = np.float32
    updates = values(rng, indices.shape[:-1] + shape[indices.shape[-1] :], dtype)
    agree(
        "ScatterND",
        [values(rng, shape, dtype), indices, updates],
        {"reduction": reduction},
        opset=18,
        refused=[HALF],
    )


@common
@given(shapes(), SEEDS, DTYPES, st.data())
def test_transpose(shape, seed, dtype, data):
    order = {"perm": data.draw(st.permutations(range(len(shape))))} if shape and data.draw(flags) else {}
    agree("Transpose", [values(np.random.default_rng(seed), shape, dtype)], order)


@common
@given(shapes(), SEEDS, DTYPES, st.data(), flags)
def test_reshape(shape, seed, dtype, data, allowzero):
    x = values(np.random.default_rng(seed), shape, dtype)
    wanted = list(data.draw(st.permutations(shape)))
    if wanted and data.draw(flags):
        wanted[data.draw(st.integers(0, len(wanted) - 1))] = -1
    elif data.draw(flags):
        wanted = [math.prod(shape)]
    agree("Reshape", [x, integers(wanted)], {"allowzero": allowzero})


@common
@given(shapes(0, 3), SEEDS, DTYPES, st.data())
def test_squeeze_and_unsqueeze(shape, seed, dtype, data):
    x = values(np.random.default_rng(seed), shape, dtype)
    rank = len(shape) + data.draw(st.integers(1, 2))
    axes = data.draw(st.permutations(range(rank)))[: rank - len(shape)]
    named = integers([axis - rank * data.draw(flags) for axis in axes])
    agree("Unsqueeze", [x, named])
    wide = np.expand_dims(x, tuple(axes))
    agree("Squeeze", [wide, named])
    if wide.size:
        agree("Squeeze", [wide, None])
    if shape:
        agree("Squeeze", [x, integers([axis_of(data, shape)])])


@common
@given(broadcast(), SEEDS, DTYPES)
def test_expand(pair, seed, dtype):
    agree("Expand", [values(np.random.default_rng(seed), pair[0], dtype), integers(pair[1])])


@common
@given(shapes(1), SEEDS, st.sampled_from([*SPREAD, np.uint8, object]), st.data())
def test_tile(shape, seed, dtype, data):
    repeats = [data.draw(st.integers(0, 3)) for _ in shape]
    agree("Tile", [values(np.random.default_rng(seed), shape, dtype), integers(repeats)])


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@common
@given(shapes(1, 3), SEEDS, st.sampled_from(SPREAD), st.data())
def test_pad(mode, shape, seed, dtype, data):
    rng = np.random.default_rng(seed)
    if mode != "constant":
        shape = tuple(max(n, 2) for n in shape)
    low = -1 if mode == "constant" else 0
    count = data.draw(st.integers(1, len(shape)))
    axes = data.draw(st.permutations(range(len(shape))))[:count]
    most = [shape[axis] - 1 if mode != "constant" else 3 for axis in axes]
    pads = [
        data.draw(st.integers(max(low, -shape[axis] // 2), m))
        for axis, m in zip(axes * 2, most * 2, strict=True)
    ]
    named = integers([axis - len(shape) * data.draw(flags) for axis in axes])
    value = values(rng, (), dtype, spoiled=True) if mode == "constant" and data.draw(flags) else None
    agree("Pad", [values(rng, shape, dtype), integers(pads), value, named], {"mode": mode})


@common
@given(shapes(), SEEDS, DTYPES, st.data())
def test_flatten(shape, seed, dtype, data):
    axis = axis_of(data, shape, past=1)
    agree("Flatten", [values(np.random.default_rng(seed), shape, dtype)], {"axis": axis})


@common
@given(shapes(), SEEDS, DTYPES, st.data())
def test_shape(shape, seed, dtype, data):
    ends = st.integers(-5, 5)
    attributes = {"start": data.draw(ends), **({"end": data.draw(ends)} if data.draw(flags) else {})}
    agree("Shape", [values(np.random.default_rng(seed), shape, dtype)], attributes)


@pytest.mark.parametrize(
    ("shape", "wanted", "expected"),
    [
        ((0, 3, 4), [0, -1], (0, 12)),
        ((0, 3, 4), [0, 2, -1], (0, 2, 6)),
        ((0, 3, 4), [-1, 12], (0, 12)),
        ((2, 0, 4), [0, -1], (2, 0)),
        ((2, 0, 4), [-1, 4], (0, 4)),
        ((0, 3), [0, 0, -1], (0, 3, 1)),
        ((0, 3), [0, 0, 0, -1], None),
    ],
)
def test_reshape_and_slice_of_an_empty_batch(shape, wanted, expected):
    """onnxruntime refuses to infer -1 beside an axis of length 0 that is kept."""
    kernel, inputs = lookup("Reshape", "", 13), [np.zeros(shape, np.float32), integers(wanted)]
    if expected is None:
        with pytest.raises(ValueError, match="keeps a dimension"):
            run(kernel, inputs, {})
        return
    (result,) = run(kernel, inputs, {})
    assert result.shape == expected
    part = [result, *map(integers, ([1], [3], [1]))]
    (cut,) = run(lookup("Slice", "", 13), part, {})
    assert cut.shape == result[:, 1:3].shape
