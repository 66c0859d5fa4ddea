"""Operators that only rearrange axes: two become one, in a row or with activations between them."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.nodes import attribute, domain_of, is_op
from onnxslim_lab.rewriting.patterns import reshape_value, sole_reader
from onnxslim_lab.rewriting.transposable import UNARY
from onnxslim_lab.symbols.dimensions import Size, multiply
from onnxslim_lab.symbols.facts import Facts, Shape, Step
from onnxslim_lab.symbols.size_editor import SizeEditor
from onnxslim_lab.symbols.targets import reshape_target, same_shape
from onnxslim_lab.symbols.value_rules import slice_bounds

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
REDUCED = {"ReduceMax": "Max", "ReduceMin": "Min", "ReduceSum": "Sum", "ReduceMean": "Mean"}
_ELEMENTWISE = (TensorProto.FLOAT, TensorProto.FLOAT16)  # onnxruntime has no Mean of the others


def view(editor: SizeEditor, node: NodeProto) -> bool:
    """Two views become one; three in a row, of which the middle one is a Transpose, one Transpose.

    Activations between two views do not mind the axes. They run before the one that is left, right behind what
    makes the value, where a runtime fuses them with it.
    """
    graph, facts = editor.graph, editor.facts
    first, between = behind_activations(editor, node.input[0])
    if first is None or first.op_type not in VIEWS or graph.opset() < 5:
        return picked(editor, node)
    if is_op(first, "Transpose") and not is_view(facts, first):
        return not between and transposed(editor, node, first)
    if not is_view(facts, node):
        return False
    source, result = first.input[0], facts.shape(node.output[0])
    shape = facts.shape(source)
    same = same_shape(shape, result)
    target = reshape_target(shape, result) if result is not None else None
    both = is_op(first, "Transpose") and is_op(node, "Transpose")
    if not same and (target is None or both):
        return False
    why = f"{first.op_type} and {node.op_type} became one view"
    if between:
        run_on(editor, between, source)
        source = between[-1].output[0]
        why += f" behind {between[-1].op_type}"
    if same:
        editor.replace(node, source, why)
        editor.drop(first)
        return True
    assert target is not None
    made = editor.exchange(node, "Reshape", [source, editor.constant(target)], why)
    editor.drop(first)
    view(editor, made)
    return True


def behind_activations(editor: SizeEditor, value: str) -> tuple[NodeProto | None, list[NodeProto]]:
    """Return what makes a value but for activations, which follow in order; nothing else reads what is between."""
    chain: list[NodeProto] = []
    node = sole_source(editor, value)
    while node is not None and node.op_type in UNARY and len(node.output) == 1:
        if editor.facts.values(node.output[0]) is not None:
            return None, []  # sizes, which later edits know by their shape
        chain.insert(0, node)
        node = sole_source(editor, node.input[0])
    return node, chain


def run_on(editor: SizeEditor, activations: list[NodeProto], source: str) -> None:
    """Let a chain of activations read a value of another shape."""
    graph, facts = editor.graph, editor.facts
    graph.set_input(activations[0], 0, source)
    for node in activations:
        reshape_value(graph, node.output[0], graph.shape_of(source))
        facts.reshape(node.output[0], facts.shape(source))


def sole_source(editor: SizeEditor, value: str) -> NodeProto | None:
    """Return the standard operator that makes a value for one reader only."""
    node = editor.graph.producer(value)
    alone = node is not None and domain_of(node.domain) == "" and editor.graph.use_count(value) == 1
    return node if alone else None


def is_view(facts: Facts, node: NodeProto) -> bool:
    """Whether a node keeps the elements' order: not a Transpose, or one that moves axes of size 1 only."""
    if node.op_type != "Transpose":
        return True
    shape = facts.shape(node.input[0])
    if shape is None:
        return False
    order = attribute(node, "perm") or range(len(shape))[::-1]
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


def transposed(editor: SizeEditor, node: NodeProto, middle: NodeProto) -> bool:
    """Reshape -> Transpose -> Reshape that joins axes, moves them and splits them again is a Transpose."""
    first = sole_source(editor, middle.input[0])
    if first is None or first.op_type not in VIEWS or is_op(first, "Transpose") or is_op(node, "Transpose"):
        return False
    facts = editor.facts
    shape, joined, result = (facts.shape(name) for name in (first.input[0], first.output[0], node.output[0]))
    groups = grouped(shape, joined) if shape is not None and joined is not None else None
    if groups is None or joined is None or shape is None:
        return False
    order = attribute(middle, "perm") or list(range(len(joined))[::-1])
    axes = [axis for place in order for axis in groups[place]]
    if not same_shape(tuple(shape[axis] for axis in axes), result):
        return False
    editor.exchange(
        node, "Transpose", [first.input[0]], "Reshape, Transpose and Reshape became a Transpose", perm=axes
    )
    return True


def grouped(shape: Shape, joined: Shape) -> list[list[int]] | None:
    """Return which axes of a shape make each axis of another, in order; None when they do not.

    >>> from onnxslim_lab.symbols.dimensions import multiply, symbol
    >>> grouped((symbol("n"), 12, 5, 32), (multiply(symbol("n"), 12), 5, 32))
    [[0, 1], [2], [3]]
    """
    groups: list[list[int]] = []
    axis = 0
    for size in joined:
        group: list[int] = []
        total: Size = 1
        while axis < len(shape) and (not group or total != size):
            total = multiply(total, shape[axis])
            group.append(axis)
            axis += 1
        if total != size:
            return None
        groups.append(group)
    return groups if axis == len(shape) else None


