"""Remove 30 % of the multiply-accumulates by channels, and measure what that does to latency and agreement.

    python benchmarks/channels.py [--models a,b] [--macs 0.3] [--samples 32] [--unseen 64] [--pairs 15] [--trace]
        [--json FILE]

For every model: multiply-accumulates left, whether the checker takes the result, the median ratio of latencies
(one thread, original and result in turn; not with `--pairs 0`) and the relative output error, with the remaining
weights refitted and without; for EfficientNet-Lite0 also how often its first choice is the original's. ResNet-18,
MobileNetV2, DenseNet and the LSTM are built here, with random weights: they say something about latency only, and
are cut by their weights' norms (the LSTM's states are refitted). `--trace` tells the peak of the memory that Python
and NumPy took in this process beyond the model, which must stay below the budget; it takes time. Exits with 1 when
a model is less than 20 % faster, when refitting gains less than 10 points, or when memory goes over the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from channel_nets import BUILT
from zoo import path
from zoo_feeds import feeds

from onnxslim_lab.base import Context
from onnxslim_lab.bench import bench
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.prune_channels import PruneChannels
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration

MOST, GAIN = 0.8, 10.0
MEMORY = 512 << 20  # what `optimize` gives to statistics by default
AGREED = "efficientnet_lite0"


REFITTED = ("lstm",)
STEPS: dict[
    str, tuple[dict[str, Any], ...]
] = {  # of which the parts add up to all; "macs" is a share of what is asked for
    "vital_minilm_l3": (
        {"include": ("*self/query*",), "macs": 0.45},
        {"exclude": ("*self/query*",), "macs": 0.55},
    ),
}
MODELS = (AGREED, "resnet18", "ppocrv4_det", "mobilenetv2", "densenet", "vital_minilm_l3", "lstm")


@dataclass
class Row:
    """One model."""

    model: str
    macs: float
    ratio: float
    low: float
    high: float
    error: float
    error_without: float
    agreement: float
    agreement_without: float
    seconds: float
    peak: int

    @property
    def good(self) -> bool:
        """Whether the model meets what must hold."""
        faster = np.isnan(self.ratio) or self.ratio <= MOST
        agrees = self.model != AGREED or self.agreement >= self.agreement_without + GAIN
        return faster and agrees and self.peak <= MEMORY


def inputs(name: str, model: Graph, count: int, seed: int) -> list[dict[str, Any]]:
    """Return feeds of a model."""
    if name not in BUILT:
        return list(feeds(name, count, seed))
    random = np.random.default_rng(seed)
    shape = [size for size in model.shape_of("x") or () if isinstance(size, int)]
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def cut(
    model: Graph, name: str, macs: float, calibration: Calibration, **options: Any
) -> tuple[Graph, float]:
    """Return the model without so many multiply-accumulates, and the part that is left."""
    result, left = model.copy(), 1.0
    for step in STEPS.get(name, ({"macs": 1.0},)):
        settings = options | step | {"macs": step["macs"] * macs / left}
        outcome = PruneChannels(**settings).run(result, Context(calibration=calibration))
        assert outcome.changes, outcome.refusals
        left *= float(outcome.changes[0].detail["multiply-accumulates left"])
    onnx.checker.check_model(result.to_model(), full_check=True)
    return result, left


def measure(name: str, given: argparse.Namespace) -> Row:
    """Measure one model."""
    model = Graph.load(BUILT[name]() if name in BUILT else path(name))
    Simplify().run(model)
    learned = {} if name not in BUILT or name in REFITTED else {"criterion": "l2", "refit": "none"}
    count = given.samples if name not in BUILT or name in REFITTED else 2
    with Runner(threads=1) as runner, tempfile.TemporaryDirectory() as folder:
        calibration = Calibration(runner, Dataset(inputs(name, model, count, 1)), memory=MEMORY)
        if given.trace:
            tracemalloc.start()
        began = time.monotonic()
        result, left = cut(model, name, given.macs, calibration, **learned)
        seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tests = inputs(name, model, given.unseen if name == AGREED else 4, 99)
        last = model.outputs[-1]
        wanted, found = (_flat(runner.run(graph, tests), last) for graph in (model, result))
        plain = wanted * np.nan
        if not learned:
            plain = _flat(runner.run(cut(model, name, given.macs, calibration, refit="none")[0], tests), last)
        errors = [float(np.linalg.norm(run - wanted) / np.linalg.norm(wanted)) for run in (found, plain)]
        agreed = [float("nan")] * 2
        if name == AGREED:
            choice = wanted.argmax(1)
            agreed = [100 * float((run.argmax(1) == choice).mean()) for run in (found, plain)]
        ratio = low = high = float("nan")
        if given.pairs:
            files = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
            for graph, file in zip((model, result), files, strict=True):
                graph.save(file)
            report = bench(files[0], files[1], Dataset(tests[:1]), runs=given.pairs, threads=1)
            ratio, low, high = report.ratio, report.low, report.high
    return Row(
        model=name,
        macs=left,
        ratio=ratio,
        low=low,
        high=high,
        error=errors[0],
        error_without=errors[1],
        agreement=agreed[0],
        agreement_without=agreed[1],
        seconds=seconds,
        peak=peak,
    )


def _flat(runs: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(run[name], np.float64).reshape(-1) for run in runs])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--macs", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--unseen", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15, help="0: no latencies")
    parser.add_argument("--trace", action="store_true", help="measure memory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    print(
        "model                MACs left  latency (95 %)          output error: refit, none  "
        "agreement: refit, none  seconds  peak MB"
    )
    for name in given.models.split(","):
        row = measure(name, given)
        rows.append(row)
        interval = f"{row.ratio:.3f} ({row.low:.3f}-{row.high:.3f})"
        errors = f"{row.error:.3g}, {row.error_without:.3g}"
        agreed = "" if np.isnan(row.agreement) else f"{row.agreement:.1f} %, {row.agreement_without:.1f} %"
        print(
            f"{name:20} {row.macs:9.3f}  {interval:22}  {errors:25}  {agreed:22}  {row.seconds:7.1f}  "
            f"{row.peak / 2**20:7.0f}{'' if row.good else '  MISSED'}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
