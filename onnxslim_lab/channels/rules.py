"""What each operator says about the places along the axes of its operands: see `axes`.

A rule links what goes together, freezes what it needs, and returns the inputs it has dealt with; whatever it
leaves out is frozen, and so is everything around an operator without a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onnx import NodeProto

from onnxslim_lab.channels.axes import Axes
from onnxslim_lab.channels.layer_rules import LAYERS
from onnxslim_lab.channels.nodes import freeze_node, label
from onnxslim_lab.channels.shape_rules import SHAPES, dims_read
from onnxslim_lab.channels.window_rules import WINDOWS
from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.layer_views.storage import set_by_caller

Rule = Callable[[Axes, NodeProto], Iterable[int]]

_ELEMENTWISE = (
    *(
        "Abs",
        "Acos",
        "Acosh",
        "Add",
        "And",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitShift",
        "Cast",
        "Ceil",
        "Celu",
    ),
    *("Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater"),
    *("GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less"),
    *("LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow"),
    *("Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus"),
    *("Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor"),
)
_POOLS = (
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
    *("InstanceNormalization", "BatchNormalization", "LRN"),
)
_ALONG = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "ArgMax": 0, "ArgMin": 0, "TopK": -1}
WIDTH = "normalizes over it: its mean and variance would change (widths=true allows that)"


def relate(graph: Graph, *, widths: bool) -> Axes:
    """Return the atoms of a graph with what all its nodes say about them.

    Args:
        graph: The main graph, a body or a function.
        widths: Whether places may go that a normalization takes mean and variance over.
    """
    axes = Axes(graph)
    for name in graph.inputs:
        axes.freeze_all(axes.value(name), "an input of the graph keeps its size")
    for node in graph.nodes:
        if is_op(node, "Constant"):  # see `Axes.input`
            continue
        rule = None if domain_of(node.domain) else RULES.get(node.op_type)
        if rule is None or set_by_caller(node):
            freeze_node(axes, node, f"{label(node)} is not known to let channels go")
            continue
        if node.op_type in ("ReduceMean", "LayerNormalization", "RMSNormalization"):
            done = set(_averages(axes, node, widths=widths))
        else:
            done = set(rule(axes, node))
        for slot in set(range(len(node.input))) - done:
            axes.freeze_all(axes.input(node, slot), f"input {slot} of {label(node)} keeps its size")
    for name in graph.outputs:
        axes.freeze_all(axes.value(name), "an output of the graph keeps its size")
    for inner in graph.root.walk():  # what bodies capture
        if inner is not graph:
            for node in inner.nodes:
                for name in node.input:
                    if name and not inner.defines(name) and name in axes.values:
                        axes.freeze_all(axes.values[name], "a body reads it")
            for name in inner.outputs:
                if not inner.defines(name) and name in axes.values:
                    axes.freeze_all(axes.values[name], "a body reads it")
    for name, tensor in axes.values.items():
        if graph.producer(name) is None and not graph.is_input(name):
            axes.freeze_all(tensor, "it comes from outside the graph")
    return axes


def _elementwise(axes: Axes, node: NodeProto) -> Iterable[int]:
    slots = [slot for slot, name in enumerate(node.input) if name]
    outputs = [slot for slot, name in enumerate(node.output) if name]
    tensors = [axes.input(node, slot) for slot in slots]
    if axes.graph.opset() < 7 and len(slots) > 1:
        freeze_node(axes, node, f"{label(node)} broadcasts by attribute before opset 7")
        return slots
    if node.op_type in ("Clip", "Dropout"):
        slots, tensors = slots[:1], tensors[:1]
    tensors += [axes.output(node, slot) for slot in outputs]
    axes.broadcast(tensors, f"shapes around {label(node)} are not known")
    return slots


def _pool(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Batch and channels pass, the positions stay; vectors over channels are cut with them."""
    x, name = axes.input(node, 0), label(node)
    if node.op_type == "LRN":
        freeze_node(axes, node, f"{name} normalizes over neighbouring channels")
        return [0]
    for slot, value in enumerate(node.output):
        y = axes.output(node, slot)
        if not value:
            continue
        if slot and node.op_type != "MaxPool":
            axes.freeze_all(x, f"{name} is in training mode")
            axes.freeze_all(y, f"{name} is in training mode")
            continue
        if slot:
            axes.freeze_all(x, f"{name} also gives indices")
        axes.link_all(x and x[:2], y and y[:2], f"shapes around {name} are not known")
        for tensor in (x, y):
            axes.freeze_all(tensor and tensor[2:], f"{name} reads all positions")
    if node.op_type in ("BatchNormalization", "InstanceNormalization"):
        slots = range(1, len(node.input))
        for slot in slots:
            vector = axes.input(node, slot)
            axes.link(
                x[1] if x else None, vector[0] if vector else None, f"the vectors of {name} are not known"
            )
        return range(len(node.input))
    return [0]


