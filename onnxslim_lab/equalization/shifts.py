"""Shifts: channels that only linear operators read are centred at 0, and the readers' biases make up for it.

before: y = W2 (W1 x + b1) + b2                  after: y = W2 (W1 x + (b1 - c)) + (b2 + W2 c)

A quantizer has one range for all channels of a value. It must cover the lowest and the highest of them, so
that a channel from 10 to 20 wastes half of it: scaled to the same magnitude as the others, each needs only
half its own length around the middle. Sums of several values (residual connections) are shifted by the sum
of what these are shifted by.

Wei et al. 2023, "Outlier Suppression+: Accurate quantization of large language models by equivalent and
effective shifting and scaling", section 4.1, for the input of layers behind a normalization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.equalization.biases import BiasSlot, add_to_bias, find_slots
from onnxslim_lab.equalization.ends import by_channel, channel_axis
from onnxslim_lab.equalization.regions import layer_nodes
from onnxslim_lab.equalization.scales import Doubles
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.convolutions import ConvKind
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.layers import Layer
from onnxslim_lab.rewriting.folding import pads_its_input
from onnxslim_lab.statistics import Statistics, Want

_WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
_WORTH = 0.95  # of the noise that must be left at most: a second run then finds nothing to do
_LARGEST = 1e30  # of what is added to a bias
_HARMLESS = ("Shape", "Size")  # they read no values


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a shifted value, with the bias that makes up for the shift."""

    layer: Layer
    slot: BiasSlot
    value: str

    @property
    def taps(self) -> Doubles:
        """The weight as (groups, out, channels, taps), with the layer's factor."""
        return by_channel(self.layer, self.layer.matrix.astype(np.float64)) * self.layer.kind.scale


@dataclass(frozen=True, eq=False)
class Stream:
    """Values that layers make, Adds sum and layers read, and nothing else.

    Attributes:
        graph: Their graph.
        axis: The axis of the channels.
        sums: Each value, in the order they are made, with the values of the stream that it is the sum of:
            none for what a layer makes.
        makers: The biases by which values are shifted.
        readers: What reads them.
    """

    graph: Graph
    axis: int
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    makers: dict[str, BiasSlot] = field(default_factory=dict)
    readers: list[Reader] = field(default_factory=list)

    def wants(self) -> list[Want]:
        """Return what to measure."""
        return [Want(self.graph, value, axis=self.axis, average=False) for value in self.sums]


@dataclass(frozen=True, eq=False)
class Shift:
    """Shifts that are worth it.

    Attributes:
        stream: The values.
        centres: What each value loses, float64 (channels,).
        before, after: Noise of the rounding in what the readers make, up to a factor that both have.
    """

    stream: Stream
    centres: Mapping[str, Doubles]
    before: float
    after: float


def find_streams(graph: Graph, layers: Iterable[Layer]) -> list[Stream]:
    """Return the streams of one graph; a value is in one of them at most."""
    slots = [
        slot
        for slot in find_slots(graph)[0]
        if slot.kind == "float" or (slot.kind == "new float" and slot.slot == 2)
    ]
    by_node = {id(slot.node): slot for slot in slots}
    makers = {slot.value: slot for slot in (*slots, *_norms(graph))}
    readers = {}
    for key, layer in layer_nodes(layers).items():
        if key in by_node and _can_make_up(layer):
            readers[key] = layer, by_node[key]
    streams, seen = [], set[str]()
    for layer, _ in readers.values():
        value = layer.node.input[0]
        if value in seen:
            continue
        stream = _grow(graph, value, makers, readers)
        seen.update(stream.sums if stream else [value])
        if stream is not None:
            streams.append(stream)
    return streams


def _norms(graph: Graph) -> list[BiasSlot]:
    """Return the biases of normalizations over the last axis."""
    found = []
    for node in graph.nodes:
        if not is_op(node, "LayerNormalization") or len(node.input) < 3 or any(node.output[1:]):
            continue
        shape, known = graph.shape_of(node.output[0]), graph.constant_type(node.input[2])
        if shape is None or known is None or len(known[1]) != 1 or set_by_caller(node):
            continue
        if attribute(node, "axis", -1) in (-1, len(shape) - 1):
            found.append(BiasSlot(graph, node, node.output[0], len(shape) - 1, "float", node, 2))
    return found


def _can_make_up(layer: Layer) -> bool:
    """Whether a constant added to all of a layer's input is a constant in its output, and known."""
    if layer.stored.data_type not in _WIDE or layer.slot != 1 or pads_its_input(layer.node):
        return False
    return isinstance(layer.kind, ConvKind) or layer.groups == 1


