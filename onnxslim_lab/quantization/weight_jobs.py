"""What is to be quantized to what: one job per stored weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from onnx import TensorProto

from onnxslim_lab.base import Outcome
from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.quantization import microsoft
from onnxslim_lab.quantization.types import QuantType, find_type
from onnxslim_lab.quantization.weight_forms import Form, can_look_up, fuses, least_opset
from onnxslim_lab.quantization.weight_layout import Layout, layout_of
from onnxslim_lab.selection import Target, find_targets
from onnxslim_lab.targets.model import Profile

_HALF_OPSET = 19  # of DequantizeLinear whose scales are float16
_DEQUANTIZED = ("fused", "dequantized", "looked up")


class WeightOnlyStep(Protocol):
    """The parameters of the quantize pass that count here; see its fields for their meaning."""

    @property
    def weights(self) -> str: ...  # noqa: D102 - as in the pass, and the following
    @property
    def granularity(self) -> str: ...  # noqa: D102
    @property
    def block(self) -> int: ...  # noqa: D102
    @property
    def symmetric(self) -> bool | None: ...  # noqa: D102
    @property
    def rounding(self) -> str: ...  # noqa: D102
    @property
    def include(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def exclude(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def op_types(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def format(self) -> str: ...  # noqa: D102
    def pass_name(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Job:
    """One weight to quantize: how it is cut, and the form it will be written in."""

    target: Target
    layout: Layout
    kind: QuantType
    block: int  # 0: one scale for the tensor
    form: Form

    @property
    def opset(self) -> int:
        """The least opset of its form."""
        least = least_opset(self.form, self.kind, block=self.blocks > 1, axis=self.block > 0)
        half = self.target.layer.stored.data_type == TensorProto.FLOAT16
        return max(least, _HALF_OPSET) if half and self.form in _DEQUANTIZED else least

    @property
    def blocks(self) -> int:
        """Scales of a channel."""
        return -(-self.layout.shape[1] // self.block) if self.block else 1


def weight_type(step: WeightOnlyStep, profile: Profile) -> QuantType:
    """Return the type of the codes: the one asked for, or the target's for the granularity.

    Raises:
        ParameterError: Weights cannot have this type.
    """
    name = step.weights
    if name == "auto":
        small = [name for name in profile.weight_only_types if find_type(name).bits == 4]
        small.sort(key=lambda name: find_type(name).signed != bool(step.symmetric))
        name = small[0] if small and step.granularity == "block" else "int8"
    kind = find_type(name)
    if kind.bits > 16:
        raise ParameterError(
            f"{step.pass_name()}: weights={name} is no type for weights; choose 2 to 16 bits"
        )
    return kind


def select(model: Graph, step: WeightOnlyStep, outcome: Outcome) -> list[Target]:
    """Return the weights that patterns and operators select; the others are refused in `outcome`.

    Raises:
        ParameterError: A pattern, or an operator of `op_types`, matches nothing.
    """
    targets = find_targets(model, outcome, step=step.pass_name(), include=step.include, exclude=step.exclude)
    if not step.op_types:
        return targets
    known = {layer.op_type for target in targets for layer in target.layers}
    for op_type in step.op_types:
        if op_type not in known:
            raise ParameterError(
                f"{step.pass_name()}: op_types: no selected layer of the model is a {quote(op_type)}"
                + suggest(op_type, known)
            )
    chosen = []
    for target in targets:
        other = next((layer for layer in target.layers if layer.op_type not in step.op_types), None)
        if other is None:
            chosen.append(target)
        else:
            outcome.refuse(target.where, f"{other.op_type} is not among op_types")
    return chosen


def make_job(target: Target, step: WeightOnlyStep, kind: QuantType, profile: Profile) -> Job:
    """Return how a weight is cut, and the form that costs least to run on the target."""
    layout = layout_of(target.layers)
    length = layout.shape[1]
    block = {"tensor": 0, "channel": length, "block": min(step.block, length)}[step.granularity]
    parted = block if 0 < block < length else 0
    written = parted or 16
    contrib = step.format == "microsoft" or (step.format == "auto" and profile.int4_format == "MatMulNBits")
    folds = step.format != "qdq" and profile.is_onnxruntime
    form: Form = "decoded" if folds else "dequantized"
    if contrib and microsoft.can_multiply(target.layers, kind, written):
        form = "MatMulNBits"
    elif contrib and microsoft.can_gather(target.layers, kind, written, length):
        form = "GatherBlockQuantized"
    elif fuses(target.layers, kind, parted):
        form = "fused"
    elif can_look_up(target.layers, kind):
        form = "looked up"
    return Job(target, layout, kind, block, form)
