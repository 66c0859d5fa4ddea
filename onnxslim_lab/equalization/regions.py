"""Finding the regions of a graph: from the input of each layer as far as its scales reach."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from onnxslim_lab.equalization.carriers import CARRIERS
from onnxslim_lab.equalization.ends import NORMS, channel_axis, end_at, norm_at
from onnxslim_lab.equalization.region import LayerEnd, Region
from onnxslim_lab.graph import Graph, domain_of, is_op
from onnxslim_lab.layer_views.storage import FLOATS, set_by_caller
from onnxslim_lab.layers import Layer

_HARMLESS = ("Shape", "Size")  # they read no values


def find_regions(graph: Graph, layers: Iterable[Layer]) -> list[Region]:
    """Return the regions of one graph that end in the inputs of its layers, each value in one of them."""
    by_node = layer_nodes(layers)
    seen: set[str] = set()
    regions = []
    for layer in by_node.values():
        value = next(iter(layer.node.input), "")
        found = channel_axis(layer, "in")
        if isinstance(found, str) or value in seen or graph.is_constant(value):
            continue
        region = grow(graph, value, found[0], by_node)
        seen.update(region.indices)
        regions.append(region)
    return regions


def layer_nodes(layers: Iterable[Layer]) -> dict[int, Layer]:
    """Return the layers whose inputs or outputs may be scaled by the identity of their nodes."""
    return {id(layer.node): layer for layer in layers if layer.role in ("weight", "W")}


def grow(graph: Graph, value: str, axis: int, by_node: dict[int, Layer]) -> Region:
    """Return the region around a value whose channels lie along an axis; see `layer_nodes` for `by_node`."""
    region = Region(graph)
    shape = region.shape(value)
    if shape is None or not -len(shape) <= axis < len(shape):
        region.reasons.append("the shape of its input is not known")
        return region
    index = region.start(value, {axis % len(shape)})
    if index is None:
        region.reasons.append("the number of its input channels is not known")
        return region
    region.know(value, index)
    done: set[tuple[int, str]] = set()
    while region.waiting:
        current = region.waiting.popleft()
        producer = graph.producer(current)
        if producer is None:
            what = "an input of the graph" if graph.is_input(current) else "a value from outside the graph"
            region.freeze(region.indices[current], f"{what} keeps its scale")
        else:
            _visit(region, producer, current, by_node, done, made=True)
        if graph.is_output(current):
            region.freeze(region.indices[current], "an output of the graph keeps its scale")
        if graph.dtype_of(current) not in FLOATS:
            region.freeze(region.indices[current], "its type is not real or not known")
        for node in graph.consumers(current):
            _visit(region, node, current, by_node, done, made=False)
    _agree_on_shared(region)
    region.close()
    return region


def _visit(
    region: Region,
    node: NodeProto,
    value: str,
    by_node: dict[int, Layer],
    done: set[tuple[int, str]],
    *,
    made: bool,
) -> None:
    """Take in a node that makes or reads a value of the region."""
    layer = by_node.get(id(node))
    side = ("out" if made else "in") if layer is not None or node.op_type in NORMS else ""
    if (id(node), side) in done:
        return
    done.add((id(node), side))
    reason = ""
    carrier = None if domain_of(node.domain) else CARRIERS.get(node.op_type)
    if not made and node.op_type in _HARMLESS and not domain_of(node.domain):
        return
    if value not in node.input and not made:
        reason = f"the body of {node.op_type} reads it"
    elif set_by_caller(node):
        reason = "attributes are set by the function's caller"
    elif layer is not None and made:
        reason = end_at(region, layer, "out", value)
    elif layer is not None:
        reads = [slot for slot, name in enumerate(node.input) if name == value]
        reason = "" if reads == [0] else f"{node.op_type} reads it twice or as its bias"
        reason = reason or end_at(region, layer, "in", value)
    elif made and node.op_type in NORMS and not domain_of(node.domain):
        reason = norm_at(region, node, value)
    elif carrier is not None and region.graph.opset() >= 7:
        carrier(region, node)
    else:
        reason = f"{node.op_type} does not let a scale through"
    if reason:
        region.freeze(region.indices[value], reason)


def _agree_on_shared(region: Region) -> None:
    """Freeze the scales of weights that nodes outside the region, or on its other side, use too."""
    users: dict[tuple[int, str], list[LayerEnd]] = {}
    for end in region.layers:
        users.setdefault((id(end.layer.weight_graph), end.layer.weight), []).append(end)
    for ends in users.values():
        for side in {end.side for end in ends}:
            own = [end for end in ends if end.side == side]
            nodes = {id(end.layer.node) for end in own}
            others = {id(node) for node in own[0].layer.sharers}
            if not others <= nodes or any(end.layer.shape != own[0].layer.shape for end in own):
                for end in own:
                    region.freeze(end.index, "the weight is used by layers outside the region too")
            for end in own[1:]:
                region.link(own[0].index, end.index)


def copied(graph: Graph, value: str, by_node: dict[int, Layer]) -> Region | None:
    """Return a region of the layers that read a normalization, for a copy of it that only they read.

    None when the value is not made by a normalization with constants of its own (LayerNormalization and its
    kin; Mul by a vector and Add) or no layer reads it.
    """
    last = graph.producer(value)
    nodes = [] if last is None else [last]
    if is_op(last, "Add") and last is not None:
        before = [graph.producer(name) for name in last.input if not graph.is_constant(name)]
        if len(before) != 1 or before[0] is None or not is_op(before[0], "Mul"):
            return None
        nodes.insert(0, before[0])
    if not nodes or not (is_op(nodes[0], "Mul") or nodes[0].op_type in NORMS):
        return None
    readers = [by_node[id(node)] for node in graph.consumers(value) if id(node) in by_node]
    region = Region(graph)
    shape = region.shape(value)
    places = [channel_axis(layer, "in") for layer in readers]
    index = None
    if shape is not None and places and not isinstance(places[0], str):
        index = region.start(value, {places[0][0] % len(shape)})
    if index is None:
        return None
    region.indices[value] = index
    for layer in readers:
        if list(layer.node.input).count(value) == 1 and layer.node.input[0] == value:
            end_at(region, layer, "in", value)
    done: set[tuple[int, str]] = set()
    for node in reversed(nodes):
        _visit(region, node, node.output[0], by_node, done, made=True)
    region.copies = nodes
    _agree_on_shared(region)
    region.close()
    made = {node.output[0] for node in nodes}
    whole = region.norms == nodes[:1] and set(region.indices) <= made and region.layers
    return region if whole else None
