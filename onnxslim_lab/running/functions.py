"""Operators without a kernel: the function bodies that the specification gives for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TypeProto, helper

from onnxslim_lab.errors import UnsupportedError, quote
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.kernels.dtypes import NUMBERS, STRING
from onnxslim_lab.running.program import label
from onnxslim_lab.worker.messages import Value

Schema = Any  # onnx.defs.OpSchema, which has no type stubs for what is used here


def schema_of(node: NodeProto, graph: Graph) -> Schema | None:
    """Return the schema of a node's operator when it gives a function body, else None."""
    try:
        schema: Schema = onnx.defs.get_schema(node.op_type, graph.opset(node.domain), domain_of(node.domain))
    except onnx.defs.SchemaError:
        return None
    return schema if schema.has_function or schema.has_context_dependent_function else None


def defaults(schema: Schema) -> dict[str, AttributeProto]:
    """Return the default values of an operator's attributes."""
    return {
        name: attribute.default_value
        for name, attribute in schema.attributes.items()
        if attribute.default_value.name
    }


def body(schema: Schema, node: NodeProto, opset: int, types: Sequence[TypeProto] | None) -> Graph | None:
    """Return the function body of an operator for an opset, None when there is none for these types.

    Args:
        schema: The operator's schema.
        node: The node, its attributes resolved.
        opset: The version of the node's domain that the model imports.
        types: Types of the node's inputs, for bodies that depend on them.
    """
    if types is None:
        version = _version(schema.function_opset_versions, opset)
        data = schema.get_function_with_opset_version(version)
    else:
        version = _version(schema.context_dependent_function_opset_versions, opset)
        data = schema.get_context_dependent_function_with_opset_version(
            version, node.SerializeToString(), [item.SerializeToString() for item in types]
        )
    if not data:
        return None
    function = FunctionProto.FromString(data)
    domain, name = "onnxslim_lab.body", function.name
    function.domain = domain  # a standard operator's name: its body may use that operator
    _drop_outputs(function, node)
    if not function.opset_import:
        function.opset_import.add(domain="", version=opset)
    model = ModelProto(ir_version=onnx.IR_VERSION, functions=[function])
    model.opset_import.extend(function.opset_import)
    model.opset_import.add(domain=domain, version=1)
    model.graph.name = name
    return Graph.load(model).functions[domain, name, function.overload]


def _drop_outputs(function: FunctionProto, node: NodeProto) -> None:
    """Remove outputs that the body does not make or the node does not ask for, from the last on.

    Bodies that depend on the node leave out what it does not need. Another output that is missing is made by
    a node without inputs that no kernel has to compute, as nothing reads it.
    """
    made = {name for child in function.node for name in child.output} | set(function.input)
    while function.output and (function.output[-1] not in made or len(function.output) > len(node.output)):
        del function.output[-1]
    for name in function.output:
        if name not in made:
            function.node.append(helper.make_node("Optional", [], [name]))


def _version(versions: Sequence[int], opset: int) -> int:
    """Return the greatest version not above the opset, or the least there is."""
    return max((version for version in versions if version <= opset), default=min(versions))


def type_of(value: Value) -> TypeProto:
    """Return the ONNX type of a value; an empty TypeProto for what is absent."""
    if isinstance(value, np.ndarray):
        number = STRING if value.dtype == object else NUMBERS[value.dtype]
        return helper.make_tensor_type_proto(number, value.shape)
    if isinstance(value, list):
        return helper.make_sequence_type_proto(type_of(value[0]) if value else TypeProto())
    return TypeProto()


def unsupported(node: NodeProto, graph: Graph) -> UnsupportedError:
    """Return the error for an operator that cannot be computed."""
    domain = domain_of(node.domain)
    return UnsupportedError(
        f"{label(node)}: the NumPy runtime has no kernel for operator {quote(node.op_type)} of domain "
        f"{quote(domain or 'ai.onnx')}, version {graph.opset(domain)}"
    )
