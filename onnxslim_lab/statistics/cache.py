"""Results kept on disk under hashes of the content of model, data and options."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np

from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.statistics.collected import Place, Statistics, place
from onnxslim_lab.statistics.gram import Gram
from onnxslim_lab.statistics.values import Channels, Histogram, ValueStatistics
from onnxslim_lab.weights import stub_location
from onnxslim_lab.worker.messages import Value, receive, send

VERSION = 2  # to be raised when results change their meaning
LARGEST = 2 << 30  # bytes of the folder
_CHECK = 16  # bytes of the hash at the end of an entry
_PART = ".part"  # ending of files that are being written
_DEAD = 24 * 3600.0  # seconds after which nobody writes to one any more

Kept = TypeVar("Kept")


def default_folder() -> Path:
    """Return the user's cache folder: $ONNXSLIM_LAB_CALIBRATION_CACHE, else below $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("ONNXSLIM_LAB_CALIBRATION_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onnxslim_lab" / "calibration"


def model_digest(model: Graph) -> bytes:
    """Return a hash of what a model computes: nodes, constants, inputs and outputs of all its graphs."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(sorted(model.opsets.items())).encode())
    for part in model.walk():
        digest.update(repr((place(part), part.inputs, part.outputs)).encode())
        for name in sorted(part.sparse_initializers):
            sparse = part.sparse_initializer(name)
            assert sparse is not None
            for tensor in (sparse.values, sparse.indices):
                location = stub_location(tensor)
                digest.update(part.store.digest(location) if location else tensor.SerializeToString())
            digest.update(repr((name, list(sparse.dims))).encode())
        for name in sorted(part.initializers):
            digest.update(repr((name, part.constant_key(name))).encode())
        for node in part.nodes:
            if is_op(node, "Constant"):
                key = part.constant_key(node.output[0])
                if key is not None:
                    digest.update(repr((node.output[0], key)).encode())
                    continue
            digest.update(node.SerializeToString(deterministic=True))
            for attribute in node.attribute:
                location = stub_location(attribute.t) if attribute.HasField("t") else ""
                if location:
                    digest.update(part.store.digest(location))
    return digest.digest()


def data_digest(feeds: Iterable[Mapping[str, Value]], digest: Any = None) -> bytes:
    """Return a hash of the feeds, in order; `digest`: a new hash object of another kind."""
    digest = digest or hashlib.blake2b(digest_size=16)
    for feed in feeds:
        digest.update(b"feed")
        for name in sorted(feed):
            digest.update(repr(name).encode())
            _add(digest, feed[name])
    return bytes(digest.digest())


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.name}{value.shape}".encode())
        if value.dtype == object:
            digest.update(repr(value.tolist()).encode())
        elif value.nbytes:
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, (list, tuple)):
        digest.update(b"list%d" % len(value))
        for item in value:
            _add(digest, item)
    elif isinstance(value, dict):
        digest.update(b"map%d" % len(value))
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add(digest, item)
    else:
        digest.update(repr(value).encode())


class _Checked:
    """A binary stream that hashes what goes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.blake2b(digest_size=_CHECK)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)

    def readinto(self, buffer: memoryview) -> int:
        count = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self.digest.update(buffer[:count])
        return int(count)

    def flush(self) -> None:
        self._stream.flush()


class Cache:
    """A folder of results, for any number of processes at a time.

    An entry ends with a hash of itself. One that is damaged counts as none; a folder that cannot be written to
    is not written to again. Either is told in `notices` and stops nothing.

    Args:
        folder: Made when first written to.
        notices: Gets a line for what went wrong.
        largest: Bytes of all entries together; those used longest ago go first.
    """

    def __init__(self, folder: Path, notices: list[str] | None = None, *, largest: int = LARGEST) -> None:
        self.folder = folder
        self.notices = [] if notices is None else notices
        self._largest = largest
        self._readable = self._writable = True

    def has(self, key: str) -> bool:
        """Whether there is an entry under a key."""
        with contextlib.suppress(OSError):
            return self._path(key).exists()
        return False

    def get(self, key: str, unpack: Callable[[dict[str, Any]], Kept]) -> Kept | None:
        """Return what `unpack` makes of an entry, None when there is none."""
        path = self._path(key)
        try:
            with path.open("rb") as stream:
                checked = _Checked(stream)
                message = receive(cast("BinaryIO", checked))
                found = unpack(message) if stream.read() == checked.digest.digest() else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if self._readable:
                self.notices.append(f"calibration results in {self.folder} cannot be read: {error.strerror}")
            self._readable = False
            return None
        except (EOFError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
            found = None
        if found is None:
            self.notices.append(f"calibration results in {path} are damaged and were measured again")
            return None
        with contextlib.suppress(OSError):  # of another user, say
            os.utime(path)
        return found

    def put(self, key: str, message: dict[str, Any]) -> None:
        """Keep a result: at every moment the entry is there in full or not at all."""
        if not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=_PART, delete=False) as stream:
                try:
                    checked = _Checked(cast("BinaryIO", stream))
                    send(cast("BinaryIO", checked), message)
                    stream.write(checked.digest.digest())
                    stream.close()
                    Path(stream.name).replace(self._path(key))
                except BaseException:
                    Path(stream.name).unlink(missing_ok=True)
                    raise
            self._evict()
        except OSError as error:
            self._writable = False
            self.notices.append(
                f"calibration results are not kept: cannot write to {self.folder}: {error.strerror}; name another "
                "folder in ONNXSLIM_LAB_CALIBRATION_CACHE"
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.bin"

    def _evict(self) -> None:
        """Remove the entries used longest ago past the limit, and what processes that died left behind."""
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process was faster
                found = path.stat()
                if path.suffix == ".bin":
                    entries.append((found.st_mtime, found.st_size, path))
                elif path.suffix == _PART and time.time() - found.st_mtime > _DEAD:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._largest:
                break
            path.unlink(missing_ok=True)
            total -= size


def key_of(*parts: Any) -> str:
    """Return the key of an entry: a hash of everything its content depends on."""
    return hashlib.blake2b(repr((VERSION, *parts)).encode(), digest_size=20).hexdigest()


def pack_statistics(statistics: Statistics) -> dict[str, Any]:
    """Return statistics as a message."""
    values = [[[*at], name, asdict(found)] for (at, name), found in statistics.values.items()]
    return {
        "values": values,
        "missing": [[[*at], name, why] for (at, name), why in statistics.missing.items()],
    }


def unpack_statistics(message: dict[str, Any]) -> Statistics:
    """Return the statistics that a message holds."""
    values: dict[tuple[Place, str], ValueStatistics] = {}
    for at, name, fields in message["values"]:
        form = dict(fields)
        histogram, channels = form.pop("histogram"), form.pop("channels")
        values[tuple(at), name] = ValueStatistics(
            **form,
            histogram=None if histogram is None else Histogram(**histogram),
            channels=None if channels is None else Channels(**channels),
        )
    return Statistics(values, {(tuple(at), name): why for at, name, why in message["missing"]})


def pack_gram(gram: Gram) -> dict[str, Any]:
    """Return a Gram matrix as a message."""
    return {"matrix": gram.matrix, "total": gram.total, "count": gram.count}


def unpack_gram(message: dict[str, Any]) -> Gram:
    """Return the Gram matrix that a message holds."""
    return Gram(**message)
