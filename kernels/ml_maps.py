"""ai.onnx.ml: operators on maps, which are dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxslim_lab.kernels.ml import ML, one_of
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.strings import texts


@kernel("ZipMap", since=1, domain=ML, tensors=False)
def ZipMap(
    X: Array,
    *,
    classlabels_int64s: Sequence[int] | None = None,
    classlabels_strings: Sequence[str] | None = None,
) -> list[dict[Any, float]]:
    """Return for every row a dict from class labels to the row's values."""
    lists = {"classlabels_int64s": classlabels_int64s, "classlabels_strings": classlabels_strings}
    labels = one_of("ZipMap", **lists)
    return [dict(zip(labels, row, strict=True)) for row in np.atleast_2d(X).tolist()]


def of_type(values: Sequence[Any]) -> Array:
    """Return a map's values as a row vector: strings, int64, float64 for NumPy doubles, else float32."""
    if any(isinstance(value, str) for value in values):
        return texts(values, (1, len(values)))
    if any(isinstance(value, np.float64) for value in values):
        return np.array([values], np.float64)
    whole = all(isinstance(value, int | np.integer) for value in values)
    return np.array([values], np.int64 if whole else np.float32)


@kernel("DictVectorizer", since=1, domain=ML, tensors=False)
def DictVectorizer(
    X: Mapping[Any, Any],
    *,
    int64_vocabulary: Sequence[int] | None = None,
    string_vocabulary: Sequence[str] | None = None,
) -> Array:
    """Return the map's values in the order of the vocabulary, (1, C): 0 or "" for keys it lacks."""
    lists = {"int64_vocabulary": int64_vocabulary, "string_vocabulary": string_vocabulary}
    vocabulary = one_of("DictVectorizer", **lists)
    known = of_type(list(X.values()))
    filling: Any = "" if known.dtype == object else known.dtype.type(0)
    ordered = [X.get(key, filling) for key in vocabulary]
    result = np.empty((1, len(ordered)), known.dtype)
    result[0] = ordered
    return result


@kernel("CastMap", since=1, domain=ML, tensors=False)
def CastMap(
    X: Mapping[int, Any], *, cast_to: str = "TO_FLOAT", map_form: str = "DENSE", max_map: int = 1
) -> Array:
    """Return the map's values by ascending key, (1, C), or each at its key among `max_map` when SPARSE.

    Raises:
        ValueError: An attribute is unknown, or a key is out of range.
    """
    casts: dict[str, tuple[Any, Any]] = {
        "TO_FLOAT": (float, np.float32),
        "TO_INT64": (lambda value: int(float(value)), np.int64),
        "TO_STRING": (str, object),
    }
    if cast_to not in casts or map_form not in {"DENSE", "SPARSE"}:
        raise ValueError(f"CastMap: cast_to {cast_to!r} or map_form {map_form!r} is unknown")
    convert, dtype = casts[cast_to]
    if map_form == "DENSE":
        values = [convert(X[key]) for key in sorted(X)]
        result = np.empty((1, len(values)), dtype)
        result[0] = values
        return result
    if any(not 0 <= key < max_map for key in X):
        raise ValueError(f"CastMap: a key is not in [0, {max_map})")
    result = np.full((1, max_map), "0.f" if dtype is object else 0, dtype)
    for key, value in X.items():
        result[0, key] = convert(value)
    return result
