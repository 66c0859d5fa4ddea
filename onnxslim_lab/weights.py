"""WeightStore: the bytes of large tensors, kept outside the protobuf and outside memory."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import secrets
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.errors import ExternalDataError, ModelError, SaveError, quote
from onnxslim_lab.wire import RAW_DATA, Slice

Array = NDArray[Any]

DETACH_ABOVE = 1024  # bytes; smaller tensors stay in the proto
_READ_BELOW = 1 << 16  # bytes; smaller slices are read, larger ones mapped
# Bits of the types that are stored packed; numbers, since older onnx releases lack some of the names.
_PACKED_BITS = {
    21: 4,  # UINT4
    22: 4,  # INT4
    23: 4,  # FLOAT4E2M1
    25: 2,  # UINT2
    26: 2,  # INT2
    27: 6,  # FLOAT6E2M3
    28: 6,  # FLOAT6E3M2
}


@dataclass
class FileSource:
    """An open file that slices are read from; each large slice is mapped only while it is used."""

    path: Path

    @cached_property
    def _file(self) -> Any:
        return self.path.open("rb")

    def view(self, offset: int, length: int) -> memoryview:
        """Return the bytes, read-only; the mapping ends with the last reference to the view."""
        descriptor = self._file.fileno()
        if length < _READ_BELOW:
            return memoryview(os.pread(descriptor, length, offset))
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(descriptor, offset + length - start, access=mmap.ACCESS_READ, offset=start)
        return memoryview(mapped)[offset - start :]


class Scratch:
    """An unnamed temporary file that takes what does not fit the memory budget."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="onnxslim_lab-")  # noqa: SIM115 - lives as long as the store
        self._end = 0

    def append(self, data: memoryview) -> int:
        """Write the bytes and return their offset."""
        offset = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            self._file.seek(offset)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise SaveError(
                f"cannot write scratch data to {tempfile.gettempdir()}: {error.strerror}"
            ) from error
        self._end = offset + len(data)
        return offset

    def view(self, offset: int, length: int) -> memoryview:
        """Return the bytes, mapped read-only."""
        return memoryview(mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_READ, offset=offset))


class WeightStore:
    """Tensors outside the proto, by key: slices of files, of given buffers, or of a scratch file.

    The store only grows: a key's bytes never change, so graphs can share a store and copies are free.

    Args:
        memory: Bytes of new tensors kept in memory before they go to the scratch file.
    """

    def __init__(self, memory: int = 256 << 20) -> None:
        self.token = f"onnxslim_lab:{secrets.token_hex(8)}:"
        self._entries: list[tuple[FileSource | Scratch | memoryview, Slice]] = []
        self._digests: dict[int, bytes] = {}
        self._memory_left = memory
        self._scratch: Scratch | None = None

    def add(self, source: FileSource | memoryview, where: Slice) -> str:
        """Register a slice of a file or buffer; return the stub location that stands for it."""
        self._entries.append((source, where))
        return f"{self.token}{len(self._entries) - 1}"

    def put(self, data: memoryview) -> str:
        """Store new bytes; return their stub location."""
        data = data.cast("B") if data.nbytes else memoryview(b"")
        if len(data) <= self._memory_left:
            self._memory_left -= len(data)
            return self.add(memoryview(bytes(data)), Slice(0, len(data)))
        if self._scratch is None:
            self._scratch = Scratch()
        offset = self._scratch.append(data)
        self._entries.append((self._scratch, Slice(offset, len(data))))
        return f"{self.token}{len(self._entries) - 1}"

    def knows(self, location: str) -> bool:
        """Whether a tensor's external location is a stub of this store."""
        return location.startswith(self.token)

    def view(self, location: str) -> memoryview:
        """Return the bytes behind a stub, read-only."""
        source, where = self._entries[int(location[len(self.token) :])]
        if isinstance(source, memoryview):
            return source[where.offset : where.offset + where.length]
        return source.view(where.offset, where.length)

    def size(self, location: str) -> int:
        """Return the number of bytes behind a stub."""
        return self._entries[int(location[len(self.token) :])][1].length

    def field(self, location: str) -> int:
        """Return the TensorProto field the bytes belong in."""
        return self._entries[int(location[len(self.token) :])][1].field

    def digest(self, location: str) -> bytes:
        """Return a content hash (BLAKE2b, 16 bytes), computed once."""
        key = int(location[len(self.token) :])
        if key not in self._digests:
            self._digests[key] = hashlib.blake2b(self.view(location), digest_size=16).digest()
        return self._digests[key]


