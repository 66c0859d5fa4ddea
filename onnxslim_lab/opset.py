"""Raise the opset of a whole model, weights and interface untouched."""

from __future__ import annotations

from onnx import ModelProto, helper, version_converter

from onnxslim_lab.errors import ModelError
from onnxslim_lab.graph import Graph
from onnxslim_lab.weights import stub_location


def raise_opset(graph: Graph, version: int) -> None:
    """Convert the model's standard operators to a newer opset, in place.

    onnx's version converter sees the model without its large tensors, which it takes for inputs; only the
    nodes it returns, and the small tensors it adds, come back. Everything else stays: weights, names, types
    and order of inputs and outputs, metadata, other domains.

    Args:
        graph: The main graph of the model.
        version: The opset to raise to; an equal or newer model is left as it is.

    Raises:
        ModelError: the model has local functions or the converter fails; nothing was changed.
    """
    if graph.opset() >= version:
        return
    if graph.functions:
        raise ModelError("the version converter does not handle local functions: inline them first")
    if any(inner is not graph for inner in graph.walk()):
        raise ModelError("the version converter does not handle the bodies of control flow")
    light = _without_large(graph.light_model())
    try:
        converted = version_converter.convert_version(light, version)
    except Exception as error:  # the converter raises RuntimeError and others, by operator
        raise ModelError(f"the version converter cannot raise it to {version}: {error}") from error
    graph.remove(*graph.nodes)
    graph.set_opset("", version)
    known = set(graph.initializers)
    for tensor in converted.graph.initializer:
        if tensor.name not in known:
            graph.adopt(helper.make_node("Constant", [], [tensor.name], value=tensor))
    for node in converted.graph.node:
        graph.adopt(node)


def _without_large(model: ModelProto) -> ModelProto:
    """Return the model with its detached tensors declared as inputs."""
    listed = {value.name for value in model.graph.input}
    small = []
    for tensor in model.graph.initializer:
        if not stub_location(tensor):
            small.append(tensor)
        elif tensor.name not in listed:
            model.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    kept = [tensor.SerializeToString() for tensor in small]
    model.graph.ClearField("initializer")
    for data in kept:
        model.graph.initializer.add().ParseFromString(data)
    return model
