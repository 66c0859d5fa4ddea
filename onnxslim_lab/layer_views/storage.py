"""From the value a node uses as its weight back to the stored constant, and forward to all its readers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnxslim_lab.errors import quote
from onnxslim_lab.graph import Graph, attribute, domain_of

Array = NDArray[Any]
Shape = tuple[int, ...]

FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
VIEWS = ("Identity", "Cast", "Transpose", *_RESHAPES)
_WIDER: dict[int, tuple[int, ...]] = {
    TensorProto.FLOAT16: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.BFLOAT16: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.FLOAT: (TensorProto.DOUBLE,),
}


@dataclass(frozen=True)
class View:
    """One step between the stored constant and its use: a transposition or a new shape.

    Attributes:
        before, after: Shapes of the array on either side.
        perm: The transposition, None for a reshape.
    """

    before: Shape
    after: Shape
    perm: Shape | None = None

    def forward(self, array: Array) -> Array:
        """Return the array as the consumer sees it."""
        return array.reshape(self.after) if self.perm is None else array.transpose(self.perm)

    def backward(self, array: Array) -> Array:
        """Return the array as it is stored."""
        return array.reshape(self.before) if self.perm is None else array.transpose(np.argsort(self.perm))


@dataclass(frozen=True)
class Stored:
    """A constant and the views that lead from it to a value.

    Attributes:
        graph: The graph that defines the constant.
        name: The constant's name there.
        data_type: TensorProto type it is stored in.
        used_type: The type the node computes with; wider where a Cast stands between.
        stored_shape, shape: Its shape as stored, and at the value.
        views: The steps, in the order data flows.
    """

    graph: Graph
    name: str
    data_type: int
    used_type: int
    stored_shape: Shape
    shape: Shape
    views: tuple[View, ...]

    def forward(self, array: Array) -> Array:
        """Return an array in the stored layout as the value's consumer sees it."""
        for view in self.views:
            array = view.forward(array)
        return array

    def backward(self, array: Array) -> Array:
        """Return an array of the value's shape in the stored layout."""
        for view in reversed(self.views):
            array = view.backward(array)
        return array


def trace(graph: Graph, value: str, dynamic: set[tuple[int, str]] | None = None) -> Stored | str:
    """Follow a value back to a stored float constant through value-preserving nodes.

    Identity, widening Cast, Transpose, Reshape, Squeeze, Unsqueeze and Flatten are looked through; the
    constant may belong to a graph around this one.

    Args:
        graph: The graph of the node that reads the value.
        value: The value's name.
        dynamic: Values known to depend on inputs, by graph; filled for the next call, to save time.

    Returns:
        The constant and the views, or the reason why there is none.
    """
    chain: list[NodeProto] = []
    graphs: list[Graph] = []
    name = value
    while True:
        scope = graph.scope_of(name)
        if scope is None:
            return f"the weight {quote(name)} is defined nowhere"
        if scope.is_constant(name):
            break
        node = scope.producer(name)
        if node is None:
            return _no_producer(scope, name)
        if domain_of(node.domain) or node.op_type not in VIEWS or not node.input or set_by_caller(node):
            return _computed(scope, node, dynamic)
        chain.append(node)
        graphs.append(scope)
        graph, name = scope, node.input[0]
    data_type, shape, _ = scope.constant_type(name) or (0, (), 0)
    if data_type not in FLOATS:
        stored_as = TensorProto.DataType.Name(data_type).lower()
        return f"the weight is already quantized or not real: stored as {stored_as}"
    stored, kind, views = shape, data_type, []
    for node, owner in zip(reversed(chain), reversed(graphs), strict=True):
        if node.op_type == "Cast":
            to = attribute(node, "to", 0)
            if to != kind and to not in _WIDER.get(kind, ()):
                names = TensorProto.DataType.Name(kind).lower(), TensorProto.DataType.Name(to).lower()
                return f"the weight is rounded by a Cast from {names[0]} to {names[1]}"
            kind = to
        elif node.op_type != "Identity":
            view = _view(owner, node, shape)
            if view is None:
                return f"the shape that {node.op_type} {quote(node.name)} gives the weight is not known"
            views.append(view)
            shape = view.after
    return Stored(scope, name, data_type, kind, stored, shape, tuple(views))


def _no_producer(scope: Graph, name: str) -> str:
    if name in scope.sparse_initializers:
        return "the weight is a sparse initializer"
    if name in scope.initializers:
        return "the weight is an initializer that callers may override as an input"
    kind = "function" if scope.is_function else "graph"
    return f"the weight is not constant: {quote(name)} is an input of the {kind}"


