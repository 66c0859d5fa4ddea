"""Shapes of operators' outputs in terms of symbolic sizes, where onnx's own inference loses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxslim_lab.symbols import dimensions
from onnxslim_lab.symbols.dimensions import (
    Size,
    add,
    equal,
    exact_quotient,
    less,
    low_of,
    multiply,
    product,
    subtract,
)
from onnxslim_lab.symbols.facts import ImpossibleError, Shape, ShapeRule, Step
from onnxslim_lab.symbols.value_rules import slice_bounds

RULES: dict[str, ShapeRule] = {}  # layer_shape_rules adds the layers' rules

# fmt: off
SAME = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BatchNormalization", "BitwiseNot",
    "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "CumSum", "DequantizeLinear", "Dropout",
    "Elu", "Erf", "Exp", "Floor", "Gelu", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax",
    "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu",
    "Log", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Mish", "Neg", "Not", "PRelu",
    "QuantizeLinear", "RMSNormalization", "RandomNormalLike", "RandomUniformLike", "Reciprocal", "Relu",
    "ReverseSequence", "Round", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Trilu",
)
BROADCAST = (
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub",
    "Sum", "Where", "Xor",
)
# fmt: on


def rule(*op_types: str) -> Callable[[ShapeRule], ShapeRule]:
    """Register a rule for operators of the default domain."""

    def register(function: ShapeRule) -> ShapeRule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


@rule(*SAME)
def same(step: Step) -> list[Shape | None] | None:
    """The first input's shape."""
    return [step.shape(0)]


@rule(*BROADCAST)
def broadcast(step: Step) -> list[Shape | None] | None:
    """The inputs' shapes under numpy's broadcasting."""
    shapes = step.shapes()
    if shapes is None or not shapes or step.attribute("broadcast"):
        return None
    return [broadcast_shapes(step, shapes)]


