"""Integer, machine learning, text, signal and com.microsoft kernels against onnxruntime."""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.kernels import lookup, random_draws, run
from onnxslim_lab.kernels.dtypes import NUMBERS
from onnxslim_lab.kernels.registry import kernels

ML, MS = "ai.onnx.ml", "com.microsoft"
OPSETS = {"": 21, ML: 5, MS: 1}


def tensor_type(value):
    return TensorProto.STRING if value.dtype.kind in "OU" else NUMBERS[value.dtype]


def both(op_type, inputs, attributes=None, outputs=1, domain="", opset=None):
    """Return the outputs of onnxruntime and of the kernel for a model of one node."""
    attributes = attributes or {}
    opset = opset or OPSETS[domain]
    inputs = [None if value is None else np.asarray(value) for value in inputs]
    names = ["" if value is None else f"i{k}" for k, value in enumerate(inputs)]
    results = [f"o{k}" for k in range(outputs)]
    given_values = {name: value for name, value in zip(names, inputs, strict=True) if name}
    wrapped = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in attributes.items()
    }
    node = helper.make_node(op_type, names, results, domain=domain, **wrapped)
    declared = [
        helper.make_tensor_value_info(name, tensor_type(value), list(value.shape))
        for name, value in given_values.items()
    ]
    graph = helper.make_graph([node], "g", declared, [onnx.ValueInfoProto(name=name) for name in results])
    opsets = [helper.make_opsetid("", 21)] + [helper.make_opsetid(domain, opset)] * bool(domain)
    if not domain:
        opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    want = session.run(None, given_values)
    have = run(lookup(op_type, domain, opset), inputs, attributes, outputs)
    return want, have[:outputs]


def check(
    op_type, inputs, attributes=None, *, outputs=1, domain="", opset=None, rtol=1e-5, atol=1e-6, steps=0
):
    want, have = both(op_type, inputs, attributes, outputs, domain, opset)
    for wanted, got in zip(want, have, strict=True):
        assert got.shape == wanted.shape
        if wanted.dtype == object or wanted.dtype.kind == "U":
            assert got.tolist() == wanted.tolist()
        elif wanted.dtype.kind in "iub":
            assert got.dtype == wanted.dtype
            assert np.abs(got.astype(np.int64) - wanted.astype(np.int64)).max(initial=0) <= steps
        else:
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(
                got.astype(np.float64), wanted.astype(np.float64), rtol=rtol, atol=atol
            )


SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=20, deadline=None)
TRANSFORMS = ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO"]


@quick
@given(SEEDS, st.sampled_from(TRANSFORMS), st.sampled_from([1, 2, 3]), st.booleans())
def test_linear_models(seed, post_transform, classes, names):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    coefficients = rng.normal(size=classes * 4).astype(np.float32).tolist()
    intercepts = rng.normal(size=classes).astype(np.float32).tolist()
    attributes = {"coefficients": coefficients, "intercepts": intercepts, "post_transform": post_transform}
    labels = max(classes, 2)
    if names:
        attributes["classlabels_strings"] = [f"c{k}" for k in range(labels)]
    else:
        attributes["classlabels_ints"] = list(range(10, 10 + labels))
    check("LinearClassifier", [x], attributes, outputs=2, domain=ML, opset=1)
    regression = {"coefficients": coefficients, "intercepts": intercepts, "targets": classes}
    check("LinearRegressor", [x], regression, domain=ML, opset=1)


def machine(rng, classes, kernel_type, *, probabilities):
    per_class = rng.integers(1, 4, classes).tolist()
    vectors = sum(per_class)
    pairs = classes * (classes - 1) // 2
    attributes = {
        "classlabels_ints": list(range(classes)),
        "coefficients": rng.normal(size=(classes - 1) * vectors).astype(np.float32).tolist(),
        "kernel_params": [0.3, 0.1, 2.0],
        "kernel_type": kernel_type,
        "rho": rng.normal(size=pairs).astype(np.float32).tolist(),
        "support_vectors": rng.normal(size=vectors * 3).astype(np.float32).tolist(),
        "vectors_per_class": per_class,
    }
    if probabilities:
        attributes["prob_a"] = rng.normal(size=pairs).astype(np.float32).tolist()
        attributes["prob_b"] = rng.normal(size=pairs).astype(np.float32).tolist()
    return attributes


@quick
@given(
    SEEDS,
    st.integers(2, 4),
    st.sampled_from(["LINEAR", "POLY", "RBF", "SIGMOID"]),
    st.booleans(),
    st.sampled_from(TRANSFORMS),
)
def test_support_vector_classifier(seed, classes, kernel_type, probabilities, post_transform):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    attributes = machine(rng, classes, kernel_type, probabilities=probabilities)
    attributes["post_transform"] = post_transform
    check("SVMClassifier", [x], attributes, outputs=2, domain=ML, opset=1, rtol=1e-3, atol=1e-4)