def stub_location(tensor: TensorProto) -> str:
    """Return the external data location of a tensor, "" when its data is inline."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def make_stub(tensor: TensorProto, location: str) -> None:
    """Turn a tensor into a stub of the store: no data, an external location."""
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(name)
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    tensor.data_location = TensorProto.EXTERNAL


def stored_bytes(data_type: int, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of this type and shape takes in raw form (strings: 0).

    Raises:
        ModelError: unknown type or negative dimension.
    """
    if any(size < 0 for size in shape):
        raise ModelError(f"negative dimension in shape {list(shape)}")
    if data_type == TensorProto.STRING:
        return 0
    count = math.prod(shape)
    if data_type in _PACKED_BITS:
        return -(-count * _PACKED_BITS[data_type] // 8)
    try:
        return count * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"unknown tensor data type {data_type}") from error


def to_array(tensor: TensorProto, store: WeightStore) -> Array:
    """Return a tensor's values, read-only; a view of the stored bytes where the type allows it."""
    location = stub_location(tensor)
    shape = tuple(tensor.dims)
    if not location:
        array: Array = numpy_helper.to_array(tensor)
    elif tensor.data_type in _PACKED_BITS:
        whole = TensorProto(dims=shape, data_type=tensor.data_type, raw_data=bytes(store.view(location)))
        array = numpy_helper.to_array(whole)
    else:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        array = np.frombuffer(store.view(location), dtype.newbyteorder("<")).reshape(shape)
    array.flags.writeable = False
    return array


def from_array(name: str, array: Array, store: WeightStore, data_type: int | None = None) -> TensorProto:
    """Return a tensor with these values; a stub of the store when it is large.

    Args:
        name: The tensor's name.
        array: Values; ml_dtypes types for bfloat16, float8, 4-bit and 2-bit, object for strings.
        store: Takes the bytes of a large tensor.
        data_type: TensorProto type to convert to; by default that of the array.
    """
    if data_type is not None and data_type != TensorProto.STRING:
        array = np.asarray(array, helper.tensor_dtype_to_np_dtype(data_type))
    kind = helper.np_dtype_to_tensor_dtype(array.dtype) if array.dtype != object else TensorProto.STRING
    if kind == TensorProto.STRING or kind in _PACKED_BITS or array.nbytes <= DETACH_ABOVE:
        tensor: TensorProto = numpy_helper.from_array(np.asarray(array, order="C"), name)
        if kind == TensorProto.STRING or len(tensor.raw_data) <= DETACH_ABOVE:
            return tensor
        make_stub_of = store.put(memoryview(tensor.raw_data))
    else:
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        make_stub_of = store.put(plain.reshape(-1).view(np.uint8).data)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    make_stub(tensor, make_stub_of)
    return tensor


def external_slice(tensor: TensorProto, folder: Path) -> tuple[Path, Slice]:
    """Return the file and slice of a tensor's external data, after checking that it is safe to read.

    Raises:
        ExternalDataError: absolute path, "..", a link out of the folder, a missing file, a slice past the
            end of the file, or a length that does not match type and shape.
    """
    what = f"external data of tensor {quote(tensor.name)}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or location[0] in "/\\" or ":" in parts[0] or ".." in parts:
        raise ExternalDataError(
            f"{what}: location {quote(location)} must be a relative path inside the model's folder"
        )
    path = folder / location
    try:
        real = path.resolve(strict=True)
        size = real.stat().st_size
    except (OSError, RuntimeError) as error:
        raise ExternalDataError(f"{what}: file {quote(location)} cannot be read beside the model") from error
    if not real.is_relative_to(folder.resolve()) or not real.is_file():
        raise ExternalDataError(f"{what}: {quote(location)} leads out of the model's folder")
    needed = stored_bytes(tensor.data_type, tuple(tensor.dims))
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or needed)
    except ValueError as error:
        raise ExternalDataError(f"{what}: offset and length must be integers") from error
    if length != needed:
        shape = list(tensor.dims)
        raise ExternalDataError(f"{what}: length {length} does not match shape {shape}, which takes {needed}")
    if offset < 0 or offset + length > size:
        raise ExternalDataError(
            f"{what}: bytes {offset} to {offset + length} lie past the end of {quote(location)} ({size} bytes)"
        )
    return real, Slice(offset, length, RAW_DATA)
