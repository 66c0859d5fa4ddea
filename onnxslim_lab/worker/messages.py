"""Messages between a Runner and its child process: JSON plus raw array bytes, never pickle.

A message is an 8-byte big-endian header length, a JSON header, then the bytes of the arrays that the
header describes, in order. A child that ran a hostile model can therefore send wrong numbers at worst.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Value = Array | list[Any] | dict[Any, Any] | None
"""What onnxruntime takes and gives: a tensor, a sequence, a map, or the empty optional."""

_HEADER = struct.Struct(">Q")


def narrowed(feed: Mapping[str, Value], narrow: Mapping[str, npt.DTypeLike]) -> dict[str, Value]:
    """Return a feed with float32 rounded to the 16-bit types that some inputs take.

    >>> narrowed({"x": np.float32([1.0])}, {"x": np.float16})["x"].dtype
    dtype('float16')
    """
    fitted = dict(feed)
    for name in feed.keys() & narrow.keys():
        value = feed[name]
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            fitted[name] = value.astype(narrow[name])
    return fitted


def dtype_named(name: str) -> np.dtype[Any]:
    """Return the numpy dtype called `name`, including those of ml_dtypes.

    >>> dtype_named("bfloat16").itemsize
    2
    """
    return np.dtype(getattr(ml_dtypes, name, name))


def _pack(value: Any, buffers: list[Array]) -> Any:
    """Return the JSON form of a value; array bytes go to `buffers`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"scalar": value}
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.kind in "OUS":
            texts = [t.decode() if isinstance(t, bytes) else str(t) for t in array.ravel().tolist()]
            return {"strings": texts, "shape": array.shape}
        buffers.append(np.ascontiguousarray(array).reshape(array.shape))
        return {"array": array.dtype.name, "shape": array.shape, "bytes": array.nbytes}
    if isinstance(value, (list, tuple)):
        return {"list": [_pack(item, buffers) for item in value]}
    if isinstance(value, dict):
        keys = [key.item() if isinstance(key, np.generic) else key for key in value]
        return {
            "map": [[_pack(k, buffers), _pack(v, buffers)] for k, v in zip(keys, value.values(), strict=True)]
        }
    raise TypeError(f"a {type(value).__name__} is not a tensor, list, dict or None")


def _read_exactly(stream: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        read = cast("int", stream.readinto(view[done:]))  # type: ignore[attr-defined]
        if not read:
            raise EOFError
        done += read
    return data


def _unpack(form: Any, stream: BinaryIO) -> Any:
    """Return the value of a JSON form; array bytes are read from the stream in order."""
    if "scalar" in form:
        return form["scalar"]
    if "strings" in form:
        return np.array([*form["strings"], None], dtype=object)[:-1].reshape(form["shape"])
    if "array" in form:
        dtype = dtype_named(form["array"])
        if form["bytes"] != math.prod(form["shape"]) * dtype.itemsize:
            raise ValueError("array size and shape disagree")
        return np.frombuffer(_read_exactly(stream, form["bytes"]), dtype).reshape(form["shape"])
    if "list" in form:
        return [_unpack(item, stream) for item in form["list"]]
    return {_unpack(key, stream): _unpack(item, stream) for key, item in form["map"]}


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write one message: a dict of values as `Value` describes, plain scalars, lists and dicts.

    Raises:
        TypeError: Something else is in it; nothing was written.
    """
    buffers: list[Array] = []
    header = json.dumps(_pack(message, buffers)).encode()
    stream.write(_HEADER.pack(len(header)))
    stream.write(header)
    for array in buffers:
        if array.nbytes:
            stream.write(array.reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any]:
    """Read one message.

    Raises:
        EOFError: The other side closed the stream.
        ValueError: What was sent is not a message.
    """
    (length,) = _HEADER.unpack(_read_exactly(stream, _HEADER.size))
    value = _unpack(json.loads(_read_exactly(stream, length)), stream)
    if not isinstance(value, dict):
        raise ValueError("a message is a dict")  # noqa: TRY004 - what was sent, not what was passed
    return value
