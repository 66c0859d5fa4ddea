"""Operators of several operands through which a scale of channels passes; see `carriers`."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from onnxslim_lab.equalization.indexing import Index, common_shape, varying
from onnxslim_lab.equalization.magnitudes import is_square, magnitude
from onnxslim_lab.equalization.region import ConstantEnd, Region
from onnxslim_lab.graph import is_op

_GATES = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Erf", "Exp", "Softplus", "Clip")


def joint(region: Region, node: NodeProto) -> None:
    """Relate the operands of Add, Sub, Sum, Mean, Max and Min: all have the scale of the result."""
    graph = region.graph
    fixed = [slot for slot, name in enumerate(node.input) if graph.is_constant(name)]
    values = [name for slot, name in enumerate(node.input) if slot not in fixed]
    whole = _broadcast(region, [*values, node.output[0]])
    if whole is None:
        region.freeze_values([*values, node.output[0]], f"shapes around {node.op_type} are not known")
        return
    for value in (*values, node.output[0]):
        _restrict(region, value, whole)
    for slot in fixed:
        region.constants.append(ConstantEnd(node, slot, whole))


def _broadcast(region: Region, values: list[str]) -> Index | None:
    """Return the indices known among values, broadcast to the rank of the last and linked."""
    shape = region.shape(values[-1])
    if shape is None:
        return None
    whole: Index | None = None
    for value in values:
        index = region.indices.get(value)
        if index is None:
            continue
        aligned = index.reshape((1,) * (len(shape) - index.ndim) + index.shape)
        if whole is None:
            whole = aligned
            continue
        size = common_shape(whole, aligned)
        if size is None:
            return None
        region.link(whole, aligned)
        whole = np.broadcast_to(whole, size)
    return whole


def _restrict(region: Region, value: str, whole: Index) -> None:
    """Give an operand the part of the result's index it has; axes it does not have have one scale."""
    shape = region.shape(value)
    if shape is None:
        region.freeze(whole, "the shape of an operand is not known")
        return
    extra = whole.ndim - len(shape)
    sizes = {axis: 1 if axis < extra else shape[axis - extra] for axis in varying(whole)}
    if any(size not in (1, whole.shape[axis]) for axis, size in sizes.items()):
        region.freeze(whole, "the size of an operand is not known")
        return
    own = region.collapse(whole, [axis for axis, size in sizes.items() if size == 1])
    region.know(value, own.reshape(own.shape[extra:]))


def product(region: Region, node: NodeProto) -> None:
    """Relate one factor of Mul, or the dividend of Div, with the result."""
    if is_op(node, "Mul") and is_square(region.graph, node):
        magnitude(region, node)
        return
    graph, result = region.graph, node.output[0]
    known = [value for value in node.input if value in region.indices]
    fixed = [slot for slot, name in enumerate(node.input) if graph.is_constant(name)]
    if len(known) > 1:
        region.freeze_values(known, f"{node.op_type} of two scaled values")
        return
    slot = 0
    if is_op(node, "Mul"):
        slot = list(node.input).index(known[0]) if known else _carrying_factor(region, node)
    elif known and node.input[1] == known[0]:
        region.freeze_values(known, "Div by a scaled value")
        return
    if fixed == [1 - slot] and not known and is_op(node, "Mul"):
        index = region.indices[result]
        kind = graph.constant_type(node.input[fixed[0]])
        sizes = kind[1] if kind else ()
        own = (1,) * (index.ndim - len(sizes)) + sizes
        if varying(index) and all(own[axis] == index.shape[axis] for axis in varying(index)):
            region.constants.append(ConstantEnd(node, fixed[0], index))
            region.norms.append(node)
            return
    if fixed == [slot]:
        region.freeze_values([result], f"{node.op_type} of a constant by a computed value")
        return
    value, other = node.input[slot], node.input[1 - slot]
    whole = _broadcast(region, [value, result])
    if whole is None:
        region.freeze_values([value, result], f"shapes around {node.op_type} are not known")
        return
    region.know(result, whole)
    _restrict(region, value, whole)
    region.keep_outside(other, whole, f"{node.op_type} of two scaled values")


def _carrying_factor(region: Region, node: NodeProto) -> int:
    """Return which factor's scale a product has: not the gate's, and not a narrower one's."""
    if region.graph.is_constant(node.input[0]):
        return 1
    for slot in (0, 1):
        maker = region.graph.producer(node.input[slot])
        if maker is not None and maker.op_type in _GATES:
            return 1 - slot
    first, second = (region.shape(value) or () for value in node.input)
    return 1 if second.count(1) < first.count(1) else 0


def matmul(region: Region, node: NodeProto) -> None:
    """Relate a product of two computed values with the one whose channels the result keeps."""
    left, right = node.input
    result = node.output[0]
    shapes = [region.shape(value) for value in (left, right, result)]
    if any(shape is None or len(shape) < 2 for shape in shapes):
        region.freeze_values([left, right, result], "shapes around MatMul are not known")
        return
    if left in region.indices and right in region.indices:
        region.freeze_values([left, right], "MatMul of two scaled values")
        return
    if result in region.indices and left not in region.indices and right not in region.indices:
        value = left if region.indices[result].shape[-2] > 1 else right
    else:
        value = left if left in region.indices else right
    summed = -1 if value == left else -2
    whole = _broadcast(region, [value, result])
    if whole is None:
        region.freeze_values([value, result], "shapes around MatMul do not fit")
        return
    whole = region.collapse(whole, [whole.ndim + summed])
    region.know(result, whole)
    shape = region.shape(value)
    assert shape is not None
    _restrict(region, value, whole)
    region.keep_outside(right if value == left else left, whole, "MatMul of two scaled values")
