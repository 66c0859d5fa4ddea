"""What stays float32, known without running the model or from the ranges of its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from onnx import NodeProto, TensorProto, numpy_helper

from onnxslim_lab.graph import attribute
from onnxslim_lab.precision.half import FEW, Role
from onnxslim_lab.precision.model import Anatomy, Item, Value

Range = tuple[float, float]  # of the finite values seen

HEADROOM = 2.0  # times the values seen must fit the format: other data is larger
DIGITS_ABOVE = 4.0  # times the smallest number of full precision must be reached by some value

# Operators whose results are weights times values: what conversion is for.
HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum", "Attention", "DeformConv")
# Operators whose results easily leave the range or the digits of float16, where no ranges are known.
RISKY = (
    *(
        "Exp",
        "Log",
        "Pow",
        "Reciprocal",
        "Sqrt",
        "Softplus",
        "CumSum",
        "CumProd",
        "LpNormalization",
        "LpPool",
    ),
    *(f"Reduce{kind}" for kind in ("Sum", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod", "Mean")),
)
SUMS = ("ReduceSum", "ReduceMean", "GlobalAveragePool", "ReduceL1", "AveragePool")
_BIASES = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "LayerNormalization", "InstanceNormalization"), (2,)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (3, 5, 6)),
    "BatchNormalization": (2, 3),
}
# Operators that hand a huge value on.
_HANDS_ON = (
    *(
        "Add",
        "Sub",
        "Mul",
        "Where",
        "Expand",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Transpose",
        "Slice",
        "Cast",
    ),
    *("Concat", "Identity", "Tile", "Gather", "Flatten", "Pad", "Neg", "Abs", "Split", "If"),
)
# Operators through which a float on its way to an integer must keep its digits.
_EXACT = (
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Floor",
        "Ceil",
        "Round",
        "Min",
        "Max",
        "Range",
        "Clip",
        "Mod",
        "Neg",
        "Abs",
    ),
    *("Concat", "Slice", "Gather", "Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity", "Where", "Expand"),
    *(
        "Sqrt",
        "Pow",
        "Transpose",
        "Tile",
        "ReduceMax",
        "ReduceMin",
        "ReduceSum",
        "ReduceProd",
        "CumSum",
        "If",
    ),
)
_INTEGERS = (
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16),
    *(TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64),
)


def keep_by_structure(anatomy: Anatomy, *, ranged: bool) -> None:
    """Keep what cannot or should not be converted whatever the data is.

    Args:
        anatomy: The model.
        ranged: Whether ranges will be known too; without them, risky operators stay.
    """
    for item in anatomy.items:
        if item.low:
            item.reason = _own_reason(anatomy, item, ranged=ranged)
    _spread_huge(anatomy)
    _keep_way_to_integers(anatomy)
    _keep_quantized(anatomy)


def _own_reason(anatomy: Anatomy, item: Item, *, ranged: bool) -> str:
    node, half, graph = item.node, anatomy.half, anatomy.graphs[item.place]
    epsilon = attribute(node, "epsilon")
    if isinstance(epsilon, float) and 0 < epsilon < half.smallest and node.op_type != "LayerNormalization":
        return f"its epsilon {epsilon:.3g} is below the smallest {half.name}"
    if node.op_type == "ConstantOfShape":
        filled = attribute(node, "value")
        number = 0.0 if filled is None else float(numpy_helper.to_array(filled).reshape(-1)[0])
        if number and math.isfinite(number) and not half.smallest <= abs(number) <= half.largest:
            return f"its value {number:.4g} does not fit {half.name}"
    for index, (name, wanted) in enumerate(zip(node.input, item.slots.inputs, strict=True)):
        value = anatomy.value(item.place, name)
        if name and wanted and anatomy.is_constant(value):
            problem = anatomy.loss(value, _role(anatomy, node, index, value))
            if problem:
                return f"constant {value[1]!r}: {problem}"
    if (
        node.op_type == "Cast"
        and half.name == "float16"
        and graph.dtype_of(node.input[0]) in _INTEGERS
        and not ranged
    ):
        return "integers over 2048 lose their last digits"
    if node.op_type in RISKY and not ranged and half.name == "float16":
        return f"{node.op_type} easily leaves the range of float16, and no data was given to tell"
    return ""


def _role(anatomy: Anatomy, node: NodeProto, index: int, value: Value) -> Role:
    """Return what a constant does in a node: a tiny one added to something large may vanish."""
    if node.op_type == "BatchNormalization" and index == 4:
        return "divisor"
    if index in _BIASES.get(node.op_type, ()):
        return "bias"
    few = math.prod(anatomy.graphs[value[0]].shape_of(value[1]) or ()) <= FEW  # type: ignore[arg-type]
    return "bias" if node.op_type in ("Add", "Sub") and not few else "factor"


def _spread_huge(anatomy: Anatomy) -> None:
    """Keep what reads a value that was made with a constant beyond the range: masks of -3.4e38, say."""
    limit = anatomy.half.largest
    huge: dict[Value, None] = {}
    for item in anatomy.items:
        found = item.node.op_type in _HANDS_ON and any(
            value in huge or (anatomy.is_constant(value) and _beyond(anatomy, value))
            for value, _ in anatomy.inputs(item)
        )
        if not found and item.node.op_type == "ConstantOfShape":
            found = "does not fit" in item.reason
        if any(value in huge for value, _ in anatomy.inputs(item)) and item.low:
            item.keep(f"it reads values beyond {limit:g}")
        if found:
            huge.update(dict.fromkeys(value for value, _ in anatomy.outputs(item)))


def _beyond(anatomy: Anatomy, value: Value) -> bool:
    return f"over the largest {anatomy.half.name}" in anatomy.loss(value)


def _keep_way_to_integers(anatomy: Anatomy) -> None:
    """Keep what computes a float that becomes an integer: sizes, positions, indices must be exact."""
    start = [
        item
        for item in anatomy.items
        if item.node.op_type == "Cast" and attribute(item.node, "to") in _INTEGERS
    ]
    _climb(anatomy, start, _EXACT, "its result becomes an integer")


def _keep_quantized(anatomy: Anatomy) -> None:
    """Keep what a backend fuses with the (De)QuantizeLinear around it."""
    for item in anatomy.items:
        makers = [anatomy.makers.get(value) for value, _ in anatomy.inputs(item)]
        if item.low and any(
            maker is not None and maker.node.op_type == "DequantizeLinear" for maker in makers
        ):
            item.keep("it computes with quantized values")


def _climb(anatomy: Anatomy, start: Iterable[Item], through: Iterable[str], reason: str) -> None:
    """Keep the makers of what some nodes read, as far up as operators of a kind go."""
    seen: set[int] = set()
    stack = list(start)
    while stack:
        item = stack.pop()
        for value, _ in anatomy.inputs(item):
            maker = anatomy.makers.get(value)
            if maker is not None and maker.number not in seen and maker.node.op_type in through:
                seen.add(maker.number)
                maker.keep(reason)
                stack.append(maker)


def keep_by_range(anatomy: Anatomy, ranges: Mapping[Value, Range], nonfinite: Iterable[Value] = ()) -> None:
    """Keep what makes or reads values that the data drives out of the format's range.

    Args:
        anatomy: The model.
        ranges: The finite values seen of each value.
        nonfinite: Values that are infinite or NaN in float32 already, which is left as it is.
    """
    half, odd = anatomy.half, set(nonfinite)
    for item in anatomy.items:
        if not item.low:
            continue
        for value in anatomy.floats(item):
            found = ranges.get(value)
            if found is None:
                continue
            size = max(abs(found[0]), abs(found[1]))
            if size * HEADROOM > half.largest:
                item.keep(f"value {value[1]!r} reaches {size:.4g}, {half.name} ends at {half.largest:g}")
            elif 0 < size < half.normal * DIGITS_ABOVE and value not in odd:
                item.keep(f"value {value[1]!r} stays below {size:.2g}, where {half.name} has few digits")
            if item.reason:
                break
        unseen = any(value not in ranges for value, _ in anatomy.outputs(item))
        if item.low and unseen and item.node.op_type in RISKY and half.name == "float16":
            item.keep(f"{item.node.op_type} easily leaves the range of float16, and no data reached it")
        if item.low:
            item.reason = _by_sum(anatomy, item, ranges)


def _by_sum(anatomy: Anatomy, item: Item, ranges: Mapping[Value, Range]) -> str:
    """Return why a node that adds up or counts should stay, "" when it need not."""
    half, node = anatomy.half, item.node
    if half.name != "float16":
        return ""
    if node.op_type == "Cast" and anatomy.graphs[item.place].dtype_of(node.input[0]) in _INTEGERS:
        low, high = ranges.get((item.place, node.output[0]), (0.0, 0.0))
        if max(abs(low), abs(high)) > 2048:
            return "integers over 2048 lose their last digits"
    if node.op_type in SUMS:
        value = anatomy.value(item.place, node.input[0])
        low, high = ranges.get(value, (0.0, 0.0))
        sizes = (anatomy.graphs[item.place].shape_of(name) for name in (node.input[0], node.output[0]))
        before, after = (math.prod(s for s in shape or () if isinstance(s, int)) for shape in sizes)
        total = max(abs(low), abs(high)) * max(1.0, before / max(after, 1))
        if node.op_type != "AveragePool" and total > half.largest:
            return f"it may add up to {total:.4g}, {half.name} ends at {half.largest:g}"
    return ""


def keep_empty_branches(anatomy: Anatomy) -> None:
    """Keep an If none of whose branches makes a 16-bit value; inner ones first, which come last."""
    for item in reversed(anatomy.items):
        if item.low and item.node.op_type == "If":
            made = [
                anatomy.makers.get((place, name))
                for place in item.bodies
                for name in anatomy.graphs[place].outputs
            ]
            if not any(maker is not None and maker.low for maker in made):
                item.keep("its branches make float32 values")


def keep_islands(anatomy: Anatomy, pays: Callable[[Item], bool]) -> None:
    """Keep connected 16-bit nodes among which none pays for the Casts around them."""
    unseen = {item.number: item for item in anatomy.items if item.low}
    while unseen:
        island = [unseen.popitem()[1]]
        for item in island:
            island += [
                unseen.pop(other.number) for other in _neighbours(anatomy, item) if other.number in unseen
            ]
        if not any(pays(item) for item in island):
            for item in island:
                item.keep("nothing is gained: it reads no large weights, nor does what it is connected to")


def _neighbours(anatomy: Anatomy, item: Item) -> Iterable[Item]:
    for value, wanted in anatomy.inputs(item):
        maker = anatomy.makers.get(value)
        if wanted is not False and maker is not None:
            yield maker
    for value, becomes in anatomy.outputs(item):
        if becomes:
            yield from anatomy.readers.get(value, ())
    yield from anatomy.within(item)
    if item.place in anatomy.owners:
        yield anatomy.owners[item.place]


def pays(anatomy: Anatomy) -> Callable[[Item], bool]:
    """Return whether a node is what conversion is for: heavy, or a reader of a large constant."""

    def check(item: Item) -> bool:
        return item.node.op_type in HEAVY or any(
            wanted and anatomy.is_constant(value) and anatomy.size(value) >= 1024
            for value, wanted in anatomy.inputs(item)
        )

    return check
