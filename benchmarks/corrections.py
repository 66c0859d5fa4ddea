"""What equalize and correct-bias add to static quantization to 8 bits: outputs on feeds they have not seen.

    python benchmarks/corrections.py [--models efficientnet_lite0,vital_minilm_l3] [--samples 8] [--json FILE]

Each model is quantized with one scale for a weight and with one for each output channel, rounded to nearest, by
itself and with the steps around it. The figure is the SQNR in decibels of the worst output on feeds of another seed.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import zoo

from onnxslim_lab import optimize
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.recipe import Recipe
from onnxslim_lab.sessions import Runner
from onnxslim_lab.worker.messages import Value

Feed = dict[str, Value]

QUANTIZE = "quantize:rounding=nearest,ranges=minmax,granularity={}"
STEPS = {
    "quantize": [QUANTIZE],
    "equalize, quantize": ["equalize:granularity={}", QUANTIZE],
    "equalize in parts, quantize": ["equalize:granularity={},parts=6", QUANTIZE],
    "quantize, correct-bias": [QUANTIZE, "correct-bias"],
}


@dataclass(frozen=True)
class Row:
    """One model under some steps."""

    model: str
    granularity: str
    steps: str
    sqnr_db: float
    seconds: float


def measure(model: str, granularity: str, name: str, samples: int, runner: Runner) -> Row:
    """Run the steps on a model and compare its outputs."""
    original = Graph.load(zoo.path(model))
    start = time.perf_counter()
    steps = ["simplify", *(step.format(granularity) for step in STEPS[name])]
    recipe = Recipe.of(steps, allow_opset_raise=True, verify="off")
    feeds: list[Feed] = [dict(feed) for feed in zoo.feeds(model, samples, 0)]
    data = Dataset(feeds, source=model)
    result = optimize(original, recipe=recipe, data=data, runner=runner, cache=False).graph
    seconds = time.perf_counter() - start
    other: list[Feed] = [dict(feed) for feed in zoo.feeds(model, samples, 99)]
    errors = compare_outputs(runner.run(original, other), runner.run(result, other))
    worst = min(error.sqnr_db for error in errors if error.floating)
    return Row(model, granularity, name, round(worst, 2), round(seconds, 1))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="efficientnet_lite0,vital_minilm_l3")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with Runner(threads=1) as runner:
        for model in arguments.models.split(","):
            for granularity in ("tensor", "channel"):
                for name in STEPS:
                    row = measure(model, granularity, name, arguments.samples, runner)
                    rows.append(row)
                    print(
                        f"{row.model:22} {row.granularity:8} {row.steps:30} {row.sqnr_db:6.2f} dB "
                        f"{row.seconds:6.1f} s",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
