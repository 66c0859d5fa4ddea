"""Remove what is in the file for people to read: doc strings, inner types, defaults and, on request, names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product
from string import ascii_letters, digits
from typing import ClassVar, Literal

import onnx
from onnx import AttributeProto, NodeProto, TypeProto
from pydantic import Field

from onnxslim_lab import shapes
from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.rewriting.signature import is_random

_WINDOWS = frozenset(
    {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "ConvInteger", "QLinearConv"}
)
_WINDOW_DEFAULTS = {"dilations": 1, "strides": 1, "pads": 0}


class Strip(Pass):
    """Remove doc strings, exporters' traces, types that can be inferred, attributes at their default, long names.

    before: encoder.layer.0.output = MatMul (x, encoder.layer.0.weight), with its line of source code
    after:  the same without that line; with names=true also: a = MatMul (x, b)

    Exporters write where in the source a node comes from, which can be half of a small file. Inputs and outputs
    keep names, types and doc strings; the model keeps its doc string and its metadata, which applications read.

    refuses: types that cannot be inferred; with names=true, names in functions, of constants that a caller may
    override, of results of random nodes (seeds go by them), and those that annotations refer to.

    >>> graph = Graph.parse('<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y)'
    ...                     '{ a_long_name = Relu (x) y = Exp (a_long_name) }')
    >>> Strip(documents=False, names=True).run(graph).changes[0].what
    'shortened 1 names'
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    documents: bool = Field(
        True, description="remove doc strings, metadata and empty fields of nodes and inner values"
    )
    types: bool = Field(True, description="remove declared types of inner values that can be inferred")
    attributes: bool = Field(True, description="remove attributes of nodes that have their default value")
    names: bool = Field(
        False, description="shorten names of inner values and constants, and drop those of nodes"
    )

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Clean the main graph, its bodies and the functions; see the class."""
        outcome = Outcome()
        where = graph.name or "model"
        for wanted, edit, what in (
            (
                self.documents,
                _clear_documents,
                "removed doc strings, metadata and empty fields of {} nodes and values",
            ),
            (self.types, _forget_types, "removed {} types that can be inferred"),
            (self.attributes, _drop_defaults, "removed {} attributes that have their default value"),
            (self.names, _shorten_names, "shortened {} names"),
        ):
            if not wanted:
                continue
            before = graph.file_bytes()
            edited = edit(graph)
            after = graph.file_bytes()
            if after != before:
                outcome.changes.append(
                    Change(where, what.format(edited), bytes_before=before, bytes_after=after)
                )
        return outcome


def _clear_documents(model: Graph) -> int:
    return sum(part.clear_documents() for part in model.walk())


def _forget_types(model: Graph) -> int:
    """Remove the types that inference finds again without them; return how many.

    Sizes that come from an input of the model count as found only under its name for them: runtimes fuse
    operators on two values of one size, and inference loses such names in shapes that are computed.
    """
    inferred = shapes.infer(model.light_model(value_info=False))
    known = {value.name: value.type for value in inferred.graph.value_info}
    fed = {dim.dim_param for kind in model.input_types().values() for dim in kind.tensor_type.shape.dim} - {
        ""
    }
    again = [
        name for name, kind in model.declared.items() if name in known and _is_found(kind, known[name], fed)
    ]
    for name in again:
        model.undeclare(name)
    return len(again)


def _is_found(declared: TypeProto, inferred: TypeProto, fed: set[str]) -> bool:
    """Whether an inferred tensor type says all that a declared one says, but for names of sizes of its own."""
    if not inferred.HasField("tensor_type") or not declared.HasField("tensor_type"):
        return False
    one, other = declared.tensor_type, inferred.tensor_type
    if not one.HasField("shape"):
        return True
    if not other.HasField("shape"):
        return False
    if len(one.shape.dim) != len(other.shape.dim):
        return True  # what is declared is wrong
    return not any(
        (dim.HasField("dim_value") and not again.HasField("dim_value"))
        or (dim.dim_param in fed and not again.HasField("dim_value") and again.dim_param != dim.dim_param)
        for dim, again in zip(one.shape.dim, other.shape.dim, strict=True)
    )


def _drop_defaults(model: Graph) -> int:
    """Remove attributes that say what the operator does without them; return how many."""
    dropped = 0
    for part in model.walk():
        for node in part.nodes:
            for name in [item.name for item in node.attribute if _is_default(part, node, item)]:
                part.remove_attribute(node, name)
                dropped += 1
    return dropped


def _is_default(graph: Graph, node: NodeProto, item: AttributeProto) -> bool:
    """Whether an attribute of a standard operator has the value that it has when it is left out."""
    if domain_of(node.domain) or item.ref_attr_name:
        return False
    if node.op_type in _WINDOWS and item.name in _WINDOW_DEFAULTS:
        return set(item.ints) <= {_WINDOW_DEFAULTS[item.name]}
    try:
        schema = onnx.defs.get_schema(node.op_type, graph.opset())
    except onnx.defs.SchemaError:
        return False
    known = schema.attributes.get(item.name)
    if known is None or known.required or known.default_value.type != item.type:
        return False
    plain = AttributeProto()
    plain.CopyFrom(item)
    plain.ClearField("doc_string")
    usual = AttributeProto()
    usual.CopyFrom(known.default_value)
    usual.ClearField("doc_string")
    return plain == usual


def _shorten_names(model: Graph) -> int:
    """Give inner values and constants the shortest names that are free, often used ones first."""
    values = [(part, name) for part in model.walk() for name in _inner(part)]
    values.sort(key=lambda found: -found[0].use_count(found[1]))
    taken = {name for part in model.walk() for name in _every(part)}
    fresh = (name for name in _short() if name not in taken)
    short, renamed = next(fresh), 0
    for part, name in values:
        if len(short) < len(name):
            part.rename(name, short)
            short, renamed = next(fresh), renamed + 1
    for part in model.walk():
        for node in part.nodes:
            if node.name:
                part.name_node(node, "")
                renamed += 1
    return renamed


def _inner(graph: Graph) -> Iterator[str]:
    """Yield the names of a graph that nobody outside of it can refer to."""
    if graph.is_function:
        return
    referenced = graph.referenced()
    fixed = {*graph.inputs, *graph.outputs, *referenced}
    if graph.ir_version >= 4:  # before, every initializer is an input
        yield from (name for name in graph.initializers if name not in fixed)
    for node in graph.nodes:
        if not is_random(graph, node) or node.domain == "com.microsoft":
            yield from (name for name in node.output if name and name not in fixed)


def _every(graph: Graph) -> Iterator[str]:
    yield from (*graph.inputs, *graph.outputs, *graph.initializers, *graph.sparse_initializers)
    for node in graph.nodes:
        yield from (node.name, *node.input, *node.output)


def _short() -> Iterator[str]:
    """Yield a, b, ..., aa, ab, ...: a letter, then letters and digits."""
    for length in count(0):
        for first in ascii_letters:
            yield from (first + "".join(rest) for rest in product(ascii_letters + digits, repeat=length))
