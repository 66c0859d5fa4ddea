"""How operators compute small integer tensors out of symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from onnxslim_lab.symbols import dimensions
from onnxslim_lab.symbols.dimensions import Size
from onnxslim_lab.symbols.facts import MOST_ELEMENTS, RANGES, Elements, Step, elements, static_shape
from onnxslim_lab.symbols.value_arithmetic import RULES, elementwise, rule, truth

__all__ = ["RULES"]  # of all operators: these rules join those of value_arithmetic


@rule("Shape")
def shape_of(step: Step) -> list[Elements] | None:
    """Sizes of the input's axes from start to end."""
    shape = step.shape(0)
    if shape is None:
        return None
    return [elements(list(shape[step.attribute("start", 0) : step.attribute("end", len(shape))]))]


@rule("Size")
def size_of(step: Step) -> list[Elements] | None:
    """Number of elements of the input."""
    shape = step.shape(0)
    return None if shape is None else [elements(dimensions.product(shape))]


@rule("Identity", "Cast", "Dropout")
def same(step: Step) -> list[Elements] | None:
    """The input; a cast between the integer types keeps what fits, one to bool compares with zero."""
    values = step.values(0)
    if values is None:
        return None
    graph = step.facts.graph
    was_bool = graph.dtype_of(step.node.input[0]) == TensorProto.BOOL
    if step.node.op_type == "Cast" and step.attribute("to") == TensorProto.BOOL and not was_bool:
        return [elementwise(truth, values)]
    return [values] if graph.dtype_of(step.node.output[0]) in RANGES else None


@rule("Gather")
def gather(step: Step) -> list[Elements] | None:
    """Elements along an axis, of an index that is known."""
    values, indices = step.values(0), step.values(1)
    known = step.ints(1)
    axis = step.attribute("axis", 0)
    if values is None or indices is None or known is None or not -values.ndim <= axis < values.ndim:
        return None
    length = values.shape[axis]
    if any(not -length <= index < length for index in known):
        return None
    index = np.array(known, np.int64).reshape(indices.shape)
    return [elements(np.take(values, index, axis=axis))]


@rule("Slice")
def slice_(step: Step) -> list[Elements] | None:
    """Slices with known bounds."""
    values = step.values(0)
    found = slice_bounds(step, values.ndim) if values is not None else None
    if values is None or found is None:
        return None
    picked: list[slice] = [slice(None)] * values.ndim
    for axis, start, end, stride in found:
        if not isinstance(start, int) or not isinstance(end, int):
            return None
        length = values.shape[axis]
        first = start + length if start < 0 else start
        last = end + length if end < 0 else end
        if stride > 0:
            picked[axis] = slice(min(max(first, 0), length), min(max(last, 0), length), stride)
        else:
            first, last = min(max(first, 0), length - 1), min(max(last, -1), length - 1)
            picked[axis] = slice(first, None if last < 0 else last, stride) if length else slice(0)
    return [values[tuple(picked)]]


def slice_bounds(step: Step, rank: int) -> list[tuple[int, Size, Size, int]] | None:
    """Return (axis, start, end, stride) of a Slice whose axes and strides are known."""
    starts: Sequence[Size] | None
    ends: Sequence[Size] | None
    if step.opset < 10:
        starts, ends = step.attribute("starts"), step.attribute("ends")
        axes, strides = step.attribute("axes"), None
    else:
        starts, ends = step.items(1), step.items(2)
        axes, strides = step.ints(3), step.ints(4)
        if (step.has(3) and axes is None) or (step.has(4) and strides is None):
            return None
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    axes = list(range(len(starts))) if axes is None else axes
    strides = [1] * len(starts) if strides is None else strides
    if not len(axes) == len(starts) == len(strides) or 0 in strides:
        return None
    if any(not -rank <= axis < rank for axis in axes):
        return None
    return [
        (axis % rank, start, end, stride)
        for axis, start, end, stride in zip(axes, starts, ends, strides, strict=True)
    ]


@rule("Concat")
def concat(step: Step) -> list[Elements] | None:
    """The inputs after one another."""
    arrays = [step.values(index) for index in range(len(step.node.input))]
    known = [array for array in arrays if array is not None and array.ndim]
    axis = step.attribute("axis", 1)
    if len(known) < len(arrays) or not known or not -known[0].ndim <= axis < known[0].ndim:
        return None
    return [elements(np.concatenate(known, axis=axis))]


