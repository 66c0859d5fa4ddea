"""Types and shapes of values, by inference rather than by what the file declares."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    defs,
    numpy_helper,
    shape_inference,
)

Dim = int | str | None
FunctionKey = tuple[str, str, str]

INTEGERS = (TensorProto.INT32, TensorProto.INT64)
_OPAQUE = "onnxslim_lab.opaque"
_MAKERS = ("Range", "ConstantOfShape", "Expand", "Tile")  # what makes long vectors from short ones
_WINDOWS = ("HannWindow", "HammingWindow", "BlackmanWindow")  # whose function bodies make a Range
_LONG = 1 << 16  # elements
MOST_ELEMENTS = 64
MOST_CALLS = 50_000  # nodes of local functions, counted at every call; onnx expands each call


def infer(light: ModelProto) -> ModelProto:
    """Return the model with the types that onnx's inference derives from inputs and constants.

    What exporters declare about intermediate values, about outputs and about the inputs of loop bodies is
    dropped first, because it is often wrong: shapes come back only as far as they follow from the operators.
    The exception: outputs of operators that onnx does not know keep their declared types. A node that
    cannot be inferred leaves its outputs unknown and does not stop the rest. Bodies of If, Loop and Scan
    are inferred where they stand, in the graph attributes of the result.
    """
    model = ModelProto()
    model.CopyFrom(light)
    for function in model.functions:
        function.ClearField("value_info")
    if not _bounded(model):
        model.ClearField("functions")
    _forget(model.graph, {_key(function) for function in model.functions})
    plain = _infer(model, data_prop=False)
    if plain is None:
        return model
    if not _seal_long(model, plain):
        return plain
    return _infer(model, data_prop=True) or plain


def _infer(model: ModelProto, *, data_prop: bool) -> ModelProto | None:
    """Return onnx's inference, None when it gives up; it raises many kinds of errors on odd models."""
    try:
        return shape_inference.infer_shapes(model, check_type=False, strict_mode=False, data_prop=data_prop)
    except Exception:  # noqa: BLE001
        return None


def _seal_long(model: ModelProto, plain: ModelProto) -> bool:
    """Make nodes opaque whose integers onnx must not propagate; return whether it may propagate the rest.

    onnx propagates the values of an integer vector by making all of them, known or not, so that a
    hundred bytes of model can take all memory. What makes vectors of a length that inference without
    values does not give, or of a large one, keeps its type only.
    """
    known = {value.name: value for graph in _all_graphs(plain.graph) for value in graph.value_info}
    inputs = [value for graph in _all_graphs(plain.graph) for value in (*graph.input, *graph.output)]
    sealed = False
    for graph in _all_graphs(model.graph):
        short = {
            tensor.name
            for tensor in graph.initializer
            if tensor.data_type in INTEGERS and not tensor.dims and numpy_helper.to_array(tensor) <= _LONG
        }
        for node in graph.node:
            if node.op_type in _WINDOWS and _domain(node.domain) == "" and node.input[0] not in short:
                node.domain = _OPAQUE
                sealed = True
            if node.op_type in _MAKERS and _domain(node.domain) == "":
                found = known.get(node.output[0])
                if found is not None and _long(found.type, unknown=True):
                    kept = graph.value_info.add(name=found.name)
                    kept.type.tensor_type.elem_type = found.type.tensor_type.elem_type
                    kept.type.tensor_type.shape.dim.add()
                    node.domain = _OPAQUE
                    sealed = True
                    del known[node.output[0]]
    for function in model.functions:
        for node in _all_nodes(function):
            if node.op_type in (*_MAKERS, *_WINDOWS) and _domain(node.domain) == "":
                node.domain = _OPAQUE
                sealed = True
    if sealed:
        model.opset_import.add(domain=_OPAQUE, version=1)
        for function in model.functions:
            function.opset_import.add(domain=_OPAQUE, version=1)
    return not any(_long(value.type, unknown=False) for value in (*known.values(), *inputs))


def _long(value_type: TypeProto, *, unknown: bool) -> bool:
    """Whether a type is an integer vector of more than so many elements; `unknown` lengths as asked."""
    tensor = value_type.tensor_type
    if tensor.elem_type not in INTEGERS or len(tensor.shape.dim) != 1:
        return False
    length = tensor.shape.dim[0]
    return length.dim_value > _LONG if length.HasField("dim_value") else unknown


def shape_from_type(value_type: TypeProto) -> tuple[Dim, ...] | None:
    """Return a tensor type's shape: an int, a symbolic name or None (unknown) per axis; None without rank."""
    if not value_type.HasField("tensor_type") or not value_type.tensor_type.HasField("shape"):
        return None
    return tuple(
        (dim.dim_value if dim.dim_value >= 0 else None)
        if dim.HasField("dim_value")
        else dim.dim_param or None
        for dim in value_type.tensor_type.shape.dim
    )


