"""Static int8 of the zoo side by side with onnxruntime's quantizer and NNCF: same calibration data, same format.

    python benchmarks/quantization.py --peers PYTHON [--models a,b] [--tools a,b] [--jobs N] [--folder DIR]
        [--runs N] [--json FILE]

PYTHON is the interpreter of an environment with the peers (default: ONNXSLIM_LAB_PEERS, else none are run).
Each tool quantizes in a process of its own from the same feeds; the results are judged on other feeds and
timed in turn on one thread. Columns: whether it loads and runs, SQNR of the worst output, the model's own
metric, share of the multiply-accumulates left in float by choice, bytes and median latency relative to the float
model. With --folder and --runs 0 first, the models are made while the machine is busy, and timed by a second
run while it is not. Exits with 1 and a list when a target is missed.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zoo
from quantization_metrics import METRICS, child, meets
from quantizers import OURS, TOOLS, quantize

from onnxslim_lab.base import Outcome
from onnxslim_lab.graph import Graph
from onnxslim_lab.selection import find_targets

CALIBRATION, EVALUATION = 32, 64  # feeds; images come one to a feed
MORE = {  # feeds, where these are too few: of 64 answers to photographs one is more than the target leaves
    "efficientnet_lite0": (128, 256),
    "nudenet_yolov8n": (128, EVALUATION),  # most crops of photographs show nothing that it detects
    **{name: (256, EVALUATION) for name in METRICS if name.startswith("silero")},  # 36 ms of sound each
}
FLOAT_MACS = 0.1  # at most
FILE = 0.27  # of the float file, for models of convolutions and products; of the weights' bytes for others
DENSE = 0.9  # of the file's bytes in weights of convolutions and products: these models have to meet FILE
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


def make(name: str, tools: list[str], peers: str, jobs: int, folder: Path) -> list[Result]:
    """Quantize one model with every tool, `jobs` at a time, and judge the results.

    Results that an earlier run left in the folder are taken from there.
    """
    record = folder / "results.json"
    known = {one["tool"]: Result(**one) for one in json.loads(record.read_text())} if record.exists() else {}
    source = zoo.path(name)
    calibration, evaluation = MORE.get(name, (CALIBRATION, EVALUATION))
    for kind, samples, seed in (("calibration", calibration, 11), ("evaluation", evaluation, 12)):
        (folder / kind).write_bytes(pickle.dumps(zoo.feeds(name, samples=samples, seed=seed)))

    def one(tool: str) -> Result:
        if tool in known:
            return known[tool]
        target = folder / file_name(tool)
        python = sys.executable if tool.startswith(OURS) else peers
        made = quantize(tool, source, folder / "calibration", target, python)
        result = Result(tool, made.seconds, error=made.error, facts=made.facts)
        answer = {} if made.error else child("judge", source, target, folder / "evaluation", name)
        result.error = result.error or answer.get("error", "")
        if not result.error:
            result.sqnr, result.metric = answer["sqnr"], answer.get("metric", math.nan)
            result.float_macs = made.facts.get("float_macs", math.nan)
            result.bytes = target.stat().st_size / source.stat().st_size
        return result

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, tools))
    record.write_text(
        json.dumps([asdict(result) for result in (known | {r.tool: r for r in results}).values()])
    )
    return results


def clock(name: str, results: list[Result], runs: int, folder: Path) -> None:
    """Time the results that run in turn with the float model, alone on the machine."""
    paths = {result.tool: str(folder / file_name(result.tool)) for result in results if not result.error}
    source = str(zoo.path(name))
    times = child("time", runs, folder / "evaluation", source, *paths.values()) if paths else {}
    for result in results:
        if result.tool in paths and "error" not in times:
            pairs = zip(times[paths[result.tool]], times[source], strict=True)
            result.latency = statistics.median(a / b for a, b in pairs)


def file_name(tool: str) -> str:
    """Return the name of a tool's result."""
    return f"{tool.replace(' ', '_')}.onnx"


def largest_file(path: Path) -> float:
    """Return how large the int8 file may be, relative to the float file: FILE of what the weights take."""
    sizes = {"dense": 0, "other": 0}
    for target in find_targets(Graph.load(path), Outcome(), step="file size"):
        product = all(layer.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") for layer in target.layers)
        sizes["dense" if product else "other"] += target.read().nbytes
    dense, weights = (size / path.stat().st_size for size in (sizes["dense"], sum(sizes.values())))
    return FILE if dense >= DENSE else FILE * weights + 1 - weights


def missed(name: str, results: list[Result]) -> Iterator[str]:
    """Yield the targets that our result misses."""
    ours = next((result for result in results if result.tool == OURS), None)
    if ours is None:
        return
    if ours.error:
        yield f"{name}: {ours.error}"
        return
    peers = [r for r in results if not r.tool.startswith(OURS) and not r.error]
    best = max(
        (peer.sqnr for peer in peers if peer.sqnr < math.inf), default=-math.inf
    )  # inf: nothing quantized
    if ours.sqnr < best - PEER_SLACK:
        yield f"{name}: SQNR {ours.sqnr:.2f} dB, a peer reaches {best:.2f}"
    if name in METRICS and not meets(name, ours.metric):
        yield f"{name}: {METRICS[name][0]} {ours.metric:.4f}, the target is {METRICS[name][2]}"
    if ours.float_macs > FLOAT_MACS + 1e-6:
        yield f"{name}: {ours.float_macs:.1%} of the multiply-accumulates are left in float"
    limit = largest_file(zoo.path(name))
    if ours.bytes > limit:
        yield f"{name}: {ours.bytes:.3f} of the float file, at most {limit:.3f} was wanted"
    fastest = min((peer.latency for peer in peers), default=math.inf)
    if ours.latency > fastest * LATENCY_SLACK:
        yield f"{name}: {ours.latency:.2f} of float's latency, a peer takes {fastest:.2f}"


def main() -> int:
    """Run, print the table and the targets missed."""
    parser = argparse.ArgumentParser(description="Compare static int8 quantizers on the zoo.")
    parser.add_argument("--models", help="names, comma separated; default all of the zoo with dense layers")
    parser.add_argument("--tools", help=f"of {', '.join(TOOLS)}; default all")
    parser.add_argument("--peers", default=os.environ.get("ONNXSLIM_LAB_PEERS", ""), help="interpreter")
    parser.add_argument("--jobs", type=int, default=1, help="tools that quantize at a time; timing is alone")
    parser.add_argument("--runs", type=int, default=15, help="alternating timed runs of each model; 0: none")
    parser.add_argument("--folder", type=Path, help="keep the results there, and take those that are there")
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
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder / name if options.folder else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            results = everything[name] = make(name, tools, options.peers, options.jobs, folder)
            if options.runs:
                clock(name, results, options.runs, folder)
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
