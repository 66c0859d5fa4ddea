"""Convolution, pooling, recurrent, normalization, resizing, box and attention kernels against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, currently_in_test_context, given, reject, settings
from hypothesis import strategies as st
from onnx import helper

from onnxslim_lab.kernels import conv, lookup, run
from onnxslim_lab.kernels.dtypes import NUMBERS
from onnxslim_lab.kernels.windows import slide

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
flags = st.sampled_from([0, 1])


def reference(op_type, inputs, attributes, outputs, opset):
    """Return the outputs of onnxruntime with optimizations off; reject the example where it refuses."""
    names = ["" if value is None else f"i{k}" for k, value in enumerate(inputs)]
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if name}
    results = [f"o{k}" for k in range(outputs)]
    declared = [
        helper.make_tensor_value_info(name, NUMBERS[value.dtype], value.shape)
        for name, value in feeds.items()
    ]
    node = helper.make_node(op_type, names, results, **attributes)
    graph = helper.make_graph([node], "g", declared, [onnx.ValueInfoProto(name=name) for name in results])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return session.run(None, feeds)
    except Exception:  # noqa: BLE001 - its exceptions have no common class
        return None


def check(op_type, inputs, attributes=None, *, outputs=1, opset=22, rtol=1e-4, atol=1e-5):
    """Assert that kernel and onnxruntime agree."""
    attributes = attributes or {}
    want = reference(op_type, inputs, attributes, outputs, opset)
    if want is None and currently_in_test_context():
        reject()
    assert want is not None, "onnxruntime refuses this"
    if op_type in ("LSTM", "GRU", "RNN") and currently_in_test_context():  # its Softplus overflows from 89 on
        assume(all(np.isfinite(wanted).all() for wanted in want))
    have = run(lookup(op_type, "", opset), inputs, attributes, outputs)
    for wanted, got in zip(want, have, strict=False):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=rtol, atol=atol)


def normal(random, *shape, dtype=np.float32):
    return random.standard_normal(shape).astype(dtype)


def spoil(random, x, *, nan=True):
    """Put infinities and perhaps NaN at a few places."""
    for value in (np.inf, -np.inf, np.nan)[: 3 if nan else 2]:
        if x.size and random.random() < 0.3:
            x.reshape(-1)[random.integers(x.size)] = value
    return x


@st.composite
def windows(draw, pool=False):
    """Draw spatial lengths and the attributes of a window over them."""
    rank = draw(st.integers(1, 3))

    def each(low, high):
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    kernel, strides, dilations = each(1, 4), each(1, 3), each(1, 2)
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
    padding = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if padding == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attributes["auto_pad"] = padding
    if pool and padding == "NOTSET":
        attributes["ceil_mode"] = draw(flags)
    if padding.startswith("SAME"):  # onnxruntime refuses dilations; its pools skip inputs between windows
        attributes["dilations"] = dilations = [1] * rank
        if pool:
            attributes["strides"] = np.minimum(strides, kernel).tolist()
    lengths = each(1, 11)
    if not padding.startswith("SAME"):  # no window lies in the padding alone
        lengths = [max(n, (k - 1) * gap + 1) for n, k, gap in zip(lengths, kernel, dilations, strict=True)]
    return lengths, attributes


@few
@given(windows(), seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), flags)
def test_conv(window, seed, group, channels, rows, batch, spoiled):
    lengths, attributes = window
    random = np.random.default_rng(seed)
    x = normal(random, batch, group * channels, *lengths)
    w = normal(random, group * rows, channels, *attributes["kernel_shape"])
    b = normal(random, group * rows) if seed % 2 else None
    check("Conv", [spoil(random, x) if spoiled else x, w, b], {**attributes, "group": group})


@few
@given(windows(), seeds, st.integers(1, 3), st.integers(1, 3))
def test_ways_to_convolve_agree_at_tile_borders(window, seed, group, batch):
    lengths, attributes = window
    random = np.random.default_rng(seed)
    x = normal(random, batch, group * 2, *lengths, dtype=np.float64)
    w = normal(random, group * 3, 2, *attributes["kernel_shape"], dtype=np.float64)
    try:
        slid = slide(
            "Conv", lengths, **{"kernel" if k == "kernel_shape" else k: v for k, v in attributes.items()}
        )
    except ValueError:
        assume(False)
    assume(np.prod(slid.output) > 0)
    whole = conv.exact(x, w, None, slid, group)
    before = conv.TILE, conv.NARROWEST
    conv.TILE, conv.NARROWEST = 40, 3
    try:
        for way in (conv.exact, conv.flat):
            np.testing.assert_allclose(way(x, w, None, slid, group), whole, rtol=1e-9, atol=1e-9)
    finally:
        conv.TILE, conv.NARROWEST = before


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 1, 7)])
def test_conv_of_nothing_and_of_a_line(shape):
    random = np.random.default_rng(0)
    check("Conv", [normal(random, *shape), normal(random, 6, 4, 1, 3), normal(random, 6)])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_conv_keeps_its_type(dtype):
    random = np.random.default_rng(0)
    x, w = normal(random, 1, 400, 6, 6, dtype=dtype), normal(random, 3, 400, 3, 3, dtype=dtype)
    y = run(lookup("Conv", "", 22), [x, w], {})[0]
    precise = run(lookup("Conv", "", 22), [x.astype(np.float64), w.astype(np.float64)], {})[0]
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float64), precise, rtol=1e-3, atol=0.03)


@few
@given(windows(), seeds, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(0, 1))
def test_conv_transpose(window, seed, group, channels, rows, extra):
    lengths, attributes = window
    random = np.random.default_rng(seed)
    x = normal(random, 2, group * channels, *lengths)
    w = normal(random, group * channels, rows, *attributes["kernel_shape"])
    padding = [min(extra, stride - 1) for stride in attributes["strides"]]
    if "auto_pad" in attributes:
        padding, attributes["dilations"] = None, [1] * len(lengths)
        # onnxruntime makes the output shorter than the specification where the kernel is
        attributes["strides"] = np.minimum(attributes["strides"], attributes["kernel_shape"]).tolist()
    given_padding = {} if padding is None else {"output_padding": padding}
    check(
        "ConvTranspose", [x, w, normal(random, group * rows)], {**attributes, **given_padding, "group": group}
    )


@few
@given(windows(pool=True), seeds, flags, flags)
def test_max_pool(window, seed, order, indices):
    lengths, attributes = window
    x = np.random.default_rng(seed).permutation(2 * 3 * int(np.prod(lengths))).astype(np.float32)
    x = x.reshape(2, 3, *lengths)
    check("MaxPool", [x], {**attributes, "storage_order": order}, outputs=1 + indices)


def test_max_pool_passes_nan_on():
    x = np.array([[[1, np.nan, 3, 2, 5, 4]]], np.float32)
    y, places = run(lookup("MaxPool", "", 12), [x], {"kernel_shape": [2], "strides": [2]}, 2)
    assert np.isnan(y[0, 0, 0])
    assert (y[0, 0, 1:].tolist(), places.tolist()) == ([3, 5], [[[1, 2, 4]]])


@few
@given(windows(pool=True), seeds, flags, flags)
def test_average_pool(window, seed, counted, spoiled):
    lengths, attributes = window
    random = np.random.default_rng(seed)
    x = normal(random, 2, 3, *lengths)
    check("AveragePool", [spoil(random, x) if spoiled else x], {**attributes, "count_include_pad": counted})


@few
@given(windows(pool=True), seeds, st.integers(1, 3))
def test_lp_pool(window, seed, p):
    lengths, attributes = window
    check("LpPool", [normal(np.random.default_rng(seed), 2, 3, *lengths)], {**attributes, "p": p})


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@pytest.mark.parametrize("lengths", [(7,), (5, 6), (2, 3, 4)])
def test_global_pools(op_type, lengths):
    check(op_type, [normal(np.random.default_rng(1), 2, 3, *lengths)], opset=13)


ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid", "Elu", "Softsign", "Softplus"]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["LSTM", "GRU", "RNN"]), seeds)
def test_recurrent_layers(data, op_type, seed):
    random = np.random.default_rng(seed)
    gates, functions = {"LSTM": (4, 3), "GRU": (3, 2), "RNN": (1, 1)}[op_type]
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    ways = 2 if direction == "bidirectional" else 1
    steps, batch, inputs, hidden = (data.draw(st.integers(1, 4)) for _ in range(4))
    attributes = {"direction": direction, "hidden_size": hidden}
    if data.draw(st.booleans()):
        attributes["clip"] = 0.7
    if data.draw(st.booleans()):
        names = st.sampled_from(ACTIVATIONS)
        count = functions * ways
        attributes["activations"] = data.draw(st.lists(names, min_size=count, max_size=count))

    def optional(*shape):
        return normal(random, *shape) if data.draw(st.booleans()) else None

    given_inputs = [
        normal(random, steps, batch, inputs),
        normal(random, ways, gates * hidden, inputs),
        normal(random, ways, gates * hidden, hidden),
        optional(ways, 2 * gates * hidden),
        random.integers(1, steps + 1, batch).astype(np.int32) if data.draw(st.booleans()) else None,
        optional(ways, batch, hidden),
    ]
    if op_type == "LSTM":
        given_inputs += [optional(ways, batch, hidden), optional(ways, 3 * hidden)]
        attributes["input_forget"] = data.draw(flags)
    if op_type == "GRU":
        attributes["linear_before_reset"] = data.draw(flags)
    check(op_type, given_inputs, attributes, outputs=3 if op_type == "LSTM" else 2, opset=14)


def test_lstm_whose_gates_are_rows_of_16_bytes():  # where numpy 2.4's np.negative in place is wrong
    random = np.random.default_rng(0)
    inputs = [normal(random, 2, 5, 1), normal(random, 1, 4, 1), normal(random, 1, 4, 1)]
    check("LSTM", [*inputs, *[None] * 4, normal(random, 1, 3)], {"hidden_size": 1}, outputs=3, opset=14)


@few
@given(seeds, st.integers(0, 3), st.integers(0, 3), flags)
def test_normalizations(seed, batch, spatial_rank, spoiled):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 5, spatial_rank).tolist()
    x = normal(random, batch, 4, *lengths)
    x = spoil(random, x) if spoiled else x
    scale, bias, mean = normal(random, 4), normal(random, 4), normal(random, 4)
    check("BatchNormalization", [x, scale, bias, mean, np.abs(normal(random, 4))], {"epsilon": 1e-3})
    if batch and not spoiled:
        check("LRN", [x], {"size": int(random.choice([1, 3, 5])), "alpha": 0.1, "bias": 2.0})
        check("LpNormalization", [x], {"axis": 1, "p": int(random.integers(1, 3))})
        axis = int(random.integers(-x.ndim, x.ndim))
        shape = x.shape[axis:]
        check(
            "LayerNormalization",
            [x, normal(random, *shape), normal(random, *shape)],
            {"axis": axis},
            outputs=3,
        )
        if spatial_rank:
            check("InstanceNormalization", [x, scale, bias])


def test_training_batch_normalization():
    random = np.random.default_rng(3)
    inputs = [normal(random, 3, 4, 5), *(np.abs(normal(random, 4)) for _ in range(4))]
    check("BatchNormalization", inputs, {"training_mode": 1, "momentum": 0.8}, outputs=3, opset=15)


COORDINATES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric"]


@settings(max_examples=100, deadline=None)
@given(st.data(), seeds, st.sampled_from(["nearest", "linear", "cubic"]), st.sampled_from(COORDINATES))
def test_resize(data, seed, mode, transformation):
    random = np.random.default_rng(seed)
    x = normal(random, 1, 2, *(data.draw(st.integers(1, 7)) for _ in range(2)))
    attributes = {"mode": mode, "coordinate_transformation_mode": transformation}
    if mode == "nearest":
        assume(transformation != "half_pixel_symmetric")  # the last bit of its formula decides ties
        rules = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        attributes["nearest_mode"] = data.draw(st.sampled_from(rules))
    if mode == "cubic":
        attributes["exclude_outside"] = data.draw(flags)
    scales = sizes = None
    if data.draw(st.booleans()):
        sizes = np.array([1, 2, *(data.draw(st.integers(1, 12)) for _ in range(2))], np.int64)
    else:
        factors = st.sampled_from([0.5, 0.6, 1, 1.5, 2, 2.7, 3])
        scales = np.array([1, 1, data.draw(factors), data.draw(factors)], np.float32)
        assume(np.floor(x.shape * scales).min() >= 1)
        if transformation == "align_corners":  # the specification counts with the length before rounding
            assume(np.all(x.shape * scales == np.floor(x.shape * scales)))
    check("Resize", [x, None, scales, sizes], attributes, opset=19)


@few
@given(st.data(), seeds, st.sampled_from(["nearest", "linear"]))
def test_upsample_and_first_resize(data, seed, mode):
    x = normal(np.random.default_rng(seed), 1, 2, 3, 4)
    factors = st.sampled_from([1, 2, 2.5, 3])
    scales = np.array([1, 1, data.draw(factors), data.draw(factors)], np.float32)
    check("Upsample", [x, scales], {"mode": mode}, opset=9)
    small = np.array([1, 1, 0.5, 0.7], np.float32)
    check("Resize", [x, small if seed % 2 else scales], {"mode": mode}, opset=10)


@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.sampled_from(["bilinear", "nearest", "bicubic"]),
    st.sampled_from(["zeros", "border", "reflection"]),
    flags,
)
def test_grid_sample(seed, mode, padding, align):
    random = np.random.default_rng(seed)
    grid = (random.random((2, 3, 4, 2)) * 5 - 2.5).astype(np.float32)
    x = normal(random, 2, 2, *random.integers(2, 6, 2))
    check("GridSample", [x, grid], {"mode": mode, "padding_mode": padding, "align_corners": align}, opset=16)


@few
@given(
    seeds,
    st.sampled_from(["avg", "max"]),
    st.integers(0, 3),
    st.sampled_from(["half_pixel", "output_half_pixel"]),
)
def test_roi_align(seed, mode, ratio, transformation):
    random = np.random.default_rng(seed)
    corners = np.sort(random.random((5, 2, 2)) * 14 - 2, axis=1).reshape(5, 4).astype(np.float32)
    attributes = {"mode": mode, "sampling_ratio": ratio, "output_height": 2, "output_width": 3}
    attributes |= {"spatial_scale": 0.8, "coordinate_transformation_mode": transformation}
    batch = random.integers(0, 2, 5).astype(np.int64)
    check("RoiAlign", [normal(random, 2, 3, 9, 8), corners, batch], attributes, opset=16)


@few
@given(seeds)
def test_max_roi_pool(seed):
    random = np.random.default_rng(seed)
    corners = np.sort(random.integers(0, 9, (5, 2, 2)), axis=1).reshape(5, 4).astype(np.float32)
    rois = np.concatenate([random.integers(0, 2, (5, 1)).astype(np.float32), corners], axis=1)
    check(
        "MaxRoiPool",
        [normal(random, 2, 3, 9, 8), rois],
        {"pooled_shape": [2, 3], "spatial_scale": 0.75},
        opset=13,
    )


@few
@given(seeds, flags, st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.6]))
def test_non_max_suppression(seed, centred, most, threshold):
    random = np.random.default_rng(seed)
    boxes = np.round(random.random((2, 12, 4)) * 8).astype(np.float32) / 2
    scores = np.round(random.random((2, 3, 12)), 1).astype(np.float32)
    limits = [np.array([most], np.int64), np.array([threshold], np.float32), np.array([0.25], np.float32)]
    check("NonMaxSuppression", [boxes, scores, *limits], {"center_point_box": centred}, opset=11)


@few
@given(seeds, flags, flags, flags, st.sampled_from([-1, 0, 1]))
def test_top_k_of_many(seed, largest, ties, spoiled, axis):
    random = np.random.default_rng(seed)
    x = normal(random, 3, 40) if axis else normal(random, 40, 3)
    x = np.round(x * 4) if ties else x
    x = spoil(random, x, nan=False) if spoiled else x
    k = np.array([random.integers(0, 6)], np.int64)
    check("TopK", [x, k], {"axis": axis, "largest": largest}, outputs=2, opset=11)


UNARY = {
    "Elu": ({"alpha": 0.7}, 22),
    "Selu": ({}, 22),
    "Celu": ({"alpha": 0.6}, 12),
    "Softplus": ({}, 22),
    "Softsign": ({}, 22),
    "Mish": ({}, 18),
    "HardSwish": ({}, 22),
    "ThresholdedRelu": ({"alpha": 0.5}, 22),
    "Shrink": ({"bias": 0.3, "lambd": 0.4}, 9),
    "Gelu": ({}, 20),
    "Sigmoid": ({}, 13),
    "Hardmax": ({"axis": -1}, 13),
}


@pytest.mark.parametrize("op_type", UNARY)
@few
@given(seeds, flags)
def test_activations(op_type, seed, spoiled):
    random = np.random.default_rng(seed)
    x = normal(random, 3, 5) * np.float32(10.0 ** random.integers(-3, 3))
    if spoiled and op_type not in {"Hardmax", "HardSwish", "Softsign", "Mish"}:
        x = spoil(random, x, nan=op_type not in {"ThresholdedRelu", "Celu", "Selu", "Shrink"})
    check(op_type, [x], UNARY[op_type][0], opset=UNARY[op_type][1], rtol=1e-5, atol=1e-6)


@few
@given(seeds, st.sampled_from([(1,), (4, 1, 1), (5, 6), (1, 5, 1)]))
def test_prelu(seed, shape):
    random = np.random.default_rng(seed)
    check("PRelu", [normal(random, 2, 4, 5, 6), normal(random, *shape)], opset=16)


@few
@given(seeds, flags, flags, flags, st.sampled_from([None, np.bool_, np.float32]))
def test_attention(seed, causal, flattened, cached, mask_type):
    random = np.random.default_rng(seed)
    batch, queries, keys, size, count, shared = 2, 3, 4, 5, 4, 2
    q, k, v = (
        normal(random, batch, h, n, size) for h, n in ((count, queries), (shared, keys), (shared, keys))
    )
    past = [normal(random, batch, shared, 2, size) if cached else None for _ in range(2)]
    mask = normal(random, queries, keys + 2 * cached)
    mask = None if mask_type is None else mask > -1 if mask_type is np.bool_ else mask
    attributes = {"is_causal": causal, "scale": 0.3}
    if flattened:
        q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch, x.shape[2], -1) for x in (q, k, v))
        attributes |= {"q_num_heads": count, "kv_num_heads": shared}
    outputs = 3 if cached else 1
    inputs = [q, k, v, mask, *past] if cached else [q, k, v, mask]
    check("Attention", inputs, attributes, outputs=outputs, opset=23)


WRONG = [
    ("Conv", [(1, 3, 5, 5), (2, 2, 3, 3)], {}, "expects 2 channels"),
    ("Conv", [(1, 2, 2, 2), (2, 2, 3, 3)], {}, "spans 3 positions of spatial axis 0"),
    ("Conv", [(1, 2, 5, 5), (2, 2, 3, 3)], {"strides": [1]}, "strides has 1 entries for 2"),
    ("Conv", [(1, 2, 5, 5), (2, 2, 3, 3), (3,)], {}, r"bias has shape \(3,\), expected \(2,\)"),
    ("MaxPool", [(1, 2)], {"kernel_shape": [1]}, "expected"),
    ("AveragePool", [(1, 2, 5)], {"kernel_shape": [2], "pads": [1]}, "expected 2"),
    ("LSTM", [(2, 1, 3), (1, 8, 4), (1, 8, 2)], {}, r"W has shape \(1, 8, 4\), expected \(1, 8, 3\)"),
    ("RNN", [(2, 1, 3), (1, 2, 3), (1, 2, 2)], {"activations": ["Sine"]}, "'Sine' is not one of"),
    ("BatchNormalization", [(1, 2, 3), (3,), (2,), (2,), (2,)], {}, "scale has shape"),
    ("Resize", [(1, 1, 2, 2)], {}, "exactly one of scales and sizes"),
    ("GridSample", [(1, 1, 2, 2), (1, 2, 2, 3)], {}, "expected"),
    ("Attention", [(1, 2, 6), (1, 2, 6), (1, 2, 6)], {}, "number of heads"),
]


@pytest.mark.parametrize(
    ("op_type", "shapes", "attributes", "text"), WRONG, ids=[row[0] + row[3] for row in WRONG]
)
def test_errors_say_what_was_expected(op_type, shapes, attributes, text):
    inputs = [np.ones(shape, np.float32) for shape in shapes]
    with pytest.raises(ValueError, match=text):
        run(lookup(op_type, "", 23), inputs, attributes)


def test_batch_normalization_per_element():
    random = np.random.default_rng(0)
    x, scale, b, mean = (normal(random, *shape) for shape in ((2, 3, 4), (3, 4), (3, 4), (3, 4)))
    var = np.abs(normal(random, 3, 4))
    (y,) = run(lookup("BatchNormalization", "", 7), [x, scale, b, mean, var], {"spatial": 0})
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale + b, rtol=1e-5, atol=1e-5)


def test_batch_normalization_follows_parameters_that_change():
    x, ones = np.ones((1, 2, 2), np.float32), np.ones(2, np.float32)
    scale = np.ones(2, np.float32)
    kernel = lookup("BatchNormalization", "", 15)
    before = run(kernel, [x, scale, ones, ones, ones], {"epsilon": 0.0})[0]
    scale[:] = 3
    x[0, 0] = 2
    after = run(kernel, [x, scale, ones, ones, ones], {"epsilon": 0.0})[0]
    assert (before.tolist(), after.tolist()) == ([[[1, 1], [1, 1]]], [[[4, 4], [1, 1]]])


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17])
@pytest.mark.parametrize(("depth", "columns"), [(300, 500), (128, 1000), (1000, 385)])
def test_products_of_few_rows(rows, depth, columns):
    random = np.random.default_rng(rows)
    left, right = normal(random, 1, rows, depth), normal(random, depth, columns)
    (y,) = run(lookup("MatMul", "", 13), [left, right], {})
    want = left.astype(np.float64) @ right.astype(np.float64)
    assert (y.shape, y.dtype) == ((1, rows, columns), np.float32)
    np.testing.assert_allclose(y, want, atol=1e-4 * np.abs(want).max())
