"""Which values an input may take, found by looking at what it feeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import FunctionKey, Graph, attribute, domain_of
from onnxslim_lab.worker.messages import Array

_PASS = frozenset({  # the first input's values come out, moved
    "Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Expand", "Tile",
    "Slice", "Split", "Pad", "Dropout", "Gather", "GatherElements", "GatherND", "ReduceMax", "ReduceMin", "Max",
    "Min", "SequenceAt", "SplitToSequence", "ConcatFromSequence", "OptionalGetElement", "TopK", "Clip",
    "SequenceInsert", "SequenceErase", "Optional",
})  # fmt: skip
_PASS_ANY = frozenset({"Concat", "SequenceConstruct", "Max", "Min"})
_SIZES = {  # inputs that say how large something becomes, by slot
    "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "TopK": (1,),
    "Resize": (3,), "Slice": (1, 2, 3, 4), "Pad": (1,), "Loop": (0,), "Trilu": (1,),
    "AffineGrid": (1,), "CenterCropPad": (1,), "NonMaxSuppression": (2,), "HannWindow": (0,),
    "BlackmanWindow": (0,), "HammingWindow": (0,), "DFT": (1,), "STFT": (1, 3), "MelWeightMatrix": (0, 1, 2),
}  # fmt: skip
_AXES = {"Squeeze": (1,), "Unsqueeze": (1,), "CumSum": (1,), "CumProd": (1,), "SequenceAt": (1,), "SequenceInsert": (2,),
         "SequenceErase": (1,)}  # fmt: skip
_VALUES = {  # inputs that take one number within narrow limits
    ("Dropout", 1): 0.5, ("Resize", 2): 1.0, ("Upsample", 1): 1.0, ("NonMaxSuppression", 3): 0.5,
    ("NonMaxSuppression", 4): 0.5, ("Reshape", 1): -1, ("Split", 1): 1,
}  # fmt: skip
_MOST_COMPARED = 1 << 16
_VOCABULARIES = (
    "keys_strings", "cats_strings", "string_vocabulary", "pool_strings", "stopwords", "keys_int64s", "cats_int64s",
    "int64_vocabulary", "pool_int64s", "keys_floats",
)  # fmt: skip


@dataclass
class Range:
    """What is known about the values of an input.

    Attributes:
        high: Largest index that is in bounds wherever the values index something; None when they do not.
        low: Smallest such index.
        reason: The node that bounds it.
        equals: Constants the values are compared with.
        vocabulary: Values that a lookup table knows.
        mask: The node that takes the values as a mask.
        length: The node that takes the values as sequence lengths, with its sequence input.
        size: The node that takes the values as a shape or size.
        axis: The node that takes the values as an axis or position.
        value: A number that suits the node that takes it (a ratio, a scale), with the node.
        divisor: The node that divides by the values.
    """

    high: int | None = None
    low: int = 0
    reason: str = ""
    equals: list[float] = field(default_factory=list)
    vocabulary: list[Any] = field(default_factory=list)
    mask: str = ""
    length: tuple[str, tuple[int | str | None, ...] | None] | None = None
    size: str = ""
    axis: str = ""
    value: tuple[float, str] | None = None
    divisor: str = ""

    def bound(self, count: int | None, offset: float, where: str) -> None:
        """Note that value + offset indexes something with `count` entries."""
        if count is None or count < 1:
            return
        high = count - 1 - int(offset)
        if self.high is None or high < self.high:
            self.high, self.reason = high, where
        self.low = max(self.low, -int(offset))


def find_range(graph: Graph, name: str, sizes: dict[str, int] | None = None) -> Range:
    """Return what is known about the values of a main-graph input.

    Follows the value through operators that move or convert it, additions of constants, bodies and local
    functions.

    Args:
        graph: The main graph.
        name: The input.
        sizes: Sizes of symbolic dimensions.
    """
    found = Range()
    look = _Lookup(sizes or {})
    todo: list[tuple[Graph, str, float]] = [(graph, name, 0.0)]
    seen: set[tuple[int, str]] = set()
    while todo:
        here, value, offset = todo.pop()
        if (id(here), value) in seen:
            continue
        seen.add((id(here), value))
        for node in here.consumers(value):
            todo.extend(_inner(here, node, value, offset, look))
            for slot in [i for i, used in enumerate(node.input) if used == value]:
                todo.extend((here, out, moved) for out, moved in _look(here, node, slot, offset, found, look))
        if here.parent is not None and here.owner is not None and here.is_output(value):
            place = here.outputs.index(value) - (here.owner.op_type == "Loop")
            if 0 <= place < len(here.owner.output):
                todo.append((here.parent, here.owner.output[place], offset))
    return found


class _Lookup:
    """Finds sizes and constants, through the arguments of local functions."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.arguments: dict[tuple[int, str], list[tuple[Graph, str]]] = {}

    def call(self, here: Graph, node: NodeProto, function: Graph) -> None:
        """Note what a function is called with."""
        for formal, actual in zip(function.inputs, node.input, strict=False):
            calls = self.arguments.setdefault((id(function), formal), [])
            if (here, actual) not in calls:
                calls.append((here, actual))

    def _sources(self, here: Graph, value: str) -> Iterator[tuple[Graph, str]]:
        home = here.scope_of(value)
        calls = self.arguments.get((id(home), value))
        if calls is None:
            yield here, value
            return
        for caller, actual in calls:
            yield from self._sources(caller, actual)

    def count(self, here: Graph, data: str, axis: int) -> int | None:
        """Return the least number of entries along an axis, None when it is not known."""
        known: list[int] = []
        for graph, value in self._sources(here, data):
            constant = graph.constant_type(value)
            shape: Any = constant[1] if constant else graph.shape_of(value)
            if shape and -len(shape) <= axis < len(shape):
                size = shape[axis]
                size = self.sizes.get(size) if isinstance(size, str) else size
                known.extend([] if size is None else [size])
        return min(known, default=None)

    def constant(self, here: Graph, value: str) -> Array | None:
        """Return a constant that is the same in all calls, None when there is none."""
        found = [graph.constant(name) for graph, name in self._sources(here, value) if name]
        return found[0] if len(found) == 1 else None

    def scalar(self, here: Graph, value: str) -> float | None:
        """Return a constant that is one number."""
        array = self.constant(here, value)
        return (
            None if array is None or array.size != 1 or array.dtype.kind in "OUSc" else float(array.flat[0])
        )