@quick
@given(
    SEEDS, st.sampled_from(["LINEAR", "POLY", "RBF", "SIGMOID"]), st.integers(0, 1), st.sampled_from([0, 4])
)
def test_support_vector_regressor(seed, kernel_type, one_class, supports):
    rng = np.random.default_rng(seed)
    attributes = {
        "coefficients": rng.normal(size=supports or 3).astype(np.float32).tolist(),
        "kernel_params": [0.3, 0.1, 2.0],
        "kernel_type": kernel_type if supports else "LINEAR",
        "n_supports": supports,
        "one_class": one_class,
        "rho": [float(np.float32(rng.normal()))],
    }
    if supports:
        attributes["support_vectors"] = rng.normal(size=supports * 3).astype(np.float32).tolist()
    check(
        "SVMRegressor",
        [rng.normal(size=(5, 3)).astype(np.float32)],
        attributes,
        domain=ML,
        opset=1,
        atol=1e-5,
    )


NODE_FIELDS = ["treeids", "nodeids", "modes", "values", "truenodeids", "falsenodeids", "featureids"]
MODES = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]


def forest(rng, trees, targets, *, mixed, kind, positive=False, several=False):
    """Return random node and leaf attributes: trees of depth up to 3 with numbers drawn from few values."""
    nodes = {name: [] for name in NODE_FIELDS}
    nodes["missing_value_tracks_true"] = []
    votes = {name: [] for name in ("treeids", "nodeids", "ids", "weights")}
    for tree in range(trees):
        pending, count = [(0, 0)], 1
        while pending:
            node, depth = pending.pop()
            leaf = depth == 3 or (depth > 0 and rng.random() < 0.3)
            values = {"treeids": tree, "nodeids": node, "featureids": int(rng.integers(3))}
            values["values"] = 0.0 if leaf else float(rng.integers(-2, 3)) / 2
            values["modes"] = "LEAF" if leaf else str(rng.choice(MODES)) if mixed else "BRANCH_LEQ"
            values["missing_value_tracks_true"] = int(rng.integers(2)) if not leaf else 0
            values["truenodeids"], values["falsenodeids"] = (0, 0) if leaf else (count, count + 1)
            if not leaf:
                pending += [(count, depth + 1), (count + 1, depth + 1)]
                count += 2
            for name, value in values.items():
                nodes[name].append(value)
            if leaf:
                for target in range(targets) if several else [int(rng.integers(targets))]:
                    weight = float(np.float32(rng.random() if positive else rng.normal()))
                    for name, value in zip(votes, (tree, node, target, weight), strict=True):
                        votes[name].append(value)
    return {f"nodes_{name}": value for name, value in nodes.items()} | {
        f"{kind}_{name}": value for name, value in votes.items()
    }


def samples(rng, dtype=np.float32):
    x = (rng.integers(-3, 4, size=(9, 3)) / 2).astype(dtype)
    x[0, 0] = np.nan
    return x


@quick
@given(
    SEEDS, st.sampled_from(["SUM", "AVERAGE", "MIN", "MAX"]), st.booleans(), st.integers(1, 3), st.booleans()
)
def test_tree_regressor(seed, aggregate, mixed, targets, based):
    rng = np.random.default_rng(seed)
    attributes = forest(rng, 4, targets, mixed=mixed, kind="target", several=True)
    attributes |= {"aggregate_function": aggregate, "n_targets": targets}
    if based:
        attributes["base_values"] = rng.normal(size=targets).astype(np.float32).tolist()
    check("TreeEnsembleRegressor", [samples(rng)], attributes, domain=ML, opset=1)


@quick
@given(SEEDS, st.booleans(), st.sampled_from(TRANSFORMS), st.booleans(), st.integers(0, 1))
def test_tree_classifier_of_several_classes(seed, mixed, post_transform, several, based):
    rng = np.random.default_rng(seed)
    attributes = forest(rng, 6, 3, mixed=mixed, kind="class", several=True)
    attributes |= {"classlabels_int64s": [4, 5, 6], "post_transform": post_transform}
    if based:
        attributes["base_values"] = rng.normal(size=3).astype(np.float32).tolist()
    check("TreeEnsembleClassifier", [samples(rng)], attributes, outputs=2, domain=ML, opset=1)


@quick
@given(SEEDS, st.booleans(), st.sampled_from(TRANSFORMS), st.integers(0, 1), st.booleans())
def test_tree_classifier_of_two_classes(seed, positive, post_transform, class_id, based):
    rng = np.random.default_rng(seed)
    attributes = forest(rng, 3, 1, mixed=False, kind="class", positive=positive)
    attributes["class_ids"] = [class_id] * len(attributes["class_ids"])
    attributes |= {"classlabels_strings": ["no", "yes"], "post_transform": post_transform}
    if based and not class_id:  # onnxruntime ignores a single base value of the second class
        attributes["base_values"] = [0.25]
    check("TreeEnsembleClassifier", [samples(rng)], attributes, outputs=2, domain=ML, opset=1)


BYTES = [np.uint8, np.int8]


def codes(rng, shape, dtype):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def grid(rng, dtype, scale=0.05):
    """Return a random scale and zero point."""
    size = np.array(scale * (0.5 + rng.random()), np.float32)
    return size, np.array(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1), dtype)


def quantized(rng, shape, dtype, scale=0.05):
    return codes(rng, shape, dtype), *grid(rng, dtype, scale)


