"""Reading nodes: operators, attributes, constant values, and renaming what they read and make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import AttributeProto, NodeProto, TensorProto, helper


def is_op(node: NodeProto | None, op_type: str, domain: str = "") -> bool:
    """Whether the node is this operator; the domains "" and "ai.onnx" are one."""
    return node is not None and node.op_type == op_type and domain_of(node.domain) == domain


def domain_of(domain: str) -> str:
    """Return the canonical name of an operator domain: "" for "ai.onnx"."""
    return "" if domain == "ai.onnx" else domain


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return an attribute's value, strings decoded, or the default when it is absent."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            if isinstance(value, bytes):
                return value.decode("utf-8", "replace")
            if item.type == AttributeProto.STRINGS:
                return [text.decode("utf-8", "replace") for text in value]
            return value
    return default


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """Return a Constant node's value as a tensor; None for sparse values and attribute references."""
    if not node.attribute:
        return None
    item = node.attribute[0]
    if item.ref_attr_name:
        return None
    if item.name == "value":
        return item.t
    kinds = {
        "value_float": TensorProto.FLOAT,
        "value_floats": TensorProto.FLOAT,
        "value_int": TensorProto.INT64,
        "value_ints": TensorProto.INT64,
        "value_string": TensorProto.STRING,
        "value_strings": TensorProto.STRING,
    }
    if item.name not in kinds:
        return None
    value = helper.get_attribute_value(item)
    listed = item.name.endswith("s")
    values = list(value) if listed else [value]
    return helper.make_tensor("", kinds[item.name], [len(values)] if listed else [], values)


def rename_node(node: NodeProto, names: dict[str, str], fresh: Callable[[str], str] | None = None) -> None:
    """Rename the values a node reads and makes, in its bodies too.

    `fresh` makes the names of what the bodies define themselves; None keeps them.
    """
    for position, name in enumerate(node.input):
        node.input[position] = names.get(name, name)
    for position, name in enumerate(node.output):
        node.output[position] = names.get(name, name)
    for item in node.attribute:
        inner = [item.g] if item.type == AttributeProto.GRAPH else list(item.graphs)
        for body in inner:
            own: list[Any] = [*body.input, *body.initializer]
            own += [sparse.values for sparse in body.sparse_initializer]
            hidden = dict.fromkeys(value.name for value in own)
            hidden.update(dict.fromkeys(out for child in body.node for out in child.output if out))
            seen = {old: new for old, new in names.items() if old not in hidden}
            if fresh is not None:
                seen |= {name: fresh(name) for name in hidden}
                for value in (*own, *body.value_info):
                    value.name = seen.get(value.name, value.name)
            for child in body.node:
                if fresh is not None and child.name:
                    child.name = fresh(child.name)
                rename_node(child, seen, fresh)
            for value in body.output:
                value.name = seen.get(value.name, value.name)
