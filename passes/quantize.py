"""Quantize weights, and activations where layers can run on codes."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from onnxslim_lab.base import Context, Outcome, Pass
from onnxslim_lab.graph import Graph
from onnxslim_lab.profiles import find_profile
from onnxslim_lab.quantization.dynamic import apply_dynamic
from onnxslim_lab.quantization.ranges import Method
from onnxslim_lab.quantization.static import apply_static
from onnxslim_lab.quantization.types import QUANT_TYPES, find_type
from onnxslim_lab.quantization.weight_codes import decode_codes, restore_codes
from onnxslim_lab.quantization.weight_fill import refill, refuse_fills, spread_fills
from onnxslim_lab.quantization.weight_only import apply_weight_only, check_data
from onnxslim_lab.quantization.weight_prepare import prepare_weights, share_constants
from onnxslim_lab.selection import Patterns

_ONE_SCALE = "a sum of products of codes has one scale for all its inputs, on every target"
_EVEN_CODES = "layers that multiply codes take evenly spaced ones, on every target"


class Quantize(Pass):
    """Store weights in few bits, and let layers compute on integers.

    before: Conv(x, W, b) -> Relu
    after:  x -> QuantizeLinear -> DequantizeLinear -> Conv(., DequantizeLinear(W), DequantizeLinear(b)) -> QuantizeLinear ->

    `mode` "static" measures activations on calibration data and writes QuantizeLinear and
    DequantizeLinear where the target fuses them with Conv, MatMul and Gemm and what lies between them;
    weights of other layers are stored quantized and computed with in float. "weight-only" stores
    weights in few bits and computes in float; "dynamic" measures activations while the model runs.

    With mode static, `format` "qoperator" writes ONNX's operators on codes instead where there is one
    (QLinearConv, QLinearMatMul, MatMulInteger, ConvInteger), "microsoft" com.microsoft's as well (QGemm,
    MatMulIntegerToFloat, QLinearAdd, ...); the others keep QuantizeLinear and DequantizeLinear.

    `terms=2` reads an input that 8 bits cannot hold as two terms of 8 bits, and multiplies both:

    before: x -> Conv(., W)
    after:  d = DequantizeLinear(QuantizeLinear(x)); Conv(d, W) + Conv(DequantizeLinear(QuantizeLinear(x - d)), W)

    refuses: weights that are quantized already, not constant, or excluded; layers that the target cannot
    run on codes; layers that calibration data never reaches; with a format of operators on codes, layers
    that have none: types of more than 8 bits, float16, weights with zero points that differ by channel.

    >>> Quantize(exclude="head*").exclude
    ('head*',)
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    mode: Literal["static", "dynamic", "weight-only"] = Field(
        "static", description="what is quantized, and when"
    )
    weights: str = Field(
        "auto",
        description=f"type of weights: {', '.join(name for name in QUANT_TYPES if name != 'int32')}; auto: the target's",
    )
    activations: str = Field(
        "auto", description="type of activations, of those of 8 and 16 bits; auto: the target's"
    )
    granularity: Literal["tensor", "channel", "block"] = Field(
        "channel",
        description="what has a scale of its own: a weight, its output channels, or blocks of inputs",
    )
    block: int = Field(32, ge=1, description="inputs to a block")
    symmetric: bool = Field(
        True, description="whether weights have their zero point in the middle of the codes"
    )
    ranges: Method = Field("auto", description="how ranges of activations are chosen")
    percentile: float = Field(
        99.99, gt=50, le=100, description="share of elements that ranges=percentile covers"
    )
    rounding: Literal["auto", "nearest", "gptq", "adaround", "codebook"] = Field(
        "auto", description="how weights are rounded; auto: gptq when static, else nearest"
    )
    include: Patterns = Field((), description="glob patterns of node or weight names; empty means all layers")
    exclude: Patterns = Field((), description="glob patterns of node or weight names that stay float")
    op_types: Patterns = Field((), description="operators to quantize; empty means all")
    float_macs: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest share of multiply-accumulates left in float, where that saves most",
    )
    float_until: float = Field(
        30.0,
        gt=0,
        description="error of the outputs, in dB below them, that is small enough: no more layers stay float",
    )
    float_sums: bool = Field(
        False,
        description="whether all convolutions may give float results where rounding them spoils the outputs: by "
        "ConvInteger, which takes onnxruntime's CPU provider about as long as a float Conv, those of one tap and of one "
        "axis by MatMul, which is faster and is tried with float_macs in any case",
    )
    terms: int = Field(
        1,
        ge=1,
        le=2,
        description="codes that an input of a layer may take where one spoils the outputs; 2: one more for what the "
        "first leaves, and the products a second time, until float_until is reached",
    )
    target: str = Field(
        "auto", description="profile of the runtime and machine; auto: onnxruntime on this CPU"
    )
    format: Literal["auto", "qdq", "qoperator", "microsoft"] = Field(
        "auto",
        description="operators that are written; auto: the target's, QuantizeLinear and DequantizeLinear",
    )

    @field_validator("weights", "activations")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != "auto":
            find_type(name)
        return name

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "static":
            for field, value, known, why in (
                ("granularity", self.granularity, ("tensor", "channel"), _ONE_SCALE),
                ("rounding", self.rounding, ("auto", "nearest", "gptq", "adaround"), _EVEN_CODES),
            ):
                if value not in known:
                    raise ValueError(
                        f"mode static has no {field}={value}: {why}; choose {field}={', '.join(known)}, or "
                        "mode=weight-only"
                    )
        elif self.activations not in ("auto", "uint8") and self.mode == "dynamic":
            raise ValueError(
                f"mode dynamic has no activations={self.activations}: DynamicQuantizeLinear gives uint8"
            )
        elif self.activations != "auto" and self.mode == "weight-only":
            raise ValueError(
                f"mode weight-only has no activations={self.activations}: it leaves them in float"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations."""
        return self.mode == "static" or self.rounding in ("gptq", "adaround")

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Quantize the model in place; see the class."""
        outcome = self._apply(graph, context)
        if self.target == "auto" and outcome.changes:
            outcome.notices.append(self._choice())
        return outcome

    def _choice(self) -> str:
        """Return which types the target "auto" stands for, and why."""
        profile = find_profile(self.target)
        chosen = {"weights": self.weights, "activations": self.activations}
        auto = {name: getattr(profile, name) for name, value in chosen.items() if value == "auto"}
        if self.mode != "static" or not auto:
            return profile.notice
        bits = " of 7 bits" if profile.reduce_range and "weights" in auto else ""
        told = [f"{name} {kind}{bits if name == 'weights' else ''}" for name, kind in auto.items()]
        return f"{profile.notice}; {', '.join(told)}"

    def _apply(self, graph: Graph, context: Context) -> Outcome:
        decoded = decode_codes(graph)
        outcome = self._quantize(graph, context)
        restore_codes(graph, decoded)
        return outcome

    def _quantize(self, graph: Graph, context: Context) -> Outcome:
        if self.mode == "static":
            filled = spread_fills(graph)
            outcome = apply_static(graph, self, context)
            if filled:
                refill(graph)
            return outcome
        step = self.model_copy(update={"rounding": "nearest"}) if self.rounding == "auto" else self
        check_data(step, context)
        outcome = Outcome()
        refuse_fills(graph, outcome)
        step = prepare_weights(graph, step, context, outcome)
        outcome.merge((apply_dynamic if self.mode == "dynamic" else apply_weight_only)(graph, step, context))
        share_constants(graph, context)
        return outcome