@quick
@given(SEEDS, st.sampled_from(BYTES))
def test_quantized_elementwise(seed, dtype):
    rng = np.random.default_rng(seed)
    left, right = quantized(rng, (2, 3, 4), dtype), quantized(rng, (3, 1), dtype)
    check("QLinearAdd", [*left, *right, *grid(rng, dtype)], domain=MS, steps=1)
    check("QLinearMul", [*left, *right, *grid(rng, dtype)], domain=MS, steps=1)
    check("QLinearSigmoid", [*left, *grid(rng, dtype, 0.01)], domain=MS, steps=1)
    check("QLinearLeakyRelu", [*left, *grid(rng, dtype)], {"alpha": 0.3}, domain=MS, steps=1)
    condition = rng.random((2, 3, 4)) < 0.5
    check(
        "QLinearWhere",
        [condition, *left, *quantized(rng, (2, 3, 4), dtype), *grid(rng, dtype)],
        domain=MS,
        steps=1,
    )
    parts = [*grid(rng, dtype), *left, *quantized(rng, (2, 5, 4), dtype)]
    check("QLinearConcat", parts, {"axis": 1}, domain=MS, steps=1)
    for opset, axis in ((13, 1), (11, 1)):
        size = np.array(1 / 256, np.float32)
        output = [size, np.array(0 if dtype == np.uint8 else -128, dtype)]
        check("QLinearSoftmax", [*left, *output], {"axis": axis, "opset": opset}, domain=MS, steps=1)


@quick
@given(SEEDS, st.sampled_from(BYTES), st.integers(0, 1), st.integers(0, 1))
def test_quantized_pools(seed, dtype, last, include):
    rng = np.random.default_rng(seed)
    x = quantized(rng, (2, 6, 5, 3), dtype)
    check("QLinearGlobalAveragePool", [*x, *grid(rng, dtype)], {"channels_last": last}, domain=MS, steps=1)
    attributes = {
        "kernel_shape": [3, 2],
        "pads": [1, 0, 1, 1],
        "strides": [2, 1],
        "channels_last": last,
        "count_include_pad": include,
    }
    check("QLinearAveragePool", [*x, *grid(rng, dtype)], attributes, domain=MS, steps=1)


@quick
@given(SEEDS, st.sampled_from(BYTES), st.booleans(), st.integers(0, 1))
def test_quantized_convolutions(seed, weights, columns, last):
    rng = np.random.default_rng(seed)
    w = codes(rng, (4, 2, 3, 2), weights) // np.array(2, weights)  # half the range: no CPU saturates
    scale = rng.random(4).astype(np.float32) * 0.01 + 0.001
    zero = np.zeros(4, weights)
    if not columns:
        scale, zero = scale[0], codes(rng, (), weights) if weights == np.uint8 else np.zeros((), weights)
    x = quantized(rng, (2, 4, 6, 5), np.uint8)
    bias = rng.integers(-1000, 1000, 4).astype(np.int32)
    attributes = {"group": 2, "pads": [1, 0, 0, 1], "strides": [1, 2], "dilations": [2, 1]}
    inputs = [*x, w, scale, zero, *grid(rng, np.uint8), bias]
    check("QLinearConv", inputs, attributes, opset=10, steps=1)
    check("ConvInteger", [x[0], w, x[2], zero if zero.ndim == 0 else None], attributes, opset=10)
    inputs[0] = np.moveaxis(x[0], 1, -1).copy() if last else x[0]
    check("QLinearConv", inputs, attributes | {"channels_last": last}, domain=MS, steps=1)


@quick
@given(SEEDS, st.sampled_from(BYTES), st.booleans())
def test_integer_products(seed, dtype, columns):
    rng = np.random.default_rng(seed)
    x, x_scale, x_zero = quantized(rng, (2, 5, 40), np.uint8)
    w = codes(rng, (40, 6), dtype) // np.array(2, dtype)
    zero = codes(rng, 6 if columns else (), dtype) // np.array(2, dtype)
    scale = (rng.random(6 if columns else ()) * 0.01 + 0.001).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    check("MatMulInteger", [x, w, x_zero, zero], opset=10)
    scale = np.asarray(scale)
    check("QLinearMatMul", [x, x_scale, x_zero, w, scale, zero, *grid(rng, np.uint8, 1)], opset=10, steps=1)
    check("MatMulIntegerToFloat", [x, w, x_scale, scale, x_zero, zero, bias], domain=MS, atol=3e-3)
    real = rng.normal(size=(3, 40)).astype(np.float32)
    check("DynamicQuantizeMatMul", [real, w, scale, zero, bias], domain=MS, atol=3e-3)
    check("DynamicQuantizeLinear", [real], outputs=3, opset=11, steps=1)
    check("DynamicQuantizeLinear", [real * 0], outputs=3, opset=11)
    sums = rng.integers(-500, 500, 6).astype(np.int32)
    parts = [x[0], x_scale, x_zero, np.ascontiguousarray(w.T), scale, zero, sums]
    attributes = {"transB": 1, "alpha": 0.5}
    check("QGemm", [*parts, *grid(rng, np.uint8)], attributes, domain=MS, steps=1)
    check("QGemm", parts, attributes, domain=MS, atol=3e-3)


