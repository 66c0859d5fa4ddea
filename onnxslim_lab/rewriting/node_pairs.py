"""Two nodes in a row that are one, or none: Transposes, Casts, reshapes, Clips, Concats."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.rewriting.certain import clip_bounds, integers, same_shape
from onnxslim_lab.rewriting.removal import release, remove_unused
from onnxslim_lab.shapes import Dim

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

# Bits of the integers and of the fraction (hidden one included) that a type holds, and its exponent's range.
_INTEGERS: dict[int, tuple[int, int]] = {
    TensorProto.BOOL: (0, 1),
    TensorProto.INT8: (-(2**7), 2**7 - 1),
    TensorProto.UINT8: (0, 2**8 - 1),
    TensorProto.INT16: (-(2**15), 2**15 - 1),
    TensorProto.UINT16: (0, 2**16 - 1),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
    TensorProto.UINT32: (0, 2**32 - 1),
    TensorProto.INT64: (-(2**63), 2**63 - 1),
    TensorProto.UINT64: (0, 2**64 - 1),
}
_FLOATS: dict[int, tuple[int, int]] = {  # (bits of the fraction, largest exponent)
    TensorProto.FLOAT16: (11, 15),
    TensorProto.BFLOAT16: (8, 127),
    TensorProto.FLOAT: (24, 127),
    TensorProto.DOUBLE: (53, 1023),
}


def is_lossless(source: int, target: int) -> bool:
    """Whether every value of one TensorProto type has its exact equal in the other.

    >>> is_lossless(TensorProto.INT32, TensorProto.DOUBLE), is_lossless(TensorProto.INT32, TensorProto.FLOAT)
    (True, False)
    """
    if source in _INTEGERS and target in _INTEGERS:
        (low, high), (least, most) = _INTEGERS[source], _INTEGERS[target]
        return bool(least <= low and high <= most)
    if source in _INTEGERS and target in _FLOATS:
        return max(-_INTEGERS[source][0], _INTEGERS[source][1]) <= 1 << _FLOATS[target][0]
    if source in _FLOATS and target in _FLOATS:
        return all(a <= b for a, b in zip(_FLOATS[source], _FLOATS[target], strict=True))
    return False


def cancelled(graph: Graph, node: NodeProto) -> str | None:
    """Return the earlier value that a pair ending in this node gives back unchanged, None when there is none."""
    if is_op(node, "Concat"):
        return _split_concat(graph, node)
    first = _first(graph, node)
    if first is None:
        return None
    source = first.input[0]
    if is_op(node, "Transpose"):
        perm = _composed(first, node)
        return source if perm is not None and perm == sorted(perm) else None
    if is_op(node, "Cast"):
        kind, middle, final = graph.dtype_of(source), attribute(first, "to"), attribute(node, "to")
        return source if kind and kind == final and is_lossless(kind, middle) else None
    if node.op_type in RESHAPES:
        if same_shape(graph.shape_of(source), graph.shape_of(node.output[0]), slack=1):
            return source
        kinds = {first.op_type, node.op_type}
        axes = [integers(graph, item, "axes", 1) for item in (first, node)]
        inverse = kinds == {"Squeeze", "Unsqueeze"} and axes[0] and axes[1]
        return source if inverse and sorted(axes[0] or ()) == sorted(axes[1] or ()) else None
    return None


def merge(graph: Graph, node: NodeProto) -> str | None:
    """Merge the node with what stands before it, where that has no other reader.

    Returns:
        What was merged, in a few words; None when nothing was.
    """
    if is_op(node, "Concat"):
        return _merge_concats(graph, node)
    rule = _MERGES.get(node.op_type)
    first = _first(graph, node)
    if rule is None or first is None or graph.use_count(first.output[0]) != 1:
        return None
    kind = node.op_type
    if not rule(graph, first, node):
        return None
    remove_unused(graph, first)
    return f"merged {first.op_type} and {kind}"


def _first(graph: Graph, node: NodeProto) -> NodeProto | None:
    """Return the node before, when the two may form a pair."""
    if node.op_type not in _MERGES or not node.input:
        return None
    first = graph.producer(node.input[0])
    if first is None or first.op_type not in _PARTNERS[node.op_type] or not is_op(first, first.op_type):
        return None
    attributes = (*first.attribute, *node.attribute)
    return None if not first.input or any(item.ref_attr_name for item in attributes) else first


def _composed(first: NodeProto, second: NodeProto) -> list[int] | None:
    """Return the axes of two Transposes as one; None when nothing tells the rank."""
    perms = [attribute(node, "perm") for node in (first, second)]
    rank = next((len(perm) for perm in perms if perm is not None), None)
    if rank is None:
        return [0] if first.op_type == second.op_type else None  # both reverse the axes
    one, two = (list(range(rank))[::-1] if perm is None else list(perm) for perm in perms)
    return [one[axis] for axis in two]


def _transposes(graph: Graph, first: NodeProto, node: NodeProto) -> bool:
    perm = _composed(first, node)
    if perm is None:
        return False
    graph.set_input(node, 0, first.input[0])
    graph.set_attribute(node, "perm", perm)
    return True


def _casts(graph: Graph, first: NodeProto, node: NodeProto) -> bool:
    if not is_lossless(graph.dtype_of(first.input[0]), attribute(first, "to")):
        return False
    graph.set_input(node, 0, first.input[0])
    return True


def _reshapes(graph: Graph, first: NodeProto, node: NodeProto) -> bool:
    if _reads_only_elements(graph, first, node):
        graph.set_input(node, 0, first.input[0])
        return True
    target = _target(graph.shape_of(first.input[0]), graph.shape_of(node.output[0]))
    if target is not None and graph.opset() >= 5:
        shape = graph.fresh_name(f"{node.output[0]}_shape")
        graph.set_constant(shape, np.array(target, np.int64))
        _replace(graph, node, "Reshape", [first.input[0], shape])
        return True
    return node.op_type == first.op_type and _merge_axes(graph, first, node)


def _reads_only_elements(graph: Graph, first: NodeProto, node: NodeProto) -> bool:
    """Whether the last of two reshapes gives the same on the first one's input."""
    source, middle = graph.shape_of(first.input[0]), graph.shape_of(node.input[0])

    def kept(axis: int) -> bool:
        if source is None or middle is None or axis >= min(len(source), len(middle)):
            return False
        return source[axis] is not None and source[axis] == middle[axis]

    if node.op_type == "Flatten":
        return attribute(node, "axis", 1) == 1 and kept(0)
    if node.op_type != "Reshape":
        return False
    target = integers(graph, node, "shape", 1)
    if target is None:
        return False
    copies = not attribute(node, "allowzero", 0)
    return all(number != 0 or (copies and kept(axis)) for axis, number in enumerate(target))


