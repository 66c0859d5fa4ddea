"""GraphEdits: the only ways to change a graph; each keeps the index right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper

from onnxslim_lab.errors import InternalError, quote
from onnxslim_lab.graph_index import FunctionKey
from onnxslim_lab.graph_values import GraphValues
from onnxslim_lab.nodes import domain_of, is_op, rename_node
from onnxslim_lab.weights import Array, from_array

_DOCUMENTS = frozenset({"doc_string", "metadata_props"})
_OPTIONAL = frozenset({"name", "domain", "overload"})  # of nodes: two bytes where they are there and empty


class GraphEdits(GraphValues):
    """Adds, removes and rewires nodes, constants and values."""

    def set_constant(self, name: str, array: Array | TensorProto, data_type: int | None = None) -> None:
        """Create or replace a constant of this graph; a function gets a Constant node.

        A TensorProto, which may be a stub of the store, is copied.
        """
        if isinstance(array, TensorProto):
            tensor = TensorProto()
            tensor.CopyFrom(array)
            tensor.name = name
        else:
            tensor = from_array(name, np.asarray(array), self.store, data_type)
        node = self._producer.get(name)
        if node is not None and not is_op(node, "Constant"):
            raise InternalError(f"constant {quote(name)} would replace the output of a {node.op_type}")
        if node is not None and not self.is_function:
            self.remove(node)
            node = None
        if self.is_function:
            tensor.name = ""
            if node is None:
                self.emit("Constant", [], [name], value=tensor)
            else:
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("value", tensor))
                self._changed()
            return
        old = self._initializers.get(name)
        if old is not None and old.HasField("doc_string"):
            tensor.doc_string = old.doc_string
        self._initializers[name] = tensor
        self._remember(name)
        self.set_type(name, tensor.data_type, tuple(tensor.dims))

    def remove_constant(self, name: str) -> None:
        """Remove an initializer or Constant node; nothing may read it any more."""
        node = self._producer.get(name)
        if node is not None:
            self.remove(node)
            return
        self._initializers.pop(name, None)
        self._sparse.pop(name, None)
        self._changed()
        if self.parent is None and self.ir_version < 4 and name in self._inputs:
            self.remove_input(name)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | int = 1,
        *,
        name: str | None = None,
        domain: str = "",
        doc_string: str = "",
        **attributes: Any,
    ) -> NodeProto:
        """Add a node; a number of outputs makes as many fresh names. Returns the node."""
        label = self.fresh_name(name or op_type)
        if isinstance(outputs, int):
            outputs = [self.fresh_name(f"{label}_out") for _ in range(outputs)]
        node = helper.make_node(op_type, inputs, outputs, label, doc_string, domain, **attributes)
        return self.adopt(node)

    def adopt(self, node: NodeProto) -> NodeProto:
        """Add a copy of a node made elsewhere, bodies included; returns the copy."""
        own = NodeProto()
        own.CopyFrom(node)
        self._register(own)
        self._sorted = False
        self._touch()
        return own

    def remove(self, *nodes: NodeProto) -> None:
        """Remove nodes; their outputs must have no readers left when the model is saved."""
        for node in nodes:
            key = id(node)
            self._refresh()
            for name in {*node.input, *self._captures.pop(key, ())}:
                self._drop_use(name, key)
            for name in node.output:
                if self._producer.get(name) is node:
                    del self._producer[name]
            self._bodies.pop(key, None)
            del self._nodes[key]
        self._touch()

    def set_input(self, node: NodeProto, index: int, value: str) -> None:
        """Replace one input; "" drops an optional one."""
        inputs = list(node.input)
        inputs += [""] * (index + 1 - len(inputs))
        inputs[index] = value
        self.set_inputs(node, inputs)

    def set_inputs(self, node: NodeProto, values: Sequence[str]) -> None:
        """Replace all inputs; trailing empty ones are cut."""
        self._refresh()
        kept = list(values)
        while kept and not kept[-1]:
            kept.pop()
        held = list(node.input)
        common = min(len(held), len(kept))
        changed = [index for index in range(common) if held[index] != kept[index]]
        for name in (*(held[index] for index in changed), *held[common:]):
            self._drop_use(name, id(node), slots=1)
        node.input[:] = kept
        for name in (*(kept[index] for index in changed), *kept[common:]):
            self._add_use(name, node)
        self._sorted = False
        self._touch()

    def set_outputs(self, node: NodeProto, values: Sequence[str]) -> None:
        """Replace all outputs; trailing empty ones are cut."""
        kept = list(values)
        while kept and not kept[-1]:
            kept.pop()
        for name in node.output:
            if self._producer.get(name) is node:
                del self._producer[name]
        del node.output[:]
        node.output.extend(kept)
        for name in filter(None, kept):
            self._define(name, node)
        self._sorted = False
        self._touch()

    def set_attribute(self, node: NodeProto, name: str, value: Any) -> None:
        """Create or replace an attribute (not a body); an AttributeProto keeps its type under the new name."""
        if isinstance(value, AttributeProto):
            made = AttributeProto()
            made.CopyFrom(value)
            made.name = name
        else:
            made = helper.make_attribute(name, value)
        self.remove_attribute(node, name)
        node.attribute.append(made)

    def remove_attribute(self, node: NodeProto, name: str) -> None:
        """Remove an attribute if the node has it."""
        for position, item in enumerate(node.attribute):
            if item.name == name:
                del node.attribute[position]
                break
        self._changed()

    def replace_uses(self, old: str, new: str) -> None:
        """Let every reader of `old`, captures included, read `new`; graph outputs are left alone."""
        for node in self.consumers(old):
            if old in node.input:
                self.set_inputs(node, [new if name == old else name for name in node.input])
            for bodies in self._bodies.get(id(node), {}).values():
                for body in bodies:
                    if old in body.captured():
                        body.replace_uses(old, new)
                        body._rename_outputs(old, new)  # noqa: SLF001
        self._refresh()

    def replace_value(self, old: str, new: str) -> bool:
        """Put `new` in the place of `old` everywhere, also as an output of this graph.

        The value `old` loses its producer's slot when its name is needed for the output. Returns False
        and changes nothing when an output cannot be served: `new` is not made by a node of this graph,
        or is itself an output.
        """
        if not self.is_output(old):
            self.replace_uses(old, new)
            return True
        source = self._producer.get(new)
        previous = self._producer.get(old)
        if source is None or self.is_output(new) or self.is_input(old) or old in self._initializers:
            return False
        self.replace_uses(old, new)
        if previous is not None:
            outputs = [self.fresh_name(old) if name == old else name for name in previous.output]
            self.set_outputs(previous, outputs)
        self.rename(new, old)
        return True

    def rename(self, old: str, new: str) -> None:
        """Rename a value that a node or initializer of this graph defines."""
        node = self._producer.get(old)
        if node is not None:
            self.set_outputs(node, [new if name == old else name for name in node.output])
        elif old in self._initializers and not self.is_input(old):
            tensor = self._initializers.pop(old)
            tensor.name = new
            self._initializers[new] = tensor
        else:
            raise InternalError(f"value {quote(old)} cannot be renamed: nothing here defines it")
        if old in self._types:
            self._types.setdefault(new, self._types[old])
        if old in self._value_info and new not in self._value_info:
            self._value_info[new] = self._value_info.pop(old)
            self._value_info[new].name = new
        self._remember(new)
        self.replace_uses(old, new)

    def fresh_name(self, hint: str) -> str:
        """Return a name that no value or node of the model has yet, and reserve it."""
        names = self._names()
        name = hint or "value"
        while name in names:
            count = self._model.counters.get(hint, 0) + 1
            self._model.counters[hint] = count
            name = f"{hint}_{count}"
        names.add(name)
        return name

    def absorb(self, body: GraphEdits, rename: dict[str, str]) -> dict[str, str]:
        """Copy all nodes and constants of a body or function into this graph under fresh names.

        Args:
            body: The graph to copy; it is not changed.
            rename: Names of `body` that stand for values of this graph (its inputs).

        Returns:
            The name here of every value of `body`, captured values mapping to themselves.
        """
        names = dict(rename)
        for value in (*body._initializers, *body._sparse, *body._producer):
            names.setdefault(value, self.fresh_name(value))
        for value, tensor in body._initializers.items():
            own = TensorProto()
            own.CopyFrom(tensor)
            own.name = names[value]
            self._initializers[own.name] = own
        for value, sparse in body._sparse.items():
            kept = onnx.SparseTensorProto()
            kept.CopyFrom(sparse)
            kept.values.name = names[value]
            self._sparse[names[value]] = kept
        for value, info in body._value_info.items():
            if value in names and not rename.get(value):
                own_info = ValueInfoProto()
                own_info.CopyFrom(info)
                own_info.name = names[value]
                self._value_info[own_info.name] = own_info
        for value, known in body._types.items():
            if value in names:
                self._types.setdefault(names[value], known)
        for node in body.nodes:
            whole = NodeProto()
            body._write_node(node, whole)
            if whole.name:
                whole.name = self.fresh_name(whole.name)
            rename_node(whole, names, self.fresh_name if body.is_function else None)
            self.adopt(whole)
        self._changed()
        return {**names, **{name: name for name in body.captured() if name not in names}}

    def remove_function(self, key: FunctionKey) -> None:
        """Remove a local function that no node calls any more."""
        del self._model.functions[key]
        self._changed()

    def add_input(self, name: str, data_type: int, shape: Sequence[int | str | None]) -> None:
        """Add an input to the main graph's signature."""
        assert isinstance(self._proto, GraphProto)
        self._proto.input.append(helper.make_tensor_value_info(name, data_type, shape))
        self._inputs[name] = None
        self._changed()

    def remove_input(self, name: str) -> None:
        """Remove an unused input from the main graph's signature."""
        self._drop_value_entry("input", name)
        del self._inputs[name]
        self._changed()

    def _drop_value_entry(self, field: str, name: str) -> None:
        entries = getattr(self._proto, field)
        for position, value in enumerate(entries):
            if value.name == name:
                del entries[position]
                return

    def remove_output(self, index: int) -> None:
        """Remove an output of a body; its owner must lose the output that stands for it as well."""
        assert isinstance(self._proto, GraphProto)
        del self._outputs[index]
        del self._proto.output[index]
        self._touch()

    def set_output(self, index: int, value: str) -> None:
        """Let another value be an output of a body."""
        assert isinstance(self._proto, GraphProto)
        assert self.parent is not None
        self._outputs[index] = value
        self._proto.output[index].name = value
        self._touch()

    def declare(self, value: str, data_type: int) -> None:
        """Change the element type that this graph declares for a tensor: an input, output or inner value."""
        if isinstance(self._proto, GraphProto):
            listed = [*self._proto.input, *self._proto.output]
            listed += [self._value_info[value]] if value in self._value_info else []
            for info in listed:
                if info.name == value and info.type.HasField("tensor_type"):
                    info.type.tensor_type.elem_type = data_type
        known = self._types.get(value)
        if known is not None and known.HasField("tensor_type"):
            changed = TypeProto()
            changed.CopyFrom(known)
            changed.tensor_type.elem_type = data_type
            self._types[value] = changed
        self._changed()

    def clear_documents(self) -> int:
        """Remove doc strings, metadata and empty fields of nodes, constants and inner values; return of how many."""
        parts: list[Any] = [*self._nodes.values(), *self._initializers.values(), *self._value_info.values()]
        if self.parent is not None:
            parts.append(self._proto)
        found = 0
        for part in parts:
            idle = [
                kind.name
                for kind, value in part.ListFields()
                if kind.name in _DOCUMENTS or (kind.name in _OPTIONAL and not value)
            ]
            for name in idle:
                part.ClearField(name)
            found += bool(idle)
        if found:
            self._changed()
        return found

    def undeclare(self, value: str) -> None:
        """Forget the type that this graph declares for an inner value."""
        self._value_info.pop(value, None)
        self._changed()

    @property
    def declared(self) -> dict[str, TypeProto]:
        """The types that this graph declares for inner values."""
        return {name: info.type for name, info in self._value_info.items()}

    def name_node(self, node: NodeProto, name: str) -> None:
        """Give a node another name, "" for none."""
        if name:
            node.name = name
        else:
            node.ClearField("name")
        self._remember(name)

    def set_opset(self, domain: str, version: int) -> None:
        """Import an operator domain at a version, replacing what was imported."""
        top = self.root
        proto = top._proto if top.is_function else self._model.proto  # noqa: SLF001
        for entry in proto.opset_import:  # type: ignore[union-attr]
            if domain_of(entry.domain) == domain_of(domain):
                entry.version = version
                break
        else:
            proto.opset_import.add(domain=domain, version=version)  # type: ignore[union-attr]
        self._changed()

    def raise_ir(self, version: int) -> None:
        """Declare a newer IR version; initializers that were listed as inputs because IR 3 wants that no longer are."""
        proto = self._model.proto
        if proto.ir_version >= version:
            return
        if proto.ir_version < 4:
            for name in [name for name in self._inputs if name in self._initializers]:
                self.remove_input(name)
        proto.ir_version = version
        self._changed()

    def set_metadata(self, key: str, value: str) -> None:
        """Create or replace an entry of the model's metadata_props."""
        for entry in self._model.proto.metadata_props:
            if entry.key == key:
                entry.value = value
                break
        else:
            self._model.proto.metadata_props.add(key=key, value=value)
        self._changed()

    def remove_metadata(self, key: str) -> None:
        """Remove an entry of the model's metadata_props, where there is one."""
        entries = self._model.proto.metadata_props
        for index, entry in enumerate(entries):
            if entry.key == key:
                del entries[index]
                self._changed()
                return
