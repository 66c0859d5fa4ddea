"""Compress a model larger than the memory it may use, and show the peak.

    python benchmarks/scale.py [--layers 64] [--width 4096] [--limit 1.2] [--folder DIR]

Writes a chain of MatMul -> Add -> Relu layers of random float32 weights with external data (64 layers of
4096 x 4096: 4.3 GB), row block by row block, then runs `optimize` with simplify, prune, share and encode in
a child process and prints the peak resident memory of it and its helpers, seconds and sizes. Exits with 1
when the peak is above the limit, the command fails or the result is not what was asked for.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
PASSES = ("simplify", "prune:sparsity=0.9,scope=layer", "share:bits=4", "encode")
INTERVAL = 0.05
GB = 1e9


@dataclass
class Peaks:
    """Bytes. `program` is the high-water mark of the command itself, `total` the largest sum with helpers seen."""

    program: int = 0
    total: int = 0


def write_model(target: Path, layers: int, width: int) -> int:
    """Write the model and its weights; return the bytes of both. One block of rows is in memory at a time."""
    random = np.random.default_rng(0)
    data = target.with_suffix(".weights")
    nodes, weights, value = [], [], "x"
    rows = max(1, (1 << 22) // width)
    with data.open("wb") as stream:
        for layer in range(layers):
            offset = stream.tell()
            for first in range(0, width, rows):
                block = random.standard_normal((min(rows, width - first), width), np.float32)
                stream.write((block * np.float32((2 / width) ** 0.5)).tobytes())
            entry: dict[str, str | int] = {
                "location": data.name,
                "offset": offset,
                "length": stream.tell() - offset,
            }
            weights.append(_external(f"weight{layer}", (width, width), entry))
            bias = (0.01 * random.standard_normal(width)).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(bias, f"bias{layer}"))
            product, total, result = (f"{stem}{layer}" for stem in ("product", "sum", "value"))
            nodes += [
                helper.make_node("MatMul", [value, f"weight{layer}"], [product], f"matmul{layer}"),
                helper.make_node("Add", [product, f"bias{layer}"], [total], f"add{layer}"),
                helper.make_node("Relu", [total], [result], f"relu{layer}"),
            ]
            value = result
            if sys.stderr.isatty():
                print(f"\rwriting layer {layer + 1} of {layers}", end="", file=sys.stderr, flush=True)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "scale", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    target.write_bytes(model.SerializeToString())
    return target.stat().st_size + data.stat().st_size


def _external(name: str, shape: tuple[int, ...], entry: dict[str, str | int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entry.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _status(process: int) -> dict[str, int]:
    """Return the memory lines of /proc/PROCESS/status in bytes; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS")))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}


def _descendants(process: int) -> list[int]:
    """Return the processes started by `process`, and by those."""
    found = []
    for listing in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(word) for word in listing.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def run_watched(command: list[str]) -> tuple[int, float, Peaks]:
    """Run a command; return its exit code, seconds and peak memory. Its messages go to this terminal."""
    peaks = Peaks()
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        own = _status(process.pid)
        helpers = sum(_status(child).get("VmRSS", 0) for child in _descendants(process.pid))
        peaks.program = max(peaks.program, own.get("VmHWM", 0))
        peaks.total = max(peaks.total, own.get("VmRSS", 0) + helpers, peaks.program)
        time.sleep(INTERVAL)
    return process.returncode, time.perf_counter() - start, peaks


def defects(result: Path, layers: int, width: int) -> list[str]:
    """Return what is wrong with the written model; reads one weight, not all."""
    model = onnx.load(result, load_external_data=False)
    onnx.checker.check_model(str(result))
    products = sum(node.op_type in {"MatMul", "Gemm"} for node in model.graph.node)
    wrong = [] if products == layers else [f"{products} products instead of {layers}"]
    dense = [tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [width, width]]
    if dense:
        wrong.append(f"{len(dense)} weights are still stored dense, {dense[0]} the first")
    return wrong


def main() -> int:
    """Write, compress, print, judge."""
    parser = argparse.ArgumentParser(description="Compress a model larger than the memory it may use.")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=1.2, help="peak memory allowed, in GB")
    parser.add_argument("--folder", type=Path, help="where the model is written; default a temporary folder")
    options = parser.parse_args()
    need = 4 * options.layers * options.width**2
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.folder) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < 2.5 * need:
            print(
                f"{scratch}: {2.5 * need / GB:.1f} GB are needed, {free / GB:.1f} GB are free; use --folder"
            )
            return 2
        source, target = Path(scratch) / "scale.onnx", Path(scratch) / "out" / "small.onnx"
        target.parent.mkdir()
        before = write_model(source, options.layers, options.width)
        print(f"\nmodel: {options.layers} layers of {options.width} x {options.width}, {before / GB:.2f} GB")
        steps = [word for name in PASSES for word in ("--pass", name)]
        command = [sys.executable, "-m", "onnxslim_lab", "optimize", str(source), "-o", str(target), *steps]
        code, seconds, peaks = run_watched(command)
        print("\n| figure | value |\n|---|---|")
        print(f"| passes | {', '.join(PASSES)} |")
        print(f"| seconds | {seconds:.1f} |")
        print(f"| peak memory of the program | {peaks.program / GB:.2f} GB |")
        print(f"| peak memory with helper processes | {peaks.total / GB:.2f} GB |")
        wrong = [] if code == 0 else [f"optimize ended with exit code {code}"]
        if target.exists():
            after = sum(file.stat().st_size for file in target.parent.iterdir())
            print(f"| bytes | {before} -> {after} ({before / after:.1f}x) |")
            wrong += defects(target, options.layers, options.width)
        if peaks.total > options.limit * GB:
            wrong.append(f"peak memory {peaks.total / GB:.2f} GB, the limit is {options.limit} GB")
    if wrong:
        print("\nmissed:\n" + "\n".join(f"- {line}" for line in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