def _target(source: tuple[Dim, ...] | None, final: tuple[Dim, ...] | None) -> list[int] | None:
    """Return a shape for Reshape that takes one shape to another; None when more than one size is unknown.

    >>> _target(("N", 2, 3), ("N", 6)), _target(("N", "M"), ("M", "N"))
    ([0, 6], None)
    """
    if source is None or final is None or 0 in final:
        return None
    target: list[int] = []
    for axis, dim in enumerate(final):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if dim is not None and axis < len(source) and source[axis] == dim else -1)
    return target if target.count(-1) <= 1 else None


def _merge_axes(graph: Graph, first: NodeProto, node: NodeProto) -> bool:
    """Merge two Squeezes or two Unsqueezes of known axes, none counted from the end."""
    axes = [integers(graph, item, "axes", 1) for item in (first, node)]
    one, two = axes
    if not one or not two or min(*one, *two) < 0 or node.op_type not in ("Squeeze", "Unsqueeze"):
        return False
    # Unsqueeze: the last one's axes are final; Squeeze: the first one's are original. Shift the others.
    fixed, moved = (two, one) if node.op_type == "Unsqueeze" else (one, two)
    free = [axis for axis in range(max(moved) + len(fixed) + 1) if axis not in fixed]
    both = sorted([*fixed, *(free[axis] for axis in moved)])
    if graph.opset() < 13:
        graph.set_attribute(node, "axes", both)
        graph.set_input(node, 0, first.input[0])
    else:
        name = graph.fresh_name(f"{node.output[0]}_axes")
        graph.set_constant(name, np.array(both, np.int64))
        _replace(graph, node, node.op_type, [first.input[0], name])
    return True


