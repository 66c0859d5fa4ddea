"""Judge a rewritten model against the original: does it load, is it valid, are its outputs the same?

    python benchmarks/agreement.py NAME ORIGINAL RESULT     prints one line of JSON

Runs in a process of its own, because a model that another tool wrote can end the process that loads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from zoo_feeds import Feed, feeds

TOLERANCE = 1e-4
TIMEOUT = 900.0
LEVELS = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Judgement:
    """The largest difference of any output, and the noise it is held against.

    `difference` is max|a-b| / max(1e-6, max|a|), the worst over outputs, feeds, both sizes of free
    dimensions and onnxruntime's optimization levels off and all; infinite when an integer, a string, a
    shape or a nan differs. `noise` is what the two levels differ by on the original itself.
    """

    difference: float = 0.0
    noise: float = 0.0
    error: str = ""

    @property
    def bound(self) -> float:
        """The largest difference that counts as the same."""
        return max(TOLERANCE, 3 * self.noise)

    @property
    def reason(self) -> str:
        """Why the result is wrong; empty when it is right."""
        if self.error:
            return self.error
        return f"outputs differ by {self.difference:.1e}" if not self.difference <= self.bound else ""


def judge(name: str, original: Path, result: Path) -> Judgement:
    """Judge in a child process."""
    command = [sys.executable, str(Path(__file__).resolve()), name, str(original), str(result)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Judgement(error=f"onnxruntime did not finish in {TIMEOUT:.0f} s")
    if done.returncode == 0:
        return Judgement(**json.loads(done.stdout.splitlines()[-1]))
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return Judgement(error=f"ended the process of onnxruntime: {said[-1][:150] if said else done.returncode}")


def difference(reference: Any, result: Any) -> float:
    """Return the largest relative difference of two values; infinite when what must be equal is not.

    Args:
        reference: What the original gives: an array, or a list or dictionary as onnxruntime returns sequences
            and maps.
        result: What the rewritten model gives.
    """
    if isinstance(reference, dict):
        if not isinstance(result, dict) or reference.keys() != result.keys():
            return float("inf")
        ordered = [[value[key] for key in reference] for value in (reference, result)]
        return difference(np.array(ordered[0]), np.array(ordered[1]))
    if isinstance(reference, list):
        if not isinstance(result, list) or len(reference) != len(result):
            return float("inf")
        return max((difference(a, b) for a, b in zip(reference, result, strict=True)), default=0.0)
    a, b = np.asarray(reference), np.asarray(result)
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind not in "fc":
        return 0.0 if np.array_equal(a, b) else float("inf")
    special = ~np.isfinite(a)
    if not np.array_equal(a[special], b[special], equal_nan=True) or not np.isfinite(b[~special]).all():
        return float("inf")
    a, b = a[~special].astype(np.complex128), b[~special].astype(np.complex128)
    return float(np.abs(a - b).max() / max(1e-6, np.abs(a).max())) if a.size else 0.0


def outputs(file: Path, level: str, batches: Sequence[Feed]) -> list[list[Any]]:
    """Run the model on every feed, one thread, no other optimization than `level`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return [list(session.run(None, feed)) for feed in batches]


def interface(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """Return the names of the inputs to be fed and of the outputs, in order."""
    held = {tensor.name for tensor in model.graph.initializer}
    fed = [value.name for value in model.graph.input if value.name not in held]
    return fed, [value.name for value in model.graph.output]


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of every body nested in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from all_nodes(body)


def count_nodes(file: Path) -> int:
    """Count a model's nodes: bodies and local functions included, Constant nodes not."""
    model = onnx.load(file, load_external_data=False)
    graphs: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    return sum(node.op_type != "Constant" for graph in graphs for node in all_nodes(graph))


def _valid(file: Path) -> str:
    """Return the checker's complaint, empty when there is none."""
    try:
        onnx.checker.check_model(str(file))
    except Exception as problem:  # noqa: BLE001 - the checker raises several kinds
        return str(problem).strip().splitlines()[0][:150]
    return ""


def _brief(problem: Exception, file: Path) -> str:
    """Return onnxruntime's message without its prefix and the file's path."""
    text = " ".join(str(problem).replace(str(file), "it").split())
    return text.removeprefix("[ONNXRuntimeError] : ").replace("Load model from it failed:", "")[:150]


def compare(name: str, original: Path, result: Path) -> Judgement:
    """Judge in this process."""
    before, after = (onnx.load(file, load_external_data=False) for file in (original, result))
    if interface(before) != interface(after):
        return Judgement(error="names or order of inputs or outputs changed")
    domains = {node.domain for node in all_nodes(after.graph)} - {
        node.domain for node in all_nodes(before.graph)
    }
    if "com.microsoft" in domains:
        return Judgement(error="introduced operators of com.microsoft")
    if not _valid(original) and (complaint := _valid(result)):
        return Judgement(error=f"invalid: {complaint}")
    largest = noise = 0.0
    for size in (0, 1):
        batches = feeds(name, samples=2, seed=7, size=size)
        reference = {level: outputs(original, level, batches) for level in LEVELS}
        noise = max(noise, difference(reference["off"], reference["all"]))
        for level in LEVELS:
            try:
                results = outputs(result, level, batches)
            except Exception as problem:  # noqa: BLE001 - every failure of onnxruntime is a verdict
                return Judgement(error=f"onnxruntime ({level}, size {size}): {_brief(problem, result)}")
            largest = max(largest, difference(reference[level], results))
    return Judgement(largest, noise)


if __name__ == "__main__":
    print(json.dumps(asdict(compare(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))))
