"""equalize: channels are scaled so that a quantizer finds even ranges; the function stays the same."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.equalization.balance import Balance, Plan, channel_statistics
from onnxslim_lab.equalization.ends import channel_axis
from onnxslim_lab.equalization.region import Region
from onnxslim_lab.equalization.regions import copied, find_regions, layer_nodes
from onnxslim_lab.equalization.scales import Noise
from onnxslim_lab.equalization.shifts import find_shift, find_streams, write_shift
from onnxslim_lab.equalization.trials import keep_what_helps
from onnxslim_lab.equalization.writing import write
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, find_layers
from onnxslim_lab.statistics import Calibration, Statistics, Want

_TRIED = (2, 4, 8, 16)  # bits of the types that weights can be quantized to


class Equalize(Pass):
    """Scale channels between layers, so that activations and weights quantize with less error.

    before: y = W2 f(W1 x + b)                       after: y = (W2 S) f((1/S W1) x + b/S)
    before: y = W LayerNormalization(x, g, b)        after: y = (W S) LayerNormalization(x, g/S, b/S)
    before: y = W2 (W1 x + b1) + b2                  after: y = W2 (W1 x + (b1 - c)) + (b2 + W2 c)

    f is anything through which a positive scale of channels passes: Relu, LeakyRelu, pooling, Pad with 0,
    Reshape, Transpose, Resize, Slice, Gather, Concat, Split, Add of branches (which then share their scales), Mul by a gate,
    the root of a sum of squares, the product of attention weights with the values. All readers of a value are
    scaled together.

    mode=weights makes the ranges of W1's rows and W2's columns equal (Nagel et al. 2019, section 4.1);
    mode=activations moves the outliers of activations into the weights (Xiao et al. 2022, SmoothQuant);
    mode=auto takes, region by region, what has the least expected error by the calibration data, or does as
    mode=weights without any.

    `parts` quantizes copies of the model and keeps the scales with which its outputs get better.

    refuses: regions that reach an operator that is not homogeneous (Sigmoid, Gelu, Clip at 6), an input or
    output of the graph or a body; weights shared with other layers, not finite, quantized, or that would leave
    the range of their type.

    >>> from onnxslim_lab.graph import Graph
    >>> model = Graph.parse('''<ir_version: 8, opset_import: ["" : 17]>
    ... g (float[n, 2] x) => (float[n, 1] y) <float[2,2] v = {16, 0, 0, 1}, float[2,1] w = {1, 16}>
    ... { h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) }''')
    >>> outcome = Equalize(mode="weights").run(model)
    >>> model.constant("v").tolist(), model.constant("w").tolist()
    ([[4.0, 0.0], [0.0, 4.0]], [[4.0], [4.0]])
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    mode: Literal["auto", "weights", "activations"] = Field(
        "auto", description="what is made even: weight ranges, activation ranges, or what costs least"
    )
    alpha: Literal["auto"] | float = Field(
        "auto",
        description="how much of an activation's range goes into the weights, 0 to 1; auto: the best by region",
    )
    granularity: Literal["tensor", "channel"] = Field(
        "channel", description="whether the weights will be quantized per tensor or per output channel"
    )
    weight_bits: int = Field(8, ge=2, le=16, description="bits the weights will be quantized to")
    activation_bits: int = Field(8, ge=2, le=16, description="bits the activations will be quantized to")
    parts: int = Field(
        0,
        ge=0,
        le=1000,
        description="in how many parts scales are tried on quantized copies of the model and kept where its outputs "
        "get better; 0: all are kept, untried",
    )
    shift: bool = Field(
        True,
        description="with calibration data, also centre channels that only linear layers read, through the biases",
    )
    copy_norms: bool = Field(
        False,
        description="where a residual path keeps a normalization from being scaled, give the layers a copy of it",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise ValueError("alpha must be auto or a number from 0 to 1")
        if self.alpha != "auto" and self.mode == "weights":
            raise ValueError("alpha has no meaning with mode=weights; leave it out")
        if self.copy_norms and self.mode == "weights":
            raise ValueError("copy_norms has no meaning with mode=weights: only activations are scaled there")
        if self.parts and (self.mode == "weights" or self.weight_bits not in _TRIED):
            raise ValueError(
                f"parts needs calibration data and weights that can be quantized: mode other than weights, weight_bits "
                f"{', '.join(map(str, _TRIED))}"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations."""
        return self.mode != "weights"

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Scale the channels of the whole model in place."""
        calibration = None if self.mode == "weights" else context.calibration
        if calibration is None and (self.mode == "activations" or self.alpha != "auto"):
            raise ParameterError("equalize needs calibration data to even out activations; or mode=weights")
        if calibration is None and self.parts:
            raise ParameterError(
                "equalize needs calibration data to try scales on: give data, or take parts=0"
            )
        outcome = Outcome()
        graph.infer()
        if calibration is not None and self.shift:
            _centre(graph, calibration, outcome)
        everything = self._regions(graph, outcome, measured=calibration is not None)
        regions = everything
        statistics = None
        if calibration is not None and regions:
            statistics = _measure(graph, calibration, regions, per_tensor=self.granularity == "tensor")
            regions = [region for region in regions if _is_measured(statistics, region, outcome)]
        noise = Noise(2**self.weight_bits - 1, 2**self.activation_bits - 1, self.granularity == "channel")
        alpha = None if self.alpha == "auto" else float(self.alpha)
        balance = Balance(regions, statistics, noise, alpha)
        balance.solve()
        if self.parts and calibration is not None:
            numbers = [everything.index(plan.region) for plan in balance.plans]
            self._try(graph, balance.plans, numbers, context, outcome)
        dropped = write(balance.plans)
        for plan in balance.plans:
            if plan in dropped:
                outcome.refuse(name_of(plan.region), "a scaled constant would leave the range of its type")
            elif plan.logs.any():
                outcome.changes.append(_change(plan))
        return outcome

    def _try(
        self, graph: Graph, plans: list[Plan], numbers: list[int], context: Context, outcome: Outcome
    ) -> None:
        """Undo the scales that do not help a model quantized per `granularity` to these bits.

        Args:
            graph: The model.
            plans: The scales found.
            numbers: Of the plans' regions among all that `_regions` returns.
            context: Of the pass.
            outcome: Receives a refusal for what is undone.
        """
        from onnxslim_lab.passes.quantize import Quantize  # noqa: PLC0415 - it takes a second to load

        wide = {"activations": "uint16"} if self.activation_bits > 8 else {}
        step = Quantize.model_validate(
            {
                "weights": f"int{self.weight_bits}",
                "granularity": self.granularity,
                "rounding": "nearest",
                "ranges": "minmax",
                **wide,
            }
        )

        def regions_of(copy: Graph) -> list[Region]:
            found = self._regions(copy, Outcome(), measured=True)
            return [found[number] for number in numbers]

        before, after, undone = keep_what_helps(graph, plans, regions_of, step, context, self.parts)
        for plan in undone:
            outcome.refuse(name_of(plan.region), "its scales do not lower the error of the quantized outputs")
        if any(plan.logs.any() for plan in plans):
            outcome.notices.append(f"quantized outputs: error {before:.3g}, with scales {after:.3g}")

    def _regions(self, model: Graph, outcome: Outcome, *, measured: bool) -> list[Region]:
        """Return the regions of all graphs that can be scaled; refuse the others."""
        found = []
        for graph in model.walk():
            layers, refusals = find_layers(graph)
            outcome.refusals += refusals
            for region in find_regions(graph, layers):
                reason = _trouble(region, measured=measured)
                if not reason:
                    found.append(region)
                    continue
                copies = _copies(region, layers) if self.copy_norms and measured else []
                found += copies
                if not copies:
                    outcome.refuse(name_of(region), reason)
        return found


def _centre(model: Graph, calibration: Calibration, outcome: Outcome) -> None:
    """Shift the channels of streams of values where that leaves less to be rounded."""
    streams = [stream for graph in model.walk() for stream in find_streams(graph, find_layers(graph)[0])]
    if not streams:
        return
    statistics = calibration.collect(model, [want for stream in streams for want in stream.wants()])
    for stream in streams:
        shift = find_shift(stream, statistics)
        if shift is None:
            continue
        makers = [slot.name for slot in stream.makers.values()]
        readers = list(dict.fromkeys(reader.layer.name for reader in stream.readers))
        problem = write_shift(shift)
        if problem:
            outcome.refuse(readers[0], problem)
            continue
        outcome.changes.append(
            Change(
                where=readers[0],
                what=f"centred channels from {', '.join(makers)} to {', '.join(readers)}",
                detail={"noise": shift.after / shift.before},
            )
        )


def _trouble(region: Region, *, measured: bool) -> str:
    """Return why a region cannot be scaled, "" when it can."""
    if not region.free.any():
        return region.reasons[0] if region.reasons else "it has no channels"
    if region.free.size == 1:
        return "all its channels have one scale"
    if region.norms and not measured:
        return f"smoothing what comes from {region.norms[0].op_type} needs calibration data"
    return ""


def _copies(region: Region, layers: list[Layer]) -> list[Region]:
    """Return a region for each normalization in a region that cannot be scaled, for a copy of it."""
    by_node = layer_nodes(layers)
    values = dict.fromkeys(end.value for end in region.layers if end.side == "in")
    made = [copied(region.graph, value, by_node) for value in values]
    return [item for item in made if item is not None and not _trouble(item, measured=True)]


def _measure(
    model: Graph, calibration: Calibration, regions: list[Region], *, per_tensor: bool
) -> Statistics:
    """Measure what the regions' layers read and make, by channel."""
    wants = []
    for region in regions:
        for end in region.layers:
            measured = [(end.value, channel_axis(end.layer, end.side))]
            if end.side == "out" and per_tensor:
                measured.append((end.layer.node.input[0], channel_axis(end.layer, "in")))
            for value, place in measured:
                shape = region.shape(value)
                if shape is not None and not isinstance(place, str):
                    wants.append(Want(region.graph, value, axis=place[0] % len(shape)))
    return calibration.collect(model, wants)


def _is_measured(statistics: Statistics, region: Region, outcome: Outcome) -> bool:
    values = [end.value for end in region.layers if end.side == "in"]
    missing = [value for value in values if channel_statistics(statistics, region, value) is None]
    if missing:
        outcome.refuse(name_of(region), f"{missing[0]} was never computed on the data, or is not finite")
    return not missing


def name_of(region: Region) -> str:
    """Return the name of the first layer that reads the region's values."""
    return next((end.layer.name for end in region.layers if end.side == "in"), "") or next(
        iter(region.indices), ""
    )


def _change(plan: Plan) -> Change:
    region = plan.region
    makers = [end.layer.name for end in region.layers if end.side == "out"]
    makers += [node.name or node.output[0] for node in region.norms]
    readers = [end.layer.name for end in region.layers if end.side == "in"]
    logs = plan.logs
    detail: dict[str, float | int | str] = {"method": plan.method, "channels": int(np.count_nonzero(logs))}
    detail |= {"least scale": float(np.exp2(logs.min())), "largest scale": float(np.exp2(logs.max()))}
    if not np.isnan(plan.before):
        detail |= {"expected error before": plan.before, "expected error after": plan.after}
    copy = " (a copy of it)" if region.copies else ""
    return Change(
        where=name_of(region),
        what=f"scaled {np.count_nonzero(logs)} channels from {', '.join(makers)}{copy} to {', '.join(readers)}",
        weights=tuple(dict.fromkeys(end.layer.weight for end in region.layers)),
        detail=detail,
    )
