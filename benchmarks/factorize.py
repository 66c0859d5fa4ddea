"""Compare whitened SVD with plain and pivoted-QR factorization at equal parameters, layer by layer and end to end.

    python benchmarks/factorize.py [--models a,b] [--keep 0.5] [--samples 128] [--unseen 16] [--json FILE]

For every matrix that can pay, at the rank where its factors have `keep` of its parameters: the relative error
|X (W - W')^T| / |X W^T| of the layer's output on the calibration rows and on rows of unseen feeds, and how far the
loss predicted from the discarded directions is from the measured one on float32 factors. Then the whole model,
every layer at that rank, and by `budget` (ranks shared out over the layers): error of the outputs on unseen feeds,
parameters and MACs. Exits with 1 when the geometric mean of whitened over plain SVD is above 0.8 on either set of
rows, or a prediction is off by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zoo import path
from zoo_feeds import feeds as zoo_feeds

from onnxslim_lab.base import Context
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, find_layers
from onnxslim_lab.low_rank.bases import Method, Metric, balanced, find_basis, shrinkage
from onnxslim_lab.macs import model_macs, parameters
from onnxslim_lab.passes.factorize import Factorize
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.worker.messages import Value

MODELS = ("vital_minilm_l3", "ppocrv4_rec")
METHODS: tuple[Method, ...] = ("svd", "qr", "whitened")
MOST = 0.8  # of plain SVD's error, geometric mean over the matrices of a model
OFF = 0.01


@dataclass
class Row:
    """One matrix: errors by method, on calibration rows and on unseen ones."""

    model: str
    layer: str
    groups: int
    out: int
    inputs: int
    rank: int
    seen: dict[str, float]
    unseen: dict[str, float]
    off: float

    @property
    def ratios(self) -> tuple[float, float]:
        """Whitened over plain SVD, on calibration rows and on unseen ones."""
        return self.seen["whitened"] / self.seen["svd"], self.unseen["whitened"] / self.unseen["svd"]

    def markdown(self) -> str:
        """Return the Markdown row."""
        shape = f"{self.groups} x {self.out} x {self.inputs}"
        figures = " | ".join(f"{self.seen[m]:.4f} / {self.unseen[m]:.4f}" for m in METHODS)
        one, two = self.ratios
        return f"| {self.layer[-48:]} | {shape} | {self.rank} | {figures} | {one:.3f} | {two:.3f} | {self.off:.1e} |"


def make_feeds(model: str, samples: int, seed: int) -> list[dict[str, Value]]:
    """Return inputs that mean something to the model."""
    return [dict(feed) for feed in zoo_feeds(model, samples, seed=seed)]


def measured(metric: Metric, matrix: np.ndarray[Any, Any]) -> float:
    """Return the energy of an output, or of an output's error, from its Gram matrix."""
    return sum(float(metric.energies(part, group).sum()) for group, part in enumerate(matrix))


def layer_rows(
    model: str, graph: Graph, calibration: Calibration, unseen: Calibration, keep: float
) -> Iterator[Row]:
    """Yield a row for each matrix of a model of which a rank of 4 or more pays."""
    chosen: list[Layer] = []
    for inner in graph.walk():
        for layer in find_layers(inner)[0]:
            groups, out, inputs = layer.shape
            fitting = (
                layer.op_type in ("Conv", "Gemm", "MatMul") and layer.parameters == groups * out * inputs
            )
            if fitting and keep * out * inputs / (out + inputs) >= 4:
                chosen.append(layer)
    pairs = zip(calibration.grams(graph, chosen), unseen.grams(graph, chosen), strict=True)
    for (layer, gram), (_, other) in pairs:
        groups, out, inputs = layer.shape
        rank = int(keep * out * inputs / (out + inputs))
        matrix = np.asarray(layer.matrix, np.float64)
        damping = shrinkage(gram.count, inputs)
        metric, fresh = Metric.of(gram.matrix, damping=damping), Metric.of(other.matrix)
        seen: dict[str, float] = {}
        new: dict[str, float] = {}
        off = 0.0
        energy, new_energy = measured(metric, matrix), measured(fresh, matrix)
        for method in METHODS:
            basis = find_basis(matrix, method, metric)
            columns = basis.columns[..., :rank]
            one, two = (f.astype(np.float32) for f in balanced(columns.swapaxes(1, 2) @ matrix, columns))
            error = matrix - two.astype(np.float64) @ one
            loss, predicted = measured(metric, error), float(basis.losses()[rank])
            seen[method] = math.sqrt(loss / energy)
            new[method] = math.sqrt(measured(fresh, error) / new_energy)
            if loss > 1e-9 * energy:
                off = max(off, abs(predicted / loss - 1))
        yield Row(model, layer.name, groups, out, inputs, rank, seen, new, off)


