"""Reading and writing model files: large tensors stay out of the proto, writes are atomic."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from onnxslim_lab import wire
from onnxslim_lab.errors import ExternalDataError, ModelError, SaveError, quote
from onnxslim_lab.weights import (
    DETACH_ABOVE,
    FileSource,
    WeightStore,
    external_slice,
    make_stub,
    stored_bytes,
    stub_location,
)

LARGEST_PROTO = 2**31 - 1  # bytes; the limit of protobuf and so of a model without external data
_ALIGNMENT = 4096  # of tensors in external data files, so that runtimes can map them


@dataclass(frozen=True)
class SavedFiles:
    """The files of a saved model: the .onnx and, when it has one, its external data."""

    paths: tuple[Path, ...]
    total_bytes: int


@dataclass(frozen=True)
class Source:
    """Where a model came from and what it weighed."""

    name: str
    total_bytes: int
    external: bool


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model: initializers, attributes, sparse parts, bodies, functions, training."""
    yield from _graph_tensors(model.graph)
    for info in model.training_info:
        yield from _graph_tensors(info.initialization)
        yield from _graph_tensors(info.algorithm)
    for function in model.functions:
        yield from _attribute_tensors(function.attribute_proto)
        for node in function.node:
            yield from _attribute_tensors(node.attribute)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from _sparse_tensors(sparse)
    for node in graph.node:
        yield from node_tensors(node)


def node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    """Yield every tensor in a node's attributes and bodies."""
    return _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: object) -> Iterator[TensorProto]:
    for attribute in attributes:  # type: ignore[attr-defined]
        kind = attribute.type
        if kind == AttributeProto.TENSOR:
            yield attribute.t
        elif kind == AttributeProto.GRAPH:
            yield from _graph_tensors(attribute.g)
        elif kind == AttributeProto.TENSORS:
            yield from attribute.tensors
        elif kind == AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)
        elif kind == AttributeProto.SPARSE_TENSOR:
            yield from _sparse_tensors(attribute.sparse_tensor)
        elif kind == AttributeProto.SPARSE_TENSORS:
            for sparse in attribute.sparse_tensors:
                yield from _sparse_tensors(sparse)


def _sparse_tensors(sparse: SparseTensorProto) -> Iterator[TensorProto]:
    yield sparse.values
    yield sparse.indices


def read(source: str | os.PathLike[str] | bytes, store: WeightStore) -> tuple[ModelProto, Source]:
    """Return the light model, its large tensors in the store, and what it weighed.

    Raises:
        ModelError: not readable, empty, truncated, not ONNX, or a tensor's size does not match its shape.
        ExternalDataError: external data is unsafe or missing.
    """
    if isinstance(source, bytes):
        return _parse(source, memoryview(source), "<bytes>", None, store)
    path = Path(source)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelError(f"{quote(str(path))} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parse(mapped, FileSource(path), str(path), path.parent, store)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot read {quote(str(path))}: {reason}") from error


def _parse(
    buffer: wire.Buffer,
    origin: FileSource | memoryview,
    name: str,
    folder: Path | None,
    store: WeightStore,
) -> tuple[ModelProto, Source]:
    where = quote(name)
    try:
        light = wire.detach(buffer, lambda part: store.add(origin, part), DETACH_ABOVE)
        model = ModelProto.FromString(light)
    except DecodeError as error:
        raise ModelError(f"{where} is not an ONNX model: {error}") from error
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if not model.HasField("graph"):
        raise ModelError(f"{where} is not an ONNX model: it has no graph")
    total = len(buffer)
    files: dict[Path, FileSource] = {}
    for tensor in all_tensors(model):
        location = stub_location(tensor)
        if location and not store.knows(location):
            total += _resolve(tensor, folder, files, store)
        elif location or tensor.HasField("raw_data"):
            _check_size(tensor, store.size(location) if location else len(tensor.raw_data))
        elif tensor.data_location == TensorProto.EXTERNAL:
            raise ExternalDataError(f"external data of tensor {quote(tensor.name)} names no file")
    return model, Source(name, total, external=bool(files))


