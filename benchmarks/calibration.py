"""What calibration costs: wall time against running the model, and peak memory against the budget.

    python benchmarks/calibration.py [--models A,B] [--feeds 128] [--rounds 5] [--samples 1000]

Times are medians of alternating rounds, each with a new Runner, so that loading counts on both sides. The
values measured are those that static quantization asks for: what layers read and make, Relu and Clip taken
into the layer before, and the operands of additions. Memory is the peak resident size of this process and of
the one that runs onnxruntime, with histograms of the same values and the Gram matrices of all layers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from zoo_feeds import feeds as zoo_feeds

from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration, Want

MODELS = ("efficientnet_lite0", "ppocrv4_rec", "vital_minilm_l3")
BUDGET = 1 << 30
_ACTIVATIONS = {"Relu", "Clip", "HardSwish", "Sigmoid", "LeakyRelu"}
_READS = {"Add", "Mul", "Concat", "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"}


def cache() -> Path:
    """Return the folder of the models."""
    return Path(os.environ.get("ONNXSLIM_LAB_CACHE", "~/.cache/onnxslim_lab")).expanduser()


def quantized_values(graph: Graph) -> list[str]:
    """Return the float values of the main graph that static quantization asks for."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op_type not in _READS:
            continue
        for name in (*node.input, *node.output):
            if not name or graph.is_constant(name) or graph.dtype_of(name) != 1:
                continue
            consumers = graph.consumers(name)
            if len(consumers) == 1 and consumers[0].op_type in _ACTIVATIONS and not graph.is_output(name):
                name = consumers[0].output[0]  # noqa: PLW2901 - measured behind its activation
            found[name] = None
    return list(found)


def seconds(work: Callable[[Runner], object], threads: int) -> float:
    """Return the wall time of some work with a new Runner, its start not counted."""
    with Runner(threads) as runner:
        runner.run(
            Graph.parse(
                '<ir_version: 8, opset_import: ["": 17]> g () => (float y) {y = Constant<value_float = 1.0>()}'
            ),
            [{}],
        )
        start = time.perf_counter()
        work(runner)
        return time.perf_counter() - start


def compare(name: str, count: int, rounds: int, threads: int) -> None:
    """Print the wall time of ranges against a plain run."""
    graph = Graph.load(cache() / f"{name}.onnx")
    feeds: list[dict[str, Any]] = [*(zoo_feeds(name, min(count, 16)) * (count // 16 + 1))[:count]]
    data = Dataset(feeds)
    values = quantized_values(graph)

    def plain(runner: Runner) -> None:
        for _ in runner.stream(graph, feeds):
            pass

    def ranges(runner: Runner) -> None:
        Calibration(runner, data).collect(graph, [Want(graph, value) for value in values])

    def histograms(runner: Runner) -> None:
        Calibration(runner, data).collect(graph, [Want(graph, value, histogram=True) for value in values])

    times: dict[str, list[float]] = {"plain": [], "ranges": [], "histograms": []}
    for _ in range(rounds):
        for work in (plain, ranges, histograms):
            times[work.__name__].append(seconds(work, threads))
    medians = {kind: statistics.median(found) for kind, found in times.items()}
    ratios = [r / p for p, r in zip(times["plain"], times["ranges"], strict=True)]
    print(
        f"{name}, threads {threads or 'all'}: {len(values)} values, {count} feeds: plain {medians['plain']:.2f} s, "
        f"ranges {medians['ranges']:.2f} s ({medians['ranges'] / medians['plain']:.2f}, rounds "
        f"{min(ratios):.2f} to {max(ratios):.2f}), histograms {medians['histograms']:.2f} s "
        f"({medians['histograms'] / medians['plain']:.2f})",
        flush=True,
    )


class Peak:
    """Watches the resident memory of this process and its children."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.bytes = max(self.bytes, sum(map(resident, ["self", *children])))


def resident(process: str) -> int:
    """Return the resident bytes of a process, 0 when it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class Repeated(list[dict[str, object]]):
    """A few feeds that stand for many."""

    def __init__(self, feeds: list[dict[str, object]], count: int) -> None:
        super().__init__(feeds)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: object) -> object:  # type: ignore[override]
        assert isinstance(index, int)
        if not 0 <= index < self._count:
            raise IndexError(index)
        return super().__getitem__(index % super().__len__())


def memory(samples: int) -> None:
    """Print the peak memory of histograms and Gram matrices of EfficientNet-Lite0."""
    graph = Graph.load(cache() / "efficientnet_lite0.onnx")
    data = Dataset(Repeated(zoo_feeds("efficientnet_lite0", 32), samples))  # type: ignore[arg-type]
    wants = [Want(graph, value, histogram=True, axis=1) for value in quantized_values(graph)]
    layers, _ = find_layers(graph)
    before = resident("self")
    start = time.perf_counter()
    with Peak() as peak, Runner() as runner:
        calibration = Calibration(runner, data, memory=BUDGET)
        found = calibration.collect(graph, wants)
        half = time.perf_counter()
        size = sum(gram.matrix.nbytes for _, gram in calibration.grams(graph, layers))
    end = time.perf_counter()
    print(
        f"efficientnet_lite0, {samples} samples: {len(found)} histograms and channel statistics in "
        f"{half - start:.0f} s, {len(layers)} Gram matrices ({size / 1e6:.0f} MB) in {end - half:.0f} s; peak "
        f"resident memory of both processes {peak.bytes / 1e6:.0f} MB ({before / 1e6:.0f} MB before), "
        f"budget {BUDGET / 1e6:.0f} MB"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--feeds", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    for name in filter(None, options.models.split(",")):
        compare(name, options.feeds, options.rounds, options.threads)
    if options.samples:
        memory(options.samples)


if __name__ == "__main__":
    main()
