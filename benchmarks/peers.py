"""Run one optimizer on one model in a process of its own and measure that process.

    PYTHON benchmarks/peers.py TOOL IN OUT      prints one line of JSON

Every tool gets the same treatment: its modules are imported first, then the clock runs over
load -> simplify -> save. This file imports only the standard library, so that it also runs in the
environment of the peers (`pip install onnxslim onnxsim onnxoptimizer`), which need not have onnxslim_lab.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "onnxslim_lab"
OURS_GROWING = "onnxslim_lab allow_growth"
TIMEOUT = 900.0

Job = Callable[[str, str], object]


@dataclass(frozen=True)
class Measurement:
    """What one run took. Memory in bytes, time in seconds; `error` is empty when the tool succeeded.

    `idle` is the peak resident memory once the tool is imported, `peak` that of the whole run, helper
    processes included.
    """

    seconds: float = 0.0
    idle: int = 0
    peak: int = 0
    error: str = ""

    @property
    def memory(self) -> int:
        """Peak memory beyond what importing the tool takes."""
        return self.peak - self.idle


def measure(tool: str, source: Path, target: Path, python: str) -> Measurement:
    """Run `tool` on `source` with the given interpreter; the result is written to `target`."""
    command = [python, str(Path(__file__).resolve()), tool, str(source), str(target)]
    environment = dict(os.environ)
    if tool.startswith(OURS):
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment
        )
    except FileNotFoundError:
        return Measurement(error=f"{python}: no such interpreter")
    except subprocess.TimeoutExpired:
        return Measurement(error=f"not finished after {TIMEOUT:.0f} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"seconds"'):
            return Measurement(**json.loads(line))
    if done.returncode < 0:
        return Measurement(error=f"the process was ended by signal {-done.returncode}")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return Measurement(error=said[-1][:200] if said else f"exit code {done.returncode}")


def _onnxslim() -> Job:
    onnx, onnxslim = importlib.import_module("onnx"), importlib.import_module("onnxslim")
    for lazy in ("onnxslim.core", "onnxslim.utils"):
        importlib.import_module(lazy)
    return lambda source, target: onnx.save(
        onnxslim.slim(source), target
    )  # without its tables of before and after


def _onnxsim() -> Job:
    onnx, onnxsim = importlib.import_module("onnx"), importlib.import_module("onnxsim")
    return lambda source, target: onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def _onnxoptimizer() -> Job:
    onnx, optimizer = importlib.import_module("onnx"), importlib.import_module("onnxoptimizer")
    return lambda source, target: onnx.save(optimizer.optimize(onnx.load(source), fixed_point=True), target)


def _ours(**options: Any) -> Job:
    base, graph = importlib.import_module("onnxslim_lab.base"), importlib.import_module("onnxslim_lab.graph")
    simplify = importlib.import_module("onnxslim_lab.passes.simplify").Simplify(**options)

    def run(source: str, target: str) -> None:
        model = graph.Graph.load(source)
        simplify.run(model, base.Context())
        model.save(target)

    return run


TOOLS: dict[str, Callable[[], Job]] = {
    OURS: _ours,
    OURS_GROWING: lambda: _ours(allow_growth=True),
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
    "onnxoptimizer": _onnxoptimizer,
}
PEERS = ("onnxslim", "onnxsim", "onnxoptimizer")


def peak_memory() -> int:
    """Return the peak resident memory of this program, plus that of helper processes it has waited for, in bytes.

    Read from /proc where there is one: getrusage carries the peak of the parent over into its children.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if status.exists():
        own = next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    helpers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return own + helpers * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    """Run the tool named on the command line and print its measurement."""
    tool, source, target = sys.argv[1:]
    job = TOOLS[tool]()
    idle = peak_memory()
    start = time.perf_counter()
    error = ""
    try:
        job(source, target)
    except Exception as problem:  # noqa: BLE001 - whatever a tool raises is its verdict
        lines = str(problem).strip().splitlines()
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        error = f"{type(problem).__name__}: {lines[0][:150] if lines else ''} ({place})"
    seconds = time.perf_counter() - start
    if not error and not Path(target).exists():
        error = "wrote no file"
    print(json.dumps({"seconds": seconds, "idle": idle, "peak": peak_memory(), "error": error}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
