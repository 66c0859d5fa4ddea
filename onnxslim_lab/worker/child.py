"""The parent's end of the child process that runs onnxruntime: requests, crashes, time limits."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from onnxslim_lab.errors import DataError, SessionError, one_line, quote, suggest
from onnxslim_lab.worker.messages import Value, narrowed, receive, send

# NumPy's sums in the child (Gram matrices) would else depend on the threads; onnxruntime has its own.
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_HALVES = {"tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16}
_START_TIMEOUT = 60.0  # seconds; importing onnxruntime is not the model's fault


class ChildError(Exception):
    """The child answered with an error; `kind` is the name of the exception it caught."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Session:
    """A session in the child.

    Attributes:
        key: What the child calls it.
        seconds: Time its creation took.
        bytes: Stored bytes of the model's weights.
        kinds: onnxruntime's type of each input and overridable initializer.
        required: Inputs that every feed must have.
    """

    key: str
    seconds: float
    bytes: int
    kinds: dict[str, str]
    required: tuple[str, ...]

    @classmethod
    def answered(cls, key: str, weights: int, answer: dict[str, Any]) -> Session:
        """Return the session that the child's answer describes."""
        kinds = {a["name"]: a["type"] for a in (*answer["inputs"], *answer["overridable"])}
        return cls(key, answer["seconds"], weights, kinds, tuple(a["name"] for a in answer["inputs"]))

    def fit(self, feed: dict[str, Value], number: int) -> dict[str, Value]:
        """Return a feed as the model takes it: float32 rounded to 16 bits where an input has become that.

        Raises:
            DataError: Its names are not the model's inputs.
        """
        for name in feed:
            if name not in self.kinds:
                raise DataError(f"feed {number}: no input {quote(name)}{suggest(name, self.kinds)}")
        for name in self.required:
            if name not in feed:
                raise DataError(f"feed {number}: input {quote(name)} ({self.kinds[name]}) is missing")
        return narrowed(feed, {name: _HALVES[kind] for name, kind in self.kinds.items() if kind in _HALVES})


class Child:
    """One process that answers requests in turn.

    Args:
        folder: The private folder; the child works there and removes it when its input ends.
        timeout: Seconds after which a request is given up and the process killed.
        module: What the process runs.
    """

    def __init__(self, folder: Path, timeout: float, module: str = "onnxslim_lab.worker.main") -> None:
        self._timeout = timeout
        self._log = folder / "stderr.txt"
        # The child finds this package where we found it, whatever its working folder.
        search = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={**os.environ, **dict.fromkeys(_BLAS, "1"), "PYTHONPATH": search},
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def request(self, doing: str, call: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Args:
            doing: What is being done, for errors: "loading model 'x'".
            call: Method of the worker.
            **arguments: Its arguments.

        Raises:
            ChildError: The child reports an error; it still lives.
            SessionError: The child died or was killed on timeout; it cannot be used again.
            TypeError: An argument cannot be sent; the child still lives.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = max(self._timeout, _START_TIMEOUT) if call == "hello" else self._timeout
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit, give_up)
        timer.daemon = True
        timer.start()
        try:
            send(cast("Any", self._process.stdin), {"call": call, **arguments})
            answer = receive(cast("Any", self._process.stdout))
        except (EOFError, OSError, ValueError):
            raise SessionError(self._obituary(doing, late=late.is_set())) from None
        except TypeError:  # not a message: nothing was sent
            raise
        except BaseException:  # interrupted: the streams are out of step
            self._process.kill()
            raise
        finally:
            timer.cancel()
        if "error" in answer:
            raise ChildError(str(answer["error"]), str(answer["type"]))
        return answer

    def _obituary(self, doing: str, *, late: bool) -> str:
        """Return how the process ended, as one line."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if late:
            return (
                f"onnxruntime took more than {self._timeout:g} s {doing} and was stopped; raise the timeout"
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code == -9:  # we did not kill it
            how += ", perhaps out of memory"
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        said = f": {one_line(last[0], 300)}" if last else ""
        return f"onnxruntime ended its process ({how}) while {doing}{said}"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
