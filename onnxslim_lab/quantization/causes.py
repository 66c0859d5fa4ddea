"""Why quantizing a layer costs what it does: its input, its weight or its output, and what about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.numerics import dequantize
from onnxslim_lab.quantization.placement import fused_output
from onnxslim_lab.quantization.plan import Plan
from onnxslim_lab.quantization.ranges import expected_error
from onnxslim_lab.quantization.static_layers import StaticLayer, added_bias, weight_axis, weight_of
from onnxslim_lab.statistics import Channels, Statistics, ValueStatistics, Want

Array = npt.NDArray[Any]

HALF_MAX = 65504.0
_OUTLIER = 6.0  # a channel whose magnitude is so many times the median channel's
_SPREAD = 16.0  # magnitudes of channels that one scale cannot serve
_PEAK = 16.0  # greatest magnitude over root mean square: a long tail
_SHOWN = 16  # channels named
_LOUD = 1e-5  # noise shares below this (50 dB) need no cause


class Cause(BaseModel):
    """One reason for a layer's error.

    Attributes:
        kind: saturated-range, outlier-channels, wide-spread, long-tail, coarse-weights, coarse-codes or
            fp16-overflow.
        part: "input", "weight" or "output".
        share: Expected noise over signal energy of that part; of weights, the mean over their channels.
        what: The reason in words.
        channels: Indices of the channels concerned, worst first.
        remedy: What answers it: KEY=VALUE for the step, equalize, or exclude.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kind: str
    part: str
    share: float
    what: str
    channels: tuple[int, ...] = ()
    remedy: str = ""


def wants(plan: Plan) -> list[Want]:
    """Return what has to be measured of a plan's layers to tell the causes: inputs and outputs by channel."""
    found: dict[tuple[int, str], Want] = {}
    for planned in plan.layers:
        layer = planned.layer
        for value in (layer.node.input[0], output_of(layer)):
            scope = layer.graph.scope_of(value) or layer.graph
            axis = 1 if layer.op_type == "Conv" else -1
            found.setdefault((id(scope), value), Want(scope, value, histogram=True, axis=axis))
    return list(found.values())


def output_of(layer: Layer) -> str:
    """Return the value that holds a layer's quantized output: behind its bias, Relu or Clip."""
    added = added_bias(layer)
    return fused_output(layer.graph, added[0] if added else layer.node)


def causes(plan: Plan, planned: StaticLayer, statistics: Statistics) -> list[Cause]:
    """Return why a layer of a static plan loses what it does, the most expensive part first.

    Args:
        plan: The plan.
        planned: One of its layers.
        statistics: Of what `wants` asks for.
    """
    layer = planned.layer
    found = [*_weight(plan, planned), *_activation(plan, layer, layer.node.input[0], "input", statistics)]
    found += _activation(plan, layer, output_of(layer), "output", statistics)
    return sorted(found, key=lambda cause: -cause.share)


def overflows(statistics: ValueStatistics | None) -> Cause | None:
    """Return the cause when a value does not fit float16, None when it does."""
    if statistics is None or statistics.empty:
        return None
    largest = max(abs(statistics.low), abs(statistics.high))
    if largest <= HALF_MAX:
        return None
    return Cause(
        kind="fp16-overflow",
        part="output",
        share=float("inf"),
        what=f"its output reaches {largest:.3g}; float16 ends at {HALF_MAX:g}",
        remedy="exclude",
    )


def _weight(plan: Plan, planned: StaticLayer) -> Iterator[Cause]:
    layer = planned.layer
    exact = weight_of(layer).astype(np.float64)
    codes, grid = plan.weight(planned, layer)
    noise = dequantize(codes, grid).astype(np.float64) - exact
    axis = weight_axis(layer)
    rest = tuple(i for i in range(exact.ndim) if i != axis % exact.ndim)
    signal, lost = (exact * exact).sum(axis=rest), (noise * noise).sum(axis=rest)
    heard = signal > 0
    # Channels by themselves: what follows may well make the quiet ones loud again.
    share = float(np.minimum(lost[heard] / signal[heard], 1.0).mean()) if heard.any() else 0.0
    if share < _LOUD:
        return
    largest = np.abs(exact).max(axis=rest)
    if grid.axis is None and grid.block == 0:
        spread, order = _spread(largest)
        if spread > _SPREAD:
            yield Cause(
                kind="wide-spread",
                part="weight",
                share=share,
                what=f"one scale for channels whose largest weights differ {spread:.0f} times",
                channels=order,
                remedy="granularity=channel",
            )
            return
    yield Cause(
        kind="coarse-weights",
        part="weight",
        share=share,
        what=f"rounding its weights to {grid.kind} alone adds {share:.2%} of noise",
        channels=_worst(lost),
        remedy="rounding=gptq",
    )


