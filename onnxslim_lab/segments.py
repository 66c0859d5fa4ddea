"""Segments: a quantized model judged from one quantized value to the next.

Two engines add floats in another order, so that single values on the border between two quantization steps
are rounded to different sides. Such a step grows in the layers that follow, until the outputs differ by
several although every node is right. Here each segment starts from the integers that onnxruntime gave, and
its own integers may differ from onnxruntime's by one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from onnxslim_lab.errors import one_line, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.kernels.dtypes import is_integer
from onnxslim_lab.metrics import Feed, OutputError, compare_outputs
from onnxslim_lab.running.program import label
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.saturation import PRODUCTS, overflow
from onnxslim_lab.sessions import Runner
from onnxslim_lab.weights import Array
from onnxslim_lab.worker.messages import Value

QUANTIZERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QGemm"})
"""Operators that round to a quantized type, besides all whose name begins with QLinear."""
INSIDE = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"})
"""Operators that quantize a float input themselves: segments end before them and after them."""


@dataclass(frozen=True)
class Departure:
    """A segment whose result is not onnxruntime's.

    Attributes:
        value: Its result.
        node: The node to blame: the last quantized product of the segment, else the one that makes the value.
        op_type: Its operator.
        size: How far apart: "3 steps", or a relative difference.
        overflow: Largest sum of two products that the node adds; 0 when it fits 16 bits or is not known.
        hidden: Whether the segment has bodies or functions that quantize too, which cannot be looked into.
    """

    value: str
    node: str
    op_type: str
    size: str
    overflow: int
    hidden: bool

    def __str__(self) -> str:
        text = f"{self.op_type} node {quote(self.node)} departs by {self.size} at value {quote(self.value)}"
        if self.overflow:
            text += (
                f"; its sums of two products reach {self.overflow}, over the 32767 where onnxruntime"
                " saturates on CPUs without VNNI"
            )
        return text


@dataclass(frozen=True)
class Judgement:
    """What the segments of a model gave.

    Attributes:
        compared: Quantized values that were compared.
        departures: Segments that differ by more than a step, in topological order.
        outputs: The model's outputs, computed from the last quantized values of onnxruntime.
        reference: What onnxruntime gave for them in the same run.
    """

    compared: int
    departures: tuple[Departure, ...]
    outputs: list[OutputError]
    reference: list[Feed]


def quantizes(node: NodeProto) -> bool:
    """Whether a node rounds to a quantized type.

    >>> quantizes(NodeProto(op_type="QLinearConv")), quantizes(NodeProto(op_type="Round"))
    (True, False)
    """
    return node.op_type in QUANTIZERS or node.op_type.startswith("QLinear")


def borders(graph: Graph) -> dict[str, NodeProto]:
    """Return the values of the main graph between its segments, with the nodes that make them.

    Only values that depend on an input; in topological order.
    """
    fixed = {name for name in graph.initializers if graph.is_constant(name)} | {""}
    found: dict[str, NodeProto] = {}
    for node in graph.nodes:
        if node.op_type == "Constant" or (node.input and fixed.issuperset(graph.read_by(node))):
            fixed.update(node.output)
        elif quantizes(node):
            found.update((name, node) for name in node.output if name)
        elif node.op_type in INSIDE:
            before = graph.producer(node.input[0])
            if before is not None and node.input[0] not in fixed:
                found.setdefault(node.input[0], before)
            found.update((name, node) for name in node.output if name)
    return found


def hidden(graph: Graph) -> bool:
    """Whether nodes in bodies or functions quantize: onnxruntime does not tell their values."""
    return any(
        quantizes(node) or node.op_type in INSIDE
        for part in graph.walk()
        if part is not graph
        for node in part.nodes
    )


def judge_segments(
    graph: Graph, feeds: Sequence[Feed], runner: Runner, interpreter: Interpreter, tolerance: float
) -> Judgement | None:
    """Compare a model's segments; None when its main graph has no quantized values.

    Costs one run of onnxruntime, fully optimized and asked for all quantized values, so that its quantized
    operators still fuse, and one of the NumPy runtime.

    Args:
        graph: A root graph.
        feeds: Inputs by name.
        runner: Where onnxruntime runs.
        interpreter: The graph on the NumPy runtime.
        tolerance: Largest relative difference of floating values.

    Raises:
        LabError: One of the engines does not run it.
    """
    cuts = borders(graph)
    if not cuts:
        return None
    names = [*dict.fromkeys((*cuts, *graph.outputs))]
    theirs = runner.run(graph, feeds, outputs=names, optimization="all")
    makers = {id(node) for node in cuts.values()}
    walk = _Walk(graph, cuts, tolerance)
    ours = []
    for given, feed in zip(theirs, feeds, strict=True):

        def exchange(
            node: NodeProto, outputs: Sequence[Value], given: Feed = given
        ) -> Sequence[Value] | None:
            if id(node) not in makers:
                return None
            walk.compare(node, dict(zip(node.output, outputs, strict=True)), given)
            return [given.get(name, value) for name, value in zip(node.output, outputs, strict=True)]

        ours.append(interpreter.run(feed, exchange=exchange))
    reference = [{name: given[name] for name in graph.outputs} for given in theirs]
    order = {name: place for place, name in enumerate(cuts)}
    departures = tuple(walk.departures[name] for name in sorted(walk.departures, key=order.__getitem__))
    return Judgement(len(walk.compared), departures, compare_outputs(reference, ours), reference)


@dataclass
class _Walk:
    """The values between segments, compared as they come."""

    graph: Graph
    cuts: Mapping[str, NodeProto]
    tolerance: float
    compared: set[str] = field(default_factory=set)
    departures: dict[str, Departure] = field(default_factory=dict)

    def compare(self, node: NodeProto, ours: dict[str, Value], theirs: Feed) -> None:
        """Compare the outputs of a node and note those that depart."""
        for name in filter(self.cuts.__contains__, node.output):
            self.compared.add(name)
            mine, other = ours[name], theirs[name]
            if node.op_type == "DynamicQuantizeLinear" and name == node.output[0]:
                mine, other = (_centred(values, node) for values in (ours, theirs))
            size = apart(name, mine, other, self.tolerance)
            if size and name not in self.departures:
                self.departures[name] = self._departure(name, node, size, theirs)

    def _departure(self, name: str, node: NodeProto, size: str, theirs: Feed) -> Departure:
        segment = list(self._segment(node))
        products = [item for item in segment if item.op_type in PRODUCTS]
        blamed = products[0] if products else node  # the segment is walked backwards
        return Departure(
            value=name,
            node=blamed.name or one_line(label(blamed)),
            op_type=blamed.op_type,
            size=size,
            overflow=overflow(self.graph, blamed, theirs) if products else 0,
            hidden=any(self.graph.bodies(item) or self._is_call(item) for item in segment),
        )

    def _segment(self, last: NodeProto) -> Iterator[NodeProto]:
        """Yield the nodes of a segment, from its last back to those that read quantized values."""
        waiting, seen = [last], {id(last)}
        while waiting:
            node = waiting.pop(0)
            yield node
            for name in node.input:
                maker = None if name in self.cuts else self.graph.producer(name)
                if maker is not None and id(maker) not in seen:
                    seen.add(id(maker))
                    waiting.append(maker)

    def _is_call(self, node: NodeProto) -> bool:
        return (node.domain, node.op_type, node.overload) in self.graph.functions


def _centred(values: Mapping[str, Value], node: NodeProto) -> Value:
    """Return what DynamicQuantizeLinear made without its zero point, which may itself be off by one."""
    quantized, zero_point = values.get(node.output[0]), values.get(node.output[2])
    if not isinstance(quantized, np.ndarray) or not isinstance(zero_point, np.ndarray):
        return quantized
    return np.asarray(quantized.astype(np.int32) - zero_point.astype(np.int32))


def apart(name: str, ours: Value, theirs: Value, tolerance: float) -> str:
    """Return how far two values are apart, "" when within one step or, if floating, the tolerance.

    >>> apart("y", np.array([1, 5], np.int8), np.array([2, 9], np.int8), 1e-4)
    '4 steps (2 of 2 values differ)'
    """
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray) and has_steps(ours, theirs):
        gap = np.abs(codes(ours) - codes(theirs))
        if gap.max(initial=0) <= 1:
            return ""
        return f"{gap.max()} steps ({np.count_nonzero(gap)} of {gap.size} values differ)"
    (error,) = compare_outputs([{name: theirs}], [{name: ours}])
    if error.structure:
        return error.structure
    if error.nonfinite:
        return f"{error.nonfinite} values that are finite on one side only"
    return f"a relative difference of {error.relative:.2e}" if error.relative > tolerance else ""


def has_steps(ours: Array, theirs: Array) -> bool:
    """Whether two arrays differ by steps: of one shape and one type, integers or 8-bit floats."""
    dtype = ours.dtype
    if (theirs.dtype, theirs.shape) != (dtype, ours.shape):
        return False
    return is_integer(dtype) if dtype.itemsize > 1 else dtype != np.bool_


def codes(values: Array) -> Array:
    """Return quantized values as integers, neighbours one apart."""
    if is_integer(values.dtype):
        return values.astype(np.int64)
    bits = values.view(np.uint8).astype(np.int64)
    return np.asarray(np.where(bits < 128, bits, 128 - bits))
