"""Nodes that scale and shift by constants, y = scale * x + shift, and the algebra of merging them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.layer_views.storage import FLOATS, numpy_dtype, set_by_caller

Array = NDArray[Any]
Doubles = NDArray[np.float64]

ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Neg")


@dataclass(frozen=True)
class Affine:
    """A node that computes scale * x + shift.

    Attributes:
        node: The node.
        x: Name of what is scaled and shifted.
        scale, shift: float64, broadcastable against x as NumPy does; None for no scale or no shift.
        constants: Names of the constants it reads.
    """

    node: NodeProto
    x: str
    scale: Doubles | None
    shift: Doubles | None
    constants: tuple[str, ...]

    @property
    def y(self) -> str:
        """Name of the result."""
        return self.node.output[0]

    @property
    def parts(self) -> list[Doubles]:
        """The scale and the shift, those that are there."""
        return [part for part in (self.scale, self.shift) if part is not None]


def read_affine(graph: Graph, node: NodeProto, rank: int | None = None) -> Affine | str:
    """Return a node as an Affine, or the reason why it is none.

    Args:
        graph: The node's graph.
        node: Add, Sub, Mul, Div with one constant, Neg, or BatchNormalization.
        rank: Rank of the data of a BatchNormalization where it is known from elsewhere.
    """
    if is_op(node, "BatchNormalization"):
        return _read_batchnorm(graph, node, rank)
    if domain_of(node.domain) or node.op_type not in ELEMENTWISE or not all(node.input):
        return f"{node.op_type} does not scale or shift"
    if graph.opset() < 7:
        return "operators before opset 7 broadcast by attribute"
    if node.op_type == "Neg":
        known = graph.dtype_of(node.input[0])
        if known not in FLOATS:
            return "only real values are scaled"
        return Affine(node, node.input[0], np.array(-1.0), None, ())
    if len(node.input) != 2:
        return f"{node.op_type} needs two inputs"
    first, second = node.input
    fixed = graph.is_constant(second)
    if fixed == graph.is_constant(first):
        return "not one constant and one computed value"
    name, x = (second, first) if fixed else (first, second)
    kind, shape, size = graph.constant_type(name) or (0, (), 0)
    if kind not in FLOATS:
        return "only real values are scaled"
    if size > 1 << 20 or 0 in shape:
        return "the constant is not a scale or shift of channels"
    raw = graph.constant(name)
    assert raw is not None
    values = raw.astype(np.float64)
    if not np.isfinite(values).all():
        return "the constant is not finite"
    scale: Doubles | None = None
    shift: Doubles | None = None
    if node.op_type == "Add":
        shift = values
    elif node.op_type == "Sub":
        shift, scale = (-values, None) if fixed else (values, np.array(-1.0))
    elif node.op_type == "Mul":
        scale = values
    elif not fixed:
        return "a constant divided by a computed value is not linear"
    elif not values.all():
        return "a divisor is zero"
    else:
        scale = 1.0 / values
    return Affine(node, x, scale, shift, (name,))


def _read_batchnorm(graph: Graph, node: NodeProto, rank: int | None) -> Affine | str:
    reason = batchnorm_trouble(graph, node)
    if reason:
        return reason
    gamma, beta, mean, var = batchnorm_values(graph, node)
    if rank is None:
        shape = graph.shape_of(node.input[0])
        if shape is None:
            return "the rank of its input is not known"
        rank = len(shape)
    if rank < 2:
        return "its input has no channel axis"
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return "its scale or shift is not finite"
    form = (-1, *(1,) * (rank - 2))
    return Affine(node, node.input[0], scale.reshape(form), shift.reshape(form), tuple(node.input[1:5]))


def batchnorm_trouble(graph: Graph, node: NodeProto) -> str:
    """Return why a BatchNormalization is not a fixed scale and shift per channel, "" when it is."""
    if len(node.input) != 5:
        return "it does not have five inputs"
    if set_by_caller(node):
        return "its attributes are set by the function's caller"
    if attribute(node, "training_mode", 0) or any(node.output[1:]):
        return "it is in training mode"
    opset = graph.opset()
    if opset < 7 and not attribute(node, "is_test", 0):
        return "it is in training mode (is_test=0)"
    if opset < 9 and not attribute(node, "spatial", 1):
        return "spatial=0 keeps statistics of every element"
    for name in node.input[1:5]:
        if not graph.is_constant(name):
            return "its parameters are not constant"
    return ""


def batchnorm_values(graph: Graph, node: NodeProto) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Return scale, B, mean and var of a BatchNormalization in float64."""
    found = []
    for name in node.input[1:5]:
        values = graph.constant(name)
        assert values is not None
        found.append(values.astype(np.float64))
    gamma, beta, mean, var = found
    return gamma, beta, mean, var


def along(values: Doubles, rank: int | None, axis: int, size: int) -> Doubles | None:
    """Return values broadcast along one axis only as a vector, None when they vary along others.

    Args:
        values: Broadcastable against a tensor of this rank.
        rank: The tensor's rank; None when not known, then only the last axis can be asked for.
        axis: The axis, counted from the front, or -1.
        size: The tensor's size along it.
    """
    if rank is None:
        if values.ndim > 1 or axis != -1:
            return None
        rank = 1
    if values.ndim > rank:
        return None
    shape = (1,) * (rank - values.ndim) + values.shape
    axis %= rank
    if any(n != 1 for i, n in enumerate(shape) if i != axis) or shape[axis] not in (1, size):
        return None
    return np.broadcast_to(values.reshape(-1), (size,))


def rounded(values: Doubles, data_type: int) -> Array | None:
    """Return values in a TensorProto type, None when one leaves its range."""
    with np.errstate(over="ignore"):
        result: Array = values.astype(numpy_dtype(data_type))
    return result if np.isfinite(result.astype(np.float64)).all() else None


def stored_bytes_freed(graph: Graph, names: tuple[str, ...]) -> int:
    """Return the bytes of those constants of a node that nothing else reads."""
    freed = 0
    for name in set(names):
        known = graph.constant_type(name)
        scope = graph.scope_of(name)
        if known and scope is graph and graph.use_count(name) == names.count(name):
            freed += known[2]
    return freed


def drop_unused(graph: Graph, names: tuple[str, ...]) -> None:
    """Remove those constants that nothing reads any more; inputs of the main graph stay."""
    for name in set(names):
        scope = graph.scope_of(name)
        if scope is None or scope.use_count(name) or not scope.is_constant(name):
            continue
        if scope.is_input(name) and scope.ir_version >= 4:
            continue
        scope.remove_constant(name)


def is_float(data_type: int) -> bool:
    """Whether Gemm and Conv compute in this type."""
    return data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
