"""The child process of a Runner: creates onnxruntime sessions and runs them.

Started as `python -m onnxslim_lab.worker.main FOLDER`. Requests arrive on standard input, answers
leave on standard output (see `_messages`). FOLDER is the Runner's private folder; the child removes it
when its input ends, so that a parent that was killed leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any

from onnxslim_lab.worker.binding import needs_binding, run_bound
from onnxslim_lab.worker.measure import Measurement
from onnxslim_lab.worker.messages import Value, receive, send


def _describe(arguments: Any) -> list[dict[str, Any]]:
    """Return name, type and shape of a session's inputs or outputs."""
    return [{"name": a.name, "type": a.type, "shape": list(a.shape)} for a in arguments]


class Worker:
    """Holds the sessions; one method per request."""

    def __init__(self) -> None:
        self.sessions: dict[str, Any] = {}
        self.measurement: Measurement | None = None

    def hello(self) -> dict[str, Any]:
        """Import onnxruntime and return its version and providers."""
        import onnxruntime  # noqa: PLC0415

        onnxruntime.disable_telemetry_events()
        onnxruntime.set_default_logger_severity(3)
        return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}

    def load(
        self, key: str, path: str, level: str, threads: int, providers: list[str], deterministic: bool
    ) -> dict[str, Any]:
        """Create the session `key` and return its signature and the seconds it took."""
        import onnxruntime  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.use_deterministic_compute = deterministic
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        if deterministic:
            onnxruntime.set_seed(1)
        start = time.perf_counter()
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        seconds = time.perf_counter() - start
        self.sessions[key] = session
        return {
            "seconds": seconds,
            "providers": session.get_providers(),
            "inputs": _describe(session.get_inputs()),
            "overridable": _describe(session.get_overridable_initializers()),
            "outputs": _describe(session.get_outputs()),
        }

    def drop(self, key: str) -> dict[str, Any]:
        """Release the session `key`."""
        self.sessions.pop(key, None)
        return {}

    def run(self, key: str, feed: dict[str, Value], outputs: list[str]) -> dict[str, Any]:
        """Run one feed and return the named outputs."""
        session = self.sessions[key]
        if needs_binding(session, feed, outputs):
            return {"outputs": run_bound(session, feed, outputs)}
        return {"outputs": dict(zip(outputs, session.run(outputs, feed), strict=True))}

    def clock(self, key: str, feed: dict[str, Value], outputs: list[str], enough: float) -> dict[str, Any]:
        """Run one feed until so many seconds are over, once at least; return the least that a run took."""
        least, began = float("inf"), time.perf_counter()
        while True:
            start = time.perf_counter()
            self.run(key, feed, outputs)
            end = time.perf_counter()
            least = min(least, end - start)
            if end - began >= enough:
                return {"seconds": least}

    def measure(self, key: str, **specification: Any) -> dict[str, Any]:
        """Begin to measure with the session `key`; see Measurement."""
        self.measurement = Measurement(self.sessions[key], **specification)
        return {}

    def measure_feed(self, number: int, feed: dict[str, Value], samples: int) -> dict[str, Any]:
        """Take a feed; an error may be that of one before it."""
        assert self.measurement is not None
        self.measurement.feed(number, feed, samples)
        return {}

    def measured(self) -> dict[str, Any]:
        """End measuring and return what was found."""
        assert self.measurement is not None
        found = self.measurement.finish()
        self.measurement = None
        return found


def serve(worker: Any) -> None:
    """Answer requests with the methods of `worker` until the input ends."""
    folder = sys.argv[1]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what onnxruntime prints must not mix with the answers
    requests = sys.stdin.buffer
    try:
        while True:
            request = receive(requests)
            try:
                answer = getattr(worker, request.pop("call"))(**request)
            except Exception as error:  # noqa: BLE001 - the parent raises it
                answer = {"error": str(error) or type(error).__name__, "type": type(error).__name__}
            send(answers, answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Destructors of a session that crashed half way may crash again: leave without them.
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    serve(Worker())
