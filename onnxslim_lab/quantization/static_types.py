"""Types that layers with quantized activations can have on a target, and the type their weights run in.

onnxruntime's CPU provider replaces a layer between DequantizeLinear and QuantizeLinear whatever the types are, and
then does not load the model when its operator on codes lacks them (1.31: float8, 2 and 4 bits). Weights of 2
and 4 bits get a Cast to int8, which it folds when it loads: the file holds few bits and the layer runs on int8.
"""

from __future__ import annotations

from dataclasses import replace

from onnxslim_lab.errors import ParameterError
from onnxslim_lab.quantization.numerics import Grid
from onnxslim_lab.quantization.types import QUANT_TYPES, QuantType
from onnxslim_lab.targets.model import Profile

_INT8 = QUANT_TYPES["int8"]
_WIDE = ("uint16", "int16")  # onnxruntime computes in float between them


def check_types(activations: QuantType, weights: QuantType, profile: Profile) -> None:
    """Check that the target runs layers of these types.

    Raises:
        ParameterError: It does not, or cannot even load them.

    >>> from onnxslim_lab.profiles import find_profile
    >>> check_types(QUANT_TYPES["uint8"], QUANT_TYPES["int4"], find_profile("onnxruntime-x86"))
    """
    if not profile.activation_types:
        return  # no layer of it runs on codes: their weights alone are quantized
    known = profile.activation_types + (_WIDE if profile.is_onnxruntime else ())
    if activations.name not in known:
        raise ParameterError(
            f"quantize: target {profile.name} has no layers with {activations} activations; "
            f"choose activations={', '.join(known)}, or mode=weight-only"
        )
    taken: tuple[str, ...] = profile.weight_types
    if profile.is_onnxruntime:
        wide = activations.name in _WIDE
        taken = tuple(
            kind.name for kind in QUANT_TYPES.values() if kind.bits <= 16 and (wide or not kind.floating)
        )
    if weights.name not in taken:
        raise ParameterError(
            f"quantize: target {profile.name} has no layers with {activations} activations and {weights} weights; "
            f"choose weights={', '.join(taken)}, or mode=weight-only"
        )


def widens(activations: QuantType, weights: QuantType, profile: Profile) -> bool:
    """Whether codes of weights are cast to int8, in which the target multiplies them."""
    return profile.is_onnxruntime and weights.bits < 8 and activations.bits == 8


def widened(grid: Grid) -> Grid:
    """Return the grid of the same codes as int8, which holds those of uint4 and uint2 too.

    >>> import numpy as np
    >>> widened(Grid(QUANT_TYPES["uint4"], np.float32(1), np.array(8, QUANT_TYPES["uint4"].dtype))).zero_point
    array(8, dtype=int8)
    """
    return replace(grid, kind=_INT8, zero_point=grid.zero_point.astype(_INT8.dtype))