def _along(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Link all axes but the one that the operator works along."""
    x, name = axes.input(node, 0), label(node)
    default = _ALONG[node.op_type]
    flattens = node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and axes.graph.opset() < 13
    axis = attribute(node, "axis", 1 if flattens else default)
    keeps = bool(attribute(node, "keepdims", 1))
    for slot, value in enumerate(node.output):
        y = axes.output(node, slot) if value else None
        if not value:
            continue
        if x is None or y is None:
            axes.freeze_all(x, f"shapes around {name} are not known")
            axes.freeze_all(y, f"shapes around {name} are not known")
            continue
        at = axis % len(x)
        barred = range(at, len(x)) if flattens else [at]
        kept = list(x) if len(x) == len(y) else [part for i, part in enumerate(x) if i != at or keeps]
        for i, (mine, theirs) in enumerate(zip(kept, y, strict=True)):
            if i not in barred or len(x) != len(y):
                axes.link(mine, theirs, f"shapes around {name} are not known")
            else:
                axes.freeze(theirs, f"{name} works along it")
        for i in barred:
            axes.freeze(x[i], f"{name} works along it")
    return [0]


def _reduce(axes: Axes, node: NodeProto) -> Iterable[int]:
    _reduced(axes, node, f"{label(node)} sums it up")
    return [0, 1]


def _reduced(axes: Axes, node: NodeProto, reason: str | None) -> None:
    """Link the axes that a reduction keeps; the others are frozen for this reason, if there is one."""
    x, y, name = axes.input(node, 0), axes.output(node), label(node)
    given = axes.graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    if x is None or y is None or (given is None and len(node.input) > 1 and node.input[1]):
        freeze_node(axes, node, f"axes of {name} are not known")
        return
    listed = attribute(node, "axes") if given is None else [int(axis) for axis in given.reshape(-1)]
    none = not listed and bool(attribute(node, "noop_with_empty_axes", 0))
    chosen = {axis % len(x) for axis in (listed or ([] if none else range(len(x))))}
    keeps = bool(attribute(node, "keepdims", 1))
    left = iter(y)
    for axis, mine in enumerate(x):
        theirs = next(left) if keeps or axis not in chosen else None
        if axis not in chosen:
            axes.link(mine, theirs, f"shapes around {name} are not known")
        elif reason:
            axes.freeze(mine, reason)


def _averages(axes: Axes, node: NodeProto, *, widths: bool) -> Iterable[int]:
    """Relate what takes mean and variance over an axis: its places may go, but not without changing them."""
    reason = None if widths else f"{label(node)} {WIDTH}"
    if node.op_type == "ReduceMean":
        _reduced(axes, node, reason)
        return [0, 1]
    x, y = axes.input(node, 0), axes.output(node)
    unknown = f"shapes around {label(node)} are not known"
    axes.link_all(x, y, unknown)
    first = attribute(node, "axis", -1) % max(1, len(x or ()))
    if reason:
        axes.freeze_all(x and x[first:], reason)
    for slot in range(1, len(node.input)):
        axes.broadcast([axes.input(node, slot), x], unknown)
    if any(node.output[1:]):
        freeze_node(axes, node, f"{label(node)} has other outputs")
    return range(len(node.input))


def _shape(axes: Axes, node: NodeProto) -> Iterable[int]:
    """Freeze the axes of whose sizes something is computed."""
    x = axes.input(node, 0)
    axes.freeze_all(axes.output(node), "a size")
    for axis in dims_read(axes.graph, node, len(x or ())):
        axes.freeze(
            (x or ())[axis], f"its size is read by {label(node)} (simplify-shapes may make it constant)"
        )
    return [0]


def _nothing(_axes: Axes, _node: NodeProto) -> Iterable[int]:
    return []


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd"), _reduce),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"), _reduce),
    **dict.fromkeys(("ReduceMean", "LayerNormalization", "RMSNormalization"), _nothing),  # see _averages
    "Shape": _shape,
    **LAYERS,
    **SHAPES,
    **WINDOWS,
}
