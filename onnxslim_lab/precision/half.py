"""The two 16-bit formats: their range, and what values lose in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from onnx import TensorProto

from onnxslim_lab.floats import Array, blocks

Role = Literal["factor", "bias", "divisor"]
FEW = 16  # elements; each of so few counts, in more the small ones count as little as they are


@dataclass(frozen=True)
class Half:
    """A 16-bit floating-point format.

    Attributes:
        name: As users and schemas write it.
        data_type: TensorProto type.
        dtype: numpy type.
        largest: Largest finite number.
        normal: Smallest number of full precision.
        smallest: Smallest positive number.
        step: Distance from 1 to the next number.
    """

    name: str
    data_type: int
    dtype: Any
    largest: float
    normal: float
    smallest: float
    step: float

    @property
    def type_name(self) -> str:
        """The tensor type as schemas write it."""
        return f"tensor({self.name})"


HALVES = {
    "float16": Half(
        *("float16", TensorProto.FLOAT16, np.dtype(np.float16)), 65504.0, 2.0**-14, 2.0**-24, 2.0**-10
    ),
    "bfloat16": Half(
        *("bfloat16", TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
        *((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2.0**-7),
    ),
}


def to_half(values: Array, half: Half) -> Array:
    """Return the values rounded to the nearest number of the format; beyond its range, infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(half.dtype)


def loss(values: Array, half: Half, role: Role = "factor") -> str:
    """Return why float32 values should not be stored in the format, "" when they can be.

    No finite value may become infinite. Many factors together may lose as much as rounding explains, in the
    root mean square; of a few none may lose more than its last digits or become zero. What divides (a
    variance) is held to that however many there are; what is added (a bias) may vanish when there are many.

    >>> loss(np.float32([1e5]), HALVES["float16"])
    'its value 1e+05 is over the largest float16, 65504'
    >>> loss(np.float32([1e-12]), HALVES["float16"])
    'its value 1e-12 loses digits in float16'
    >>> loss(np.float32([0.1, -np.inf]), HALVES["float16"])
    ''
    """
    noise = power = 0.0
    strict = role == "divisor" or (role != "bias" and values.size <= FEW)
    for block in blocks(values):
        rounded = to_half(block, half).astype(np.float64)
        exact = block.astype(np.float64)
        finite = np.isfinite(exact)
        exact, rounded = np.where(finite, exact, 0.0), np.where(finite, rounded, 0.0)
        over = ~np.isfinite(rounded)
        if over.any():
            worst = exact[over][0]
            return f"its value {worst:.4g} is over the largest {half.name}, {half.largest:g}"
        gap, size = np.abs(rounded - exact), np.abs(exact)
        lost = gap > half.step * size
        if strict and lost.any():
            return f"its value {exact[lost][0]:.4g} loses digits in {half.name}"
        noise += float((gap * gap).sum())
        power += float((size * size).sum())
    if role != "bias" and noise > half.step**2 * power:
        return f"its values lose {np.sqrt(noise / power):.1%} in {half.name}"
    return ""
