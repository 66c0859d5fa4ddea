"""Rules of operators that take parts of tensors, or move or repeat them: see `rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.channels.axes import Atoms, Axes, Kept
from onnxslim_lab.channels.nodes import freeze_node, label
from onnxslim_lab.channels.sizes import Entry, entry_of, rewrite
from onnxslim_lab.graph import attribute


def cut(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Slice: the places it takes; its bounds are rewritten."""
    x, y, graph = axes.input(node, 0), axes.output(node), axes.graph
    unknown = f"bounds or shapes around {label(node)} are not known"
    fields = {}
    for slot, field in enumerate(("starts", "ends", "axes", "steps"), start=1):
        name = node.input[slot] if slot < len(node.input) else ""
        values = graph.constant(name) if name else attribute(node, field)
        fields[field] = None if values is None else [int(value) for value in np.asarray(values).reshape(-1)]
        if name and values is None:
            return freeze_node(axes, node, unknown)
    starts, ends = fields["starts"], fields["ends"]
    if x is None or y is None or starts is None or ends is None:
        return freeze_node(axes, node, unknown)
    chosen = [axis % len(x) for axis in fields["axes"] or range(len(starts))]
    steps = fields["steps"] or [1] * len(starts)
    for axis, (mine, theirs) in enumerate(zip(x, y, strict=True)):
        if axis not in chosen:
            axes.link(mine, theirs, unknown)
            continue
        at = chosen.index(axis)
        if mine is None or theirs is None or steps[at] != 1:
            axes.freeze(mine, f"{label(node)} takes some of it")
            axes.freeze(theirs, f"{label(node)} takes some of it")
            continue
        taken = mine[starts[at] : ends[at]]
        axes.link(taken, theirs, unknown)

    def rebound(kept: Kept) -> None:
        new = list(starts), list(ends)
        for at, axis in enumerate(chosen):
            atoms = x[axis]
            if atoms is None or kept(atoms).all():
                continue
            stays = kept(atoms)
            first, last, _ = slice(starts[at], ends[at]).indices(atoms.size)
            new[0][at], new[1][at] = int(stays[:first].sum()), int(stays[:last].sum())
        if new != (list(starts), list(ends)):
            for slot, field, values in ((1, "starts", new[0]), (2, "ends", new[1])):
                if graph.opset() < 10:
                    graph.set_attribute(node, field, values)
                else:
                    name = graph.fresh_name(f"{node.output[0]}_{field}")
                    kind = graph.constant_type(node.input[slot])
                    dtype = np.int32 if kind and kind[0] == TensorProto.INT32 else np.int64
                    graph.set_constant(name, np.array(values, dtype))
                    graph.set_input(node, slot, name)

    axes.edits.append(rebound)
    return range(len(node.input))


def pad(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Pad: the axes it leaves alone."""
    x, y, graph = axes.input(node, 0), axes.output(node), axes.graph
    given = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "pads")
    only = graph.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
    if x is None or y is None or given is None or (only is None and len(node.input) > 3 and node.input[3]):
        return freeze_node(axes, node, f"the pads of {label(node)} are not known")
    listed = range(len(x)) if only is None else [int(axis) % len(x) for axis in only.reshape(-1)]
    moved = {axis for axis, *ends in zip(listed, *np.asarray(given).reshape(2, -1), strict=True) if any(ends)}
    for axis, (mine, theirs) in enumerate(zip(x, y, strict=True)):
        if axis in moved:
            axes.freeze(mine, f"{label(node)} pads it")
            axes.freeze(theirs, f"{label(node)} pads it")
        else:
            axes.link(mine, theirs, f"shapes around {label(node)} are not known")
    return [0]


def resize(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Resize and Upsample: the axes that keep their size."""
    x, y, graph = axes.input(node, 0), axes.output(node), axes.graph
    unknown = f"shapes around {label(node)} are not known"
    if x is None or y is None or attribute(node, "axes") is not None:
        return freeze_node(axes, node, unknown)
    by_size = len(node.input) > 3 and bool(node.input[3])
    scales = None
    if not by_size and node.op_type == "Upsample":
        scales = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "scales")
    elif not by_size and len(node.input) > 1:
        scales = graph.constant(node.input[2 if len(node.input) > 2 else 1])
    crops = attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize"
    if crops or (not by_size and (scales is None or len(np.asarray(scales)) != len(x))):
        return freeze_node(axes, node, f"the scales of {label(node)} are not known")
    for axis, (mine, theirs) in enumerate(zip(x, y, strict=True)):
        entry = entry_of(graph, node, 3, axis) if by_size else None
        stays = mine is not None and theirs is not None and mine.size == theirs.size
        if stays and (entry is not None if by_size else float(np.asarray(scales)[axis]) == 1.0):
            axes.link(mine, theirs, unknown)
            if entry is not None and theirs is not None:
                rewrite(axes, theirs, entry, axis)
        else:
            axes.freeze(mine, f"{label(node)} resizes it")
            axes.freeze(theirs, f"{label(node)} resizes it")
    return [0]


def expand(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Expand: the axes that have their size already."""
    x, y = axes.input(node, 0), axes.output(node)
    if x is None or y is None:
        return freeze_node(axes, node, f"shapes around {label(node)} are not known")
    extra = len(y) - len(x)
    known = axes.graph.shape_of(node.input[1])
    length = known[0] if known and isinstance(known[0], int) else 0
    for axis, theirs in enumerate(y):
        mine: Atoms | None = x[axis - extra] if axis >= extra else None
        place = axis - (len(y) - length)
        entry = entry_of(axes.graph, node, 1, place) if place >= 0 else Entry(node, 1, 0, 1)
        if mine is not None and theirs is not None and mine.size == theirs.size and entry is not None:
            axes.link(mine, theirs, "")
            if entry.size > 1:
                rewrite(axes, theirs, entry, axis)
        else:
            axes.freeze(mine, f"{label(node)} makes it larger")
            axes.freeze(theirs, f"{label(node)} makes it")
    return [0, 1]


def depth_to_space(axes: Axes, node: NodeProto) -> Iterable[int]:
    """DepthToSpace and SpaceToDepth: a channel of the wide side for several of the deep one."""
    x, y = axes.input(node, 0), axes.output(node)
    step = attribute(node, "blocksize", 1) ** 2
    shallow, deep = (y, x) if node.op_type == "DepthToSpace" else (x, y)
    few, many = (tensor[1] if tensor is not None and len(tensor) == 4 else None for tensor in (shallow, deep))
    if x is None or y is None or few is None or many is None or many.size != few.size * step:
        return freeze_node(axes, node, f"shapes around {label(node)} are not known")
    inner = node.op_type == "DepthToSpace" and attribute(node, "mode", "DCR") == "CRD"
    axes.tie(np.concatenate([few[None], many.reshape(-1, step).T if inner else many.reshape(step, -1)]))
    axes.link(x[0], y[0], f"shapes around {label(node)} are not known")
    for tensor in (x, y):
        axes.freeze_all(tensor[2:], f"{label(node)} moves it")
    return [0]


WINDOWS: dict[str, Callable[[Axes, NodeProto], Iterable[int]]] = {
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Pad": pad,
    "Resize": resize,
    "Slice": cut,
    "SpaceToDepth": depth_to_space,
    "Upsample": resize,
}
