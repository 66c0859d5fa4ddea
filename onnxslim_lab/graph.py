"""Graph: a model's graph, body or function with an index; the only thing passes edit."""

from __future__ import annotations

import os
from typing import Any, Self

import onnx
from onnx import ModelProto

from onnxslim_lab import modelfile, ordering
from onnxslim_lab.errors import ModelError, quote
from onnxslim_lab.graph_edits import GraphEdits
from onnxslim_lab.graph_index import FunctionKey, ModelState
from onnxslim_lab.modelfile import LARGEST_PROTO, SavedFiles, Source
from onnxslim_lab.nodes import attribute, domain_of, is_op
from onnxslim_lab.weights import WeightStore

__all__ = ["FunctionKey", "Graph", "attribute", "domain_of", "is_op"]


class Graph(GraphEdits):
    """A main graph, the body of a control-flow node, or a local function.

    Nodes are `NodeProto` objects: read them freely, change them only through the methods here, which
    keep the index, the bodies that capture values, and the topological order right. The methods come
    from four classes, one idea each: `GraphIndex` (structure, producers, consumers), `GraphWriter`
    (protobufs), `GraphValues` (constants, types, shapes) and `GraphEdits`.
    """

    @classmethod
    def load(cls, source: str | os.PathLike[str] | bytes | ModelProto, *, memory: int = 256 << 20) -> Self:
        """Read a model without changing its source; large tensors stay on disk.

        Args:
            source: Path of an .onnx file, its bytes, or a ModelProto.
            memory: Bytes of edited tensors kept in memory before a scratch file takes them.

        Raises:
            ModelError: unreadable, truncated, not ONNX, or inconsistent (values defined twice or nowhere,
                cycles, sizes that do not match shapes).
            ExternalDataError: external data that is unsafe, missing or of the wrong size.
        """
        store = WeightStore(memory)
        if isinstance(source, ModelProto):
            try:
                source = source.SerializeToString()
            except Exception as error:
                raise ModelError("the ModelProto is over 2 GB: save it with external data first") from error
        model, origin = modelfile.read(source, store)
        return cls._from_light(model, store, origin)

    @classmethod
    def from_graphsurgeon(cls, graph: Any) -> Self:
        """Read an onnx_graphsurgeon.Graph, which is not changed."""
        import onnx_graphsurgeon  # noqa: PLC0415 - a third of a second that most runs need not wait

        return cls.load(onnx_graphsurgeon.export_onnx(graph, do_type_check=False))

    def to_graphsurgeon(self) -> Any:
        """Return the whole model as an onnx_graphsurgeon.Graph; raises ModelError over 2 GB."""
        import onnx_graphsurgeon  # noqa: PLC0415 - as above

        return onnx_graphsurgeon.import_onnx(self.to_model())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a model from ONNX's textual syntax; meant for tests."""
        return cls.load(onnx.parser.parse_model(text))

    @classmethod
    def _from_light(cls, proto: ModelProto, store: WeightStore, source: Source) -> Self:
        model = ModelState(ModelProto(), store, source)
        root = model.main = cls(model, proto.graph)
        for function in proto.functions:
            key = (domain_of(function.domain), function.name, function.overload)
            if key in model.functions:
                raise ModelError(f"function {quote(function.name)} is defined twice")
            model.functions[key] = cls(model, function)
        skeleton = ModelProto()
        skeleton.CopyFrom(proto)
        skeleton.ClearField("functions")
        skeleton.ClearField("graph")
        model.proto = skeleton
        for graph in root.walk():
            ordering.check(graph)
            graph._sort()  # noqa: SLF001 - the constructor of this class
        return root

    def copy(self) -> Self:
        """Return an independent copy of the whole model; tensors are shared until one of them edits."""
        self._need_root("copy")
        return self._from_light(self.light_model(), self.store, self.source)

    def save(self, path: str | os.PathLike[str], *, external: bool | None = None) -> SavedFiles:
        """Write the model atomically: at every moment `path` is what it was before or complete.

        Args:
            path: The .onnx file to write.
            external: Whether large tensors go to a data file beside it; None: only when over 2 GB.

        Raises:
            SaveError: the folder is missing, the disk is full, or the model needs external data and
                `external` is False.
        """
        self._need_root("save")
        return modelfile.write(self.light_model(), self.store, path, external=external)

    def to_model(self) -> ModelProto:
        """Return a whole ModelProto, data included.

        Raises:
            ModelError: it would be over protobuf's 2 GB limit.
        """
        if self.file_bytes() > LARGEST_PROTO:
            raise ModelError("the model is over 2 GB: save it with external data instead")
        return ModelProto.FromString(b"".join(modelfile.chunks(self.light_model(), self.store)))