def broadcast_shapes(step: Step, shapes: Sequence[Shape]) -> Shape:
    """Return the broadcast shape; where two sizes may or may not differ, a fresh one."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(_common(step, sizes) for sizes in zip(*padded, strict=True))


def _common(step: Step, sizes: Sequence[Size]) -> Size:
    candidates = {size for size in sizes if size != 1}
    if len({size for size in candidates if isinstance(size, int)}) > 1:
        raise ImpossibleError
    if len(candidates) <= 1:
        return next(iter(candidates), 1)
    for size in list(candidates):  # min(n, 512) broadcasts with n only where it is n
        one, other = dimensions.smaller_of(size) or (0, 0)
        if (one in candidates and less(other, 2) is False) or (other in candidates and less(one, 2) is False):
            candidates.discard(size)
    if len(candidates) == 1:
        return candidates.pop()
    for size in candidates:  # a size that cannot be 1 is the result, if the model runs at all
        if equal(size, 1) is False:
            return size
    return step.fresh()


@rule("Transpose")
def transpose(step: Step) -> list[Shape | None] | None:
    """The axes permuted."""
    shape = step.shape(0)
    if shape is None:
        return None
    order = step.attribute("perm") or range(len(shape))[::-1]
    if len(order) != len(shape):
        raise ImpossibleError
    return [tuple(shape[axis] for axis in order)]


@rule("Concat")
def concat(step: Step) -> list[Shape | None] | None:
    """Sizes along the axis added up; elsewhere all are equal, so a static one is preferred."""
    shapes = step.shapes()
    if not shapes:
        return None
    if len({len(shape) for shape in shapes}) != 1:
        raise ImpossibleError
    axis = step.attribute("axis", 1) % max(1, len(shapes[0]))
    sizes: list[Size] = []
    for position, column in enumerate(zip(*shapes, strict=True)):
        if position == axis:
            total: Size = 0
            for size in column:
                total = add(total, size)
            sizes.append(total)
        else:
            sizes.append(next((size for size in column if isinstance(size, int)), column[0]))
    return [tuple(sizes)]


@rule("Reshape")
def reshape(step: Step) -> list[Shape | None] | None:
    """The requested sizes: 0 copies, -1 is what is left, and so is an integer from data."""
    shape, wanted = step.shape(0), step.values(1)
    if step.opset < 5:
        wanted = None
    if wanted is None or wanted.ndim != 1:
        return None
    sizes: list[Size | None] = []
    for index, item in enumerate(wanted):
        if item == 0 and not step.attribute("allowzero", 0):
            sizes.append(shape[index] if shape is not None and index < len(shape) else step.fresh())
        else:
            low = low_of(item)
            sizes.append(item if low is not None and low >= 0 else None)
    if sizes.count(None) == 1:
        rest = product(size for size in sizes if size is not None)
        left = exact_quotient(product(shape), rest) if shape is not None and rest != 0 else None
        sizes[sizes.index(None)] = left
    return [tuple(step.fresh() if size is None else size for size in sizes)]


@rule("Flatten")
def flatten(step: Step) -> list[Shape | None] | None:
    """Two axes: the product of those before `axis`, and of the rest."""
    shape = step.shape(0)
    if shape is None:
        return None
    axis = step.attribute("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return [(product(shape[:axis]), product(shape[axis:]))]


@rule("Squeeze")
def squeeze(step: Step) -> list[Shape | None] | None:
    """The axes removed; without axes those of size 1, if that is known for all."""
    shape = step.shape(0)
    if shape is None:
        return None
    if not step.has(1) and step.attribute("axes") is None:
        if any(equal(size, 1) is None for size in shape):
            return None
        return [tuple(size for size in shape if size != 1)]
    axes = step.axes(1, len(shape))
    if axes is not None and any(equal(shape[axis], 1) is False for axis in axes):
        raise ImpossibleError
    return None if axes is None else [tuple(size for axis, size in enumerate(shape) if axis not in axes)]


@rule("Unsqueeze")
def unsqueeze(step: Step) -> list[Shape | None] | None:
    """Axes of size 1 inserted."""
    shape = step.shape(0)
    given = step.attribute("axes") or step.ints(1)
    if shape is None or given is None:
        return None
    axes = step.axes(1, len(shape) + len(given))
    if axes is None or len(set(axes)) != len(given):
        return None
    rest = iter(shape)
    return [tuple(1 if axis in axes else next(rest) for axis in range(len(shape) + len(axes)))]


@rule("Gather")
def gather(step: Step) -> list[Shape | None] | None:
    """The indices' shape in the place of the axis."""
    shape, indices = step.shape(0), step.shape(1)
    if not shape or indices is None:
        return None
    axis = step.attribute("axis", 0) % len(shape)
    return [(*shape[:axis], *indices, *shape[axis + 1 :])]


@rule("GatherElements")
def gather_elements(step: Step) -> list[Shape | None] | None:
    """The indices' shape."""
    return [step.shape(1)]


@rule("Slice")
def slice_(step: Step) -> list[Shape | None] | None:
    """Sizes cut by known bounds; an axis from its start to a symbolic end is cut to the smaller."""
    shape = step.shape(0)
    if shape is None:
        return None
    bounds = slice_bounds(step, len(shape))
    sizes = list(shape)
    if bounds is None:
        axes = step.axes(3, len(shape)) if step.opset >= 10 and step.has(3) else range(len(shape))
        for axis in axes or range(len(shape)):
            sizes[axis] = step.fresh()
        return [tuple(sizes)]
    for axis, start, end, stride in bounds:
        sizes[axis] = _sliced(step, shape[axis], start, end, stride)
    return [tuple(sizes)]


def _sliced(step: Step, size: Size, start: Size, end: Size, stride: int) -> Size:
    """Return the size that a slice leaves; the largest integers stand for the end."""
    if stride < 0:
        whole = start == -1 or equal(add(size, -1), start) or less(start, 2**31 - 1) is False
        if not whole or less(-(2**31) + 1, end) is not False:
            return step.fresh()
        return dimensions.floor_divide(add(size, -stride - 1), -stride)
    first = _clamped(size, start)
    last = _clamped(size, end)
    if first is None or last is None:
        return step.fresh()
    length = last if first == 0 else dimensions.maximum(subtract(last, first), 0)
    return dimensions.floor_divide(add(length, stride - 1), stride)


