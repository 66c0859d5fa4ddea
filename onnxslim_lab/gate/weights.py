"""The weights of a model's layers as they are when it runs, however the file stores them.

A file may hold a weight as codes that it decodes itself: a pruned and shared weight behind a Gather, an int4
one behind BitShift and Mul. What such a file has of parameters, zeros and integers is that of the decoded weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.errors import LabError
from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.layer_views.storage import FLOATS
from onnxslim_lab.layers import Layer, find_layers
from onnxslim_lab.macs import fed_sizes, model_macs, parameters
from onnxslim_lab.metrics import Feed
from onnxslim_lab.passes.eliminate_dead import EliminateDead
from onnxslim_lab.passes.fold_constants import FoldConstants
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.shapes import Dim
from onnxslim_lab.weights import Array
from onnxslim_lab.worker.messages import Value

_SLOTS = {
    "QLinearConv": (3, 5),
    "QLinearMatMul": (3, 5),
    "QGemm": (3, 5),
    "ConvInteger": (1, 3),
    "MatMulInteger": (1, 3),
    "MatMulIntegerToFloat": (1, 5),
    "DynamicQuantizeMatMul": (1, 3),
    "MatMulNBits": (1, None),
}
"""Where operators read integer weights, and the zero point of these; None: packed, zeros are not counted."""

_FEW_FLOATS = 4  # a code book and scales are at most a part in four of the values that are not zero


@dataclass(frozen=True)
class Weight:
    """How many values a weight has, how many are zero, whether integers store them, and how many floats do."""

    size: int
    zeros: int
    integer: bool
    floats: int


@dataclass(frozen=True)
class Weights:
    """What `decoded_weights` found.

    Attributes:
        model: A copy in which weights that the file decodes are plain float constants.
        found: Each weight of a layer once.
        hidden: Layers whose weights could not be decoded.
        parameters: Real-valued constants, those counted that are stored as integers or codes.
    """

    model: Graph
    found: tuple[Weight, ...]
    hidden: tuple[str, ...]
    parameters: int

    @property
    def size(self) -> int:
        """The number of all weights."""
        return sum(item.size for item in self.found)


def decoded_weights(model: Graph, feed: Feed) -> Weights:
    """Return the weights of a model's layers, decoded by the NumPy runtime; the model stays as it is.

    Args:
        model: The main graph.
        feed: Inputs of the model; no weight depends on them.
    """
    copy = model.copy()
    origins = {id(graph): (graph, origin) for graph, origin in zip(copy.walk(), model.walk(), strict=True)}
    _decode(copy, feed)
    FoldConstants(allow_growth=True).run(copy)  # what bodies and functions make of constants
    found: dict[tuple[int, str], Weight] = {}
    hidden = []
    for graph in copy.walk():
        layers, refusals = find_layers(graph)
        for layer in layers:
            key = (id(layer.weight_graph), layer.weight)
            array = layer.weight_graph.constant(layer.weight)
            if key not in found and array is not None:
                found[key] = _weight(origins[id(layer.weight_graph)][1], layer.weight, array)
        for node in graph.nodes:
            packed = _integer_weight(graph, node)
            if packed is not None:
                found[packed[0]] = packed[1]
        integer = {node.name or node.output[0] for node in graph.nodes if node.op_type in _SLOTS}
        hidden += [
            item.where
            for item in refusals
            if item.where not in integer and ("quantized" in item.reason or "from constants" in item.reason)
        ]
    extra = sum(item.size - item.floats for item in found.values() if item.integer or item.floats < item.size)
    return Weights(copy, tuple(found.values()), tuple(hidden), parameters(model) + extra)


def fed_macs(model: Graph, feed: Feed) -> tuple[int, int]:
    """Return the multiply-accumulates of one run on a feed, and the layers that could not be counted.

    Sizes that inference does not know are those of a run on the NumPy runtime.

    Raises:
        LabError: The runtime cannot run the model.
    """
    counted = model_macs(model, fed_sizes(model, feed))
    integers = [node for graph in model.walk() for node in graph.nodes if node.op_type in _SLOTS]
    if not counted.unknown and not integers:
        return counted.total, 0
    known: dict[str, tuple[Dim, ...]] = {n: v.shape for n, v in feed.items() if isinstance(v, np.ndarray)}

    def look(node: NodeProto, given: Sequence[Value], made: Sequence[Value], _: float) -> None:
        for name, value in (*zip(node.input, given, strict=False), *zip(node.output, made, strict=False)):
            if name and isinstance(value, np.ndarray):
                known.setdefault(name, value.shape)

    Interpreter(model).run(feed, hook=look)
    found = [
        (layer.macs(known) if _ran(layer, known) else 0) if count is None else count
        for layer, count in counted.layers
    ]
    found += [_integer_macs(node, known) for node in integers]
    return sum(count or 0 for count in found), sum(count is None for count in found)


def _ran(layer: Layer, known: Mapping[str, tuple[Dim, ...]]) -> bool:
    """Whether a layer was computed: one in a branch that was not taken was not."""
    return layer.graph.owner is None or any(name in known for name in layer.node.output)


def _integer_macs(node: NodeProto, known: Mapping[str, tuple[Dim, ...]]) -> int | None:
    """Return the multiply-accumulates of an operator on integer weights; None when its sizes are not known."""
    weight, y = known.get(node.input[_SLOTS[node.op_type][0]]), known.get(node.output[0])
    if weight is None or y is None:
        return None
    if node.op_type == "MatMulNBits":
        each = attribute(node, "K", 0)
    elif "Conv" in node.op_type:
        each = math.prod(size for size in weight[1:] if isinstance(size, int))
    else:
        each = weight[-1 if attribute(node, "transB", 0) else -2]
    return int(each) * math.prod(size for size in y if isinstance(size, int))


def _decode(copy: Graph, feed: Feed) -> None:
    """Put the values of what depends on constants only in the place of the nodes that compute it."""
    static: dict[str, NodeProto] = {}
    for node in copy.nodes:
        fixed = all(name in static or copy.is_constant(name) for name in node.input if name)
        if fixed and len(node.output) == 1 and any(node.input) and not copy.bodies(node):
            static[node.output[0]] = node
    ids = set(map(id, static.values()))
    ends = [
        name
        for name in static
        if not copy.is_output(name) and any(id(node) not in ids for node in copy.consumers(name))
    ]
    if not ends:
        return
    try:
        values = Interpreter(copy).run(feed, ends)
    except LabError:  # what it cannot compute stays, and is told as hidden
        return
    for name in ends:
        value = values[name]
        if isinstance(value, np.ndarray):
            copy.remove(static[name])
            copy.set_constant(name, value)
    EliminateDead().run(copy)


def _weight(origin: Graph, name: str, array: Array) -> Weight:
    """Return what is known of a decoded weight by what the original graph makes it from."""
    zeros = int(np.count_nonzero(array == 0))
    if origin.is_constant(name):
        return Weight(array.size, zeros, integer=False, floats=array.size)
    floats = integers = 0
    for kind, size in _sources(origin, name):
        if kind in FLOATS:
            floats += size
        elif kind not in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL):  # shapes and positions
            integers += size
    few = floats * _FEW_FLOATS <= max(1, array.size - zeros)
    return Weight(array.size, zeros, integer=few and integers > 0, floats=floats)


def _sources(graph: Graph, name: str) -> Iterator[tuple[int, int]]:
    """Yield type and size of the constants that a value is made from."""
    waiting, seen = [name], set[str]()
    while waiting:
        value = waiting.pop()
        scope = graph.scope_of(value) if value and value not in seen else None
        seen.add(value)
        if scope is None:
            continue
        known = scope.constant_type(value) if scope.is_constant(value) else None
        node = scope.producer(value)
        if known is not None:
            yield known[0], int(np.prod(known[1], dtype=np.int64))
        elif node is not None:
            waiting += node.input


def _integer_weight(graph: Graph, node: NodeProto) -> tuple[tuple[int, str], Weight] | None:
    """Return the integer weight that an operator reads, values packed into bytes counted one by one."""
    if node.op_type not in _SLOTS:
        return None
    slot, zero_slot = _SLOTS[node.op_type]
    name = node.input[slot] if slot < len(node.input) else ""
    scope = graph.scope_of(name) if name else None
    kind = scope.constant_type(name) if scope is not None else None
    if scope is None or kind is None or kind[0] in FLOATS or len(kind[1]) < 2:
        return None
    key = (id(scope), name)
    size = int(np.prod(kind[1], dtype=np.int64))
    if zero_slot is None:
        return key, Weight(size * (8 // attribute(node, "bits", 4)), 0, integer=True, floats=0)
    codes = scope.constant(name)
    point = node.input[zero_slot] if zero_slot < len(node.input) else ""
    zero = graph.constant(point) if point else None
    level = np.zeros((), np.int64) if zero is None else zero.astype(np.int64)
    if level.size > 1:  # one for each output channel: the first axis of convolutions, else the last
        level = level.reshape([-1] + [1] * (len(kind[1]) - 1)) if "Conv" in node.op_type else level
    zeros = 0 if codes is None else int(np.count_nonzero(codes.astype(np.int64) == level))
    return key, Weight(size, zeros, integer=True, floats=0)
