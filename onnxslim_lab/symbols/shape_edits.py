"""Operators that are given a shape: their edits once sizes are known."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from onnxslim_lab.nodes import attribute, domain_of
from onnxslim_lab.symbols import shape_rules
from onnxslim_lab.symbols.dimensions import Size, equal, exact_quotient, less
from onnxslim_lab.symbols.facts import RANGES, ImpossibleError, Shape, Step
from onnxslim_lab.symbols.size_editor import SizeEditor
from onnxslim_lab.symbols.targets import literal_target, reshape_target, same_shape

TO_END = 2**63 - 1


def reshape(editor: SizeEditor, node: NodeProto) -> bool:
    """Reshape to sizes that are known, copied or left over: the target becomes a constant."""
    if editor.unchanged(node):
        return True
    graph, facts = editor.graph, editor.facts
    wanted = facts.values(node.input[1]) if len(node.input) > 1 else None
    if wanted is None or wanted.ndim != 1 or graph.is_constant(node.input[1]):
        return False
    shape, result = facts.shape(node.input[0]), facts.shape(node.output[0])
    target = reshape_target(shape, result) if result is not None else None
    if target is None:
        sizes: list[Size] = list(wanted)
        if result is not None:
            sizes = [own if own in (0, -1) else size for own, size in zip(wanted, result, strict=True)]
        target = literal_target(shape, sizes, zero_is_zero=bool(attribute(node, "allowzero", 0)))
    if target is None:
        return False
    graph.set_input(node, 1, editor.constant(target))
    graph.remove_attribute(node, "allowzero")
    editor.outcome.change(node.name, f"Reshape to the constant {target}")
    return False


def expand(editor: SizeEditor, node: NodeProto) -> bool:
    """Expand that changes nothing, or that its readers do by themselves, is removed."""
    if editor.unchanged(node):
        return True
    graph, facts = editor.graph, editor.facts
    shape, wanted = facts.shape(node.input[0]), facts.values(node.input[1])
    if shape is None:
        return False
    if readers_broadcast(editor, node, shape):
        editor.replace(node, node.input[0], "Expand before operators that broadcast removed")
        return True
    if wanted is None or wanted.ndim != 1 or wanted.size < len(shape) or graph.is_constant(node.input[1]):
        return False
    padded: Shape = (1,) * (wanted.size - len(shape)) + shape
    sizes = [1 if equal(own, item) else item for own, item in zip(padded, wanted, strict=True)]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) == len(sizes):
        graph.set_input(node, 1, editor.constant(known))
        editor.outcome.change(node.name, f"Expand to the constant {known}")
    return False


def constant_of_shape(editor: SizeEditor, node: NodeProto) -> bool:
    """ConstantOfShape whose readers broadcast becomes its one value."""
    graph, value = editor.graph, node.output[0]
    data_type = graph.dtype_of(value)
    if not data_type or not readers_broadcast(editor, node, ()):
        return False
    tensor = attribute(node, "value")
    filled = np.zeros((), np.float32) if tensor is None else numpy_helper.to_array(tensor).reshape(())
    name = graph.fresh_name("filled")
    graph.set_constant(name, filled, data_type)
    graph.replace_uses(value, name)
    editor.outcome.change(node.name, "ConstantOfShape before operators that broadcast became its value")
    return True


def readers_broadcast(editor: SizeEditor, node: NodeProto, shape: Shape) -> bool:
    """Whether every reader gives a result of the same shape when the node's output has this one instead."""
    graph, facts, value = editor.graph, editor.facts, node.output[0]
    readers = graph.consumers(value)
    if graph.is_output(value) or not readers or graph.opset() < 7:
        return False
    for reader in readers:
        if (
            reader.op_type not in shape_rules.BROADCAST
            or domain_of(reader.domain)
            or value not in reader.input
        ):
            return False
        shapes = [shape if name == value else facts.shape(name) for name in reader.input]
        known = [item for item in shapes if item is not None]
        try:
            result = shape_rules.broadcast_shapes(Step(facts, reader), known)
        except ImpossibleError:
            return False
        if len(known) < len(shapes) or not same_shape(result, facts.shape(reader.output[0])):
            return False
    return True


