"""Kernels of ai.onnx.ml against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import ML, SEEDS, check, floats, quick, words

from onnxslim_lab.kernels import lookup, run

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
