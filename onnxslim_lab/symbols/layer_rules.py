"""Shapes of the outputs of layers, pooling and reductions in terms of symbolic sizes."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim_lab.symbols import dimensions
from onnxslim_lab.symbols.dimensions import Size, add, multiply, subtract
from onnxslim_lab.symbols.facts import ImpossibleError, Shape, Step
from onnxslim_lab.symbols.shape_rules import RULES, broadcast_shapes, rule

__all__ = ["RULES"]  # of all operators: the layers' rules join those of shape_rules

# fmt: off
REDUCE = (
    "ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)
# fmt: on


@rule("MatMul")
def matmul(step: Step) -> list[Shape | None] | None:
    """Rows of the first, columns of the second, the other axes broadcast."""
    first, second = step.shape(0), step.shape(1)
    if not first or not second:
        return None
    batch = broadcast_shapes(step, [first[:-2], second[:-2]])
    return [(*batch, *first[-2:-1], *(second[-1:] if len(second) > 1 else ()))]


@rule("Gemm")
def gemm(step: Step) -> list[Shape | None] | None:
    """Rows of the first, columns of the second."""
    first, second = step.shape(0), step.shape(1)
    if first is None or second is None:
        return None
    if len(first) != 2 or len(second) != 2:
        raise ImpossibleError
    return [(first[1 if step.attribute("transA", 0) else 0], second[0 if step.attribute("transB", 0) else 1])]


@rule("Conv", "MaxPool", "AveragePool", "LpPool")
def window(step: Step) -> list[Shape | None] | None:
    """One place per window that fits; outputs channels are the weight's first axis."""
    shape = step.shape(0)
    weight = step.shape(1) if step.node.op_type == "Conv" else None
    if shape is not None and weight is not None and len(shape) != len(weight):
        raise ImpossibleError
    if shape is None or len(shape) < 3 or step.attribute("ceil_mode", 0):
        return None
    rank = len(shape) - 2
    kernel: Sequence[Size] | None = step.attribute("kernel_shape") or (weight[2:] if weight else None)
    if kernel is None or len(kernel) != rank or (step.node.op_type == "Conv" and not weight):
        return None
    strides = step.attribute("strides") or [1] * rank
    dilations = step.attribute("dilations") or [1] * rank
    pads = step.attribute("pads") or [0] * 2 * rank
    automatic = step.attribute("auto_pad", "NOTSET")
    if automatic == "VALID":
        pads = [0] * 2 * rank
    sizes = []
    for axis in range(rank):
        size, stride = shape[2 + axis], strides[axis]
        if automatic.startswith("SAME"):
            sizes.append(dimensions.floor_divide(add(size, stride - 1), stride))
            continue
        reach = add(multiply(add(kernel[axis], -1), dilations[axis]), 1)
        room = subtract(add(size, pads[axis] + pads[axis + rank]), reach)
        sizes.append(add(dimensions.floor_divide(room, stride), 1))
    return [(shape[0], weight[0] if weight else shape[1], *sizes) for _ in step.node.output]


@rule("GlobalAveragePool", "GlobalMaxPool")
def global_pool(step: Step) -> list[Shape | None] | None:
    """Every axis but the first two becomes 1."""
    shape = step.shape(0)
    return None if shape is None else [(*shape[:2], *[1] * (len(shape) - 2))]


@rule(*REDUCE)
def reduce(step: Step) -> list[Shape | None] | None:
    """Axes removed, or kept with size 1."""
    shape = step.shape(0)
    if shape is None:
        return None
    if step.node.op_type.startswith("Arg"):
        axes: list[int] | None = [step.attribute("axis", 0) % max(1, len(shape))]
    elif step.has(1) or step.attribute("axes") is not None:
        axes = step.axes(1, len(shape))
    else:
        axes = [] if step.attribute("noop_with_empty_axes", 0) else list(range(len(shape)))
    if axes is None:
        return None
    if step.attribute("keepdims", 1):
        return [tuple(1 if axis in axes else size for axis, size in enumerate(shape))]
    return [tuple(size for axis, size in enumerate(shape) if axis not in axes)]


@rule("LSTM", "GRU", "RNN")
def recurrent(step: Step) -> list[Shape | None] | None:
    """Sequence and states, in the default layout."""
    shape, weight = step.shape(0), step.shape(2)
    if shape is not None and len(shape) != 3:
        raise ImpossibleError
    if shape is None or weight is None or len(weight) != 3 or step.attribute("layout", 0):
        return None
    state: Shape = (weight[0], shape[1], weight[2])
    shapes: list[Shape | None] = [(shape[0], *state[:1], *state[1:]), state, state]
    return shapes[: len(step.node.output)]
