"""Show what prune + share + encode make of files: bytes, load time, exactness, accuracy where it is known.

    python benchmarks/storage.py [--models a,b] [--sparsity 0.92] [--bits 4] [--json FILE]

Per model: the file; simplified and encoded (lossless); pruned, shared and encoded. `decoded` counts the
weights of the main graph that onnxruntime decodes to the very bits that `share` left; `outputs differ` holds
the whole encoded model, bodies included, against the one before `encode`. Accuracy is on MNIST's 10,000
test images for the LeNets; for the other models sizes only are shown, at settings that would need a
search under the user's own metric. Exits with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import zoo
from agreement import judge

from onnxslim_lab.base import Context, Pass
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.encode import Encode
from onnxslim_lab.passes.prune import Prune
from onnxslim_lab.passes.share import Share
from onnxslim_lab.passes.simplify import Simplify

LENETS = ("lenet300", "lenet5")
LARGEST = {"lenet300": 36_000}  # bytes, at the default settings
SLOWEST = 0.2  # seconds to load a LeNet
LOADS = 5
DEFAULT_SPARSITY, DEFAULT_BITS = 0.92, 4


@dataclass
class Row:
    """Figures of one model: bytes of the files, seconds to load, accuracy in [0, 1] (nan: not measured)."""

    model: str
    input_bytes: int = 0
    lossless_bytes: int = 0
    bytes: int = 0
    load_before: float = math.nan
    load_after: float = math.nan
    encoded_weights: int = 0
    inexact: str = ""
    difference: float = math.nan
    accuracy_before: float = math.nan
    accuracy_after: float = math.nan
    error: str = ""

    def markdown(self) -> str:
        """Return the Markdown row."""
        if self.error:
            return f"| {self.model} | | | | | | | | | {self.error.replace('|', '/')} |"
        accuracy = "not measured"
        if not math.isnan(self.accuracy_before):
            accuracy = f"{100 * self.accuracy_before:.2f} -> {100 * self.accuracy_after:.2f} %"
        cells = [
            self.model,
            f"{self.input_bytes / 1000:.1f}",
            f"{self.lossless_bytes / 1000:.1f}",
            f"{self.bytes / 1000:.1f}",
            f"{self.input_bytes / self.bytes:.1f}x",
            f"{self.load_before:.3f}",
            f"{self.load_after:.3f}",
            self.inexact or f"{self.encoded_weights} exact",
            f"{self.difference:.0e}",
            accuracy,
        ]
        return "| " + " | ".join(cells) + " |"

    def missed(self, *, default_settings: bool) -> list[str]:
        """Return one line for each target this row misses."""
        lines = [f"{self.model}: {reason}" for reason in (self.error, self.inexact) if reason]
        limit = LARGEST.get(self.model) if default_settings else None
        if limit is not None and self.bytes > limit:
            lines.append(f"{self.model}: {self.bytes} bytes, the target is {limit}")
        if max(self.bytes, self.lossless_bytes) > self.input_bytes:
            lines.append(f"{self.model}: larger than the input of {self.input_bytes} bytes")
        if self.model in LENETS and self.load_after > SLOWEST:
            lines.append(f"{self.model}: {self.load_after:.3f} s to load, the target is {SLOWEST} s")
        return lines


def session(file: Path | bytes) -> onnxruntime.InferenceSession:
    """Open a model as a user would."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def load_seconds(file: Path) -> float:
    """Return the median time to make a session."""
    times = []
    for _ in range(LOADS):
        start = time.perf_counter()
        session(file)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def mnist_accuracy(file: Path) -> float:
    """Return the share of MNIST's test images classified right."""
    _, _, images, labels = zoo.mnist()
    scores = session(file).run(None, {"x": images[:, None].astype(np.float32) / 255})[0]
    return float((scores.argmax(1) == labels).mean())


