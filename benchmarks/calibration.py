"""What calibration costs: wall time against running the model, and peak memory against the budget.

    python benchmarks/calibration.py [--models A,B] [--feeds 128] [--rounds 5] [--threads 0] [--samples 1000]

Times are medians of alternating rounds, each with a new Runner, so that loading counts on both sides. Both sides run
the model as static quantization prepares it, and the values measured are those that it asks for: "ranges"
those of minmax, "averages" also the means over the samples, "histograms" with these. CPU seconds are those of
both processes. Memory is the peak resident size of this process and of
the one that runs onnxruntime, with histograms and statistics per channel of the same values and the Gram matrices of all layers; it is
printed as it goes, so that growth would show.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import zoo
from zoo_feeds import feeds as zoo_feeds

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration, Statistics, Want

MODELS = ("efficientnet_lite0", "nudenet_yolov8n", "vital_minilm_l3", "ppocrv4_rec")
BUDGET = 1 << 30


class _Asked(Exception):  # noqa: N818 - no error: the question is all that is wanted
    """Ends a step when it asks for statistics."""


class _Asking(Calibration):
    """Takes down what is asked for and measures nothing."""

    def collect(self, model: Graph, wants: Iterable[Want]) -> Statistics:
        """Take down the question."""
        self.asked = model, list(wants)
        raise _Asked


def quantized_values(graph: Graph, feed: dict[str, Any]) -> tuple[Graph, list[Want]]:
    """Return the model that static quantization measures, and the ranges that it asks for."""
    with Runner(1) as runner:
        calibration = _Asking(runner, Dataset([feed]))
        with suppress(_Asked):
            Quantize(ranges="minmax").apply(
                graph.copy(), Context(calibration=calibration, allow_opset_raise=True)
            )
        return calibration.asked


def measured(work: Callable[[Runner], object], threads: int) -> tuple[float, float]:
    """Return the wall time and the CPU time of some work with a new Runner, its start not counted."""
    with Runner(threads) as runner:
        runner.run(
            Graph.parse(
                '<ir_version: 8, opset_import: ["": 17]> g () => (float y) {y = Constant<value_float = 1.0>()}'
            ),
            [{}],
        )
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        start, used = time.perf_counter(), sum(map(cpu_seconds, ["self", *children]))
        work(runner)
        end = time.perf_counter()
        return end - start, sum(map(cpu_seconds, ["self", *children])) - used


def cpu_seconds(process: str) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(name: str, count: int, rounds: int, threads: int, kinds: Collection[str]) -> None:
    """Print the time of ranges against a plain run."""
    feeds: list[dict[str, Any]] = [*(zoo_feeds(name, min(count, 16)) * (count // 16 + 1))[:count]]
    data = Dataset(feeds)
    graph, wants = quantized_values(Graph.load(zoo.path(name)), feeds[0])

    def plain(runner: Runner) -> None:
        for _ in runner.stream(graph, feeds):
            pass

    def ranges(runner: Runner) -> None:
        Calibration(runner, data).collect(graph, wants)

    def averages(runner: Runner) -> None:
        Calibration(runner, data).collect(graph, [replace(want, average=True) for want in wants])

    def histograms(runner: Runner) -> None:
        Calibration(runner, data).collect(graph, [replace(want, histogram=True) for want in wants])

    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for work in (plain, ranges, averages, histograms):
            if work is not plain and work.__name__ not in kinds:
                continue
            times.setdefault(work.__name__, []).append(measured(work, threads))
    print(f"{name}, threads {threads or 'all'}: {len(wants)} values, {count} feeds")
    for kind, found in times.items():
        wall, used = (statistics.median(pair[at] for pair in found) for at in (0, 1))
        ratios = [
            sorted(mine[at] / theirs[at] for mine, theirs in zip(found, times["plain"], strict=True))
            for at in (0, 1)
        ]
        print(
            f"  {kind:10} {wall:7.2f} s, {statistics.median(ratios[0]):.2f} of plain (rounds {ratios[0][0]:.2f} "
            f"to {ratios[0][-1]:.2f}); CPU {used:7.2f} s, {statistics.median(ratios[1]):.2f} of plain "
            f"({ratios[1][0]:.2f} to {ratios[1][-1]:.2f})",
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
    feeds = zoo_feeds("efficientnet_lite0", 32)
    data = Dataset(Repeated(feeds, samples))  # type: ignore[arg-type]
    graph, ranges = quantized_values(Graph.load(zoo.path("efficientnet_lite0")), feeds[0])
    wants = [replace(want, histogram=True, axis=1) for want in ranges]
    layers, _ = find_layers(graph)
    before = resident("self")
    start = time.perf_counter()
    with Peak() as peak, Runner() as runner:

        def show(done: int, total: int, what: str) -> None:
            if done in (total // 10, total // 2, total):
                print(f"  {what}, {done} of {total}: peak {peak.bytes / 1e6:.0f} MB", flush=True)

        calibration = Calibration(runner, data, memory=BUDGET, progress=show)
        found = calibration.collect(graph, wants)
        half = time.perf_counter()
        size = sum(gram.matrix.nbytes for _, gram in calibration.grams(graph, layers))
    end = time.perf_counter()
    print(
        f"efficientnet_lite0, {samples} samples: {len(found)} histograms and channel statistics in "
        f"{half - start:.0f} s, {len(layers)} Gram matrices ({size / 1e6:.0f} MB) in {end - half:.0f} s; peak "
        f"resident memory of both processes {peak.bytes / 1e6:.0f} MB ({before / 1e6:.0f} MB before), "
        f"budget {BUDGET / 1e6:.0f} MB: {'within' if peak.bytes <= BUDGET else 'ABOVE'} it"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--feeds", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="ranges,averages,histograms")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000, help="of the memory run; 0 leaves it out")
    options = parser.parse_args()
    for name in filter(None, options.models.split(",")):
        compare(name, options.feeds, options.rounds, options.threads, options.kinds.split(","))
    if options.samples:
        memory(options.samples)


if __name__ == "__main__":
    main()
