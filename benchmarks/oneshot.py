"""Prune, share and encode the MNIST networks in one shot: unlabelled calibration images, no retraining.

    python benchmarks/oneshot.py [--models lenet300,lenet5] [--images 10000] [--json FILE]

Each model is compressed twice: for the smallest file whose test error rises by at most 0.30 points (target: 30
times smaller), and for one that rises by at most 0.05 (20 times). The file is a plain .onnx; its accuracy is that
of onnxruntime on the 10,000 test images. The same budgets with magnitude pruning stand beside them. Exits with 1
and a list when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zoo

from onnxslim_lab import optimize
from onnxslim_lab.data import Dataset

BATCH = 500
SECONDS = 120.0


@dataclass(frozen=True)
class Goal:
    """A target: at most so many points of error for so many times fewer bytes, and how it is reached."""

    ratio: float
    points: float
    sparsity: float
    bits: int

    def steps(self, criterion: str) -> list[str]:
        """Return the passes; magnitude pruning has no use for data."""
        share = f"share:bits={self.bits}" + (",compensate=true" if criterion == "obs" else "")
        return ["simplify", f"prune:criterion={criterion},sparsity={self.sparsity}", share, "encode"]


GOALS = (Goal(30, 0.30, 0.90, 3), Goal(20, 0.05, 0.79, 3))


@dataclass(frozen=True)
class Row:
    """One model under one goal."""

    model: str
    passes: str
    bytes_before: int
    bytes_after: int
    error_before: float
    error_after: float
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.bytes_before / self.bytes_after

    @property
    def points(self) -> float:
        """How much the test error rose, in points."""
        return self.error_after - self.error_before

    def text(self) -> str:
        """Return the Markdown row."""
        return (
            f"| {self.model} | `{self.passes}` | {self.bytes_after:,} | {self.ratio:.1f}x | "
            f"{self.error_before:.2f} -> {self.error_after:.2f} % | {self.seconds:.0f} s |"
        )


def feeds(images: Any) -> list[dict[str, Any]]:
    """Return batches of images as the networks take them."""
    ready = (images.reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    return [{"x": ready[start : start + BATCH]} for start in range(0, len(ready), BATCH)]


def compress(name: str, goal: Goal, criterion: str, calibration: Dataset, test: Dataset) -> Row:
    """Compress one model and measure the file that is written."""
    steps = goal.steps(criterion)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "small.onnx"
        start = time.perf_counter()
        result = optimize(
            zoo.path(name), target, steps=steps, data=calibration, evaluation=test, metrics=["top1"]
        )
        seconds = time.perf_counter() - start
        (top1,) = result.report.metrics
        before, after = (100 * (1 - (value or 0.0)) for value in (top1.original, top1.result))
        size = target.stat().st_size
    return Row(name, " ".join(steps[1:]), zoo.path(name).stat().st_size, size, before, after, seconds)


def main() -> int:
    """Run, print the table and the targets missed."""
    parser = argparse.ArgumentParser(description="Compress the MNIST networks without retraining.")
    parser.add_argument("--models", default="lenet300,lenet5", help="names, comma separated")
    parser.add_argument("--images", type=int, default=10_000, help="calibration images, without labels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args()
    train_x, _, test_x, test_y = zoo.mnist()
    calibration = Dataset(feeds(train_x[: options.images]), source="MNIST, training images")
    test = Dataset(feeds(test_x), labels=test_y, source="MNIST, test images")
    print("| model | passes | bytes | smaller | test error | |")
    print("|---|---|---:|---:|---|---:|")
    rows, missed = [], []
    for name in options.models.split(","):
        for goal in GOALS:
            for criterion in ("obs", "magnitude"):
                row = compress(name, goal, criterion, calibration, test)
                print(row.text(), flush=True)
                rows.append(row)
                if criterion == "magnitude":
                    continue
                if row.ratio < goal.ratio or row.points > goal.points + 1e-9:
                    missed.append(f"{name}: {row.ratio:.1f}x at {row.points:+.2f} points")
                if row.seconds > SECONDS:
                    missed.append(f"{name}: {row.seconds:.0f} s, the target is {SECONDS:.0f}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    if missed:
        print(f"\n{len(missed)} targets missed:\n" + "\n".join(f"- {line}" for line in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
