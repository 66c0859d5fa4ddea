"""What a model's inputs take, and whether a value is that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from onnx import TensorProto, TypeProto, helper

from onnxslim_lab.errors import DataError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.worker.messages import Value

_UNNAMED = frozenset({"", "?", "-1", "None"})  # written by exporters for "open", whatever the axis

Shape = tuple[int | str | None, ...]


def numpy_dtype(element: int) -> np.dtype[Any]:
    """Return the numpy dtype of a TensorProto data type; strings are object arrays."""
    if element == TensorProto.STRING:
        return np.dtype(object)
    return np.dtype(helper.tensor_dtype_to_np_dtype(element))


def tensor_shape(kind: TypeProto.Tensor) -> Shape | None:
    """Return a tensor type's shape: fixed dimensions as int, symbolic ones as str, unnamed as None."""
    if not kind.HasField("shape"):
        return None
    return tuple(
        int(dim.dim_value)
        if dim.HasField("dim_value") and dim.dim_value >= 0  # some exporters write -1 for open
        else (None if dim.dim_param in _UNNAMED else dim.dim_param)
        for dim in kind.shape.dim
    )


def axis_key(name: str, axis: int, size: int | str | None) -> str:
    """Return how an axis is called in `dims`: its symbol, or input:axis.

    >>> axis_key("x", 0, "batch"), axis_key("x", 2, None)
    ('batch', 'x:2')
    """
    return size if isinstance(size, str) else f"{name}:{axis}"


@dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes:
        name: Its name.
        type: Its declared ONNX type.
        required: False for an initializer that a feed may override.
    """

    name: str
    type: TypeProto
    required: bool = True

    @cached_property
    def element(self) -> int:
        """TensorProto data type of a tensor input; 0 for sequences, maps and optionals."""
        return int(self.type.tensor_type.elem_type) if self.type.HasField("tensor_type") else 0

    @cached_property
    def shape(self) -> Shape | None:
        """The declared shape of a tensor input; None when it is not known."""
        return tensor_shape(self.type.tensor_type) if self.element else None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of a tensor input."""
        return numpy_dtype(self.element)

    def __str__(self) -> str:
        if not self.element:
            return f"{self.type.WhichOneof('value') or 'unknown'}"
        shape = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{TensorProto.DataType.Name(self.element).lower()}[{shape}]"


def model_inputs(graph: Graph) -> dict[str, ModelInput]:
    """Return the inputs that a caller of the model may feed, by name and in order."""
    initialized = {*graph.initializers, *graph.sparse_initializers}
    return {
        name: ModelInput(name, kind, name not in initialized) for name, kind in graph.input_types().items()
    }


def check_names(names: Mapping[str, Any], inputs: Mapping[str, ModelInput], where: str) -> None:
    """Raise DataError when a name is not an input, or a required input is not there."""
    for name in names:
        if name not in inputs:
            raise DataError(f"{where}: the model has no input {quote(name)}{suggest(name, inputs)}")
    for name, info in inputs.items():
        if name not in names and info.required and not info.type.HasField("optional_type"):
            raise DataError(f"{where}: input {quote(name)} ({info}) is missing")


def as_dtype(array: np.ndarray[Any, Any], info: ModelInput, where: str) -> np.ndarray[Any, Any]:
    """Return the array in the input's dtype where only its spelling differs, else raise DataError.

    numpy writes strings as "U" and the types of ml_dtypes as raw "V"; these are reinterpreted.
    """
    if info.element == TensorProto.STRING and array.dtype.kind in "US":
        return array.astype(str).astype(object)
    if array.dtype.kind == "V" and array.dtype.itemsize == info.dtype.itemsize and info.dtype.kind != "O":
        return array.view(info.dtype)
    if array.dtype != info.dtype:
        remedy = "" if info.dtype.kind == "O" else f"; convert it with .astype('{info.dtype.name}')"
        raise DataError(
            f"{where}: input {quote(info.name)} takes {info.dtype.name}, got {array.dtype.name}{remedy}"
        )
    return array


def check_value(value: Any, info: ModelInput, where: str) -> Value:
    """Return a value as an input takes it.

    Raises:
        DataError: Wrong kind, dtype, rank or fixed dimension.
    """
    if not info.element:
        return _check_other(value, info.type, ModelInput(info.name, info.type), where)
    if value is None or isinstance(value, dict):
        raise DataError(f"{where}: input {quote(info.name)} takes {info}, got {type(value).__name__}")
    array = as_dtype(np.asarray(value), info, where)
    if info.shape is not None:
        if array.ndim != len(info.shape):
            raise DataError(
                f"{where}: input {quote(info.name)} takes {info} (rank {len(info.shape)}), "
                f"got shape {list(array.shape)} (rank {array.ndim})"
            )
        for axis, (size, expected) in enumerate(zip(array.shape, info.shape, strict=True)):
            if isinstance(expected, int) and size != expected:
                raise DataError(
                    f"{where}: input {quote(info.name)} takes {info}, got shape {list(array.shape)}: "
                    f"axis {axis} must be {expected}"
                )
    return array


def _check_other(value: Any, kind: TypeProto, info: ModelInput, where: str) -> Value:
    """Check a sequence, optional or map."""
    if kind.HasField("optional_type"):
        if value is None:
            return None
        return check_value(value, ModelInput(info.name, kind.optional_type.elem_type), where)
    if kind.HasField("sequence_type"):
        if not isinstance(value, (list, tuple)):
            raise DataError(
                f"{where}: input {quote(info.name)} takes a list of tensors, got {type(value).__name__}"
            )
        item = ModelInput(info.name, kind.sequence_type.elem_type)
        return [check_value(each, item, where) for each in value]
    if kind.HasField("map_type") and not isinstance(value, dict):
        raise DataError(f"{where}: input {quote(info.name)} takes a dict, got {type(value).__name__}")
    checked: Value = value
    return checked


def check_feed(feed: Any, inputs: Mapping[str, ModelInput], where: str) -> dict[str, Value]:
    """Return a feed as the model takes it; empty optionals that are not given become None.

    Raises:
        DataError: Not a dict, or names or values that are not what the inputs take.
    """
    if not isinstance(feed, dict):
        raise DataError(f"{where}: expected a dict of inputs by name, got {type(feed).__name__}")
    check_names(feed, inputs, where)
    checked = {name: check_value(value, inputs[name], where) for name, value in feed.items()}
    return {**dict.fromkeys(optional_names(inputs)), **checked}


def optional_names(inputs: Mapping[str, ModelInput]) -> list[str]:
    """Return the inputs that may be empty."""
    return [name for name, info in inputs.items() if info.type.HasField("optional_type")]