def picked(editor: SizeEditor, node: NodeProto) -> bool:
    """Slice of one place, then Squeeze of that axis: Gather of the place."""
    first = sole_source(editor, node.input[0])
    if not is_op(node, "Squeeze") or not is_op(first, "Slice"):
        return False
    assert first is not None
    facts = editor.facts
    shape = facts.shape(first.input[0])
    if shape is None or (len(first.input) > 1 and first.input[0] in first.input[1:]):
        return False
    bounds = slice_bounds(Step(facts, first), len(shape))
    axes = Step(facts, node).axes(1, len(shape))
    if bounds is None or len(bounds) != 1 or axes != [bounds[0][0]]:
        return False
    axis, start, end, stride = bounds[0]
    if not isinstance(start, int) or not isinstance(end, int) or stride != 1:
        return False
    if end != start + 1 and not (start == -1 and end >= 2**31 - 1):
        return False
    if (start == -1 and end == 0) or (start < 0 and editor.graph.opset() < 11):
        return False
    index = editor.scalar(start)
    editor.exchange(node, "Gather", [first.input[0], index], "Slice and Squeeze became Gather", axis=axis)
    return True


def slices(editor: SizeEditor, node: NodeProto) -> bool:
    """Two Slices in a row of different axes become one."""
    first = sole_source(editor, node.input[0])
    if first is None or first.op_type != "Slice" or editor.graph.opset() < 10:
        return False
    shape = editor.facts.shape(first.input[0])
    if shape is None:
        return False
    parts = [slice_bounds(Step(editor.facts, part), len(shape)) for part in (first, node)]
    bounds = [bound for part in parts for bound in part or ()]
    axes = [axis for axis, *_ in bounds]
    columns = list(zip(*bounds, strict=True))
    known = [[item for item in column if isinstance(item, int)] for column in columns]
    if (
        not bounds
        or None in parts
        or len(set(axes)) < len(axes)
        or any(len(column) < len(axes) for column in known)
    ):
        return False
    inputs = [first.input[0], *(editor.constant(known[index]) for index in (1, 2, 0, 3))]
    editor.exchange(node, "Slice", inputs, "two Slices became one")
    return True


def unstacked(editor: SizeEditor, node: NodeProto) -> bool:
    """A reduction along the axis that a Concat of Unsqueezes made: the same of what they read, element by element."""
    graph, facts = editor.graph, editor.facts
    joined = sole_source(editor, node.input[0])
    if joined is None or joined.op_type != "Concat" or graph.dtype_of(node.output[0]) not in _ELEMENTWISE:
        return False
    shape = facts.shape(joined.output[0])
    if shape is None or set_by_caller(node) or graph.opset() < 8:
        return False
    axis = attribute(joined, "axis", 1) % len(shape)
    if attribute(node, "keepdims", 1) or Step(facts, node).axes(1, len(shape)) != [axis]:
        return False
    sources = stacked(editor, joined, axis, len(shape))
    if sources is None:
        return False
    made = REDUCED[node.op_type]
    editor.exchange(node, made, sources, f"{node.op_type} of a stack of {len(sources)} values became {made}")
    editor.drop(joined)
    return True


def stacked(editor: SizeEditor, node: NodeProto, axis: int, rank: int) -> list[str] | None:
    """Return what every input of a Concat was before an Unsqueeze of that axis; None when one is something else."""
    sources = []
    for value in node.input:
        source = editor.graph.producer(value)
        if source is None or not is_op(source, "Unsqueeze"):
            return None
        if Step(editor.facts, source).axes(1, rank) != [axis]:
            return None
        sources.append(source.input[0])
    return sources


def stack(editor: SizeEditor, node: NodeProto) -> bool:
    """Concat along an axis that every input got from Unsqueeze: Concat of what they had, then one Reshape."""
    graph, facts = editor.graph, editor.facts
    result = facts.shape(node.output[0])
    if result is None or len(node.input) < 2 or len(set(node.input)) < len(node.input) or graph.opset() < 5:
        return False
    axis = attribute(node, "axis", 1) % len(result)
    reader = sole_reader(graph, node.output[0])
    if reader is not None and reader.op_type in REDUCED and unstacked(editor, reader):
        return True
    sources = stacked(editor, node, axis, len(result))
    if sources is None or axis == len(result) - 1 or any(graph.use_count(value) != 1 for value in node.input):
        return False
    makers = map(graph.producer, sources)
    if any(maker is not None and maker.op_type in (*VIEWS, "If") for maker in makers):
        return False  # the Unsqueeze may yet cancel with that
    shapes = [facts.shape(source) for source in sources]
    joined = [] if shapes[0] is None else list(shapes[0])
    if not joined or any(not same_shape(shape, shapes[0]) for shape in shapes):
        return False
    joined[axis] = multiply(joined[axis], len(sources))
    target = reshape_target(tuple(joined), result)
    if target is None:
        return False
    flat = graph.emit("Concat", sources, axis=axis).output[0]
    graph.set_type(flat, graph.dtype_of(node.output[0]), None)
    facts.know(flat, tuple(joined), None)
    why = f"{len(sources)} Unsqueezes before Concat became one Reshape after it"
    editor.exchange(node, "Reshape", [flat, editor.constant(target)], why)
    return True
