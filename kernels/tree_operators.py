"""ai.onnx.ml: the operators that evaluate tree ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.kernels.kept import kept
from onnxslim_lab.kernels.ml import ML
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.scores import TRANSFORMS, labels_at, transformed, two_classes
from onnxslim_lab.kernels.trees import Forest, grown, planted

_AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")


def numbers(operator: str, floats: Sequence[float] | None, tensor: Array | None) -> Array:
    """Return the one of a float attribute and its tensor twin that is given; empty without either.

    Raises:
        ValueError: Both are given.
    """
    if floats and tensor is not None:
        raise ValueError(f"{operator}: an attribute is given as floats and as a tensor")
    return np.array(floats or (), np.float32) if tensor is None else tensor.reshape(-1)


def compared(X: Array) -> Array:
    """Return the rows as they are compared: doubles as they are, all else in float32."""
    rows = np.atleast_2d(X)
    return rows if rows.dtype == np.float64 else rows.astype(np.float32)


@kernel("TreeEnsembleClassifier", since=1, domain=ML)
def TreeEnsembleClassifier_1(
    X: Array,
    *,
    base_values: Sequence[float] | None = None,
    class_ids: Sequence[int] | None = None,
    class_nodeids: Sequence[int] | None = None,
    class_treeids: Sequence[int] | None = None,
    class_weights: Sequence[float] | None = None,
    classlabels_int64s: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    nodes_falsenodeids: Sequence[int] | None = None,
    nodes_featureids: Sequence[int] | None = None,
    nodes_hitrates: Sequence[float] | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Sequence[str] | None = None,
    nodes_nodeids: Sequence[int] | None = None,
    nodes_treeids: Sequence[int] | None = None,
    nodes_truenodeids: Sequence[int] | None = None,
    nodes_values: Sequence[float] | None = None,
    post_transform: str = "NONE",
) -> tuple[Array, Array]:
    """Return the labels and the scores of every class."""
    return TreeEnsembleClassifier_3(
        X,
        base_values=base_values,
        class_ids=class_ids,
        class_nodeids=class_nodeids,
        class_treeids=class_treeids,
        class_weights=class_weights,
        classlabels_int64s=classlabels_int64s,
        classlabels_strings=classlabels_strings,
        nodes_falsenodeids=nodes_falsenodeids,
        nodes_featureids=nodes_featureids,
        nodes_hitrates=nodes_hitrates,
        nodes_missing_value_tracks_true=nodes_missing_value_tracks_true,
        nodes_modes=nodes_modes,
        nodes_nodeids=nodes_nodeids,
        nodes_treeids=nodes_treeids,
        nodes_truenodeids=nodes_truenodeids,
        nodes_values=nodes_values,
        post_transform=post_transform,
    )


@kernel("TreeEnsembleClassifier", since=3, domain=ML)
def TreeEnsembleClassifier_3(
    X: Array,
    *,
    base_values: Sequence[float] | None = None,
    base_values_as_tensor: Array | None = None,
    class_ids: Sequence[int] | None = None,
    class_nodeids: Sequence[int] | None = None,
    class_treeids: Sequence[int] | None = None,
    class_weights: Sequence[float] | None = None,
    class_weights_as_tensor: Array | None = None,
    classlabels_int64s: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
    nodes_falsenodeids: Sequence[int] | None = None,
    nodes_featureids: Sequence[int] | None = None,
    nodes_hitrates: Sequence[float] | None = None,
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Sequence[str] | None = None,
    nodes_nodeids: Sequence[int] | None = None,
    nodes_treeids: Sequence[int] | None = None,
    nodes_truenodeids: Sequence[int] | None = None,
    nodes_values: Sequence[float] | None = None,
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
) -> tuple[Array, Array]:
    """Return the labels and the scores of every class: sums of the leaves' weights plus base values.

    Of two classes only one may have weights. They score the second class, whichever is named, which is
    chosen above 0.5 when no weight is negative, else above 0.
    """
    known = _classifier(
        base_values=base_values,
        base_values_as_tensor=base_values_as_tensor,
        class_ids=class_ids,
        class_nodeids=class_nodeids,
        class_treeids=class_treeids,
        class_weights=class_weights,
        class_weights_as_tensor=class_weights_as_tensor,
        labels=classlabels_strings or classlabels_int64s,
        nodes_falsenodeids=nodes_falsenodeids,
        nodes_featureids=nodes_featureids,
        nodes_missing_value_tracks_true=nodes_missing_value_tracks_true,
        nodes_modes=nodes_modes,
        nodes_nodeids=nodes_nodeids,
        nodes_treeids=nodes_treeids,
        nodes_truenodeids=nodes_truenodeids,
        nodes_values=nodes_values,
        nodes_values_as_tensor=nodes_values_as_tensor,
    )
    base = known.base
    total = known.forest.votes(compared(X), known.count, "SUM")
    if not known.alone:
        scores = total + base if len(base) else total
        found = labels_at(scores.argmax(1), classlabels_int64s, classlabels_strings)
        return found, transformed(scores.astype(np.float32), post_transform)
    column = int(known.forest.targets[0])
    if len(base):
        total[:, column] += base[0]
    place = (total[:, column] > (0.5 if known.positive else 0)).astype(np.int64)
    found = labels_at(place, classlabels_int64s, classlabels_strings)
    if column:
        return found, transformed(total.astype(np.float32), post_transform)
    return found, two_classes(total[:, :1].astype(np.float32), post_transform, probability=known.positive)


@dataclass(frozen=True)
class Classifier:
    """What a TreeEnsembleClassifier knows from its attributes.

    Attributes:
        forest: The trees.
        base: What is added to the scores; may be empty.
        count: Number of scores.
        alone: One of two classes has all the weights.
        positive: No weight is negative.
    """

    forest: Forest
    base: Array
    count: int
    alone: bool
    positive: bool


@kept
def _classifier(
    *,
    base_values: Sequence[float] | None,
    base_values_as_tensor: Array | None,
    class_ids: Sequence[int] | None,
    class_nodeids: Sequence[int] | None,
    class_treeids: Sequence[int] | None,
    class_weights: Sequence[float] | None,
    class_weights_as_tensor: Array | None,
    labels: Sequence[int] | Sequence[str] | None,
    nodes_falsenodeids: Sequence[int] | None,
    nodes_featureids: Sequence[int] | None,
    nodes_missing_value_tracks_true: Sequence[int] | None,
    nodes_modes: Sequence[str] | None,
    nodes_nodeids: Sequence[int] | None,
    nodes_treeids: Sequence[int] | None,
    nodes_truenodeids: Sequence[int] | None,
    nodes_values: Sequence[float] | None,
    nodes_values_as_tensor: Array | None,
) -> Classifier:
    """Return what the attributes of a TreeEnsembleClassifier say, made once."""
    splits = numbers("TreeEnsembleClassifier", nodes_values, nodes_values_as_tensor)
    weights = numbers("TreeEnsembleClassifier", class_weights, class_weights_as_tensor)
    base = numbers("TreeEnsembleClassifier", base_values, base_values_as_tensor).astype(np.float64)
    nodes = {
        "treeids": nodes_treeids,
        "nodeids": nodes_nodeids,
        "modes": nodes_modes,
        "truenodeids": nodes_truenodeids,
        "falsenodeids": nodes_falsenodeids,
        "featureids": nodes_featureids,
        "missing_value_tracks_true": nodes_missing_value_tracks_true,
    }
    forest = grown(
        nodes, {"treeids": class_treeids, "nodeids": class_nodeids, "ids": class_ids}, splits, weights
    )
    number = len(labels or ())
    return Classifier(
        forest=forest,
        base=base,
        count=max(number, int(forest.targets.max(initial=0)) + 1),
        alone=number == 2 and len(base) < 2 and len(np.unique(forest.targets)) == 1,
        positive=bool((weights >= 0).all()),
    )


@kernel("TreeEnsembleRegressor", since=1, domain=ML)
def TreeEnsembleRegressor_1(
    X: Array,
    *,
    aggregate_function: str = "SUM",
    base_values: Sequence[float] | None = None,
    n_targets: int | None = None,
    nodes_falsenodeids: Sequence[int] | None = None,
    nodes_featureids: Sequence[int] | None = None,
    nodes_hitrates: Sequence[float] | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Sequence[str] | None = None,
    nodes_nodeids: Sequence[int] | None = None,
    nodes_treeids: Sequence[int] | None = None,
    nodes_truenodeids: Sequence[int] | None = None,
    nodes_values: Sequence[float] | None = None,
    post_transform: str = "NONE",
    target_ids: Sequence[int] | None = None,
    target_nodeids: Sequence[int] | None = None,
    target_treeids: Sequence[int] | None = None,
    target_weights: Sequence[float] | None = None,
) -> Array:
    """Return the aggregated weights of the leaves for every target."""
    return TreeEnsembleRegressor_3(
        X,
        aggregate_function=aggregate_function,
        base_values=base_values,
        n_targets=n_targets,
        nodes_falsenodeids=nodes_falsenodeids,
        nodes_featureids=nodes_featureids,
        nodes_hitrates=nodes_hitrates,
        nodes_missing_value_tracks_true=nodes_missing_value_tracks_true,
        nodes_modes=nodes_modes,
        nodes_nodeids=nodes_nodeids,
        nodes_treeids=nodes_treeids,
        nodes_truenodeids=nodes_truenodeids,
        nodes_values=nodes_values,
        post_transform=post_transform,
        target_ids=target_ids,
        target_nodeids=target_nodeids,
        target_treeids=target_treeids,
        target_weights=target_weights,
    )


@kernel("TreeEnsembleRegressor", since=3, domain=ML)
def TreeEnsembleRegressor_3(
    X: Array,
    *,
    aggregate_function: str = "SUM",
    base_values: Sequence[float] | None = None,
    base_values_as_tensor: Array | None = None,
    n_targets: int | None = None,
    nodes_falsenodeids: Sequence[int] | None = None,
    nodes_featureids: Sequence[int] | None = None,
    nodes_hitrates: Sequence[float] | None = None,
    nodes_hitrates_as_tensor: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Sequence[str] | None = None,
    nodes_nodeids: Sequence[int] | None = None,
    nodes_treeids: Sequence[int] | None = None,
    nodes_truenodeids: Sequence[int] | None = None,
    nodes_values: Sequence[float] | None = None,
    nodes_values_as_tensor: Array | None = None,
    post_transform: str = "NONE",
    target_ids: Sequence[int] | None = None,
    target_nodeids: Sequence[int] | None = None,
    target_treeids: Sequence[int] | None = None,
    target_weights: Sequence[float] | None = None,
    target_weights_as_tensor: Array | None = None,
) -> Array:
    """Return the aggregated weights of the leaves for every target, plus base values, in float32."""
    forest, base = _regressor(
        base_values=base_values,
        base_values_as_tensor=base_values_as_tensor,
        nodes_falsenodeids=nodes_falsenodeids,
        nodes_featureids=nodes_featureids,
        nodes_missing_value_tracks_true=nodes_missing_value_tracks_true,
        nodes_modes=nodes_modes,
        nodes_nodeids=nodes_nodeids,
        nodes_treeids=nodes_treeids,
        nodes_truenodeids=nodes_truenodeids,
        nodes_values=nodes_values,
        nodes_values_as_tensor=nodes_values_as_tensor,
        target_ids=target_ids,
        target_nodeids=target_nodeids,
        target_treeids=target_treeids,
        target_weights=target_weights,
        target_weights_as_tensor=target_weights_as_tensor,
    )
    total = forest.votes(compared(X), n_targets or 1, aggregate_function)
    return transformed((total + base if len(base) else total).astype(np.float32), post_transform)


@kept
def _regressor(
    *,
    base_values: Sequence[float] | None,
    base_values_as_tensor: Array | None,
    nodes_falsenodeids: Sequence[int] | None,
    nodes_featureids: Sequence[int] | None,
    nodes_missing_value_tracks_true: Sequence[int] | None,
    nodes_modes: Sequence[str] | None,
    nodes_nodeids: Sequence[int] | None,
    nodes_treeids: Sequence[int] | None,
    nodes_truenodeids: Sequence[int] | None,
    nodes_values: Sequence[float] | None,
    nodes_values_as_tensor: Array | None,
    target_ids: Sequence[int] | None,
    target_nodeids: Sequence[int] | None,
    target_treeids: Sequence[int] | None,
    target_weights: Sequence[float] | None,
    target_weights_as_tensor: Array | None,
) -> tuple[Forest, Array]:
    """Return the forest of a TreeEnsembleRegressor and its base values, made once."""
    splits = numbers("TreeEnsembleRegressor", nodes_values, nodes_values_as_tensor)
    weights = numbers("TreeEnsembleRegressor", target_weights, target_weights_as_tensor)
    base = numbers("TreeEnsembleRegressor", base_values, base_values_as_tensor).astype(np.float64)
    nodes = {
        "treeids": nodes_treeids,
        "nodeids": nodes_nodeids,
        "modes": nodes_modes,
        "truenodeids": nodes_truenodeids,
        "falsenodeids": nodes_falsenodeids,
        "featureids": nodes_featureids,
        "missing_value_tracks_true": nodes_missing_value_tracks_true,
    }
    votes = {"treeids": target_treeids, "nodeids": target_nodeids, "ids": target_ids}
    forest = grown(nodes, votes, splits, weights)
    return forest, base


@kernel("TreeEnsemble", since=5, domain=ML)
def TreeEnsemble(
    X: Array,
    *,
    aggregate_function: int = 1,
    leaf_targetids: Sequence[int],
    leaf_weights: Array,
    membership_values: Array | None = None,
    n_targets: int | None = None,
    nodes_falseleafs: Sequence[int],
    nodes_falsenodeids: Sequence[int],
    nodes_featureids: Sequence[int],
    nodes_hitrates: Array | None = None,
    nodes_missing_value_tracks_true: Sequence[int] | None = None,
    nodes_modes: Array,
    nodes_splits: Array,
    nodes_trueleafs: Sequence[int],
    nodes_truenodeids: Sequence[int],
    post_transform: int = 0,
    tree_roots: Sequence[int],
) -> Array:
    """Return the aggregated weights of the leaves for every target, in the input's type."""
    forest = planted(
        leaf_targetids=leaf_targetids,
        leaf_weights=leaf_weights,
        membership_values=membership_values,
        nodes_falseleafs=nodes_falseleafs,
        nodes_falsenodeids=nodes_falsenodeids,
        nodes_featureids=nodes_featureids,
        nodes_missing_value_tracks_true=nodes_missing_value_tracks_true,
        nodes_modes=nodes_modes,
        nodes_splits=nodes_splits,
        nodes_trueleafs=nodes_trueleafs,
        nodes_truenodeids=nodes_truenodeids,
        tree_roots=tree_roots,
    )
    total = forest.votes(compared(X), n_targets or 1, _AGGREGATES[aggregate_function])
    return transformed(total.astype(X.dtype), TRANSFORMS[post_transform])
