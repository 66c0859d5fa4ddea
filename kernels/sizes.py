"""How large a result will be, known before anything is computed: the guard against hostile models.

Tensors whose values do not matter are given as *stand-ins*: arrays of one element broadcast to the shape,
which take no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onnxslim_lab.kernels.dtypes import DTYPES, SMALL_INTEGERS, dtype_of_number
from onnxslim_lab.kernels.generator import count_of_range
from onnxslim_lab.kernels.registry import Array, Kernel, run


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _names("ConstantOfShape Expand Flatten Identity Reshape Slice Split Squeeze Transpose Unsqueeze")
_SAME = _names(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Clip Cos Cosh CumProd CumSum Erf Exp Floor "
    "HardSigmoid LeakyRelu Log LogSoftmax Neg Reciprocal Relu ReverseSequence Round Scatter ScatterElements "
    "ScatterND Sigmoid Sign Sin Sinh Softmax Sqrt Tan Tanh Trilu "
    "Elu Selu Celu Softplus Softsign Mish Swish HardSwish ThresholdedRelu Shrink Gelu Hardmax"
)
_BROADCAST = _names("Add BitShift BitwiseAnd BitwiseOr BitwiseXor Div Max Mean Min Mod Mul Pow Sub Sum")
_COMPARE = _names("And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor")
_REDUCTIONS = _names(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare"
)
_WINDOWS = _names("BlackmanWindow HammingWindow HannWindow")
READS_FIRST = _WINDOWS | _names("ConstantOfShape MelWeightMatrix Range")
"""Operators whose result's shape depends on the values of all their inputs."""
READS_VALUES = (
    _REDUCTIONS | READS_FIRST | _names("Expand OneHot Pad Reshape Slice Split Squeeze Tile Unsqueeze")
)
"""Operators whose result's shape depends on the values of their inputs after the first (or of all)."""
_BOUNDED = _names(
    "ArgMax ArgMin Compress Constant DepthToSpace Det Dropout DynamicQuantizeLinear NegativeLogLikelihoodLoss "
    "NonZero SoftmaxCrossEntropyLoss SpaceToDepth StringConcat StringNormalizer StringSplit TopK Unique"
)
UNKNOWN = 1 << 62
"""The bound of a result that may be larger than what is read."""
_SCRATCH = 32  # bytes that selections and reductions may make of one input element


