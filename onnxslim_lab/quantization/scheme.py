"""The types and options that a static quantization is planned by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxslim_lab.quantization.ranges import Method
from onnxslim_lab.quantization.types import QuantType
from onnxslim_lab.targets.model import Profile


@dataclass(frozen=True)
class Scheme:
    """What values are quantized to.

    Attributes:
        activations, weights: Types.
        symmetric_activations, symmetric_weights: Whether zero points are the middle of the codes.
        per_channel: Whether each output channel of a weight has its scale.
        reduce_range: Whether weights use one bit less.
        ranges: How ranges of activations are chosen.
        percentile: For ranges "percentile".
        weight_ranges: How ranges of weights are chosen.
        profile: The target.
    """

    activations: QuantType
    weights: QuantType
    profile: Profile
    symmetric_activations: bool = False
    symmetric_weights: bool = True
    per_channel: bool = True
    reduce_range: bool = False
    ranges: Method = "auto"
    percentile: float = 99.99
    weight_ranges: Any = "minmax"

    @property
    def by_codes(self) -> bool:
        """Whether standard operators may be put between codes."""
        return self.profile.is_onnxruntime and self.activations.name == "uint8"
