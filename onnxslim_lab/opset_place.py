"""Place: where nodes are rewritten for another opset, and the constants made for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from onnxslim_lab.errors import quote
from onnxslim_lab.graph import Graph, domain_of

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


class StepError(Exception):
    """Why a node cannot be rewritten."""


class Place:
    """A graph whose nodes are being rewritten, with the constants made for them, one for each value."""

    def __init__(self, graph: Graph, main: Graph, target: int) -> None:
        self.graph = graph
        self.main = main
        self.target = target
        self._made: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def constant(self, values: Any, dtype: Any = np.int64, hint: str = "constant") -> str:
        """Return the name of a constant with these values, made by a Constant node of this graph."""
        array = np.asarray(values, dtype)
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._made:
            name = self.graph.fresh_name(hint)
            tensor = helper.make_tensor(
                "", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(), raw=True
            )
            self.graph.emit("Constant", [], [name], value=tensor)
            self._made[key] = name
        return self._made[key]

    def take(self, node: NodeProto, name: str) -> AttributeProto | None:
        """Remove an attribute from a node and return it."""
        for item in node.attribute:
            if item.name == name:
                kept = AttributeProto()
                kept.CopyFrom(item)
                self.graph.remove_attribute(node, name)
                return kept
        return None

    def value(self, item: AttributeProto, hint: str) -> str:
        """Return the name of a constant with an attribute's number or numbers: int64 or float32.

        Inside a function the attribute may stand for one of the function's; the constant does so then.
        """
        if not item.ref_attr_name:
            floating = item.type in (AttributeProto.FLOAT, AttributeProto.FLOATS)
            dtype = np.float32 if floating else np.int64
            return self.constant(helper.get_attribute_value(item), dtype, hint)
        if not self._given(item.ref_attr_name):
            reason = (
                f"the function's attribute {quote(item.ref_attr_name)}, which becomes an input, may be absent"
            )
            raise StepError(reason)
        names = {AttributeProto.FLOAT: "value_float", AttributeProto.FLOATS: "value_floats"}
        names |= {AttributeProto.INT: "value_int", AttributeProto.INTS: "value_ints"}
        own = AttributeProto(name=names[item.type], type=item.type, ref_attr_name=item.ref_attr_name)
        name = self.graph.fresh_name(hint)
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(own)
        self.graph.adopt(node)
        return name

    def typed(self, item: AttributeProto, like: str, hint: str) -> str:
        """Return a constant with an attribute's float in the type of the value `like`."""
        dtype = self.graph.dtype_of(like)
        if dtype in _FLOATS and not item.ref_attr_name:
            return self.constant(item.f, helper.tensor_dtype_to_np_dtype(dtype), hint)
        if dtype == TensorProto.FLOAT:
            return self.value(item, hint)
        if self.target < 15:
            raise StepError(
                f"the type of {quote(like)} is not known, which opset 15 and later can do without"
            )
        return str(self.graph.emit("CastLike", [self.value(item, hint), like]).output[0])

    def rank(self, value: str) -> int | None:
        """Return a value's rank, None when unknown."""
        shape = self.graph.shape_of(value)
        return None if shape is None else len(shape)

    def replace(self, node: NodeProto, op_type: str) -> NodeProto:
        """Make a node one of another operator; name, inputs, outputs and attributes stay."""
        other = NodeProto()
        other.CopyFrom(node)
        other.op_type = op_type
        self.graph.remove(node)
        return self.graph.adopt(other)

    def redirect(self, node: NodeProto, index: int = 0) -> str:
        """Give an output of a node to others: return its name, which the node now leaves to a fresh one."""
        outputs = list(node.output)
        wanted, outputs[index] = outputs[index], self.graph.fresh_name(f"{outputs[index]}_{node.op_type}")
        self.graph.set_outputs(node, outputs)
        return wanted

    def _given(self, name: str) -> bool:
        """Whether a function's attribute has a value in every call."""
        function = self.graph.root
        if name in function.attribute_defaults():
            return True
        key = next((key for key, one in self.graph.functions.items() if one is function), None)
        calls = [
            node
            for graph in self.main.walk()
            for node in graph.nodes
            if (domain_of(node.domain), node.op_type, node.overload) == key
        ]
        return all(any(item.name == name for item in node.attribute) for node in calls)