@quick
@given(
    SEEDS, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.sampled_from(["no", "packed", "real"])
)
def test_products_with_packed_weights(seed, bits, block_size, zeros):
    rng = np.random.default_rng(seed)
    k, n = 50, 7
    blocks = -(-k // block_size)
    b = codes(rng, (n, blocks, block_size * bits // 8), np.uint8)
    scales = rng.normal(size=(n, blocks)).astype(np.float32)
    a = rng.normal(size=(2, 3, k)).astype(np.float32)
    zero = None
    if zeros == "packed":
        zero = codes(rng, (n, -(-blocks * bits // 8)), np.uint8)
    elif zeros == "real" and bits == 4:
        zero = rng.normal(size=(n, blocks)).astype(np.float32)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
    inputs = [a, b, scales, zero, None, rng.normal(size=n).astype(np.float32)]
    check("MatMulNBits", inputs, attributes, domain=MS, rtol=1e-3, atol=1e-3)


@quick
@given(SEEDS, st.sampled_from([4, 8]), st.booleans())
def test_packed_gather(seed, bits, zeros):
    rng = np.random.default_rng(seed)
    data = codes(rng, (9, 64 * bits // 8), np.uint8)
    scales = rng.normal(size=(9, 4)).astype(np.float32)
    points = codes(rng, (9, 4 * bits // 8), np.uint8) if zeros else None
    indices = rng.integers(-9, 9, (2, 3))
    attributes = {"bits": bits, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    check("GatherBlockQuantized", [data, indices, scales, points], attributes, domain=MS)


def floats(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@quick
@given(
    SEEDS, st.sampled_from(["none", "lengths", "ends", "keys", "queries"]), st.booleans(), st.integers(0, 1)
)
def test_attention(seed, masking, past, unidirectional):
    rng = np.random.default_rng(seed)
    batch, length, width, count = 2, 4, 6, 2
    before = 3 if past and masking in {"none", "keys"} else 0
    total = length + before
    masks = {
        "none": None,
        "lengths": rng.integers(1, total + 1, batch),
        "ends": np.concatenate((rng.integers(2, total + 1, batch), rng.integers(0, 2, batch))),
        "keys": rng.integers(0, 2, (batch, total)),
        "queries": rng.integers(0, 2, (batch, length, total)),
    }
    mask = None if masks[masking] is None else masks[masking].astype(np.int32)
    state = floats(rng, 2, batch, count, before, 4) if before else None
    attributes = {"num_heads": count, "unidirectional": unidirectional}
    inputs = [floats(rng, batch, length, width), floats(rng, width, 24), floats(rng, 24), mask, state]
    check("Attention", inputs, attributes, outputs=2, domain=MS, atol=3e-3)
    bias = floats(rng, batch, count, length, total)
    if not before:  # onnxruntime does not take both
        check("Attention", [*inputs, bias], attributes, outputs=2, domain=MS, atol=3e-3)
    x, x_scale, x_zero = quantized(rng, (batch, length, width), np.uint8)
    w, w_scale, w_zero = quantized(rng, (width, 24), np.int8)
    if masking != "queries" and not before:
        parts = [
            x,
            w // np.int8(2),
            floats(rng, 24),
            x_scale,
            w_scale,
            mask,
            x_zero,
            w_zero // np.int8(2),
            state,
        ]
        check("QAttention", parts, attributes, domain=MS, atol=3e-3)


@quick
@given(SEEDS, st.booleans(), st.booleans(), st.booleans())
def test_multi_head_attention(seed, crossed, masked, biased):
    rng = np.random.default_rng(seed)
    batch, length, others, count, size = 2, 3, 5, 2, 4
    width = count * size
    query = floats(rng, batch, length, width)
    bias = mask = state = None
    if crossed:
        key, value = (floats(rng, batch, count, others, size) for _ in range(2))
    else:
        key, value = (floats(rng, batch, others, width) for _ in range(2))
        state = floats(rng, batch, count, 2, size) if biased else None
        bias = floats(rng, 3 * width) if biased else None
    total = others + (2 if state is not None else 0)
    if masked:
        mask = rng.integers(0, 2, (batch, total)).astype(np.int32)
    inputs = [query, key, value, bias, mask, floats(rng, 1, count, length, total), state, state]
    outputs = 1 if crossed else 3
    check("MultiHeadAttention", inputs, {"num_heads": count}, outputs=outputs, domain=MS, atol=3e-3)


def test_packed_multi_head_attention():
    rng = np.random.default_rng(0)
    query, key, value = (floats(rng, 2, 3, 8) for _ in range(3))
    found = lookup("MultiHeadAttention", MS, 1)
    split = [part.reshape(2, 3, 2, 1, 4) for part in (query, key, value)]
    bias = floats(rng, 24)
    want = run(found, [query, key, value, bias], {"num_heads": 2})
    for inputs in (
        [np.concatenate(split, 3), None, None, bias],
        [query, np.concatenate(split[1:], 3), None, bias],
    ):
        for wanted, got in zip(want, run(found, inputs, {"num_heads": 2}), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@quick
@given(SEEDS, st.integers(0, 1), st.booleans(), st.booleans())
def test_rotary_embedding(seed, interleaved, flat, offset):
    rng = np.random.default_rng(seed)
    x = floats(rng, 2, 5, 24) if flat else floats(rng, 2, 3, 5, 8)
    places = np.array([2]) if offset else rng.integers(0, 9, (2, 5))
    check(
        "RotaryEmbedding",
        [x, places, floats(rng, 9, 4), floats(rng, 9, 4)],
        {"interleaved": interleaved},
        domain=MS,
    )


@quick
@given(SEEDS)
def test_fused_normalizations_and_activations(seed):
    rng = np.random.default_rng(seed)
    x, gamma, beta, bias = floats(rng, 2, 3, 8), floats(rng, 8), floats(rng, 8), floats(rng, 8)
    for skip in (floats(rng, 2, 3, 8), floats(rng, 1, 3, 8), floats(rng, 3, 8)):
        for op_type, inputs in {
            "SkipLayerNormalization": [x, skip, gamma, beta, bias],
            "SkipSimplifiedLayerNormalization": [x, skip, gamma, bias],
        }.items():
            attributes = {"epsilon": 0.1}
            want, have = both(op_type, inputs, attributes, 4, MS)
            for place in (0, 3):  # onnxruntime does not fill the two between on a CPU
                np.testing.assert_allclose(have[place], want[place], rtol=1e-4, atol=1e-5)
    ids, segments = rng.integers(0, 9, (2, 3)).astype(np.int32), rng.integers(0, 2, (2, 3)).astype(np.int32)
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    tables = [ids, segments, floats(rng, 9, 8), floats(rng, 4, 8), floats(rng, 2, 8), gamma, beta]
    check(
        "EmbedLayerNormalization",
        [*tables, mask],
        {"epsilon": 0.1},
        outputs=3,
        domain=MS,
        rtol=1e-4,
        atol=1e-5,
    )
    tables[1] = tables[4] = None
    places = rng.integers(0, 4, (2, 3)).astype(np.int32)
    check("EmbedLayerNormalization", [*tables, mask, places], outputs=2, domain=MS, rtol=1e-4, atol=1e-5)
    for op_type, inputs in {
        "Gelu": [x],
        "BiasGelu": [x, bias],
        "FastGelu": [x, bias],
        "QuickGelu": [x],
    }.items():
        check(op_type, inputs, domain=MS, rtol=1e-4, atol=1e-5)
    check("SimplifiedLayerNormalization", [x, gamma], opset=17, rtol=1e-4, atol=1e-5)


@quick
@given(SEEDS, st.booleans(), st.booleans())
def test_fused_products(seed, turned, batch):
    rng = np.random.default_rng(seed)
    a, b = floats(rng, 2, 3, 4), floats(rng, 2, 4, 5)
    a, b = (side.swapaxes(-1, -2).copy() if turned else side for side in (a, b))
    a = np.moveaxis(a, -2, 0).copy() if batch else a
    attributes = {"alpha": 0.5, "transA": int(turned), "transB": int(turned), "transBatchA": int(batch)}
    check("FusedMatMul", [a, b], attributes, domain=MS, atol=1e-5)
    for activation in ("Relu", "LeakyRelu", "Sigmoid", "Tanh"):
        attributes = {
            "activation": activation,
            "activation_alpha": 0.1,
            "alpha": 0.7,
            "beta": 0.3,
            "transB": 1,
        }
        inputs = [floats(rng, 3, 4), floats(rng, 5, 4), floats(rng, 5)]
        check("FusedGemm", inputs, attributes, domain=MS, atol=1e-5)
    x, w = floats(rng, 1, 4, 6, 5), floats(rng, 6, 2, 3, 3)
    known = {
        "Relu": None,
        "LeakyRelu": [0.2],
        "Clip": [-1.0, 1.0],
        "HardSigmoid": [0.3, 0.4],
        "Sigmoid": None,
    }
    for activation, parameters in known.items():
        attributes = {"activation": activation, "group": 2, "pads": [1, 1, 1, 1]}
        attributes |= {"activation_params": parameters} if parameters else {}
        check("FusedConv", [x, w, floats(rng, 6)], attributes, domain=MS, atol=1e-5)
    check(
        "FusedConv",
        [x, w, floats(rng, 6), floats(rng, 1, 6, 4, 3)],
        {"activation": "Relu", "group": 2},
        domain=MS,
        atol=1e-5,
    )
    pool = {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [0, 1, 1, 0]}
    check("NhwcMaxPool", [codes(rng, (1, 6, 5, 3), np.uint8)], pool, domain=MS)


@quick
@given(SEEDS)
def test_small_operators_of_microsoft(seed):
    rng = np.random.default_rng(seed)
    check(
        "Inverse", [floats(rng, 2, 3, 3) + 3 * np.eye(3, dtype=np.float32)], domain=MS, rtol=1e-3, atol=1e-4
    )
    for metric in ("euclidean", "sqeuclidean"):
        check("CDist", [floats(rng, 4, 3), floats(rng, 5, 3)], {"metric": metric}, domain=MS, atol=1e-4)
    check("ExpandDims", [floats(rng, 2, 3), np.array(-1, np.int32)], domain=MS)
    check("GatherND", [floats(rng, 2, 3, 4), rng.integers(0, 2, (5, 2))], domain=MS)
    check("Pad", [floats(rng, 2, 3), np.array([0, 2, 1, -1]), np.array([1.5], np.float32)], domain=MS)
    check("Range", [np.array(1, np.int64), np.array(5, np.int64)], domain=MS)
    check("Trilu", [floats(rng, 2, 3, 3), np.array(1)], {"upper": 0}, domain=MS)
    check("Unique", [rng.integers(0, 4, 9).astype(np.float32)], outputs=3, domain=MS)
    check("DequantizeLinear", [codes(rng, (2, 3), np.uint8), *grid(rng, np.uint8)], domain=MS)
    check("QuantizeLinear", [floats(rng, 2, 3), *grid(rng, np.uint8)], domain=MS)


def words(rng, *shape):
    return rng.choice(["a", "b", "Cc", "dd e", ""], shape).astype(object)


@quick
@given(SEEDS)
def test_features(seed):
    rng = np.random.default_rng(seed)
    x = floats(rng, 4, 3)
    x[0] = 0
    for norm in ("MAX", "L1", "L2"):
        check("Normalizer", [x], {"norm": norm}, domain=ML, opset=1)
    check("Scaler", [x], {"offset": [0.5, 1.0, 2.0], "scale": [2.0] * 3}, domain=ML, opset=1)
    check("Scaler", [rng.integers(0, 9, (4, 3))], {"offset": [0.5], "scale": [2.0]}, domain=ML, opset=1)
    check("Binarizer", [x], {"threshold": 0.25}, domain=ML, opset=1)
    missing = np.where(rng.random((4, 3)) < 0.5, np.float32(np.nan), x)
    for imputed in ([1.0], [1.0, 2.0, 3.0]):
        attributes = {"imputed_value_floats": imputed, "replaced_value_float": float("nan")}
        check("Imputer", [missing], attributes, domain=ML, opset=1)
    attributes = {"imputed_value_int64s": [7], "replaced_value_int64": 1}
    check("Imputer", [rng.integers(0, 3, (4, 3))], attributes, domain=ML, opset=1)
    check("ArrayFeatureExtractor", [x, np.array([2, 0])], domain=ML, opset=1)
    check("FeatureVectorizer", [x, x[:, :2]], {"inputdimensions": [3, 2]}, domain=ML, opset=1)


@quick
@given(SEEDS)
def test_categories(seed):
    rng = np.random.default_rng(seed)
    texts, numbers = words(rng, 2, 3), rng.integers(-1, 5, (2, 3))
    check("OneHotEncoder", [numbers], {"cats_int64s": [3, 1, 2]}, domain=ML, opset=1)
    check("OneHotEncoder", [texts], {"cats_strings": ["b", "a"]}, domain=ML, opset=1)
    mapping = {
        "cats_int64s": [3, 1, 2],
        "cats_strings": ["b", "a", "Cc"],
        "default_int64": 9,
        "default_string": "?",
    }
    check("CategoryMapper", [numbers], mapping, domain=ML, opset=1)
    check("CategoryMapper", [texts], mapping, domain=ML, opset=1)
    check("LabelEncoder", [texts], {"classes_strings": ["b", "a"], "default_int64": 9}, domain=ML, opset=1)
    check(
        "LabelEncoder", [numbers], {"classes_strings": ["b", "a"], "default_string": "?"}, domain=ML, opset=1
    )
    reals = np.where(numbers < 0, np.float32(np.nan), numbers.astype(np.float32))
    keys = {"strings": (texts, ["a", "b", "Cc"]), "int64s": (numbers, [3, 1, 2])}
    keys["floats"] = (reals, [float("nan"), 1.0, 3.0])
    values = {"strings": ["x", "y", "z"], "int64s": [7, 8, 9], "floats": [0.5, 1.5, 2.5]}
    known = [("strings", "int64s"), ("strings", "floats"), ("int64s", "strings"), ("int64s", "floats")]
    for key, value in [*known, ("floats", "strings"), ("floats", "int64s"), ("strings", "strings")]:
        x, listed = keys[key]
        attributes = {f"keys_{key}": listed, f"values_{value}": values[value], "default_float": -2.5}
        if key != "floats":  # onnxruntime finds NaN keys from version 4 on, the specification before
            check("LabelEncoder", [x], attributes, domain=ML, opset=2)
        check("LabelEncoder", [x], attributes, domain=ML, opset=4)
    attributes = {"keys_tensor": np.array([1, 3]), "values_tensor": np.array([5, 6], np.int16)}
    attributes["default_tensor"] = np.array([4], np.int16)
    have = run(lookup("LabelEncoder", ML, 4), [np.array([[3, 2, 1]])], attributes)
    assert have[0].tolist() == [[6, 4, 5]]


def test_maps():
    rows = np.array([[0.5, 0.25], [1, 0]], np.float32)
    (zipped,) = run(lookup("ZipMap", ML, 1), [rows], {"classlabels_strings": ["a", "b"]})
    assert zipped == [{"a": 0.5, "b": 0.25}, {"a": 1.0, "b": 0.0}]
    (vector,) = run(lookup("DictVectorizer", ML, 1), [zipped[0]], {"string_vocabulary": ["b", "c", "a"]})
    assert vector.tolist() == [[0.25, 0, 0.5]]
    assert vector.dtype == np.float32
    cast = lookup("CastMap", ML, 1)
    assert run(cast, [{2: 1.5, 0: 2.5}], {"cast_to": "TO_INT64"})[0].tolist() == [[2, 1]]
    sparse = {"cast_to": "TO_FLOAT", "map_form": "SPARSE", "max_map": 3}
    assert run(cast, [{2: "1.5"}], sparse)[0].tolist() == [[0, 0, 1.5]]


def test_tree_of_doubles_and_sets():
    rng = np.random.default_rng(0)
    attributes = {
        "nodes_splits": np.array([0.1, 0.3]),
        "nodes_featureids": [0, 1],
        "nodes_modes": np.array([0, 4], np.uint8),
        "nodes_truenodeids": [0, 1],
        "nodes_trueleafs": [1, 1],
        "nodes_falsenodeids": [1, 2],
        "nodes_falseleafs": [0, 1],
        "tree_roots": [0],
        "leaf_targetids": [0, 1, 0],
        "leaf_weights": np.array([0.5, 0.25, -1.0]),
        "n_targets": 2,
    }
    x = rng.choice([0.05, 0.1, 0.3, 0.7], (9, 2))
    for aggregate in range(4):
        for post_transform in (0, 3):  # onnxruntime takes 1 and 2 for each other
            extra = {"aggregate_function": aggregate, "post_transform": post_transform}
            check("TreeEnsemble", [x], attributes | extra, domain=ML)


def test_trees_that_do_not_end_are_refused():
    attributes = {
        "nodes_treeids": [0, 0, 0],
        "nodes_nodeids": [0, 1, 2],
        "nodes_modes": ["BRANCH_LEQ", "BRANCH_LEQ", "LEAF"],
        "nodes_values": [0.0, 0.0, 0.0],
        "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 2, 0],
        "nodes_featureids": [0, 0, 0],
        "target_treeids": [0],
        "target_nodeids": [2],
        "target_ids": [0],
        "target_weights": [1.0],
    }
    found = lookup("TreeEnsembleRegressor", ML, 1)
    with pytest.raises(ValueError, match="cycle"):
        run(found, [np.array([[-1.0]], np.float32)], attributes)
    attributes["nodes_truenodeids"] = [9, 2, 0]
    with pytest.raises(ValueError, match="does not exist"):
        run(found, [np.array([[-1.0]], np.float32)], attributes)


@quick
@given(SEEDS)
def test_texts(seed):
    rng = np.random.default_rng(seed)
    check("StringConcat", [words(rng, 2, 3), words(rng, 3)])
    for delimiter in ("", "d"):
        parts = words(rng, 2, 3) + ("e" if delimiter else "")  # "" has no part in onnxruntime, one in Python
        check("StringSplit", [parts], {"delimiter": delimiter, "maxsplit": 1}, outputs=2)
    check("RegexFullMatch", [words(rng, 2, 3)], {"pattern": "[a-d]+"})


@pytest.mark.parametrize(
    ("action", "sensitive", "expected"),
    [
        ("NONE", 1, ["A", "b", "Éa"]),
        ("NONE", 0, ["b", "Éa"]),
        ("UPPER", 0, ["B", "ÉA"]),
        ("LOWER", 1, ["a", "b", "éa"]),
    ],
)
def test_string_normalizer(action, sensitive, expected):
    attributes = {"case_change_action": action, "is_case_sensitive": sensitive, "stopwords": ["a"]}
    found = lookup("StringNormalizer", "", 10)
    x = np.array(["a", "A", "b", "Éa"], object)
    assert run(found, [x], attributes)[0].tolist() == expected
    assert run(found, [x[None]], attributes)[0].tolist() == [expected]
    attributes["stopwords"] = ["a", "A", "b", "Éa"]
    assert run(found, [x], attributes)[0].tolist() == [""]


@quick
@given(SEEDS, st.sampled_from(["TF", "IDF", "TFIDF"]), st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_n_grams(seed, mode, skips, least, named):
    rng = np.random.default_rng(seed)
    pool = [1, 2, 3, 1, 2, 2, 3, 3, 1, 1, 2, 3, 3, 2, 1]
    attributes = {"max_gram_length": 3, "max_skip_count": skips, "min_gram_length": least, "mode": mode}
    attributes |= {"ngram_counts": [0, 3, 9], "ngram_indexes": [1, 0, 2, 3, 4, 6, 5, 7]}
    attributes |= {"weights": rng.random(8).astype(np.float32).tolist()}
    x = rng.integers(1, 4, (3, 9))
    if named:
        attributes["pool_strings"], x = [str(item) for item in pool], x.astype(str).astype(object)
    else:
        attributes["pool_int64s"] = pool
    for given_rows in (x, x[0]):
        check("TfIdfVectorizer", [given_rows], attributes)


@quick
@given(SEEDS, st.integers(0, 1), st.integers(0, 1), st.sampled_from([None, 3, 8]), st.sampled_from([1, 2]))
def test_fourier_transforms(seed, inverse, onesided, length, parts):
    rng = np.random.default_rng(seed)
    x = floats(rng, 2, 5, 6, parts)
    size = None if length is None else np.array(length)
    if inverse and onesided:
        return  # onnxruntime refuses it; the backend tests have it
    if onesided and parts == 2:
        return
    attributes = {"inverse": inverse, "onesided": onesided}
    check("DFT", [x, size], attributes | {"axis": 1}, opset=17, rtol=1e-3, atol=1e-4)
    check("DFT", [x, size, np.array(2)], attributes, opset=20, rtol=1e-3, atol=1e-4)
    signal = floats(rng, 2, 30, 1)
    inputs = [signal, np.array(3), floats(rng, 8), np.array(8)]
    check("STFT", inputs, {"onesided": onesided}, opset=17, rtol=1e-3, atol=1e-4)


def test_windows():
    for op_type in ("HannWindow", "HammingWindow", "BlackmanWindow"):
        for periodic in (0, 1):
            check(op_type, [np.array(9)], {"periodic": periodic}, opset=17, atol=1e-6)
            one = run(lookup(op_type, "", 17), [np.array(1)], {"periodic": periodic})[0]
            assert np.isfinite(one).all()
    numbers = [
        np.array(8),
        np.array(64),
        np.array(8192),
        np.array(100.0, np.float32),
        np.array(4000.0, np.float32),
    ]
    check("MelWeightMatrix", numbers, opset=17)


@quick
@given(SEEDS, st.sampled_from(["none", "sum", "mean"]), st.booleans(), st.sampled_from([None, 1, -1]))
def test_losses(seed, reduction, weighted, ignored):
    rng = np.random.default_rng(seed)
    scores, target = floats(rng, 3, 4, 2), rng.integers(0, 4, (3, 2))
    target[0, 0] = 1 if ignored is None else ignored
    target[1, 0] = 2
    weight = rng.random(4).astype(np.float32) + 0.1 if weighted else None
    attributes = {"reduction": reduction} | ({} if ignored is None else {"ignore_index": ignored})
    check("NegativeLogLikelihoodLoss", [scores, target, weight], attributes, opset=13)
    check("SoftmaxCrossEntropyLoss", [scores, target, weight], attributes, outputs=2, opset=13)


def test_random_numbers():
    random_draws.reseed(1)
    shape = (200, 50)
    like = np.zeros(shape, np.float32)
    (normal,) = run(
        lookup("RandomNormal", "", 22), [], {"shape": shape, "mean": 3.0, "scale": 2.0, "dtype": 11}
    )
    assert normal.shape == shape
    assert normal.dtype == np.float64
    assert abs(normal.mean() - 3) < 0.1
    assert abs(normal.std() - 2) < 0.1
    (uniform,) = run(lookup("RandomUniformLike", "", 22), [like], {"low": -1.0, "high": 3.0})
    assert uniform.dtype == np.float32
    assert uniform.min() >= -1
    assert uniform.max() <= 3
    assert abs(uniform.mean() - 1) < 0.1
    (half,) = run(lookup("RandomNormalLike", "", 22), [like], {"dtype": 10})
    assert half.dtype == np.float16
    (even,) = run(lookup("RandomUniform", "", 1), [], {"shape": [4], "seed": 5.0})
    again = run(lookup("RandomUniform", "", 1), [], {"shape": [4], "seed": 5.0})[0]
    assert even.tolist() == again.tolist()
    assert even.tolist() != run(lookup("RandomUniform", "", 1), [], {"shape": [4]})[0].tolist()
    (coin,) = run(lookup("Bernoulli", "", 22), [like + np.float32(0.3)], {"dtype": 6})
    assert coin.dtype == np.int32
    assert abs(coin.mean() - 0.3) < 0.05
    logits = np.log(np.array([[1, 2, 7], [5, 5, 0.0001]], np.float32))
    (classes,) = run(lookup("Multinomial", "", 7), [logits], {"sample_size": 4000, "dtype": 7})
    assert classes.dtype == np.int64
    shares = np.bincount(classes[0], minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.04)
    assert classes[1].max() <= 2
    x = np.ones(shape, np.float32)
    dropped, mask = run(
        lookup("Dropout", "", 22), [x, np.array(0.25, np.float32), np.array(True)], {"seed": 3}
    )
    assert abs(mask.mean() - 0.75) < 0.02
    np.testing.assert_allclose(dropped, mask / 0.75, rtol=1e-6)
    kept, mask = run(lookup("Dropout", "", 10), [x], {})
    assert kept is x
    assert mask.all()


def microsoft_schemas():
    bindings = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    return {s.name: s for s in bindings.get_all_operator_schema() if s.domain == MS}


@pytest.mark.parametrize("known", [k for k in kernels() if k.domain == MS], ids=lambda known: known.op_type)
def test_signature_is_that_of_onnxruntime(known):
    schema = microsoft_schemas()[known.op_type]
    parameters = inspect.signature(known.function).parameters
    inputs = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in inputs] == [i.name for i in schema.inputs]
    for parameter, formal in zip(inputs, schema.inputs, strict=True):
        option = str(formal.option).rsplit(".", 1)[-1]
        assert (parameter.kind is parameter.VAR_POSITIONAL) == (option == "Variadic")
        if parameter.default is None:
            assert option == "Optional"
    named = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(named) == set(schema.attributes)
    for name, attribute in schema.attributes.items():
        default = onnx.AttributeProto.FromString(attribute._default_value)
        if attribute.required:
            assert named[name].default is inspect.Parameter.empty
        elif not default.name:
            assert named[name].default is None
        else:
            value = helper.get_attribute_value(default)
            value = value.decode() if isinstance(value, bytes) else value
            assert named[name].default == (pytest.approx(value) if isinstance(value, float) else value)