def _replace(graph: Graph, node: NodeProto, op_type: str, inputs: list[str]) -> None:
    """Put another node in the place of one with a single output."""
    graph.remove(node)
    graph.emit(op_type, inputs, [node.output[0]], name=node.name or op_type, doc_string=node.doc_string)
    release(graph, node.input)


def _clips(graph: Graph, first: NodeProto, node: NodeProto) -> bool:
    low, high = clip_bounds(graph, node)
    if first.op_type == "Relu":
        if low is None or low < 0:
            return False
        graph.set_input(node, 0, first.input[0])
        return True
    least, most = clip_bounds(graph, first)
    if low is None or high is None or least is None or most is None:
        return False
    if math.isnan(low + high + least + most) and math.inf not in (high, most):
        return False
    if max(low, least) > min(high, most):
        return False  # the result would be a constant that depends on the order
    if graph.opset() < 11:
        for name, value in (("min", max(low, least)), ("max", min(high, most))):
            if math.isfinite(value):
                graph.set_attribute(node, name, value)
        graph.set_input(node, 0, first.input[0])
        return True
    outer, inner = ([*item.input, "", ""][:3] for item in (node, first))
    bounds = [inner[1] if least > low else outer[1], inner[2] if most < high else outer[2]]
    graph.set_inputs(node, [inner[0], *bounds])
    release(graph, outer)
    return True


def _axis(graph: Graph, node: NodeProto) -> int | None:
    """Return the axis a Concat or Split works on, counted from the front where the rank is known."""
    default = 1 if node.op_type == "Concat" else 0
    axis = int(attribute(node, "axis", default))
    shape = graph.shape_of(next(filter(None, node.output)))
    if shape is not None and axis < 0:
        axis += len(shape)
    return axis


def _split_concat(graph: Graph, node: NodeProto) -> str | None:
    """Return what a Split took apart and this Concat puts together again."""
    split = graph.producer(node.input[0]) if node.input else None
    if split is None or not is_op(split, "Split") or list(split.output) != list(node.input):
        return None
    if any(item.ref_attr_name for item in (*split.attribute, *node.attribute)):
        return None
    return split.input[0] if _axis(graph, split) == _axis(graph, node) else None


def _merge_concats(graph: Graph, node: NodeProto) -> str | None:
    """Put the inputs of Concats that only this Concat reads in their place, however deep they go."""
    readers = graph.consumers(node.output[0]) if graph.use_count(node.output[0]) == 1 else []
    if any(_is_inner(graph, node, reader) for reader in readers):
        return None  # its reader will take all at once
    merged: list[NodeProto] = []
    inputs: list[str] = []
    stack = list(node.input)[::-1]
    while stack:
        value = stack.pop()
        inner = graph.producer(value)
        if inner is not None and graph.use_count(value) == 1 and _is_inner(graph, inner, node):
            merged.append(inner)
            stack += list(inner.input)[::-1]
        else:
            inputs.append(value)
    if not merged:
        return None
    graph.set_inputs(node, inputs)
    for inner in merged:
        remove_unused(graph, inner)
    return "merged Concats"


def _is_inner(graph: Graph, inner: NodeProto, node: NodeProto) -> bool:
    """Whether two nodes are Concats along one axis."""
    if not (is_op(inner, "Concat") and is_op(node, "Concat")):
        return False
    if any(item.ref_attr_name for item in (*inner.attribute, *node.attribute)):
        return False
    return _axis(graph, inner) == _axis(graph, node)


_MERGES: dict[str, Callable[[Graph, NodeProto, NodeProto], bool]] = {
    "Transpose": _transposes,
    "Cast": _casts,
    "Clip": _clips,
    **dict.fromkeys(RESHAPES, _reshapes),
}
_PARTNERS: dict[str, tuple[str, ...]] = {
    "Transpose": ("Transpose",),
    "Cast": ("Cast",),
    "Clip": ("Clip", "Relu"),
    **dict.fromkeys(RESHAPES, RESHAPES),
}