def _computed(scope: Graph, node: NodeProto, dynamic: set[tuple[int, str]] | None) -> str:
    op_type = node.op_type
    if op_type in ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"):
        return f"the weight is already quantized: it comes out of {op_type}"
    if op_type == "ConstantOfShape":
        return "the weight is made by ConstantOfShape: storing it would grow the file"
    if op_type == "Constant":
        return "the weight is a sparse constant or an attribute of the function's caller"
    how = "computed from constants" if is_static(scope, node, dynamic) else "computed while the model runs"
    return f"the weight is {how}, by {op_type}"


def is_static(graph: Graph, node: NodeProto, dynamic: set[tuple[int, str]] | None = None) -> bool:
    """Whether everything a node reads is made from constants only, of at most a hundred values."""
    known = set() if dynamic is None else dynamic
    found = _is_static(graph, node, known)
    if not found:
        known.update((id(graph), name) for name in node.output)
    return found


def _is_static(graph: Graph, node: NodeProto, dynamic: set[tuple[int, str]]) -> bool:
    seen: set[tuple[int, str]] = set()
    stack = [(graph, node)]
    while stack:
        if len(seen) > 100:
            return False
        owner, current = stack.pop()
        if owner.bodies(current) or current.op_type.startswith(("Random", "Multinomial", "Bernoulli")):
            return False
        for name in filter(None, current.input):
            scope = owner.scope_of(name)
            if scope is None or (id(scope), name) in seen:
                continue
            if (id(scope), name) in dynamic:
                return False
            seen.add((id(scope), name))
            if scope.is_constant(name):
                continue
            producer = scope.producer(name)
            if producer is None:
                return False
            stack.append((scope, producer))
    return True


def _view(graph: Graph, node: NodeProto, shape: Shape) -> View | None:
    """Return what a Transpose or reshaping node does to an array of this shape, None when unknown."""
    rank = len(shape)
    if node.op_type == "Transpose":
        perm = tuple(attribute(node, "perm", range(rank)[::-1]))
        return View(shape, tuple(shape[axis] for axis in perm), perm)
    if node.op_type == "Flatten":
        axis = attribute(node, "axis", 1)
        axis += rank * (axis < 0)
        return View(shape, (math.prod(shape[:axis]), math.prod(shape[axis:])))
    argument = node.input[1] if len(node.input) > 1 else ""
    values = graph.constant(argument)
    if argument and values is None:
        return None
    given = [int(size) for size in values] if values is not None else None
    if node.op_type == "Reshape":
        sizes = given if given is not None else list(attribute(node, "shape", ()))
        copy_zero = not attribute(node, "allowzero", 0)
        sizes = [shape[i] if size == 0 and copy_zero and i < rank else size for i, size in enumerate(sizes)]
        if -1 in sizes:
            rest = math.prod(size for size in sizes if size != -1)
            sizes[sizes.index(-1)] = math.prod(shape) // rest if rest else 0
        return View(shape, tuple(sizes)) if math.prod(sizes) == math.prod(shape) else None
    axes = given if given is not None else attribute(node, "axes")
    if node.op_type == "Squeeze":
        chosen = (
            {axis % rank for axis in axes} if axes is not None else {i for i in range(rank) if shape[i] == 1}
        )
        return View(shape, tuple(size for i, size in enumerate(shape) if i not in chosen))
    total = rank + len(axes)
    added = {axis % total for axis in axes}
    sizes_left = iter(shape)
    return View(shape, tuple(1 if i in added else next(sizes_left) for i in range(total)))


def readers(graph: Graph, value: str) -> Iterator[tuple[Graph, NodeProto] | None]:
    """Yield every node that uses a value, itself or behind views, with its graph; bodies included.

    None stands for a graph output: the value leaves the graph there.
    """
    if graph.is_output(value):
        yield None
    for node in graph.consumers(value):
        if value in node.input:
            if not domain_of(node.domain) and node.op_type in VIEWS and node.input[0] == value:
                yield from readers(graph, node.output[0])
            else:
                yield graph, node
        for bodies in graph.bodies(node).values():
            for body in bodies:
                if not body.defines(value):
                    yield from readers(body, value)


def numpy_dtype(data_type: int) -> np.dtype[Any]:
    """Return the array dtype of a TensorProto type."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


def set_by_caller(node: NodeProto) -> bool:
    """Whether an attribute of a node in a function refers to the caller's: its value is not known here."""
    return any(item.ref_attr_name for item in node.attribute)
