"""Operators through which a positive scale of channels passes: what it is on one side, given the other.

Each function is called once for a node of which one value has an index; it gives the node's other values
theirs, or freezes what cannot be scaled, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from onnx import NodeProto

from onnxslim_lab.equalization.indexing import Index, reshaped, varying
from onnxslim_lab.equalization.joins import joint, matmul, product
from onnxslim_lab.equalization.magnitudes import magnitude
from onnxslim_lab.equalization.region import Region
from onnxslim_lab.graph import attribute, is_op
from onnxslim_lab.rewriting.patterns import clip_bounds, scalar

Carrier = Callable[[Region, NodeProto], None]
Step = Callable[[Index], Index | None]


def _both_ways(region: Region, node: NodeProto, forward: Step, backward: Step, reason: str = "") -> None:
    """Relate the first input and the first output; no other input may have a scale."""
    x, y = node.input[0], node.output[0]
    apart = f"{node.op_type} of a scaled argument"
    if x not in region.indices and y not in region.indices:
        region.freeze_values(node.input, apart)
        return
    known, target, step = (x, y, forward) if x in region.indices else (y, x, backward)
    index = region.indices[known]
    found = step(index)
    if found is None:
        region.freeze(index, reason or f"{node.op_type} does not keep channels apart")
    else:
        region.know(target, found)
    for other in filter(None, node.input[1:]):
        region.keep_outside(other, index, apart)


def _same(region: Region, node: NodeProto) -> None:
    _both_ways(region, node, lambda index: index, lambda index: index)


def _dropout(region: Region, node: NodeProto) -> None:
    training = node.input[2] if len(node.input) > 2 else ""
    mode = region.graph.constant(training) if training else None
    if any(node.output[1:]) or (training and (mode is None or bool(mode))):
        region.freeze_values([node.input[0], node.output[0]], "Dropout is in training mode")
    else:
        _same(region, node)


def _clip(region: Region, node: NodeProto) -> None:
    bounds = clip_bounds(region.graph, node)
    if bounds is not None and bounds[1] in (0.0, -math.inf) and bounds[2] in (0.0, math.inf):
        _same(region, node)
        return
    shown = "its bounds are not constant" if bounds is None else f"bounds {bounds[1]:g} and {bounds[2]:g}"
    reason = f"Clip is not homogeneous ({shown}, the same for all channels)"
    region.freeze_values([node.input[0], node.output[0]], reason)


def _pool(region: Region, node: NodeProto) -> None:
    def step(index: Index) -> Index | None:
        return None if any(node.output[1:]) else region.collapse(index, range(2, index.ndim))

    _both_ways(region, node, step, step, f"{node.op_type} also gives indices")


def _pad(region: Region, node: NodeProto) -> None:
    graph = region.graph
    given = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "pads")
    value = node.input[2] if len(node.input) > 2 else ""
    filler = scalar(graph, value) if value else attribute(node, "value", 0.0)
    only = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    zero = attribute(node, "mode", "constant") != "constant" or filler == 0

    def step(index: Index) -> Index | None:
        if given is None or not zero or (only is None and len(node.input) > 3 and node.input[3]):
            return None
        axes = range(index.ndim) if only is None else [int(axis) % index.ndim for axis in only.reshape(-1)]
        pads = np.asarray(given).reshape(2, -1)
        if pads.shape[1] != len(axes):
            return None
        moved = {axis for axis, *ends in zip(axes, *pads, strict=True) if any(ends)}
        return region.collapse(index, moved)

    _both_ways(region, node, step, step, "Pad fills with a number other than 0")


def _transpose(region: Region, node: NodeProto) -> None:
    def perm(index: Index) -> list[int]:
        return list(attribute(node, "perm", range(index.ndim)[::-1]))

    _both_ways(
        region,
        node,
        lambda index: index.transpose(perm(index)),
        lambda index: index.transpose([int(axis) for axis in np.argsort(perm(index))]),
    )


def _reshape(region: Region, node: NodeProto) -> None:
    before, after = region.shape(node.input[0]), region.shape(node.output[0])
    if before is None or after is None:
        region.freeze_values([node.input[0], node.output[0]], f"shapes around {node.op_type} are not known")
        return
    _both_ways(
        region,
        node,
        lambda index: reshaped(index, before, after),
        lambda index: reshaped(index, after, before),
        f"{node.op_type} mixes channels with axes of unknown size",
    )


def _axes(region: Region, node: NodeProto) -> list[int] | None:
    """Return the axes a node names by attribute or constant input, None when it names none."""
    if len(node.input) > 1 and node.input[1]:
        values = region.graph.constant(node.input[1])
        return None if values is None else [int(axis) for axis in values.reshape(-1)]
    axes = attribute(node, "axes")
    return None if axes is None else list(axes)


def _squeeze(region: Region, node: NodeProto) -> None:
    """Relate the sides of Squeeze, Unsqueeze and the reductions."""
    adds = is_op(node, "Unsqueeze")
    keeps = node.op_type.startswith("Reduce") and bool(attribute(node, "keepdims", 1))
    longer = node.output[0] if adds else node.input[0]
    shape = region.shape(longer)
    axes = _axes(region, node)
    if axes is None and is_op(node, "Squeeze") and shape is not None:
        axes = None if None in shape else [axis for axis, size in enumerate(shape) if size == 1]
    if axes is None or shape is None:
        region.freeze_values([node.input[0], node.output[0]], f"axes of {node.op_type} are not known")
        return
    chosen = tuple(sorted(axis % len(shape) for axis in axes))

    def cut(index: Index) -> Index | None:
        index = region.collapse(index, chosen)
        return index if keeps else index.reshape([n for i, n in enumerate(index.shape) if i not in chosen])

    def grow(index: Index) -> Index | None:
        if keeps:
            return region.collapse(index, chosen)
        return np.expand_dims(index, chosen)

    _both_ways(region, node, *((grow, cut) if adds else (cut, grow)))


def _resize(region: Region, node: NodeProto) -> None:
    before, after = region.shape(node.input[0]), region.shape(node.output[0])
    crops = attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize"

    def step(index: Index) -> Index | None:
        if before is None or after is None or crops:
            return None
        return region.collapse(index, [axis for axis in varying(index) if before[axis] != after[axis]])

    _both_ways(region, node, step, step)


def _slice(region: Region, node: NodeProto) -> None:
    """Relate the sides of a Slice: the channels it takes keep theirs; along its other axes there is one scale."""
    cuts = _cuts(region, node)

    def step(index: Index) -> Index | None:
        return None if cuts is None else region.collapse(index, sorted(axis % index.ndim for axis in cuts))

    known = next(
        (
            index
            for value in (node.input[0], node.output[0])
            if (index := region.indices.get(value)) is not None
        ),
        None,
    )
    whole = region.shape(node.input[0])
    if known is None or cuts is None or whole is None:
        _both_ways(region, node, step, step, "axes of Slice are not known")
        return
    placed = {axis % len(whole): cut for axis, cut in cuts.items()}
    channels = [axis for axis in varying(known) if axis in placed]
    size = whole[channels[0]] if len(channels) == 1 else None
    cut = placed[channels[0]] if len(channels) == 1 else None
    if not isinstance(size, int) or cut is None or set(varying(known)) != set(channels):
        _both_ways(region, node, step, step, "axes of Slice are not known")
        return
    form = [1] * len(whole)
    form[channels[0]] = size
    index = region.indices.get(node.input[0])
    if index is None:
        index = region.variables(size).reshape(form)
    region.know(node.input[0], np.broadcast_to(index, form))
    region.know(node.output[0], np.broadcast_to(index, form)[(slice(None),) * channels[0] + (cut,)])


def _cuts(region: Region, node: NodeProto) -> dict[int, slice | None] | None:
    """Return what a Slice takes of each axis that it names, None for unknown bounds; None for unknown axes."""
    graph = region.graph
    given: list[Sequence[int] | None]
    if len(node.input) < 2:
        given = [attribute(node, name) for name in ("starts", "ends", "axes", "steps")]
    else:
        constants = [graph.constant(name) if name else None for name in node.input[1:5]]
        given = [None if values is None else values.reshape(-1).tolist() for values in constants]
        if any(name and values is None for name, values in zip(node.input[3:4], given[2:3], strict=True)):
            return None
    starts, ends, axes, steps = (*given, None, None)[:4]
    if axes is None:
        if starts is None:
            return None
        axes = range(len(starts))
    if starts is None or ends is None or (steps is None and len(node.input) > 4 and node.input[4]):
        return dict.fromkeys(axes)
    steps = [1] * len(starts) if steps is None else steps
    if min(steps, default=1) < 1:
        return dict.fromkeys(axes)
    return {axis: slice(*bounds) for axis, *bounds in zip(axes, starts, ends, steps, strict=True)}


def _gather(region: Region, node: NodeProto) -> None:
    """Relate the sides of a Gather of computed data: along its axis there may be one scale only."""
    data, places = region.shape(node.input[0]), region.shape(node.input[1])
    if data is None or places is None:
        region.freeze_values([node.input[0], node.output[0]], "shapes around Gather are not known")
        return
    axis, count = attribute(node, "axis", 0) % len(data), len(places)

    def forward(index: Index) -> Index:
        index = region.collapse(index, [axis])
        return index.reshape(*index.shape[:axis], *(1,) * count, *index.shape[axis + 1 :])

    def backward(index: Index) -> Index:
        index = region.collapse(index, range(axis, axis + count))
        return index.reshape(*index.shape[:axis], 1, *index.shape[axis + count :])

    _both_ways(region, node, forward, backward)


def _concat(region: Region, node: NodeProto) -> None:
    """Relate the parts of Concat, or of Split turned around, with the whole."""
    splits = is_op(node, "Split")
    whole = node.input[0] if splits else node.output[0]
    parts = list(node.output) if splits else list(node.input)
    known = next(value for value in (whole, *parts) if value in region.indices)
    if any(region.graph.is_constant(value) for value in parts):
        region.freeze_values([whole, *parts], f"{node.op_type} with a constant")
        return
    rank = region.indices[known].ndim
    axis = attribute(node, "axis", 0) % rank
    others = set(varying(region.indices[known])) - {axis}
    if others:  # joined along an axis that has no scales of its own
        if axis in varying(region.indices[known]):
            region.freeze_values([known], f"{node.op_type} of scales along two axes")
            return
        for value in filter(None, (whole, *parts)):
            region.know(value, region.indices[known])
        return
    sizes = [shape[axis] for shape in map(region.shape, parts) if shape is not None]
    known_sizes = [size for size in sizes if isinstance(size, int)]
    if len(known_sizes) < len(parts):
        region.freeze_values([whole, *parts], f"sizes around {node.op_type} are not known")
        return
    ends = np.cumsum([0, *known_sizes])
    form = [1] * rank
    form[axis] = int(ends[-1])
    index = region.indices.get(whole)
    if index is None:
        index = region.variables(int(ends[-1])).reshape(form)
    index = np.broadcast_to(index, form)
    region.know(whole, index)
    for value, (start, end) in zip(parts, pairwise(ends), strict=True):
        if value:
            region.know(value, index.take(range(start, end), axis))


CARRIERS: dict[str, Carrier] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity", "Abs", "Neg"), _same),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _squeeze),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Max", "Min"), joint),
    **dict.fromkeys(("Mul", "Div"), product),
    **dict.fromkeys(("Concat", "Split"), _concat),
    "Clip": _clip,
    "Dropout": _dropout,
    "Gather": _gather,
    "MatMul": matmul,
    "Pad": _pad,
    **dict.fromkeys(("Pow", "Sqrt"), magnitude),
    "Slice": _slice,
    "Transpose": _transpose,
}