def _clamped(size: Size, bound: Size) -> Size | None:
    """Return where a bound lies between 0 and the size; None when its sign is not known."""
    if isinstance(bound, int) and abs(bound) >= 2**31 - 1:
        return size if bound > 0 else 0
    if less(bound, 0) is False:
        return dimensions.minimum(size, bound)
    return dimensions.maximum(add(size, bound), 0) if less(bound, 0) else None


@rule("Split")
def split(step: Step) -> list[Shape | None] | None:
    """The axis cut into the given or into equal parts."""
    shape = step.shape(0)
    if not shape:
        return None
    axis, count = step.attribute("axis", 0) % len(shape), len(step.node.output)
    lengths: Sequence[Size] | None = step.attribute("split") or step.ints(1)
    if lengths is None:
        part = exact_quotient(shape[axis], count)
        lengths = (
            [part] * count if part is not None and not step.has(1) else [step.fresh() for _ in range(count)]
        )
    return [(*shape[:axis], length, *shape[axis + 1 :]) for length in lengths]


@rule("Expand")
def expand(step: Step) -> list[Shape | None] | None:
    """The input broadcast with the requested sizes."""
    shape, wanted = step.shape(0), step.values(1)
    if shape is None or wanted is None or wanted.ndim != 1:
        return None
    sizes = tuple(size if (low := low_of(size)) is not None and low >= 0 else step.fresh() for size in wanted)
    return [broadcast_shapes(step, [shape, sizes])]


@rule("GatherND")
def gather_nd(step: Step) -> list[Shape | None] | None:
    """The places that the indices name, in the indices' shape."""
    shape, indices = step.shape(0), step.shape(1)
    if shape is None or not indices or not isinstance(indices[-1], int):
        return None
    return [(*indices[:-1], *shape[step.attribute("batch_dims", 0) + indices[-1] :])]


@rule("Resize")
def resize(step: Step) -> list[Shape | None] | None:
    """The requested sizes, or whole multiples of the input's."""
    shape, wanted = step.shape(0), step.values(3)
    if shape is None or step.opset < 11 or step.attribute("axes"):
        return None
    if wanted is not None and wanted.shape == (len(shape),):
        plain = step.attribute("keep_aspect_ratio_policy", "stretch") == "stretch"
        return [tuple(wanted)] if plain else None
    scales = step.facts.graph.constant(step.node.input[2]) if step.has(2) else None
    if (
        scales is None
        or scales.size != len(shape)
        or any(not scale.is_integer() for scale in scales.tolist())
    ):
        return None
    return [tuple(multiply(size, int(scale)) for size, scale in zip(shape, scales, strict=True))]


@rule("ConstantOfShape")
def constant_of_shape(step: Step) -> list[Shape | None] | None:
    """The requested sizes."""
    wanted = step.values(0)
    return None if wanted is None or wanted.ndim != 1 else [tuple(wanted)]


@rule("Tile")
def tile(step: Step) -> list[Shape | None] | None:
    """Sizes times repeats."""
    shape, repeats = step.shape(0), step.values(1)
    if shape is None or repeats is None or repeats.shape != (len(shape),):
        return None
    return [tuple(multiply(size, count) for size, count in zip(shape, repeats, strict=True))]


@rule("Pad")
def pad(step: Step) -> list[Shape | None] | None:
    """Sizes plus what is added at both ends."""
    shape = step.shape(0)
    pads = step.ints(1) if step.opset >= 11 else step.attribute("pads")
    if shape is None or pads is None:
        return None
    axes = step.axes(3, len(shape)) if step.has(3) else list(range(len(shape)))
    if axes is None or len(pads) != 2 * len(axes):
        return None
    sizes = list(shape)
    for position, axis in enumerate(axes):
        sizes[axis] = add(sizes[axis], pads[position] + pads[position + len(axes)])
    return [tuple(sizes)]


@rule("Range")
def range_(step: Step) -> list[Shape | None] | None:
    """The number of steps, where the stride is 1."""
    start, limit, delta = step.values(0), step.values(1), step.ints(2)
    if start is None or limit is None or delta != [1]:
        return None
    return [(dimensions.maximum(subtract(limit.item(), start.item()), 0),)]
