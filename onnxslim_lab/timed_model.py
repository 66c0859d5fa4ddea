"""A model in a process of its own, to be timed."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from onnxslim_lab.bench_report import NodeTime
from onnxslim_lab.errors import DataError, ParameterError, SessionError, one_line, quote, suggest
from onnxslim_lab.metrics import Feed
from onnxslim_lab.worker.child import Child, ChildError

_RELOADS = 2  # loads timed besides the first
_PROFILED = 5  # profiled runs of each feed
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class TimedModel:
    """A model in a child process of its own.

    Args:
        path: The .onnx file; it is loaded where it is.
        threads: Intra-op threads; 0 lets onnxruntime choose.
        provider: The execution provider.
        timeout: Seconds for one request.

    Raises:
        ParameterError: The provider is not there.
        SessionError: onnxruntime refuses the model.
    """

    def __init__(self, path: Path, *, threads: int, provider: str, timeout: float = 600.0) -> None:
        self.path = path
        self._folder = Path(tempfile.mkdtemp(prefix="onnxslim_lab-"))
        self._child = Child(self._folder, timeout, "onnxslim_lab.worker.timing")
        try:
            hello = self._ask("hello")
            _need_provider(provider, hello["providers"])
            self.version = str(hello["version"])
            self.loaded = self._ask("load", path=str(path.absolute()), threads=threads, provider=provider)
            self._check_used(provider)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove its folder."""
        self._child.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check_used(self, provider: str) -> None:
        if provider not in self.loaded["providers"]:
            raise SessionError(f"onnxruntime could not use {provider} for {quote(self.path.name)}")

    def _ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._child.request(f"timing {quote(self.path.name)}", call, **arguments)
        except ChildError as error:
            text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", str(error))
            raise SessionError(
                f"onnxruntime failed timing {quote(self.path.name)}: {one_line(text, 600)}"
            ) from None

    def take(self, feeds: Iterable[Feed]) -> None:
        """Send the feeds, floats in the precision of this model's inputs.

        Raises:
            DataError: A feed lacks an input or has one too many.
        """
        kinds: dict[str, str] = self.loaded["inputs"]
        for feed in feeds:
            if feed.keys() != kinds.keys():
                odd = min(feed.keys() ^ kinds.keys())
                raise DataError(
                    f"{quote(self.path.name)} takes other inputs than the first model: {quote(odd)}"
                )
            self._ask("feed", feed={name: _cast(value, kinds[name]) for name, value in feed.items()})

    def timed(self, feed: int, count: int) -> float:
        """Return the seconds of so many runs of a feed."""
        return float(self._ask("run", feed=feed, count=count)["seconds"])

    def load_seconds(self) -> float:
        """Return the median time of creating a session, three in all."""
        again = [float(self._ask("reload")["seconds"]) for _ in range(_RELOADS)]
        return float(np.median([float(self.loaded["seconds"]), *again]))

    def memory(self) -> tuple[int | None, int | None]:
        """Return the peak memory of the process since before loading, and the part loading and running added."""
        peak = int(self._ask("peak")["peak"])
        before = int(self.loaded["before"])
        return peak or None, peak - before if peak and before and self.loaded["reset"] else None

    def profile(self) -> list[NodeTime]:
        """Return the time of every node, longest first."""
        found = self._ask("profile", count=_PROFILED)["nodes"]
        return [NodeTime(name=name, op_type=op_type, seconds=seconds) for name, op_type, seconds in found]


def _need_provider(provider: str, present: Sequence[str]) -> None:
    if provider not in present:
        raise ParameterError(
            f"execution provider {quote(provider)} is not available in this onnxruntime"
            f"{suggest(provider, present)}"
        )


def _cast(value: Any, kind: str) -> Any:
    if kind in _FLOATS and isinstance(value, np.ndarray) and value.dtype.name in _FLOATS.values():
        return value.astype(_FLOATS[kind], copy=False)
    return value