def compatible(first: tuple[Dim, ...], second: tuple[Dim, ...]) -> bool:
    """Whether two shapes can be the same: equal ranks, and no axis with two different integers.

    >>> compatible((1, "n"), (1, 5)), compatible((1, 2), (1, 3)), compatible((1,), (1, 1))
    (True, False, False)
    """
    return len(first) == len(second) and all(
        one == other or not (isinstance(one, int) and isinstance(other, int))
        for one, other in zip(first, second, strict=True)
    )


def text(shape: tuple[Dim, ...]) -> str:
    """Return a shape for people to read.

    >>> text((1, "batch", None))
    '[1, batch, ?]'
    """
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def without_shape(value_type: TypeProto) -> TypeProto:
    """Return a copy of a type that keeps the element type only: declared intermediate shapes lie."""
    kept = TypeProto()
    kept.CopyFrom(value_type)
    if kept.HasField("tensor_type"):
        kept.tensor_type.ClearField("shape")
    return kept


def _forget(
    graph: GraphProto, local: set[FunctionKey], owner: str = "", outer: dict[str, TensorProto] | None = None
) -> None:
    """Drop the declared intermediate types and output shapes of a graph and its bodies.

    Bodies get copies of the small constants they capture, which onnx's inference does not see there.
    """
    unknown = {name for node in graph.node if not _known(node, local) for name in node.output}
    rest = GraphProto(value_info=[value for value in graph.value_info if value.name in unknown])
    graph.ClearField("value_info")
    graph.value_info.extend(rest.value_info)
    inner_inputs = {"Loop": graph.input[2:], "Scan": graph.input[:]}.get(owner, [])
    for value in (*graph.output, *inner_inputs):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    overridable = {value.name for value in graph.input}
    known = {**(outer or {}), **{name: t for name, t in _small_constants(graph) if name not in overridable}}
    for node, body in _bodies(graph):
        _forget(body, local, node.op_type, known)
    if outer:
        own = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
        read = dict.fromkeys(name for node in graph.node for name in node.input)
        for name in read:
            if name in outer and name not in own and name not in overridable:
                graph.initializer.add().CopyFrom(outer[name])
                graph.initializer[-1].name = name


def _small_constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield the integer constants of a graph that may be axes, shapes or bounds."""
    for tensor in graph.initializer:
        if tensor.data_type in INTEGERS and math.prod(tensor.dims) <= MOST_ELEMENTS:
            yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            if tensor.data_type in INTEGERS and math.prod(tensor.dims) <= MOST_ELEMENTS:
                yield node.output[0], tensor


def _bodies(graph: GraphProto) -> Iterator[tuple[NodeProto, GraphProto]]:
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("g"):
                yield node, item.g
            for body in item.graphs:
                yield node, body


def _all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for _, body in _bodies(graph):
        yield from _all_graphs(body)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _key(item: FunctionProto | NodeProto) -> FunctionKey:
    name = item.name if isinstance(item, FunctionProto) else item.op_type
    return _domain(item.domain), name, item.overload


def _known(node: NodeProto, local: set[FunctionKey]) -> bool:
    """Whether onnx can infer the node: a standard operator or a local function."""
    return bool(defs.has(node.op_type, _domain(node.domain))) or _key(node) in local


def _bounded(model: ModelProto) -> bool:
    """Whether expanding all calls of local functions ends, and soon: calls can nest exponentially."""
    functions = {_key(function): function for function in model.functions}
    cost: dict[FunctionKey, int] = {}
    for first in functions:
        stack, open_calls = [first], set[FunctionKey]()
        while stack:
            key = stack[-1]
            called = [_key(node) for node in _all_nodes(functions[key])]
            waiting = [call for call in called if call in functions and call not in cost]
            if key in cost or not waiting:
                cost.setdefault(key, sum(cost.get(call, 1) for call in called))
                open_calls.discard(stack.pop())
            elif key in open_calls:
                return False
            else:
                open_calls.add(key)
                stack += dict.fromkeys(waiting)
        if cost[first] > MOST_CALLS:
            return False
    total = sum(cost.get(_key(node), 0) for node in _all_nodes(model.graph))
    return total <= MOST_CALLS


def _all_nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph or function and of the bodies in them."""
    stack: list[GraphProto | FunctionProto] = [graph]
    while stack:
        top = stack.pop()
        for node in top.node:
            yield node
            for item in node.attribute:
                if item.HasField("g"):
                    stack.append(item.g)
                stack += item.graphs