@rule("Unsqueeze", "Squeeze", "Reshape", "Flatten")
def reshape(step: Step) -> list[Elements] | None:
    """The same elements in the shape that the shape rules found."""
    values = step.values(0)
    shape = static_shape(step.facts.shape(step.node.output[0]))
    if values is None or shape is None or int(np.prod(shape)) != values.size:
        return None
    return [values.reshape(shape)]


@rule("Transpose")
def transpose(step: Step) -> list[Elements] | None:
    """Axes permuted."""
    values = step.values(0)
    return None if values is None else [elements(np.transpose(values, step.attribute("perm")))]


@rule("Split")
def split(step: Step) -> list[Elements] | None:
    """Parts along an axis."""
    values = step.values(0)
    if values is None or not values.ndim:
        return None
    axis, count = step.attribute("axis", 0), len(step.node.output)
    lengths = step.attribute("split") or step.ints(1)
    if lengths is None:
        if step.has(1):
            return None
        part = -(-values.shape[axis] // count)
        ends = [min(part * index, values.shape[axis]) for index in range(1, count)]
    else:
        ends = [int(end) for end in np.cumsum(lengths)[:-1]]
    return [elements(part) for part in np.split(values, ends, axis=axis)]


@rule("ConstantOfShape")
def constant_of_shape(step: Step) -> list[Elements] | None:
    """One value repeated."""
    shape = step.ints(0)
    tensor = step.attribute("value")
    if shape is None or any(size < 0 for size in shape) or static_shape(tuple(shape)) is None:
        return None
    if tensor is None or tensor.data_type not in RANGES:
        return None
    value = int(numpy_helper.to_array(tensor).reshape(-1)[0])
    return [elements([value] * int(np.prod(shape)), tuple(shape))]


@rule("Expand", "Tile")
def expand(step: Step) -> list[Elements] | None:
    """A small tensor repeated to a known shape."""
    values, shape = step.values(0), step.ints(1)
    if values is None or shape is None or any(size < 0 for size in shape):
        return None
    if step.node.op_type == "Tile":
        total = np.prod([float(size) for size in shape]) * values.size
        return [elements(np.tile(values, shape))] if total <= MOST_ELEMENTS else None
    result = static_shape(np.broadcast_shapes(values.shape, tuple(shape)))
    return None if result is None else [elements(np.broadcast_to(values, result).copy())]


@rule("Range")
def range_(step: Step) -> list[Elements] | None:
    """An arithmetic progression with known bounds."""
    bounds = [step.ints(index) for index in range(3)]
    known = [bound[0] for bound in bounds if bound]
    if len(known) < 3 or known[2] == 0:
        return None
    numbers = range(*known)
    return [elements(list(numbers))] if len(numbers) <= MOST_ELEMENTS else None


@rule("ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax")
def reduce(step: Step) -> list[Elements] | None:
    """A vector reduced to one element."""
    values = step.values(0)
    shape = static_shape(step.facts.shape(step.node.output[0]))
    if values is None or values.ndim > 1 or not values.size or shape is None or int(np.prod(shape)) != 1:
        return None
    functions: dict[str, Callable[[Size, Size], Size]] = {
        "ReduceProd": dimensions.multiply,
        "ReduceSum": dimensions.add,
        "ReduceMin": dimensions.minimum,
        "ReduceMax": dimensions.maximum,
    }
    items: list[Any] = list(values.reshape(-1))
    if values.size > 1 and shape == values.shape:
        return None
    result = items[0]
    for item in items[1:]:
        result = functions[step.node.op_type](result, item)
    return [elements([result], shape)]


@rule("ScatterND", "ScatterElements")
def scatter(step: Step) -> list[Elements] | None:
    """Elements of a vector replaced at known places."""
    values, indices, updates = step.values(0), step.ints(1), step.values(2)
    if values is None or indices is None or updates is None or values.ndim != 1:
        return None
    if step.attribute("reduction", "none") != "none" or len(indices) != updates.size:
        return None
    if any(not -values.size <= index < values.size for index in indices):
        return None
    result = values.copy()
    for index, item in zip(indices, updates.reshape(-1), strict=True):
        result[index] = item
    return [result]
