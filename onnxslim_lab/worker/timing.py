"""The child process that `bench` times a model in: one process for each model, nothing else in it.

Started as `python -m onnxslim_lab.worker.timing FOLDER`; requests and answers are those of worker.main.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from onnxslim_lab.worker.binding import needs_binding, run_bound
from onnxslim_lab.worker.main import serve
from onnxslim_lab.worker.messages import Value

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class TimingWorker:
    """Loads one model, runs it many times, and tells time and memory."""

    def __init__(self) -> None:
        self.session: Any = None
        self.path = ""
        self.options: dict[str, Any] = {}
        self.feeds: list[dict[str, Value]] = []

    def hello(self) -> dict[str, Any]:
        """Import onnxruntime and return its version and providers."""
        import onnxruntime  # noqa: PLC0415

        onnxruntime.disable_telemetry_events()
        onnxruntime.set_default_logger_severity(3)
        return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}

    def load(self, path: str, threads: int, provider: str) -> dict[str, Any]:
        """Create the session; return its signature, the seconds it took and the memory before it."""
        self.path, self.options = path, {"threads": threads, "provider": provider}
        reset = reset_peak()
        before = memory("VmRSS")
        start = time.perf_counter()
        self.session = self._session()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "before": before,
            "reset": reset,
            "providers": self.session.get_providers(),
            "inputs": {item.name: item.type for item in self.session.get_inputs()},
        }

    def _session(self, profile: str = "") -> Any:
        import onnxruntime  # noqa: PLC0415

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.options["threads"]
        options.inter_op_num_threads = 1
        # Threads that spin while the other model runs would slow it down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        return onnxruntime.InferenceSession(self.path, options, providers=[self.options["provider"]])

    def reload(self) -> dict[str, Any]:
        """Create another session beside it, drop it, and return the seconds its creation took."""
        start = time.perf_counter()
        session = self._session()
        seconds = time.perf_counter() - start
        del session
        return {"seconds": seconds}

    def feed(self, feed: dict[str, Value]) -> dict[str, Any]:
        """Keep a feed to run."""
        self.feeds.append(feed)
        return {}

    def run(self, feed: int, count: int) -> dict[str, Any]:
        """Run a feed so many times in a row and return the seconds of all runs together."""
        values, session = self.feeds[feed], self.session
        names = [output.name for output in session.get_outputs()]
        bound = needs_binding(session, values, names)
        start = time.perf_counter()
        if bound:
            for _ in range(count):
                run_bound(session, values, names)
        else:
            for _ in range(count):
                session.run(None, values)
        return {"seconds": time.perf_counter() - start}

    def peak(self) -> dict[str, Any]:
        """Return the most memory the process had since it loaded the model, in bytes; None if not known."""
        return {"peak": memory("VmHWM") or highest()}

    def profile(self, count: int) -> dict[str, Any]:
        """Run every feed so many times with onnxruntime's profiler and return what each node took.

        Returns:
            nodes: [name, operator, seconds of one run] for each node.
        """
        session = self._session(str(Path.cwd() / "profile"))
        for feed in self.feeds:
            session.run(None, feed)
        skipped = len(self.feeds)
        for _ in range(count):
            for feed in self.feeds:
                session.run(None, feed)
        written = Path(session.end_profiling())
        events = json.loads(written.read_text(encoding="utf-8"))
        written.unlink()
        return {"nodes": node_times(events, skipped, count * len(self.feeds))}


def node_times(events: list[dict[str, Any]], skipped: int, runs: int) -> list[list[Any]]:
    """Return [name, operator, seconds of one run] of each node in a profile, longest first.

    The first `skipped` events of each node are those of warming up.
    """
    seen: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            name = re.sub(r"_kernel_time$", "", event["name"])
            seen[name, event["args"].get("op_name", "")].append(event["dur"] * 1e-6)
    timed = []
    for (name, operator), durations in seen.items():
        calls = max(1, round(len(durations) / (skipped + runs)))  # a body runs several times
        timed.append([name, operator, sum(durations[skipped * calls :]) / runs])
    return sorted(timed, key=lambda item: -item[2])


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes, 0 when there is none."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def reset_peak() -> bool:
    """Let VmHWM start anew; return whether that could be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def highest() -> int:
    """Return the greatest memory of the process's life where /proc does not tell, 0 if nothing does."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage if sys.platform == "darwin" else usage * 1024)


if __name__ == "__main__":
    serve(TimingWorker())
