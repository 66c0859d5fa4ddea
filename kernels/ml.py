"""ai.onnx.ml: encoders and scalers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.strings import texts

ML = "ai.onnx.ml"


def one_of(operator: str, **lists: Any) -> Any:
    """Return the only attribute that is given and not empty.

    Raises:
        ValueError: None or several are.
    """
    given = [value for value in lists.values() if value is not None and len(value)]
    if len(given) != 1:
        raise ValueError(f"{operator}: {len(given)} of {', '.join(lists)} are given, one is required")
    return given[0]


def column(values: Sequence[Any] | Array) -> Array:
    """Return attribute values as a vector: float32, int64 or str objects."""
    if isinstance(values, np.ndarray):
        return values.reshape(-1)
    if isinstance(values[0], str):
        return texts(values, (len(values),))
    return np.array(values, np.int64 if isinstance(values[0], int) else np.float32)


def positions(X: Array, keys: Array) -> Array:
    """Return where every element of X stands among the keys, -1 where it does not; NaN equals NaN.

    Of equal keys the last counts.
    """
    if "O" in {X.dtype.kind, keys.dtype.kind}:
        place = {key: i for i, key in enumerate(keys.tolist())}
        found = [place.get(item, -1) for item in X.reshape(-1).tolist()]
        return np.array(found, np.int64).reshape(X.shape)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    below = np.searchsorted(ordered, X.astype(keys.dtype), side="right") - 1
    candidate = ordered[np.maximum(below, 0)]
    same = (candidate == X) | ((candidate != candidate) & (X != X))  # noqa: PLR0124 - finds NaN of any type
    return np.where((below >= 0) & same, order[np.maximum(below, 0)], -1)


def translated(X: Array, keys: Array, values: Array, default: Any) -> Array:
    """Return the value of every element's key, the default for elements that are no key.

    Raises:
        ValueError: There are not as many values as keys.
    """
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys and {len(values)} values")
    place = positions(X, keys)
    filling = np.empty((), values.dtype)
    filling[...] = default
    return np.where(place >= 0, values[np.maximum(place, 0)], filling)


@kernel("LabelEncoder", since=1, domain=ML)
def LabelEncoder_1(
    X: Array,
    *,
    classes_strings: Sequence[str] | None = None,
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> Array:
    """Return the index of every string among the classes, or the class of every index."""
    classes = column(one_of("LabelEncoder", classes_strings=classes_strings))
    indices = np.arange(len(classes))
    if X.dtype == object:
        return translated(X, classes, indices, default_int64)
    return translated(X, indices, classes, default_string)


@kernel("LabelEncoder", since=2, domain=ML)
def LabelEncoder_2(
    X: Array,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    keys_floats: Sequence[float] | None = None,
    keys_int64s: Sequence[int] | None = None,
    keys_strings: Sequence[str] | None = None,
    values_floats: Sequence[float] | None = None,
    values_int64s: Sequence[int] | None = None,
    values_strings: Sequence[str] | None = None,
) -> Array:
    """Return the value of every element's key, the default of the values' type for others."""
    return LabelEncoder_4(
        X,
        default_float=default_float,
        default_int64=default_int64,
        default_string=default_string,
        keys_floats=keys_floats,
        keys_int64s=keys_int64s,
        keys_strings=keys_strings,
        values_floats=values_floats,
        values_int64s=values_int64s,
        values_strings=values_strings,
    )


@kernel("LabelEncoder", since=4, domain=ML)
def LabelEncoder_4(
    X: Array,
    *,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Array | None = None,
    keys_floats: Sequence[float] | None = None,
    keys_int64s: Sequence[int] | None = None,
    keys_strings: Sequence[str] | None = None,
    keys_tensor: Array | None = None,
    values_floats: Sequence[float] | None = None,
    values_int64s: Sequence[int] | None = None,
    values_strings: Sequence[str] | None = None,
    values_tensor: Array | None = None,
) -> Array:
    """Return the value of every element's key, the default of the values' type for others."""
    keys = one_of(
        "LabelEncoder",
        keys_floats=keys_floats,
        keys_int64s=keys_int64s,
        keys_strings=keys_strings,
        keys_tensor=keys_tensor,
    )
    values = column(
        one_of(
            "LabelEncoder",
            values_floats=values_floats,
            values_int64s=values_int64s,
            values_strings=values_strings,
            values_tensor=values_tensor,
        )
    )
    defaults = {"O": default_string, "i": default_int64, "f": default_float}
    default = defaults[values.dtype.kind] if default_tensor is None else default_tensor.reshape(-1)[0]
    return translated(X, column(keys), values, default)


@kernel("CategoryMapper", since=1, domain=ML)
def CategoryMapper(
    X: Array,
    *,
    cats_int64s: Sequence[int] | None = None,
    cats_strings: Sequence[str] | None = None,
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> Array:
    """Return the number of every category's name, or the name of every number."""
    numbers = np.array(cats_int64s or (), np.int64)
    names = texts(cats_strings or (), (len(cats_strings or ()),))
    if X.dtype == object:
        return translated(X, names, numbers, default_int64)
    return translated(X, numbers, names, default_string)