def slice_(editor: SizeEditor, node: NodeProto) -> bool:
    """A Slice that keeps everything is removed; an end at the axis's end becomes the largest integer."""
    graph, facts = editor.graph, editor.facts
    if graph.opset() < 10 or len(node.input) < 3:
        return False
    step = Step(facts, node)
    shape, starts, ends = facts.shape(node.input[0]), step.ints(1), step.items(2)
    if shape is None or starts is None or ends is None:
        return False
    strides = step.ints(4) if step.has(4) else [1] * len(starts)
    axes = step.axes(3, len(shape)) if step.has(3) else list(range(len(starts)))
    if strides != [1] * len(starts) or axes is None or not len(axes) == len(starts) == len(ends):
        return False
    limits = [
        TO_END if less(end, shape[axis]) is False else end for axis, end in zip(axes, ends, strict=True)
    ]
    if not any(starts) and all(isinstance(end, int) and end >= 2**31 - 1 for end in limits):
        editor.replace(node, node.input[0], "Slice of everything removed")
        return True
    known = [end for end in limits if isinstance(end, int)]
    data_type = graph.dtype_of(node.input[2])
    if len(known) == len(limits) and not graph.is_constant(node.input[2]) and data_type in RANGES:
        most = RANGES[data_type][1]
        graph.set_input(node, 2, editor.constant([min(end, most) for end in known], data_type))
        editor.outcome.change(node.name, "the ends of Slice became a constant")
    return False


def resize(editor: SizeEditor, node: NodeProto) -> bool:
    """Sizes that are whole multiples of the input's become scales."""
    graph, facts = editor.graph, editor.facts
    if graph.opset() < 11 or len(node.input) < 4 or not node.input[3] or graph.is_constant(node.input[3]):
        return False
    shape, sizes = facts.shape(node.input[0]), facts.values(node.input[3])
    stretched = attribute(node, "keep_aspect_ratio_policy", "stretch") == "stretch"
    if shape is None or sizes is None or sizes.size != len(shape) or attribute(node, "axes") or not stretched:
        return False
    ratios = [exact_quotient(size, own) for own, size in zip(shape, sizes, strict=True)]
    known = [ratio for ratio in ratios if isinstance(ratio, int) and ratio > 0]
    if len(known) == len(ratios):
        scales = graph.fresh_name("scales")
        graph.set_constant(scales, np.array(known, np.float32))
        graph.set_inputs(node, [node.input[0], node.input[1], scales])
        editor.outcome.change(node.name, f"Resize by the constant factors {known}")
    return False


def range_(editor: SizeEditor, node: NodeProto) -> bool:
    """Known bounds of Range lose an axis of size 1: runtimes refuse it in constants, not in what they compute."""
    for index, name in enumerate(node.input):
        values = editor.facts.values(name)
        if values is not None and values.ndim and values.size == 1 and isinstance(values.reshape(-1)[0], int):
            data_type = editor.graph.dtype_of(name)
            editor.graph.set_input(node, index, editor.constant(values.reshape(()), data_type))
            editor.outcome.change(node.name, "a bound of Range became a scalar")
    return False


def condition(editor: SizeEditor, node: NodeProto) -> bool:
    """A condition with one possible outcome becomes a constant."""
    outcome = editor.facts.decided.get(id(node))
    if outcome is not None and not editor.graph.is_constant(node.input[0]):
        shape = editor.facts.shape(node.input[0]) or ()
        value = np.full([1] * len(shape), outcome)
        editor.graph.set_input(node, 0, editor.constant(value, TensorProto.BOOL))
        editor.outcome.change(node.name, f"the condition of If can only be {str(outcome).lower()}")
    return False
