"""Large tensors out of a serialized ONNX message and back in, without parsing or copying them.

A protobuf message is a sequence of (tag, value) fields; nested messages are length-delimited values, so a
tensor's bytes can be cut out of, or put into, a serialized model by rewriting the lengths of the messages
around it. This keeps what protobuf parses small whatever the size of the model, and has no 2 GB limit.

Source: Protocol Buffers documentation, "Encoding"; field numbers from onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

from onnxslim_lab.errors import ModelError

Buffer = bytes | mmap.mmap
Chunk = bytes | memoryview

# (message, field number) -> message of that field, for every way from a model down to a tensor.
_CHILDREN: dict[tuple[str, int], str] = {
    ("Model", 7): "Graph",
    ("Model", 20): "Training",
    ("Model", 25): "Function",
    ("Training", 1): "Graph",
    ("Training", 2): "Graph",
    ("Graph", 1): "Node",
    ("Graph", 5): "Tensor",
    ("Graph", 15): "Sparse",
    ("Function", 7): "Node",
    ("Function", 11): "Attribute",
    ("Node", 5): "Attribute",
    ("Attribute", 5): "Tensor",
    ("Attribute", 6): "Graph",
    ("Attribute", 10): "Tensor",
    ("Attribute", 11): "Graph",
    ("Attribute", 22): "Sparse",
    ("Attribute", 23): "Sparse",
    ("Sparse", 1): "Tensor",
    ("Sparse", 2): "Tensor",
}
# Fields of a TensorProto whose packed value is the tensor's bytes in little-endian order.
RAW_DATA = 9
_BYTES_FIELDS = (4, RAW_DATA, 10)  # float_data, raw_data, double_data
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_DEEPEST = 100  # protobuf's own limit on nesting


@dataclass(frozen=True)
class Slice:
    """Where a tensor's bytes stand in a buffer, and in which TensorProto field they stood."""

    offset: int
    length: int
    field: int = RAW_DATA


def _varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 64:
        byte = buffer[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise ModelError(f"the file is truncated or not an ONNX protobuf: bad number at byte {position}")


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, length: int) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(length)


def _next(buffer: Buffer, position: int, end: int) -> tuple[int, int, int, int]:
    """Return (field number, wire type, start of the value, end of the value)."""
    tag, start = _varint(buffer, position, end)
    number, wire = tag >> 3, tag & 7
    if wire == 2:
        length, start = _varint(buffer, start, end)
        stop = start + length
    elif wire == 0:
        _, stop = _varint(buffer, start, end)
    elif wire in (1, 5):
        stop = start + (8 if wire == 1 else 4)
    else:
        raise ModelError(f"the file is not an ONNX protobuf: wire type {wire} at byte {position}")
    if stop > end or number == 0:
        raise ModelError(
            f"the file is truncated or not an ONNX protobuf: a field at byte {position} ends past byte {end}"
        )
    return number, wire, start, stop


def detach(buffer: Buffer, stub: Callable[[Slice], str], threshold: int) -> bytes:
    """Return the serialized ModelProto without the tensors larger than `threshold` bytes.

    Each such tensor becomes a stub: a TensorProto whose external data location is `stub(slice)`.

    Raises:
        ModelError: the buffer is truncated or not a protobuf.
    """
    chunks = _detach(buffer, 0, len(buffer), "Model", stub, threshold, 0)
    return bytes(buffer[:]) if chunks is None else b"".join(chunks)


def _detach(
    buffer: Buffer, start: int, end: int, kind: str, stub: Callable[[Slice], str], threshold: int, depth: int
) -> list[Chunk] | None:
    """Return the message's new chunks, or None when nothing was taken out of it."""
    if depth > _DEEPEST:
        raise ModelError(f"the model nests messages deeper than {_DEEPEST}")
    chunks: list[Chunk] = []
    kept = position = start
    while position < end:
        number, wire, value, stop = _next(buffer, position, end)
        if wire == 2 and stop - value > threshold:
            replacement: list[Chunk] | None = None
            child = _CHILDREN.get((kind, number))
            if child is not None:
                inner = _detach(buffer, value, stop, child, stub, threshold, depth + 1)
                if inner is not None:
                    replacement = [_field(number, sum(map(len, inner))), *inner]
            elif kind == "Tensor" and number in _BYTES_FIELDS:
                replacement = [_stub_fields(stub(Slice(value, stop - value, number)))]
            if replacement is not None:
                if position > kept:
                    chunks.append(buffer[kept:position])
                chunks += replacement
                kept = stop
        position = stop
    if not chunks:
        return None
    if end > kept:
        chunks.append(buffer[kept:end])
    if kind == "Tensor":  # after an explicit data_location of the tensor's own: the last one counts
        chunks.append(_to_varint(_DATA_LOCATION << 3) + b"\x01")
    return chunks


def _stub_fields(location: str) -> bytes:
    text = location.encode()
    entry = _field(1, 8) + b"location" + _field(2, len(text)) + text
    return _field(_EXTERNAL_DATA, len(entry)) + entry


def attach(light: bytes, token: bytes, lookup: Callable[[str], tuple[Chunk, int]]) -> list[Chunk]:
    """Return the chunks of the serialized ModelProto with every stub replaced by its bytes.

    Args:
        light: The serialized light ModelProto.
        token: What every stub's location starts with; only messages containing it are looked into.
        lookup: Maps a stub's location to the tensor's bytes and the TensorProto field they belong in.
    """
    return _attach(light, 0, len(light), "Model", token, lookup)


def _attach(
    light: bytes, start: int, end: int, kind: str, token: bytes, lookup: Callable[[str], tuple[Chunk, int]]
) -> list[Chunk]:
    chunks: list[Chunk] = []
    kept = position = start
    while position < end:
        number, wire, value, stop = _next(light, position, end)
        child = _CHILDREN.get((kind, number)) if wire == 2 else None
        if child is not None and light.find(token, value, stop) >= 0:
            chunks.append(light[kept:position])
            if child == "Tensor":
                inner = _attach_tensor(light, value, stop, token, lookup)
            else:
                inner = _attach(light, value, stop, child, token, lookup)
            chunks += [_field(number, sum(map(len, inner))), *inner]
            kept = stop
        position = stop
    chunks.append(light[kept:end])
    return chunks


def _attach_tensor(
    light: bytes, start: int, end: int, token: bytes, lookup: Callable[[str], tuple[Chunk, int]]
) -> list[Chunk]:
    before, after = bytearray(), bytearray()
    data: Chunk = b""
    data_field = RAW_DATA
    fields = []
    position = start
    while position < end:
        number, _, value, stop = _next(light, position, end)
        if number == _EXTERNAL_DATA:
            at = light.find(token, value, stop)
            if at >= 0:
                data, data_field = lookup(light[at:stop].decode())
        elif number != _DATA_LOCATION:
            fields.append((number, light[position:stop]))
        position = stop
    for number, content in fields:
        (before if number <= data_field else after).extend(content)
    return [bytes(before), _field(data_field, len(data)), data, bytes(after)]