@kernel("OneHotEncoder", since=1, domain=ML)
def OneHotEncoder(
    X: Array,
    *,
    cats_int64s: Sequence[int] | None = None,
    cats_strings: Sequence[str] | None = None,
    zeros: int = 1,
) -> Array:
    """Return a new last axis with 1 at every element's category; zeros for others when `zeros` is 1.

    Raises:
        ValueError: An element is no category and `zeros` is 0.
    """
    categories = column(one_of("OneHotEncoder", cats_int64s=cats_int64s, cats_strings=cats_strings))
    given = X if X.dtype == object else X.astype(np.int64)
    place = positions(given, categories)
    if not zeros and (place < 0).any():
        raise ValueError("OneHotEncoder: an element is not among the categories and zeros is 0")
    return np.equal(place[..., None], np.arange(len(categories))).astype(np.float32)


@kernel("ArrayFeatureExtractor", since=1, domain=ML)
def ArrayFeatureExtractor(X: Array, Y: Array) -> Array:
    """Return the entries of X's last axis at the indices Y: at least a matrix."""
    return (X if X.ndim > 1 else np.atleast_2d(X)).take(Y.reshape(-1), -1)


@kernel("Binarizer", since=1, domain=ML)
def Binarizer(X: Array, *, threshold: float = 0.0) -> Array:
    """Return 1 where X is above the threshold, else 0, in X's type."""
    return (np.float32(threshold) < X).astype(X.dtype)


@kernel("FeatureVectorizer", since=1, domain=ML)
def FeatureVectorizer(*X: Array, inputdimensions: Sequence[int] | None = None) -> Array:
    """Return the inputs side by side in float32, each cut or filled up with zeros to its dimension."""
    rows = [np.atleast_2d(part).reshape(1 if part.ndim < 2 else len(part), -1) for part in X]
    widths = inputdimensions or [part.shape[1] for part in rows]
    result = np.zeros((len(rows[0]), sum(widths)), np.float32)
    start = 0
    for part, width in zip(rows, widths, strict=True):
        result[:, start : start + min(width, part.shape[1])] = part[:, :width]
        start += width
    return result


@kernel("Imputer", since=1, domain=ML)
def Imputer(
    X: Array,
    *,
    imputed_value_floats: Sequence[float] | None = None,
    imputed_value_int64s: Sequence[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Array:
    """Return X with one value (NaN perhaps) replaced, by one other or by one per feature."""
    lists = {"imputed_value_floats": imputed_value_floats, "imputed_value_int64s": imputed_value_int64s}
    imputed = np.asarray(one_of("Imputer", **lists), X.dtype)
    if X.dtype.kind == "f":
        replaced = np.asarray(replaced_value_float, X.dtype)
        missing = np.isnan(X) if np.isnan(replaced) else replaced == X
    else:
        missing = np.asarray(replaced_value_int64, X.dtype) == X
    return np.where(missing, imputed, X)


@kernel("Normalizer", since=1, domain=ML)
def Normalizer(X: Array, *, norm: str = "MAX") -> Array:
    """Return rows divided by their greatest value, L1 or L2 norm, in float32; as they are where that is 0.

    Raises:
        ValueError: The norm is unknown.
    """
    x = X.astype(np.float32)
    if norm == "MAX":
        size = x.max(-1, keepdims=True, initial=-np.inf)
    elif norm == "L1":
        size = np.abs(x).sum(-1, keepdims=True)
    elif norm == "L2":
        size = np.sqrt(np.square(x).sum(-1, keepdims=True))
    else:
        raise ValueError(f"Normalizer: norm {norm!r} is not MAX, L1 or L2")
    return np.asarray(x / np.where(size == 0, np.float32(1), size))


@kernel("Scaler", since=1, domain=ML)
def Scaler(X: Array, *, offset: Sequence[float] | None = None, scale: Sequence[float] | None = None) -> Array:
    """Return (X - offset) * scale in float32; one value or one per feature."""
    shifted = X.astype(np.float32) - np.asarray(offset or 0, np.float32)
    return np.asarray(shifted * np.asarray(scale or 1, np.float32))