def _activation(plan: Plan, layer: Layer, value: str, part: str, statistics: Statistics) -> Iterator[Cause]:
    scope = layer.graph.scope_of(value) or layer.graph
    found = statistics.get(scope, value)
    if found is None or found.empty or found.histogram is None or found.channels is None:
        return
    low, high = _range(plan, layer.graph, value, found)
    scheme = plan.scheme
    rounding, clipping = expected_error(
        found, scheme.activations, low, high, symmetric=scheme.symmetric_activations
    )
    channels = found.channels
    total = channels.count.sum()
    signal = float((channels.mean_square * channels.count).sum() / total) if total else 0.0
    share = (rounding + clipping) / signal if signal else 0.0
    if share < _LOUD:
        return
    yield _reason(found, channels, part, share, clipping > rounding, (low, high), signal)


def _range(plan: Plan, graph: Graph, value: str, found: ValueStatistics) -> tuple[float, float]:
    """Return the range the plan chose for a value, or all of it where the plan does not quantize it."""
    scope = graph.scope_of(value) or graph
    if plan.statistics.get(scope, value) is None:
        return min(found.low, 0.0), max(found.high, 0.0)
    return plan.range(graph, value)


def _reason(
    found: ValueStatistics,
    channels: Channels,
    part: str,
    share: float,
    clipped: bool,
    chosen: tuple[float, float],
    signal: float,
) -> Cause:
    """Return what about a value makes its quantization noisy."""
    largest = np.maximum(np.abs(channels.low), np.abs(channels.high))
    largest = np.where(channels.count > 0, largest, 0.0)
    peak = float(largest.max(initial=0.0))
    spread, order = _spread(largest)
    median = float(np.median(largest[largest > 0])) if (largest > 0).any() else 0.0
    loud = np.flatnonzero(largest > _OUTLIER * median) if median else np.zeros(0, int)
    if clipped:
        return Cause(
            kind="saturated-range",
            part=part,
            share=share,
            what=f"its {part} reaches from {found.low:.3g} to {found.high:.3g} and is cut to {chosen[0]:.3g} "
            f".. {chosen[1]:.3g}",
            channels=_worst(np.maximum(largest - max(abs(chosen[0]), abs(chosen[1])), 0.0)),
            remedy="ranges=minmax",
        )
    if 0 < loud.size <= max(1, largest.size // 8):
        return Cause(
            kind="outlier-channels",
            part=part,
            share=share,
            what=f"{loud.size} of {largest.size} channels of its {part} reach {peak:.3g}, the median channel "
            f"{median:.3g}",
            channels=tuple(int(i) for i in loud[np.argsort(-largest[loud])][:_SHOWN]),
            remedy="equalize" if part == "input" else "exclude",
        )
    if spread > _SPREAD:
        return Cause(
            kind="wide-spread",
            part=part,
            share=share,
            what=f"one scale for channels of its {part} whose magnitudes differ {spread:.0f} times",
            channels=order,
            remedy="equalize" if part == "input" else "exclude",
        )
    ratio = peak / np.sqrt(signal) if signal else 0.0
    if ratio > _PEAK:
        return Cause(
            kind="long-tail",
            part=part,
            share=share,
            what=f"its {part} reaches {ratio:.0f} times its root mean square: most values use few codes",
            remedy="ranges=mse",
        )
    return Cause(
        kind="coarse-codes",
        part=part,
        share=share,
        what=f"256 codes for its {part} add {share:.2%} of noise, though no channel stands out",
        remedy="exclude",
    )


def _spread(largest: Array) -> tuple[float, tuple[int, ...]]:
    """Return how far apart the loudest and the quiet channels are, and the loudest, loudest first."""
    heard = largest[largest > 0]
    if heard.size < 2:
        return 1.0, ()
    return float(heard.max() / max(np.quantile(heard, 0.1), 1e-300)), _worst(largest)


def _worst(values: Array) -> tuple[int, ...]:
    """Return the indices of the greatest values, greatest first, zeros left out."""
    order = np.argsort(-values, kind="stable")[:_SHOWN]
    return tuple(int(i) for i in order if values[i] > 0)
