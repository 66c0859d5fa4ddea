"""The mathematics of equalization: which scales, and what quantization costs under them. NumPy only.

A scale s of a channel divides the activation x and multiplies the column of every weight W that x meets;
weights that make x have their rows divided. Nothing changes but the ranges that a quantizer sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Doubles = NDArray[np.float64]

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
_WIDEST = 14.0  # octaves a scale may be away from 1


@dataclass(frozen=True)
class Noise:
    """How the layers will be quantized.

    Attributes:
        weight_steps, activation_steps: Steps over the whole range: 255 for 8 bits.
        per_channel: Whether each output channel of a weight has its own scale.
    """

    weight_steps: int = 255
    activation_steps: int = 255
    per_channel: bool = True


@dataclass(frozen=True)
class Sink:
    """A layer that reads the scaled activation.

    Attributes:
        largest, power: |W| and W^2 by group, output and input channel, (groups, out, in): the largest and the
            sum over the taps of a kernel.
        labels: Scale of each input channel, (groups, in).
        low, high, square: Smallest, largest and mean square value of each input channel, (groups, in); None
            where the activation was not measured.
        taps: Elements of a kernel.
    """

    largest: Doubles
    power: Doubles
    labels: NDArray[np.int64]
    low: Doubles | None = None
    high: Doubles | None = None
    square: Doubles | None = None
    taps: int = 1


@dataclass(frozen=True)
class Source:
    """A layer that makes the scaled activation.

    Attributes:
        largest: Largest |W| of each output channel, (out,).
        labels: Scale of each output channel, (out,).
        energy: Mean squared length of the rows that meet the weight.
        low, high: Smallest and largest output of each channel, before any activation; None where it was not
            measured.
    """

    largest: Doubles
    labels: NDArray[np.int64]
    energy: float = 0.0
    low: Doubles | None = None
    high: Doubles | None = None


def expected_error(sinks: Sequence[Sink], sources: Sequence[Source], logs: Doubles, noise: Noise) -> float:
    """Return the noise that quantization is expected to add to the layers' outputs, over their power.

    The rounding error of a step d has the power d^2 / 12 and is taken as independent of everything. A layer
    y = W x gets the error of x through W and that of W through x; also that of the outputs of the layers that
    made x, which many runtimes quantize before the activation; and with one scale for a whole weight, that of
    the weights that made x.

    Args:
        sinks: Measured ones.
        sources: The layers that make the activation.
        logs: log2 of each scale.
        noise: The quantizer.

    >>> w, x = np.array([[[1.0, 1.0]]]), np.array([[16.0, 1.0]])
    >>> sink = Sink(w, w * w, np.array([[0, 1]]), -x, x, x * x)
    >>> errors = [expected_error([sink], [], np.array(logs), Noise()) for logs in ([0.0, 0.0], [1.0, -1.0])]
    >>> errors[1] < errors[0]
    True
    """
    scales = np.exp2(logs)
    reach = np.zeros(logs.size)  # noise that the sources put on each channel
    for source in sources:
        power = 0.0
        if source.low is not None and source.high is not None:
            power += (_span(source.low, source.high, scales[source.labels]) / noise.activation_steps) ** 2
        if not noise.per_channel:
            step = 2 * float((source.largest / scales[source.labels]).max()) / noise.weight_steps
            power += step**2 * source.energy
        reach[np.unique(source.labels)] += power / 12
    total = 0.0
    for sink in sinks:
        assert sink.low is not None and sink.high is not None and sink.square is not None  # noqa: PT018
        scale = scales[sink.labels]
        columns = sink.power.sum(axis=1) * scale**2
        own = (_span(sink.low, sink.high, scale) / noise.activation_steps) ** 2 / 12
        error = float((columns * (own + reach[sink.labels])).sum())
        rows = (sink.largest * scale[:, None]).max(axis=2)
        steps = 2 * (rows if noise.per_channel else np.full_like(rows, rows.max())) / noise.weight_steps
        length = (sink.taps * sink.square / scale**2).sum(axis=1)
        error += float(((steps**2).sum(axis=1) * length).sum()) / 12
        signal = float((sink.power * sink.square[:, None]).sum())
        total += error / signal if signal > 0 else 0.0
    return total


def _span(low: Doubles, high: Doubles, scale: Doubles) -> float:
    """Return the length of the range, 0 included, that one quantizer must cover."""
    return max(0.0, float((high / scale).max())) - min(0.0, float((low / scale).min()))


def largest_by_label(values: Array, labels: NDArray[np.int64], count: int) -> Doubles:
    """Return the largest of the values that share a label, 0 where there are none."""
    found = np.zeros(count)
    np.maximum.at(found, labels.reshape(-1), np.asarray(values, np.float64).reshape(-1))
    return found


def equalizing(sinks: Sequence[Sink], sources: Sequence[Source], count: int) -> Doubles | None:
    """Return log2 of the scales sqrt(r1 / r2) that make the ranges of both sides equal; None without sources.

    r1 is the range of what makes a channel, the geometric mean of several layers; r2 of what reads it, the
    largest. Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, 2019,
    equation 11. Channels without a range keep their scale.
    """
    readers = np.zeros(count)
    for sink in sinks:
        np.maximum(readers, largest_by_label(sink.largest.max(axis=1), sink.labels, count), out=readers)
    makers, times = np.zeros(count), np.zeros(count)
    for source in sources:
        largest = largest_by_label(source.largest, source.labels, count)
        makers += _log2(largest)
        times += largest > 0
    if not times.any():
        return None
    mean = makers / np.maximum(times, 1)
    return np.where((times > 0) & (readers > 0), 0.5 * (mean - _log2(readers)), np.nan)


def smoothing(sinks: Sequence[Sink], count: int, alpha: float, sources: Sequence[Source] = ()) -> Doubles:
    """Return log2 of the scales max|x|^alpha / max|W|^(1 - alpha).

    Xiao et al., SmoothQuant, 2023, equation 4; of several layers the largest x and W count, and x before its
    activation where sources are given. NaN where a channel is always 0.

    >>> w, x = np.ones((1, 1, 2)), np.array([[16.0, 1.0]])
    >>> smoothing([Sink(w, w, np.array([[0, 1]]), -x, x, x)], 2, 0.5)
    array([2., 0.])
    """
    data, weight = np.zeros(count), np.zeros(count)
    for sink in sinks:
        assert sink.low is not None and sink.high is not None  # noqa: PT018
        span = np.maximum(np.abs(sink.low), np.abs(sink.high))
        np.maximum(data, largest_by_label(span, sink.labels, count), out=data)
        np.maximum(weight, largest_by_label(sink.largest.max(axis=1), sink.labels, count), out=weight)
    for source in sources:
        if source.low is not None and source.high is not None:
            span = np.maximum(np.abs(source.low), np.abs(source.high))
            np.maximum(data, largest_by_label(span, source.labels, count), out=data)
    found = alpha * _log2(data) - (1 - alpha) * _log2(weight)
    return np.where((data > 0) & (weight > 0), found, np.nan)


def settled(logs: Doubles, free: Array, steps: int) -> Doubles:
    """Return log2 scales fit for use: centred, bounded, on a grid, 0 where frozen or unknown.

    Args:
        logs: log2 of the scales, NaN where nothing is wanted.
        free: Which may differ from 1.
        steps: Grid points per octave; 1 for powers of two, by which scaling rounds nothing.

    >>> settled(np.array([3.0, 1.3, np.nan]), np.array([True, True, True]), 1)
    array([ 1., -1.,  0.])
    """
    wanted = np.where(free, logs, np.nan)
    known = np.isfinite(wanted)
    if not known.any():
        return np.zeros_like(logs)
    level = np.round(wanted[known].mean() * steps) / steps  # on the grid, so that it shifts no rounding
    centred = np.where(known, wanted - level, 0.0)
    return np.asarray(np.round(np.clip(centred, -_WIDEST, _WIDEST) * steps) / steps + 0.0)


def candidates(
    sinks: Sequence[Sink], sources: Sequence[Source], count: int, alphas: Sequence[float]
) -> Iterator[tuple[str, Doubles]]:
    """Yield (description, log2 scales) of the scales worth trying on measured activations."""
    for alpha in alphas:
        yield f"alpha {alpha:g}", smoothing(sinks, count, alpha)
        if sources:
            yield f"alpha {alpha:g} before activation", smoothing(sinks, count, alpha, sources)
    equal = equalizing(sinks, sources, count)
    if equal is not None:
        yield "equal weight ranges", equal


def _log2(values: Doubles) -> Doubles:
    """Return log2, 0 where there is none."""
    return np.log2(values, out=np.zeros_like(values), where=values > 0)
