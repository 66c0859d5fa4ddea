"""GraphWriter: a graph back as a protobuf."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, helper

from onnxslim_lab import modelfile
from onnxslim_lab.graph_index import GraphIndex


class GraphWriter(GraphIndex):
    """Writes graphs, bodies and functions as protobufs, large tensors as stubs of the store."""

    def light_model(self, *, value_info: bool = True) -> ModelProto:
        """Return a ModelProto whose large tensors are stubs of `store`."""
        root = self._main()
        model = ModelProto()
        model.CopyFrom(self._model.proto)
        root._write_graph(model.graph, value_info)  # noqa: SLF001 - another object of this class
        for function in self._model.functions.values():
            function._write_function(model.functions.add())  # noqa: SLF001
        return model

    def file_bytes(self) -> int:
        """Return the size of the model's file were it saved now, all tensors inside."""
        return sum(map(len, modelfile.chunks(self.light_model(), self.store)))

    def _write_graph(self, out: GraphProto, value_info: bool) -> None:
        self._write_skeleton(out)
        for node in self.nodes:
            self._write_node(node, out.node.add())
        out.initializer.extend(self._initializers.values())
        out.sparse_initializer.extend(self._sparse.values())
        if value_info:
            out.value_info.extend(info for name, info in self._value_info.items() if self.defines(name))

    def _write_function(self, out: FunctionProto) -> None:
        assert isinstance(self._proto, FunctionProto)
        out.CopyFrom(self._proto)
        for node in self.nodes:
            self._write_node(node, out.node.add())

    def _write_node(self, node: NodeProto, out: NodeProto) -> None:
        out.CopyFrom(node)
        for item in out.attribute:
            bodies = self._bodies.get(id(node), {}).get(item.name)
            if bodies and item.type == AttributeProto.GRAPH:
                bodies[0]._write_graph(item.g, value_info=True)  # noqa: SLF001
            elif bodies:
                for body in bodies:
                    body._write_graph(item.graphs.add(), value_info=True)  # noqa: SLF001

    def _write_skeleton(self, out: GraphProto) -> None:
        """Write what is neither nodes nor tensors; IR 3 lists every initializer as an input."""
        assert isinstance(self._proto, GraphProto)
        out.CopyFrom(self._proto)
        if self.parent is None and self.ir_version < 4:
            listed = {value.name for value in out.input}
            for name, tensor in self._initializers.items():
                if name not in listed:
                    out.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