def _inner(
    here: Graph, node: NodeProto, value: str, offset: float, look: _Lookup
) -> Iterator[tuple[Graph, str, float]]:
    """Yield the value's names in the bodies and functions that a node runs."""
    slots = [i for i, used in enumerate(node.input) if used == value]
    for bodies in here.bodies(node).values():
        for body in bodies:
            yield body, value, offset
            skipped = {"Loop": 0, "Scan": 0}.get(node.op_type)
            if skipped is not None:
                yield from ((body, body.inputs[i], offset) for i in slots if i < len(body.inputs))
    key: FunctionKey = (domain_of(node.domain), node.op_type, node.overload)
    function = here.functions.get(key)
    if function is not None:
        look.call(here, node, function)
        yield from ((function, function.inputs[i], offset) for i in slots if i < len(function.inputs))


def _look(
    here: Graph, node: NodeProto, slot: int, offset: float, found: Range, look: _Lookup
) -> Iterator[tuple[str, float]]:
    """Learn from one use of the value; yield the outputs that carry it on, with their offset."""
    op, where = node.op_type, f"{node.op_type} {node.name or node.output[0]}"
    for label in _VOCABULARIES:
        known = attribute(node, label)
        if known:
            found.vocabulary.extend(known)
    if op in {"Gather", "GatherElements", "GatherBlockQuantized"} and slot == 1:
        axis = attribute(node, "gather_axis" if op == "GatherBlockQuantized" else "axis", 0)
        found.bound(look.count(here, node.input[0], axis), offset, where)
    elif op in {"GatherND", "ScatterND", "ScatterElements", "Scatter"} and slot == 1:
        axis = attribute(node, "batch_dims" if op.endswith("ND") else "axis", 0)
        found.bound(look.count(here, node.input[0], axis), offset, where)
    elif op == "ArrayFeatureExtractor" and slot == 1:
        found.bound(look.count(here, node.input[0], -1), offset, where)
    elif op == "OneHot" and slot == 0:
        depth = look.scalar(here, node.input[1])
        found.bound(int(depth) if depth else None, offset, where)
    elif op == "EmbedLayerNormalization" and slot in {0, 1}:
        found.bound(look.count(here, node.input[2 if slot == 0 else 4], 0), offset, where)
    elif (op == "EmbedLayerNormalization" and slot == 7) or (
        op in {"Attention", "MultiHeadAttention"} and node.domain == "com.microsoft" and slot >= 3
    ):
        found.mask = where
    elif slot == {"LSTM": 4, "GRU": 4, "RNN": 4, "ReverseSequence": 1}.get(op):
        found.length = (where, here.shape_of(node.input[0]))
    elif op in {"NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"} and slot == 1:
        found.bound(look.count(here, node.input[0], 1), offset, where)
    elif (op, slot) in _VALUES:
        found.value = (_VALUES[op, slot], where)
    elif op in {"Div", "Mod"} and slot == 1:
        found.divisor = where
    elif slot in _SIZES.get(op, ()):
        found.size = where
    elif slot in _AXES.get(op, ()) or (op.startswith("Reduce") and slot == 1):
        found.axis = where
    elif op == "Equal":
        _compared(look.constant(here, node.input[1 - slot]), offset, found, where)
    elif (
        slot == {"Where": 0, "If": 0, "Compress": 1}.get(op)
        or op in {"Not", "And", "Or"}
        or (op == "Cast" and attribute(node, "to") == TensorProto.BOOL)
    ):
        found.mask = found.mask or where
    elif op in {"Add", "Sub"} and len(node.input) == 2:
        other = look.scalar(here, node.input[1 - slot])
        if op == "Sub" and slot == 1:  # 1 - mask
            found.mask = found.mask or (where if other == 1.0 else "")
        elif other is not None:
            yield node.output[0], offset + (other if op == "Add" else -other)
    elif op == "Mul":
        if not here.is_constant(node.input[1 - slot]):
            found.mask = found.mask or where
    elif op == "Mod" and slot == 0:
        pass  # any value is in range after it
    elif (op in _PASS and slot == 0) or op in _PASS_ANY or (op == "Where" and slot > 0):
        yield node.output[0], offset
        if op == "Split":
            yield from ((out, offset) for out in node.output[1:])


def _compared(array: Array | None, offset: float, found: Range, where: str) -> None:
    """Note the constants that an Equal compares the value with."""
    if array is None:
        return
    if array.dtype.kind in "OUS":
        found.vocabulary.extend(array.ravel().tolist())
    elif array.size <= _MOST_COMPARED:
        found.equals.extend(float(x) - offset for x in array.ravel())
        found.reason = found.reason or where
