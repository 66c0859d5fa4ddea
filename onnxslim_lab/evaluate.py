"""Metrics with 95 % confidence intervals, alone and in pairs on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxslim_lab.accuracy import Float64, Metric, find_metric, mean
from onnxslim_lab.errors import DataError
from onnxslim_lab.intervals import RESAMPLES, bootstrap_mean, mcnemar, newcombe, wilson
from onnxslim_lab.metrics import Feed
from onnxslim_lab.worker.messages import Array

if TYPE_CHECKING:
    from onnxslim_lab.data import Dataset
    from onnxslim_lab.graph import Graph
    from onnxslim_lab.sessions import Runner

_RECOMPUTED = 300  # resamples when each one calls the user's metric


@dataclass(frozen=True)
class MetricResult:
    """A metric of one model.

    Attributes:
        name: The metric.
        value: Its value; the mean where it has one number for each sample.
        low, high: 95 % confidence interval; None when none can be given.
        samples: Number of samples (decisions).
        method: How the interval was made, or why there is none.
        random: Whether the data was random: the figure then says nothing about the task.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    samples: int
    method: str
    random: bool = False


@dataclass(frozen=True)
class PairedResult:
    """A metric of two models on the same samples.

    Attributes:
        name: The metric.
        reference, result: Each model alone; `reference` is None for metrics that compare (agreement).
        difference: result - reference.
        low, high: 95 % confidence interval of the difference; None when none can be given.
        p_value: Exact McNemar test that the two are equally often right; None for other metrics.
        method: How the interval was made, or why there is none.
    """

    name: str
    reference: MetricResult | None
    result: MetricResult
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    method: str

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def _recomputed(
    calls: Sequence[Callable[[Sequence[Feed], Array | None], float]],
    outputs: Sequence[Sequence[Feed]],
    labels: Array | None,
    seed: int,
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of `resampled`."""
    values = resampled(calls, outputs, labels, seed)
    if values is None:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def resampled(
    calls: Sequence[Callable[[Sequence[Feed], Array | None], float]],
    outputs: Sequence[Sequence[Feed]],
    labels: Array | None,
    seed: int,
) -> Float64 | None:
    """Bootstrap over feeds, recomputing metrics that give one number: the last minus the first if two.

    Returns:
        One value for each resample; None with fewer than ten feeds, or labels that cannot follow the feeds.
    """
    count = len(outputs[0])
    if count < 10 or (labels is not None and len(labels) % count):
        return None
    rows = None if labels is None else np.arange(len(labels)).reshape(count, -1)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(_RECOMPUTED):
        picked = generator.integers(0, count, count)
        own = None if labels is None or rows is None else labels[rows[picked].ravel()]
        found = [call([some[i] for i in picked], own) for call, some in zip(calls, outputs, strict=True)]
        values.append(found[-1] - found[0] if len(found) > 1 else found[0])
    return np.asarray(values)


def _single(
    metric: Metric,
    values: Float64 | float,
    outputs: Sequence[Feed],
    labels: Array | None,
    seed: int,
    *,
    random: bool,
) -> MetricResult:
    """Return a metric with its interval."""
    if isinstance(values, float):
        interval = _recomputed([one_number(metric)], [outputs], labels, seed)
        method = f"bootstrap over feeds, {_RECOMPUTED} resamples, seed {seed}"
        if interval is None:
            method = "no interval: the metric gives one number and there are too few feeds to resample"
        low, high = interval or (None, None)
        return MetricResult(metric.name, values, low, high, len(outputs), method, random)
    value, count = mean(values), len(values)
    if metric.proportion:
        low, high = wilson(round(values.sum()), count)
        return MetricResult(metric.name, value, low, high, count, "Wilson score", random)
    low, high = bootstrap_mean(values, seed)
    method = f"bootstrap over samples, {RESAMPLES} resamples, seed {seed}"
    return MetricResult(metric.name, value, low, high, count, method, random)


def one_number(metric: Metric) -> Callable[[Sequence[Feed], Array | None], float]:
    """Return a metric as a function that must give one number."""

    def call(outputs: Sequence[Feed], labels: Array | None) -> float:
        value = metric.measure(outputs, labels, None)
        return value if isinstance(value, float) else mean(value)

    return call


def evaluate_outputs(
    outputs: Sequence[Feed],
    labels: Array | None,
    metrics: Sequence[str],
    *,
    reference: Sequence[Feed] | None = None,
    seed: int = 0,
    random: bool = False,
) -> list[MetricResult]:
    """Return each metric of a list of outputs, with its 95 % interval.

    Args:
        outputs: One dict for each feed.
        labels: One for each sample, or None.
        metrics: agreement, top1, top5, name@output, module:function.
        reference: Outputs of the original on the same feeds, for agreement.
        seed: Of the bootstrap.
        random: Whether the data was random.

    Raises:
        ParameterError: Unknown metric, or output without scores.
        DataError: Labels are missing or do not fit.
    """
    found = [find_metric(name) for name in metrics]
    results = []
    for metric in found:
        values = metric.measure(outputs, labels, reference)
        results.append(_single(metric, values, outputs, labels, seed, random=random))
    return results


def compare_metrics(
    reference: Sequence[Feed],
    result: Sequence[Feed],
    labels: Array | None,
    metrics: Sequence[str],
    *,
    seed: int = 0,
    random: bool = False,
) -> list[PairedResult]:
    """Return each metric of two models on the same samples, with the interval of the difference.

    Right-or-wrong metrics take Newcombe's paired score interval and the exact McNemar test; means of
    samples a paired bootstrap; single numbers a paired bootstrap over feeds.
    """
    found = [find_metric(name) for name in metrics]
    results = []
    for metric in found:
        after = metric.measure(result, labels, reference)
        second = _single(metric, after, result, labels, seed, random=random)
        if metric.paired:
            difference = second.value - 1.0
            low, high = (None if x is None else x - 1.0 for x in (second.low, second.high))
            method = f"{second.method}, against full agreement"
            results.append(PairedResult(metric.name, None, second, difference, low, high, None, method))
            continue
        before = metric.measure(reference, labels, None)
        first = _single(metric, before, reference, labels, seed, random=random)
        results.append(_paired(metric, before, after, first, second, reference, result, labels, seed))
    return results


def _paired(
    metric: Metric,
    before: Float64 | float,
    after: Float64 | float,
    first: MetricResult,
    second: MetricResult,
    reference: Sequence[Feed],
    result: Sequence[Feed],
    labels: Array | None,
    seed: int,
) -> PairedResult:
    """Return the difference of a metric with its paired interval."""
    name, difference, p_value = metric.name, second.value - first.value, None
    if isinstance(before, float) or isinstance(after, float):
        interval = _recomputed([one_number(metric)] * 2, [reference, result], labels, seed)
        method = f"paired bootstrap over feeds, {_RECOMPUTED} resamples, seed {seed}"
        if interval is None:
            method = "no interval: the metric gives one number and there are too few feeds to resample"
        low, high = interval or (None, None)
        return PairedResult(name, first, second, difference, low, high, None, method)
    if before.shape != after.shape:
        raise DataError(
            f"metric {name} gave {before.size} samples for one model and {after.size} for the other"
        )
    if metric.proportion:
        lost = int(np.count_nonzero(before > after))
        gained = int(np.count_nonzero(after > before))
        both = int(np.count_nonzero((before == 1) & (after == 1)))
        low, high = newcombe(both, gained, lost, before.size - both - gained - lost)
        p_value = mcnemar(gained, lost)
        method = "Newcombe paired score (1998, method 10); exact McNemar test"
    else:
        low, high = bootstrap_mean(after - before, seed)
        method = f"paired bootstrap over samples, {RESAMPLES} resamples, seed {seed}"
    return PairedResult(name, first, second, difference, low, high, p_value, method)


def evaluate(
    runner: Runner, graph: Graph, dataset: Dataset, metrics: Sequence[str], *, seed: int = 0
) -> list[MetricResult]:
    """Run a model on a dataset and return its metrics with 95 % intervals."""
    for name in metrics:
        find_metric(name)  # a misspelt name must not cost a run
    outputs = runner.run(graph, dataset.feeds)
    return evaluate_outputs(outputs, dataset.labels, metrics, seed=seed, random=dataset.random)


def evaluate_pair(
    runner: Runner,
    reference: Graph,
    result: Graph,
    dataset: Dataset,
    metrics: Sequence[str],
    *,
    seed: int = 0,
) -> list[PairedResult]:
    """Run two models on a dataset and compare their metrics in pairs."""
    for name in metrics:
        find_metric(name)
    before, after = runner.run(reference, dataset.feeds), runner.run(result, dataset.feeds)
    return compare_metrics(before, after, dataset.labels, metrics, seed=seed, random=dataset.random)