def first_inexact(shared: Graph, encoded: Path) -> tuple[int, str]:
    """Compare the weights of the main graph that the file decodes with what `share` left, bit for bit.

    Returns:
        How many weights the file decodes, and what is wrong with the first bad one ("" when none is).
    """
    model = onnx.load(encoded)
    made = {name for node in model.graph.node for name in node.output}
    names = [name for name in shared.initializers if name in made]
    stored = {tensor.name for tensor in model.graph.initializer}
    lost = [name for name in shared.initializers if name not in made | stored]
    if lost:
        return len(names), f"weight {lost[0]} is gone"
    if not names:
        return 0, ""
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    needed = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model([], names)
    decoded = session(needed.SerializeToString()).run(None, {})
    for name, value in zip(names, decoded, strict=True):
        expected = shared.constant(name)
        if expected is None or expected.dtype != value.dtype or expected.shape != value.shape:
            return len(names), f"weight {name} has another type"
        if expected.tobytes() != value.tobytes():
            return len(names), f"weight {name} differs"
    return len(names), ""


def measure(name: str, sparsity: float, bits: int, scratch: Path) -> Row:
    """Compress one model in this process."""
    original = zoo.path(name)
    row = Row(name, input_bytes=original.stat().st_size)
    context = Context()
    graph = Graph.load(original)
    Simplify().run(graph, context)
    lossless, lossy = graph.copy(), graph.copy()
    Encode().run(lossless, context)
    lossless.save(scratch / "lossless.onnx")
    row.lossless_bytes = (scratch / "lossless.onnx").stat().st_size
    steps: tuple[Pass, ...] = (Prune(sparsity=sparsity, scope="layer"), Share(bits=bits))
    for step in steps:
        step.run(lossy, context)
    shared = lossy.copy()
    Encode().run(lossy, context)
    result = scratch / "result.onnx"
    lossy.save(result)
    row.bytes = result.stat().st_size
    row.load_before, row.load_after = load_seconds(original), load_seconds(result)
    row.encoded_weights, row.inexact = first_inexact(shared, result)
    shared.save(scratch / "shared.onnx")
    judgement = judge(name, scratch / "shared.onnx", result)
    row.difference = judgement.difference
    row.inexact = row.inexact or judgement.reason
    if name in LENETS:
        row.accuracy_before, row.accuracy_after = mnist_accuracy(original), mnist_accuracy(result)
    return row


def measure_apart(name: str, sparsity: float, bits: int) -> Row:
    """Compress one model in a child process: onnxruntime may end it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    command += ["--sparsity", str(sparsity), "--bits", str(bits)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return Row(name, error=said[-1][:200] if said else f"exit code {done.returncode}")


def main() -> int:
    """Print the table; return 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Show what prune, share and encode make of files.")
    parser.add_argument("--models", help="names, comma separated; default all of the zoo")
    parser.add_argument("--sparsity", type=float, default=DEFAULT_SPARSITY)
    parser.add_argument("--bits", type=int, default=DEFAULT_BITS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory(prefix="storage-") as scratch:
            row = measure(options.child, options.sparsity, options.bits, Path(scratch))
        print(json.dumps(asdict(row)))
        return 0
    names = options.models.split(",") if options.models else zoo.names()
    passes = f"prune:sparsity={options.sparsity},scope=layer share:bits={options.bits} encode"
    print(f"{passes}\n")
    columns = ["model", "kB", "simplify + encode", "prune + share + encode", "ratio", "load s", "after"]
    columns += ["decoded", "outputs differ", "accuracy"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    rows = []
    for name in names:
        rows.append(measure_apart(name, options.sparsity, options.bits))
        print(rows[-1].markdown(), flush=True)
    if options.json:
        figures = [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in row.items()
            }
            for row in map(asdict, rows)
        ]
        document = {"passes": passes, "rows": figures}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    default = (options.sparsity, options.bits) == (DEFAULT_SPARSITY, DEFAULT_BITS)
    lines = [line for row in rows for line in row.missed(default_settings=default)]
    if lines:
        print(f"\n{len(lines)} targets missed:\n" + "\n".join(f"- {line}" for line in lines))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