def output_error(reference: list[dict[str, Any]], result: list[dict[str, Any]]) -> float:
    """Return |y - y'| / |y| of the float outputs, averaged over the outputs."""
    errors = []
    for name, value in reference[0].items():
        if getattr(value, "dtype", np.dtype(int)).kind == "f":
            one, two = (np.concatenate([feed[name].ravel() for feed in side]) for side in (reference, result))
            errors.append(float(np.linalg.norm(one.astype(np.float64) - two) / np.linalg.norm(one)))
    return float(np.mean(errors))


def whole_models(
    graph: Graph, calibration: Calibration, held: list[dict[str, Any]], rows: list[Row], keep: float
) -> Iterator[str]:
    """Yield Markdown rows of the whole model factorized in several ways."""
    runner = calibration.runner
    reference = runner.run(graph, held)
    before, macs = parameters(graph), model_macs(graph).total
    ranks = {row.layer: row.rank for row in rows}
    ways: dict[str, dict[str, Any]] = {
        f"{method}, those ranks": {"method": method, "overrides": ranks, "include": list(ranks)}
        for method in METHODS
    }
    ways |= {f"{method}, budget": {"method": method, "budget": keep} for method in ("svd", "whitened")}
    for what, settings in ways.items():
        result = graph.copy()
        start = time.perf_counter()
        outcome = Factorize.model_validate(settings).run(result, Context(calibration=calibration))
        seconds = time.perf_counter() - start
        error = output_error(reference, runner.run(result, held))
        share = f"{model_macs(result).total / macs:.3f}" if macs else "sizes unknown"
        yield (
            f"| {what} | {len(outcome.changes)} | {parameters(result) / before:.3f} "
            f"| {share} | {error:.4f} | {seconds:.1f} |"
        )


def geometric(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(values))))


def main() -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--keep", type=float, default=0.5, help="part of each matrix's parameters")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--unseen", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every: list[Row] = []
    good = True
    with Runner(threads=os.cpu_count() or 1) as runner:
        for model in options.models.split(","):
            graph = Graph.load(path(model))
            held = make_feeds(model, options.unseen, seed=1)
            data = Dataset(make_feeds(model, options.samples, seed=0), None, model, random=False)
            calibration = Calibration(runner, data)
            unseen = Calibration(runner, Dataset(held, None, model, random=False))
            print(
                f"\n## {model}: calibration / unseen rows, {options.keep:.0%} of each matrix's parameters\n"
            )
            print("| layer | matrix | rank | svd | qr | whitened | ratio | unseen | predicted off by |")
            print("|---|---|---|---|---|---|---|---|---|")
            rows = []
            for row in layer_rows(model, graph, calibration, unseen, options.keep):
                print(row.markdown(), flush=True)
                rows.append(row)
            ratios = [geometric([row.ratios[which] for row in rows]) for which in (0, 1)]
            off = max(row.off for row in rows)
            print(f"\n{len(rows)} matrices, whitened over svd: {ratios[0]:.3f}, unseen {ratios[1]:.3f}")
            print("\n| whole model | layers | parameters | MACs | output error, unseen | seconds |")
            print("|---|---|---|---|---|---|")
            for line in whole_models(graph, calibration, held, rows, options.keep):
                print(line, flush=True)
            good = good and max(ratios) <= MOST and off <= OFF
            every += rows
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in every], indent=1))
    print("\nholds" if good else "\ndoes not hold")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
