"""Compare `convert-precision` with the float16 converters of onnxruntime and onnxconverter-common on the zoo.

    python benchmarks/precision.py --peers PYTHON [--models a,b]
    python benchmarks/precision.py --no-peers

PYTHON is the interpreter of an environment with onnxruntime and onnxconverter-common (default:
ONNXSLIM_LAB_PEERS). Ours is calibrated on one feed and judged, as the peers are, on another one. Prints a
Markdown table for each tool: whether the result loads and runs, the least cosine of an output (labels: the
share that is equal), bytes after / before, and for ours the nodes that stay float32 and the cosine on
the NumPy runtime, which rounds to float16 wherever the model says so. Exits with 1 when one of ours fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zoo

from onnxslim_lab import Graph, Runner
from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import LabError
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.passes.convert_precision import ConvertPrecision
from onnxslim_lab.precision.measure import worst
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.statistics import Calibration

LEAST = 0.9999
TIMEOUT = 600.0
OURS = "onnxslim_lab"
PEERS = {
    "onnxruntime": "from onnxruntime.transformers.float16 import convert_float_to_float16 as convert",
    "onnxconverter-common": "from onnxconverter_common.float16 import convert_float_to_float16 as convert",
}
SCRIPT = """
import sys, onnx
{imports}
onnx.save(convert(onnx.load(sys.argv[1]), keep_io_types=True), sys.argv[2])
"""


@dataclass
class Result:
    """What one tool made of one model; `error` says why there is nothing to measure."""

    cosine: float = 0.0
    ratio: float = 0.0
    error: str = ""
    low: int = 0
    kept: int = 0
    exact: float | None = None
    seconds: float = 0.0


def ours(name: str, runner: Runner, target: Path) -> Result:
    """Convert a model with this package."""
    graph = Graph.load(zoo.path(name))
    data = Dataset([{**feed} for feed in zoo.feeds(name, 1, 0)], None, "zoo", False)
    start = time.perf_counter()
    outcome = ConvertPrecision().run(graph, Context(calibration=Calibration(runner, data)))
    seconds = time.perf_counter() - start
    graph.save(target)
    low = next((c.detail["nodes"] for c in outcome.changes if "nodes" in c.detail), 0)
    kept = sum(refusal.reason.startswith("stays float32") for refusal in outcome.refusals)
    return Result(low=int(low), kept=kept, seconds=seconds)


def peer(tool: str, name: str, python: str, target: Path) -> Result:
    """Convert a model with a peer, in a process of its own."""
    script = SCRIPT.format(imports=PEERS[tool])
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [python, "-c", script, str(zoo.path(name)), str(target)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Result(error=f"not finished after {TIMEOUT:.0f} s")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Result(error=f"does not convert: {said[-1][:80]}")
    return Result(seconds=time.perf_counter() - start)


def judge(result: Result, name: str, runner: Runner, target: Path, *, exact: bool) -> None:
    """Run the result and compare it with the original."""
    original = Graph.load(zoo.path(name))
    feeds: list[dict[str, Any]] = [{**feed} for feed in zoo.feeds(name, 1, 1)]
    reference = runner.run(original, feeds)
    result.ratio = target.stat().st_size / zoo.path(name).stat().st_size
    try:
        graph = Graph.load(target)
        result.cosine = worst(compare_outputs(reference, runner.run(graph, feeds)))[0]
    except LabError as error:
        result.error = f"does not load or run: {str(error)[:100]}"
        return
    if exact:
        try:
            outputs = [Interpreter(graph).run(feed) for feed in feeds]
            result.exact = worst(compare_outputs(reference, outputs))[0]
        except LabError as error:
            print(f"{name}: not run on NumPy: {error}", file=sys.stderr)


def row(name: str, result: Result) -> str:
    """Return a line of the table."""
    if result.error:
        return f"| {name} | no | | | | | | {result.error.replace('|', '/')} |"
    exact = "" if result.exact is None else f"{result.exact:.6f}"
    nodes = f"{result.low} | {result.kept}" if result.low or result.kept else " | "
    return (
        f"| {name} | yes | {result.cosine:.6f} | {exact} | {result.ratio:.3f} | {nodes} | "
        f"{result.seconds:.1f} s |"
    )


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=os.environ.get("ONNXSLIM_LAB_PEERS", ""), metavar="PYTHON")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--models", default="", help="names, separated by commas")
    options = parser.parse_args()
    names = options.models.split(",") if options.models else zoo.names()
    tools = [OURS, *([] if options.no_peers or not options.peers else PEERS)]
    lines: dict[str, list[str]] = {tool: [] for tool in tools}
    good = dict.fromkeys(tools, 0)
    with Runner(threads=1) as runner, tempfile.TemporaryDirectory() as folder:
        for name in names:
            for tool in tools:
                target = Path(folder) / f"{name}.onnx"
                target.unlink(missing_ok=True)
                try:
                    made = (
                        ours(name, runner, target)
                        if tool == OURS
                        else peer(tool, name, options.peers, target)
                    )
                except LabError as error:
                    made = Result(error=str(error)[:100])
                if not made.error:
                    judge(made, name, runner, target, exact=tool == OURS)
                lines[tool].append(row(name, made))
                good[tool] += not made.error and made.cosine >= LEAST
                print(tool, lines[tool][-1], file=sys.stderr, flush=True)
    for tool in tools:
        print(f"\n{tool}: {good[tool]} of {len(names)} load, run and reach {LEAST}\n")
        print("| model | runs | cosine | cosine, NumPy | bytes | float16 nodes | float32 nodes | |")
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(lines[tool]))
    return int(good[OURS] < len(names))


if __name__ == "__main__":
    sys.exit(main())
