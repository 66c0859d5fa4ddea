"""What changed in the standard operators between opsets, and how a node is rewritten for it.

`STEPS[operator, opset]` rewrites a node written in the opset before into that opset, where the schemas differ in
more than the types they take or in attributes whose default is the old meaning. A test compares this table
with the history of all schemas that onnx keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxslim_lab.graph import attribute
from onnxslim_lab.opset_place import Place, StepError

Step = Callable[[Place, NodeProto], NodeProto | None]
STEPS: dict[tuple[str, int], Step] = {}


def step(opset: int, *op_types: str) -> Callable[[Step], Step]:
    """Register the rewriting of operators for an opset."""

    def register(function: Step) -> Step:
        STEPS.update({(op_type, opset): function for op_type in op_types})
        return function

    return register


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


@step(13, "ReduceSum", "Squeeze", "Unsqueeze")
@step(18, *(f"Reduce{kind}" for kind in _REDUCTIONS))
def axes_to_input(place: Place, node: NodeProto) -> None:
    """`axes` became the second input."""
    _append(place, node, "axes", 1)


@step(13, "Split")
def split_to_input(place: Place, node: NodeProto) -> None:
    """`split` became the second input."""
    _append(place, node, "split", 1)


@step(18, "Split")
def split_count(place: Place, node: NodeProto) -> None:
    """Without sizes the number of outputs must be said; before, it was implied."""
    if len(node.input) < 2 or not node.input[1]:
        place.graph.set_attribute(node, "num_outputs", len(node.output))


@step(10, "Slice")
def slice_to_inputs(place: Place, node: NodeProto) -> None:
    """`starts`, `ends` and `axes` became inputs."""
    for index, name in enumerate(("starts", "ends", "axes"), 1):
        _append(place, node, name, index)


@step(10, "TopK")
def topk_to_input(place: Place, node: NodeProto) -> None:
    """`k` became the second input, of shape (1,)."""
    item = place.take(node, "k")
    if item is None:
        raise StepError("it has no k")
    if item.ref_attr_name:
        scalar = place.value(item, "k")
        name = place.graph.emit("Reshape", [scalar, place.constant([1])]).output[0]
    else:
        name = place.constant([item.i], hint="k")
    place.graph.set_input(node, 1, name)


@step(5, "Reshape")
def shape_to_input(place: Place, node: NodeProto) -> None:
    """`shape` became the second input."""
    place.take(node, "consumed_inputs")
    _append(place, node, "shape", 1)


@step(2, "Pad")
def rename_paddings(place: Place, node: NodeProto) -> None:
    """`paddings` became `pads`."""
    item = place.take(node, "paddings")
    if item is not None:
        place.graph.set_attribute(node, "pads", item)


@step(11, "Pad")
def pads_to_inputs(place: Place, node: NodeProto) -> None:
    """`pads` and `value` became inputs."""
    _append(place, node, "pads", 1)
    value = place.take(node, "value")
    if value is not None and (value.ref_attr_name or value.f):
        place.graph.set_input(node, 2, place.typed(value, node.input[0], "pad_value"))


@step(11, "Clip")
def limits_to_inputs(place: Place, node: NodeProto) -> None:
    """`min` and `max` became inputs."""
    for index, name in ((1, "min"), (2, "max")):
        item = place.take(node, name)
        if item is not None:
            place.graph.set_input(node, index, place.typed(item, node.input[0], name))


@step(20, "DFT")
def dft_axis_to_input(place: Place, node: NodeProto) -> None:
    """`axis` became the third input, its default 1 another one."""
    item = place.take(node, "axis") or helper.make_attribute("axis", 1)
    place.graph.set_input(node, 2, place.value(item, "axis"))


@step(12, "Dropout")
def dropout_ratio(place: Place, node: NodeProto) -> None:
    """`ratio`, which means something in training only, became the second input; the mask became all true."""
    if len(node.output) > 1 and place.graph.use_count(node.output[1]):
        raise StepError("its mask, which inference left open, has no counterpart")
    place.graph.set_outputs(node, list(node.output[:1]))
    item = place.take(node, "ratio")
    if item is not None and (item.ref_attr_name or item.f != 0.5):
        place.graph.set_input(node, 1, place.typed(item, node.input[0], "ratio"))


@step(7, "Dropout")
@step(7, "BatchNormalization")
def drop_is_test(place: Place, node: NodeProto) -> None:
    """`is_test` went: the number of outputs says whether it is training."""
    item = place.take(node, "is_test")
    place.take(node, "consumed_inputs")
    outputs = [name for name in node.output[1:] if place.graph.use_count(name)]
    if (item is None or item.i == 0) and outputs:
        raise StepError("it is written for training")
    place.graph.set_outputs(node, list(node.output[:1]))


@step(9, "BatchNormalization")
def drop_spatial(place: Place, node: NodeProto) -> None:
    """Statistics per element (spatial=0) went."""
    item = place.take(node, "spatial")
    if item is not None and (item.ref_attr_name or item.i != 1):
        raise StepError("statistics for each element (spatial=0) have no counterpart")


@step(14, "BatchNormalization")
def training_outputs(place: Place, node: NodeProto) -> None:
    """Several outputs meant training; now an attribute does and the outputs are others."""
    if any(place.graph.use_count(name) for name in node.output[1:] if name):
        raise StepError("its training outputs have no counterpart")
    place.graph.set_outputs(node, list(node.output[:1]))


@step(13, "Softmax", "LogSoftmax", "Hardmax")
def softmax_axis(place: Place, node: NodeProto) -> None:
    """All axes from `axis` (default 1) on were one; now it is a single axis (default the last)."""
    graph, source = place.graph, node.input[0]
    item, rank = place.take(node, "axis"), place.rank(source)
    if item is not None and item.ref_attr_name:
        raise StepError("its axis is an attribute of the function")
    axis = 1 if item is None else item.i
    if axis == -1 or (rank is not None and axis % max(rank, 1) == rank - 1):
        graph.set_attribute(node, "axis", -1)
        return
    graph.set_attribute(node, "axis", -1)
    flat = graph.emit("Flatten", [source], axis=axis).output[0]
    shape = graph.emit("Shape", [source]).output[0]
    graph.set_input(node, 0, flat)
    wanted = place.redirect(node)
    back = graph.emit("Reshape", [node.output[0], shape], [wanted])
    if place.target >= 14:
        graph.set_attribute(back, "allowzero", 1)


@step(9, "Upsample")
def upsample_scales(place: Place, node: NodeProto) -> None:
    """`scales` became the second input."""
    item = place.take(node, "scales")
    if item is None:
        raise StepError("it has no scales")
    place.graph.set_input(node, 1, place.value(item, "scales"))


@step(10, "Upsample")
def upsample_to_resize(place: Place, node: NodeProto) -> NodeProto:
    """Upsample became Resize, which from opset 11 on must be told to count pixels as Upsample does."""
    resize = place.replace(node, "Resize")
    if place.target >= 11:
        _asymmetric(place, resize, "floor")
    return resize


@step(11, "Resize")
def resize_modes(place: Place, node: NodeProto) -> NodeProto | None:
    """How pixels are counted became an attribute; before, nearest took the floor growing, the ceiling shrinking.

    A factor of 1 leaves an axis alone, so that factors that are unknown, or both above and below 1, become
    two steps: one that grows and one that shrinks.
    """
    graph = place.graph
    if len(node.input) > 2:
        return None  # it was an Upsample
    scales = graph.constant(node.input[1])
    if attribute(node, "mode", "nearest") != "nearest" or (scales is not None and (scales >= 1).all()):
        _asymmetric(place, node, "floor")
        return None
    if scales is not None and (scales <= 1).all():
        _asymmetric(place, node, "ceil")
        return None
    if scales is not None:
        grow, shrink = (place.constant(part(scales, 1), np.float32) for part in (np.maximum, np.minimum))
    else:
        one = place.constant(1, np.float32)
        grow, shrink = (graph.emit(op, [node.input[1], one]).output[0] for op in ("Max", "Min"))
    graph.set_input(node, 1, grow)
    wanted = place.redirect(node)
    second = graph.emit("Resize", [node.output[0], shrink], [wanted], mode="nearest")
    _asymmetric(place, node, "floor")
    _asymmetric(place, second, "ceil")
    return None


def _asymmetric(place: Place, node: NodeProto, nearest: str) -> None:
    data, scales = node.input[:2]
    place.graph.set_inputs(node, [data, "", scales] if place.target >= 13 else [data, _no_roi(place), scales])
    place.graph.set_attribute(node, "coordinate_transformation_mode", "asymmetric")
    if attribute(node, "mode", "nearest") == "nearest":
        place.graph.set_attribute(node, "nearest_mode", nearest)


def _no_roi(place: Place) -> str:
    return place.constant([], np.float32, "roi")


@step(13, "Resize")
def resize_tensorflow(place: Place, node: NodeProto) -> None:
    """TensorFlow's half pixels for nearest went: the floor without the half is half a pixel's rounding up."""
    if attribute(node, "coordinate_transformation_mode") != "tf_half_pixel_for_nn":
        return
    if attribute(node, "mode", "nearest") != "nearest" or attribute(node, "nearest_mode") != "floor":
        raise StepError(
            "tf_half_pixel_for_nn has a counterpart with mode nearest and nearest_mode floor only"
        )
    place.graph.set_attribute(node, "coordinate_transformation_mode", "half_pixel")
    place.graph.set_attribute(node, "nearest_mode", "round_prefer_ceil")


@step(11, "Scatter")
def scatter(place: Place, node: NodeProto) -> NodeProto:
    """Scatter was renamed."""
    return place.replace(node, "ScatterElements")


@step(16, "RoiAlign")
def roi_align(place: Place, node: NodeProto) -> None:
    """Half a pixel of shift became the default."""
    place.graph.set_attribute(node, "coordinate_transformation_mode", "output_half_pixel")


@step(20, "GridSample")
def grid_sample(place: Place, node: NodeProto) -> None:
    """Modes were renamed."""
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = attribute(node, "mode", "bilinear")
    if mode in names:
        place.graph.set_attribute(node, "mode", names[mode])


@step(21, "GroupNormalization")
def group_normalization(place: Place, node: NodeProto) -> NodeProto:
    """Scale and bias, one for each group, became one for each channel; InstanceNormalization has the former."""
    graph = place.graph
    data, scale, bias = node.input
    groups, epsilon = attribute(node, "num_groups"), attribute(node, "epsilon", 1e-5)
    if any(item.ref_attr_name for item in node.attribute):
        raise StepError("its attributes are those of the function")
    shape = graph.emit("Shape", [data]).output[0]
    grouped = graph.emit("Reshape", [data, place.constant([0, groups, -1])]).output[0]
    normal = graph.emit("InstanceNormalization", [grouped, scale, bias], epsilon=epsilon).output[0]
    outputs, name = list(node.output), node.name
    graph.remove(node)
    return graph.adopt(helper.make_node("Reshape", [normal, shape], outputs, name))


@step(9, "Scan")
def scan(_: Place, __: NodeProto) -> None:
    """The batch axis and the sequence lengths went."""
    raise StepError("its batch axis and sequence lengths have no counterpart")


@step(6, "*")
def drop_consumed_inputs(place: Place, node: NodeProto) -> None:
    """A hint about memory went."""
    place.take(node, "consumed_inputs")


@step(7, "LSTM", "GRU", "RNN")
def drop_output_sequence(place: Place, node: NodeProto) -> None:
    """A hint about the first output went."""
    place.take(node, "output_sequence")


@step(7, "Gemm", "Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")
def broadcast(place: Place, node: NodeProto) -> None:
    """Shapes align at their ends; before, on demand, and at a given axis."""
    place.take(node, "broadcast")
    axis = place.take(node, "axis")
    if axis is None:
        return
    ranks = place.rank(node.input[0]), place.rank(node.input[1])
    if axis.ref_attr_name or ranks[0] is None or ranks[1] is None:
        raise StepError("where its operands align depends on ranks that are not known")
    after = ranks[0] - axis.i % ranks[0] - ranks[1]
    if after > 0:
        axes = list(range(ranks[1], ranks[1] + after))
        if place.target < 13:
            moved = place.graph.emit("Unsqueeze", [node.input[1]], axes=axes)
        else:
            moved = place.graph.emit("Unsqueeze", [node.input[1], place.constant(axes)])
        place.graph.set_input(node, 1, moved.output[0])


@step(4, "Concat")
def concat_axis(place: Place, node: NodeProto) -> None:
    """`axis` had the default 1."""
    if attribute(node, "axis") is None:
        place.graph.set_attribute(node, "axis", 1)


@step(2, "Split")
def first_split(_: Place, node: NodeProto) -> None:
    """The second input became an attribute, and `axis` got a default."""
    if len(node.input) > 1 or attribute(node, "axis") is None:
        raise StepError("its sizes as an input, or its missing axis, have no counterpart")


@step(6, "Cast")
def cast_target(place: Place, node: NodeProto) -> None:
    """`to` was text."""
    item = place.take(node, "to")
    if item is None or item.ref_attr_name:
        raise StepError("its type is not given")
    place.graph.set_attribute(node, "to", TensorProto.DataType.Value(item.s.decode()) if item.s else item.i)


def _append(place: Place, node: NodeProto, name: str, index: int) -> None:
    item = place.take(node, name)
    if item is not None:
        place.graph.set_input(node, index, place.value(item, name))