def _grow(
    graph: Graph,
    start: str,
    makers: Mapping[str, BiasSlot],
    readers: Mapping[int, tuple[Layer, BiasSlot]],
) -> Stream | None:
    """Return the stream around a value, None when anything but layers and Adds reads it.

    A value that something else makes is not shifted, and its other readers do not matter.
    """
    shape = graph.shape_of(start)
    first = next(readers[id(node)][0] for node in graph.consumers(start) if id(node) in readers)
    place = channel_axis(first, "in")
    if shape is None or isinstance(place, str):
        return None
    stream = Stream(graph, place[0] % len(shape))
    stack, outside, parts = [start], set[str](), dict[str, tuple[str, ...]]()
    while stack:
        value = stack.pop()
        if value in parts or value in outside:
            continue
        maker = graph.producer(value)
        slot = makers.get(value)
        if slot is not None and slot.axis == stream.axis:
            stream.makers[value], parts[value] = slot, ()
        elif maker is not None and _is_sum(graph, maker):
            parts[value] = tuple(maker.input)
            stack += maker.input
        else:
            outside.add(value)
            continue
        if graph.is_output(value) or graph.dtype_of(value) not in _WIDE:
            return None
        for node in graph.consumers(value):
            reader = readers.get(id(node))
            if value in node.input and _is_sum(graph, node):
                stack.append(node.output[0])
            elif reader is not None and [slot for slot, name in enumerate(node.input) if name == value] == [
                0
            ]:
                stream.readers.append(Reader(*reader, value))
            elif node.op_type not in _HARMLESS or value not in node.input:
                return None
    for node in graph.nodes:
        for value in node.output:
            if value in parts:
                stream.sums[value] = tuple(part for part in parts[value] if part in parts)
    return stream if stream.makers and stream.readers else None


def _is_sum(graph: Graph, node: NodeProto) -> bool:
    """Whether a node adds two computed values of one shape."""
    if not is_op(node, "Add") or any(graph.is_constant(name) for name in node.input):
        return False
    shapes = [graph.shape_of(name) for name in (*node.input, node.output[0])]
    return shapes[0] is not None and shapes[0] == shapes[1] == shapes[2]


def find_shift(stream: Stream, statistics: Statistics) -> Shift | None:
    """Return shifts that centre what every layer of a stream makes, None when they gain too little.

    What a value's rounding costs is counted as if its channels were scaled to one magnitude, as `equalize`
    goes on to do: by the squared weights that read each channel, the square of its magnitude, and the square
    of the range that the scaled channels take.
    """
    ranges: dict[str, tuple[Doubles, Doubles]] = {}
    for value in stream.sums:
        found = statistics.get(stream.graph, value)
        if found is None or found.channels is None or not found.count:
            return None
        ends = np.asarray(found.channels.low, np.float64), np.asarray(found.channels.high, np.float64)
        if not all(np.isfinite(end).all() for end in ends):
            return None
        ranges[value] = ends
    power = _power(stream, ranges)
    centres: dict[str, Doubles] = {}
    before = after = 0.0
    for value, parts in stream.sums.items():
        low, high = ranges[value]
        centres[value] = sum((centres[part] for part in parts), start=np.zeros(len(low)))
        if value in stream.makers:
            centres[value] = (low + high) / 2
        before += _noise(low, high, power[value])
        after += _noise(low - centres[value], high - centres[value], power[value])
    return Shift(stream, centres, before, after) if after < _WORTH * before else None


def _power(stream: Stream, ranges: Mapping[str, tuple[Doubles, Doubles]]) -> dict[str, Doubles]:
    """Return the sum of squared weights that read each channel of a value, sums of it included."""
    power = {value: np.zeros(len(low)) for value, (low, _) in ranges.items()}
    for reader in stream.readers:
        power[reader.value] = power[reader.value] + np.square(reader.taps).sum(axis=(1, 3)).reshape(-1)
    for value, parts in reversed(stream.sums.items()):
        for part in parts:
            power[part] = power[part] + power[value]
    return power


def _noise(low: Doubles, high: Doubles, power: Doubles) -> float:
    magnitude = np.maximum(np.abs(low), np.abs(high))
    used = magnitude > 0
    if not used.any():
        return 0.0
    top = max(0.0, float((high[used] / magnitude[used]).max()))
    bottom = min(0.0, float((low[used] / magnitude[used]).min()))
    return float((power * magnitude**2).sum()) * (top - bottom) ** 2


def write_shift(shift: Shift) -> str:
    """Move the biases; returns why it was not done, "" when it was."""
    stream = shift.stream
    moves: dict[int, tuple[BiasSlot, Doubles]] = {}

    def add(slot: BiasSlot, delta: Doubles) -> None:
        _, already = moves.get(id(slot), (slot, np.zeros(len(delta))))
        moves[id(slot)] = slot, already + delta

    for value, slot in stream.makers.items():
        add(slot, -shift.centres[value])
    for reader in stream.readers:
        taps = reader.taps.sum(axis=3)
        groups, _, channels = taps.shape
        centre = shift.centres[reader.value].reshape(groups, channels)
        add(reader.slot, np.einsum("goc,gc->go", taps, centre).reshape(-1))
    if not all((np.abs(delta) < _LARGEST).all() for _, delta in moves.values()):
        return "what the shift adds to a bias is out of range"
    for slot, delta in moves.values():
        problem = add_to_bias(slot, delta)
        assert not problem, problem  # wide floats, checked above
    return ""
