"""What a target profile says: the schemes a runtime takes and the operators it runs in integers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Form = Literal["layer", "unary", "binary", "variadic", "select", "same", "reads"]
"""How the operands of an operator that runs in integers are quantized:

layer     a quantized activation and a quantized weight (or second activation), perhaps a bias in int32
unary     one quantized input, an output with parameters of its own
binary    two quantized inputs of one type
variadic  any number of quantized inputs of one type
select    as binary, after a first input that stays as it is (Where)
same      moves values only: the output has the parameters of the input
reads     reads a quantized input; its output is not quantized (ArgMax)
"""


class Fact(BaseModel):
    """One statement about a target and the document, or experiment, it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    source: str


class Operator(BaseModel):
    """How a target runs one operator between DequantizeLinear and QuantizeLinear.

    Attributes:
        form: How its operands are quantized.
        becomes: What the target runs instead; "" when the name stays.
        float_output: Whether it also runs in integers when no QuantizeLinear follows it.
        types: Activation types it takes; empty: all that the profile lists.
        weights: Weight types it takes; empty: all that the profile lists but those of weight-only layers.
        since: Least opset from which it takes integers.
        breaks_below: Least opset at which such a group loads at all.
        float_weight: Whether the target quantizes a constant floating-point weight or bias by itself.
        avoid: Why it is better left in float although the target fuses it; "" when it is not.
        note: What else must hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Form
    becomes: str = ""
    float_output: bool = False
    types: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    since: int = 10
    breaks_below: int = 0
    float_weight: bool = False
    avoid: str = ""
    note: str = ""


class Profile(BaseModel):
    """A runtime on a kind of machine: what a model for it may contain and what pays off there.

    Type names are those of `onnxslim_lab.quantization.types.QUANT_TYPES`.

    Attributes:
        name: Its name for `--target`.
        description: The runtime and machine in a few words.
        activations: The activation type to choose.
        weights: The weight type to choose.
        activation_types: Activation types that run in integers (or float8).
        weight_types: Weight types of layers whose activations are quantized as well.
        weight_only_types: Weight types of layers whose activations stay floating point.
        symmetric_activations: Whether activations must have the zero point 0.
        symmetric_weights: Whether weights must have the zero point 0 (128 when unsigned).
        per_channel: Whether weights may have a scale for each output channel.
        reduce_range: Whether to quantize weights to one bit less, because products saturate.
        saturates: Whether sums of two uint8 x int8 products are clamped to int16.
        quantized_bias: Whether a bias is int32; False: it stays floating point.
        format: The way to write quantized operators: standard Q and DQ nodes, ONNX's QLinear operators, or
            those of com.microsoft.
        formats: The ways the target understands.
        int4_format: Blockwise 4-bit weights as DequantizeLinear or as com.microsoft's MatMulNBits.
        blocks: Block sizes for which blockwise weights run without being unpacked first; empty: any.
        dynamic: Whether DynamicQuantizeLinear with MatMulInteger runs in integers.
        rewrites_signed: Whether int8 between Q and DQ is turned into uint8, so that the two may be mixed.
        absorbs: Operators after a layer that fuse with it whatever the quantized range is.
        slow_activations: Activation types with which QLinear operators run slowly.
        slow_weights: Weight types that run, but slower than `weights`.
        operators: What runs in integers, by operator.
        opsets: Least and greatest opset of the default domain.
        domains: Operator domains it knows; "" is ONNX's own.
        runs: The operators of ONNX's domain that it runs; None: all of them.
        refuses: Operators that it does not run, of whatever domain.
        control_flow: Whether If, Loop and Scan run.
        dynamic_shapes: Whether inputs may have open dimensions.
        facts: What else to know, with sources.
        notice: Why this profile was chosen, where it was not named; "" when it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    activations: str = "uint8"
    weights: str = "int8"
    activation_types: tuple[str, ...] = ("uint8", "int8")
    weight_types: tuple[str, ...] = ("int8", "uint8")
    weight_only_types: tuple[str, ...] = ()
    symmetric_activations: bool = False
    symmetric_weights: bool = False
    per_channel: bool = True
    reduce_range: bool = False
    saturates: bool = False
    quantized_bias: bool = True
    format: Literal["qdq", "qoperator", "microsoft"] = "qdq"
    formats: tuple[Literal["qdq", "qoperator", "microsoft"], ...] = ("qdq",)
    int4_format: Literal["qdq", "MatMulNBits"] = "qdq"
    blocks: tuple[int, ...] = ()
    dynamic: bool = False
    rewrites_signed: bool = False
    absorbs: tuple[str, ...] = ()
    slow_activations: tuple[str, ...] = ()
    slow_weights: tuple[str, ...] = ()
    operators: dict[str, Operator] = Field(default_factory=dict)
    opsets: tuple[int, int] = (7, 26)
    domains: tuple[str, ...] = ("",)
    runs: frozenset[str] | None = None
    refuses: frozenset[str] = frozenset()
    control_flow: bool = True
    dynamic_shapes: bool = True
    facts: tuple[Fact, ...] = ()
    notice: str = ""

    @property
    def is_onnxruntime(self) -> bool:
        """Whether the runtime is onnxruntime's CPU provider, which folds constants and fuses by pattern."""
        return self.name.startswith("onnxruntime")