def _check_size(tensor: TensorProto, length: int) -> None:
    shape = tuple(tensor.dims)
    try:
        needed = stored_bytes(tensor.data_type, shape)
    except ModelError as error:
        raise ModelError(f"tensor {quote(tensor.name)}: {error}") from error
    if tensor.data_type == TensorProto.STRING or length != needed:
        raise ModelError(
            f"tensor {quote(tensor.name)}: {length} bytes do not match shape {list(shape)}, which takes {needed}"
        )


def _resolve(
    tensor: TensorProto, folder: Path | None, files: dict[Path, FileSource], store: WeightStore
) -> int:
    """Point a tensor with external data into the store; return its bytes."""
    if folder is None:
        raise ModelError(f"tensor {quote(tensor.name)} has external data: load the model from its path")
    path, part = external_slice(tensor, folder)
    source = files.setdefault(path, FileSource(path))
    if part.length > DETACH_ABOVE:
        make_stub(tensor, store.add(source, part))
    else:
        data = bytes(source.view(part.offset, part.length)) if part.length else b""
        make_stub(tensor, "")
        tensor.raw_data = data
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return part.length


def chunks(light: ModelProto, store: WeightStore) -> list[wire.Chunk]:
    """Return the whole serialized model as chunks, large tensors as views of the store."""
    return wire.attach(
        light.SerializeToString(), store.token.encode(), lambda text: (store.view(text), store.field(text))
    )


def write(
    light: ModelProto, store: WeightStore, path: str | os.PathLike[str], *, external: bool | None
) -> SavedFiles:
    """Write the model at `path` atomically; see `Graph.save`."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise SaveError(f"cannot write {quote(str(target))}: it must be a file in an existing folder")
    if external is None:
        stubs = sum(
            store.size(stub_location(tensor)) for tensor in all_tensors(light) if stub_location(tensor)
        )
        external = stubs + light.ByteSize() > LARGEST_PROTO - (1 << 20)
    try:
        if not external:
            total = _write_file(target, chunks(light, store))
            return SavedFiles((target,), total)
        return _write_external(light, store, target)
    except OSError as error:
        raise SaveError(
            f"cannot write {quote(str(target))}: {error.strerror}; nothing was changed"
        ) from error


def _write_file(target: Path, parts: list[wire.Chunk]) -> int:
    """Write beside the target, flush to disk, then rename over it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            total = file.tell()
        _publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return total


def _publish(temporary: Path, target: Path) -> None:
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    temporary.chmod(mode)
    temporary.replace(target)
    with contextlib.suppress(OSError):  # a file system without folder handles
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_external(light: ModelProto, store: WeightStore, target: Path) -> SavedFiles:
    """Write the data file under a name made of its content, then the model that points to it.

    The data file is complete before the model names it, and an older model at the same place keeps
    pointing at its own data file: at every moment the target is the old model or the new one.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent)
    temporary = Path(name)
    model = ModelProto()
    model.CopyFrom(light)
    digest = hashlib.blake2b(digest_size=6)
    places: dict[str, tuple[int, int]] = {}
    try:
        with os.fdopen(descriptor, "wb") as file:
            for tensor in all_tensors(model):
                location = stub_location(tensor)
                if location and location not in places:
                    view = store.view(location)
                    if len(view) >= _ALIGNMENT:
                        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    places[location] = (file.tell(), len(view))
                    file.write(view)
                    digest.update(view)
            file.flush()
            os.fsync(file.fileno())
            data_bytes = file.tell()
        data = target.with_name(f"{target.name}.{digest.hexdigest()}.data")
        for tensor in all_tensors(model):
            if location := stub_location(tensor):
                offset, length = places[location]
                del tensor.external_data[:]
                for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                    tensor.external_data.add(key=key, value=str(value))
        _publish(temporary, data)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    total = _write_file(target, [model.SerializeToString()])
    return SavedFiles((target, data), total + data_bytes)
