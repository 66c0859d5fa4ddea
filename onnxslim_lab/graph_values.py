"""GraphValues: what is known of a graph's values before it runs: constants, types and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx import (
    AttributeProto,
    GraphProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

from onnxslim_lab import shapes
from onnxslim_lab.graph_writer import GraphWriter
from onnxslim_lab.nodes import constant_tensor, is_op
from onnxslim_lab.shapes import Dim
from onnxslim_lab.weights import Array, stored_bytes, stub_location, to_array


class GraphValues(GraphWriter):
    """Reads constants and types; types come from inference, once, and again when `infer` is called."""

    def _tensor(self, value: str) -> TensorProto | None:
        """Return the tensor behind a constant: an initializer or a Constant node's value attribute."""
        graph = self.scope_of(value)
        if graph is None:
            return None
        tensor = graph._initializers.get(value)  # noqa: SLF001
        if tensor is not None:
            overridable = graph.parent is None and graph.is_input(value) and graph.ir_version >= 4
            return None if overridable else tensor
        node = graph.producer(value)
        if is_op(node, "Constant"):
            assert node is not None
            return constant_tensor(node)
        return None

    def is_constant(self, value: str) -> bool:
        """Whether the value is known before the model runs."""
        return value != "" and self._tensor(value) is not None

    def constant(self, value: str) -> Array | None:
        """Return a constant's values (read-only), None when the value is not a dense constant."""
        tensor = self._tensor(value) if value else None
        return None if tensor is None else to_array(tensor, self.store)

    def default(self, value: str) -> Array | None:
        """Return the initializer behind a value, overridable inputs included; None when there is none."""
        tensor = self._initializers.get(value)
        return self.constant(value) if tensor is None else to_array(tensor, self.store)

    def sparse_initializer(self, value: str) -> SparseTensorProto | None:
        """Return a sparse initializer of this graph; its data may be stubs of the store."""
        return self._sparse.get(value)

    def constant_type(self, value: str) -> tuple[int, tuple[int, ...], int] | None:
        """Return (TensorProto type, shape, stored bytes) of a constant without touching its data."""
        tensor = self._tensor(value) if value else None
        if tensor is None:
            return None
        shape = tuple(tensor.dims)
        size = stored_bytes(tensor.data_type, shape) or sum(map(len, tensor.string_data))
        if not tensor.HasField("raw_data") and not stub_location(tensor):  # int64_data may be shorter
            size = min(size, tensor.ByteSize() - len(tensor.name.encode()))
        return tensor.data_type, shape, size

    def same_constant(self, first: str, second: str) -> bool:
        """Whether two constants have the same type, shape and bytes."""
        return self.constant_key(first) == self.constant_key(second) is not None

    def constant_key(self, value: str) -> tuple[int, tuple[int, ...], bytes] | None:
        """Return a key that is equal for constants of the same type, shape and bytes."""
        tensor = self._tensor(value) if value else None
        if tensor is None:
            return None
        location = stub_location(tensor)
        if location:
            content = self.store.digest(location)
        elif tensor.HasField("raw_data"):
            content = tensor.raw_data
        elif tensor.data_type == TensorProto.STRING:
            content = b"".join(b"%d:%s" % (len(text), text) for text in tensor.string_data)
        else:
            content = numpy_helper.to_array(tensor).tobytes()
        return tensor.data_type, tuple(tensor.dims), content

    def infer(self) -> None:
        """Infer types and shapes again if the model was edited since the last time."""
        if self._model.inferred_at == self._model.version:
            return
        root = self._main()
        inferred = shapes.infer(self.light_model())
        root._learn(inferred.graph)  # noqa: SLF001
        self._model.inferred_at = self._model.version

    def _learn(self, proto: GraphProto) -> None:
        """Take the types of values from an inferred copy of this graph."""
        types = {name: shapes.without_shape(info.type) for name, info in self._value_info.items()}
        types |= {value.name: value.type for value in (*proto.value_info, *proto.input, *proto.output)}
        for name, tensor in self._initializers.items():
            types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        self._types = types
        for node, twin in zip(self.nodes, proto.node, strict=True):
            bodies = self._bodies.get(id(node))
            if not bodies:
                continue
            for item in twin.attribute:
                inner = [item.g] if item.type == AttributeProto.GRAPH else list(item.graphs)
                for body, copy in zip(bodies.get(item.name, ()), inner, strict=False):
                    body._learn(copy)  # noqa: SLF001

    def type_of(self, value: str) -> TypeProto | None:
        """Return a value's type, None when unknown. Values made by edits are unknown until `infer`."""
        if self._model.inferred_at is None:
            self.infer()
        graph = self.scope_of(value)
        return None if graph is None else graph._types.get(value)  # noqa: SLF001

    def dtype_of(self, value: str) -> int:
        """Return a tensor value's TensorProto type, 0 when unknown or not a tensor."""
        found = self.type_of(value)
        return found.tensor_type.elem_type if found is not None else 0

    def shape_of(self, value: str) -> tuple[Dim, ...] | None:
        """Return a tensor value's shape: int, symbolic name or None per axis; None when rank is unknown."""
        found = self.type_of(value)
        return None if found is None else shapes.shape_from_type(found)

    def disagreements(self) -> Iterator[tuple[str, str, str]]:
        """Yield (value, declared, inferred) where a declared intermediate shape cannot be true."""
        for graph in self.walk():
            for name, info in graph._value_info.items():  # noqa: SLF001
                declared, inferred = shapes.shape_from_type(info.type), graph.shape_of(name)
                if declared is None or inferred is None or shapes.compatible(declared, inferred):
                    continue
                yield name, shapes.text(declared), shapes.text(inferred)

    def set_type(self, value: str, data_type: int, shape: Sequence[Dim] | None) -> None:
        """Record the type of a value that an edit made."""
        self._types[value] = helper.make_tensor_type_proto(data_type, shape)