def stand_in(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return a read-only array of this shape and dtype that takes no memory.

    Raises:
        ValueError: The shape overflows or is negative.

    >>> stand_in((1 << 20, 1 << 20), np.dtype(np.float32)).shape
    (1048576, 1048576)
    """
    return np.broadcast_to(np.zeros((), dtype), tuple(int(length) for length in shape))


def stored_bytes(array: Array) -> int:
    """Return the bytes an array takes in a file: 4-bit and 2-bit types packed, strings by their length."""
    if array.dtype == object:
        return sum(len(str(text).encode()) + 2 for text in array.reshape(-1))
    if array.dtype in SMALL_INTEGERS or array.dtype == DTYPES[23]:
        per_byte = 4 if array.dtype in {DTYPES[25], DTYPES[26]} else 2
        return -(-array.size // per_byte)
    return array.nbytes


def predict(
    found: Kernel, inputs: Sequence[Array | None], attributes: Mapping[str, Any], output_count: int
) -> tuple[Array, ...] | None:
    """Return stand-ins for the outputs of a node, or None where only a bound is known.

    Args:
        found: The kernel of the node.
        inputs: Values or stand-ins; what READS_VALUES says must be values.
        attributes: The node's attributes.
        output_count: Number of outputs of the node.

    Raises:
        ValueError: The inputs do not fit.
    """
    op_type = found.op_type
    if op_type in _VIEWS:
        return run(found, inputs, attributes, output_count)
    given = [value for value in inputs if value is not None]
    shapes = [value.shape for value in given]
    if op_type in _SAME or op_type == "DequantizeLinear":
        dtype = given[1].dtype if op_type == "DequantizeLinear" else given[0].dtype
        return (stand_in(shapes[0], dtype),)
    if op_type in _BROADCAST or op_type in _COMPARE:
        shape = shapes[0] if "axis" in attributes else np.broadcast_shapes(*shapes)
        return (stand_in(shape, np.dtype(np.bool_) if op_type in _COMPARE else given[0].dtype),)
    if op_type == "Pad" and len(inputs) > 3 and inputs[3] is not None:
        attributes = {**attributes, "axes": inputs[3].tolist()}
    formula = _FORMULAS.get(op_type)
    return None if formula is None else (formula(given, attributes),)


def bound(found: Kernel, inputs: Sequence[Array | None], attributes: Mapping[str, Any]) -> int:
    """Return the bytes that computing an operator without a prediction may take at most, or UNKNOWN."""
    sizes = [value.size for value in inputs if value is not None]
    if found.op_type == "Einsum":
        return math.prod(max(size, 1) for size in sizes) * 8
    return sum(sizes) * _SCRATCH if found.op_type in _BOUNDED else UNKNOWN


def _cast(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return stand_in(inputs[0].shape, dtype_of_number(attributes["to"]))


def _cast_like(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return stand_in(inputs[0].shape, inputs[1].dtype)


def _where(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return stand_in(np.broadcast_shapes(*(value.shape for value in inputs)), inputs[1].dtype)


def _concat(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    shape = list(inputs[0].shape)
    axis = attributes.get("axis", 1)
    shape[axis] = sum(value.shape[axis] for value in inputs)
    return stand_in(shape, inputs[0].dtype)


def _tile(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    repeats = inputs[1].tolist()
    if len(inputs) == 3:  # opset 1: how often, along which axis
        repeats = [inputs[1].item() if i == inputs[2].item() else 1 for i in range(inputs[0].ndim)]
    return stand_in([n * times for n, times in zip(inputs[0].shape, repeats, strict=True)], inputs[0].dtype)


def _pad(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    listed = attributes.get("pads", attributes.get("paddings"))
    pads = list(listed) if listed is not None else inputs[1].tolist()
    shape = list(inputs[0].shape)
    axes = attributes.get("axes", range(len(shape)))
    for axis, total in zip(axes, np.array(pads).reshape(2, -1).sum(0).tolist(), strict=True):
        shape[axis] = max(shape[axis] + total, 0)
    return stand_in(shape, inputs[0].dtype)


def _range(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return stand_in((count_of_range(*inputs),), inputs[0].dtype)


def _one_hot(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    axis = attributes.get("axis", -1)
    shape = list(inputs[0].shape)
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, max(int(inputs[1].reshape(-1)[0]), 0))
    return stand_in(shape, inputs[2].dtype)


def _gather(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    data, indices = inputs
    axis = attributes.get("axis", 0) % max(data.ndim, 1)
    return stand_in(data.shape[:axis] + indices.shape + data.shape[axis + 1 :], data.dtype)


def _gather_elements(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return stand_in(inputs[1].shape, inputs[0].dtype)


def _gather_nd(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    data, indices = inputs
    named = attributes.get("batch_dims", 0) + indices.shape[-1]
    return stand_in(indices.shape[:-1] + data.shape[named:], data.dtype)


def _matmul(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    left, right = (value.shape for value in inputs)
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    return stand_in(np.broadcast_shapes(left[:-2], right[:-2]) + rows + columns, inputs[0].dtype)


def _gemm(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    rows = inputs[0].shape[1 if attributes.get("transA") else 0]
    columns = inputs[1].shape[0 if attributes.get("transB") else 1]
    return stand_in((rows, columns), inputs[0].dtype)


def _quantize(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    dtype = inputs[2].dtype if len(inputs) > 2 else dtype_of_number(attributes.get("output_dtype") or 2)
    return stand_in(inputs[0].shape, dtype)


def _eye_like(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    dtype = dtype_of_number(attributes["dtype"]) if "dtype" in attributes else inputs[0].dtype
    return stand_in(inputs[0].shape, dtype)


def _reduce(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    data = inputs[0]
    axes = inputs[1].tolist() if len(inputs) > 1 else list(attributes.get("axes") or ())
    if not axes and not attributes.get("noop_with_empty_axes"):
        axes = list(range(data.ndim))
    return stand_in(_without(data.shape, axes, attributes), data.dtype)


def _position(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    shape = _without(inputs[0].shape, [attributes.get("axis", 0)], attributes)
    return stand_in(shape, np.dtype(np.int64))


def _without(shape: Sequence[int], axes: Sequence[int], attributes: Mapping[str, Any]) -> list[int]:
    chosen = {axis % max(len(shape), 1) for axis in axes}
    if attributes.get("keepdims", 1):
        return [1 if axis in chosen else length for axis, length in enumerate(shape)]
    return [length for axis, length in enumerate(shape) if axis not in chosen]


def _window(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return stand_in((inputs[0].item(),), dtype_of_number(attributes.get("output_datatype", 1)))


def _mel(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    shape = (inputs[1].item() // 2 + 1, inputs[0].item())
    return stand_in(shape, dtype_of_number(attributes.get("output_datatype", 1)))


_FORMULAS: dict[str, Callable[[Sequence[Array], Mapping[str, Any]], Array]] = {
    "BitCast": _cast,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "EyeLike": _eye_like,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "OneHot": _one_hot,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Tile": _tile,
    "Where": _where,
    "ArgMax": _position,
    "ArgMin": _position,
    "MelWeightMatrix": _mel,
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_REDUCTIONS, _reduce),
}
