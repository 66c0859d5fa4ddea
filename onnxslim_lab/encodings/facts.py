"""What the encodings ask about an array: its distinct values, and the types that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxslim_lab.encodings.plan import BFLOAT16, Array, bit_view, onnx_type

LARGEST_CODEBOOK = 256
_SAMPLE = 1 << 14
_CHUNK = 1 << 20
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Palette:
    """The distinct bit patterns of an array, ascending, how often each occurs, and each element's index."""

    values: Array
    counts: Array
    index: Array


class Facts:
    """What the encodings ask about an array, each computed once."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.flat = array.reshape(-1)
        self.bits = bit_view(self.flat)
        self.data_type = onnx_type(array.dtype)

    @cached_property
    def palette(self) -> Palette | None:
        """The distinct values when there are at most 256."""
        return find_palette(self.bits)

    @cached_property
    def narrow_types(self) -> list[int]:
        """The smaller types that hold every value exactly, smallest first."""
        return narrow_types(self.flat)


def find_palette(bits: Array) -> Palette | None:
    """Return the distinct patterns of an unsigned array of shape [n], None when there are over 256.

    A hash that sends the patterns to different slots of a 65,536-entry table takes the place of a sort:
    25 million elements take a fraction of a second.
    """
    if has_many_values(bits):
        return None
    values = np.unique(bits[:: max(1, bits.size // _SAMPLE)])
    while len(values) <= LARGEST_CODEBOOK:
        multiplier, table = _hash_table(values)
        index = np.empty(bits.size, np.uint8)
        missing = values[:0]
        for start in range(0, bits.size, _CHUNK):
            chunk = bits[start : start + _CHUNK]
            found = table[_slots(chunk, multiplier)]
            index[start : start + _CHUNK] = found
            wrong = chunk[values[found] != chunk]
            if wrong.size:
                missing = np.union1d(missing, wrong)
                if len(values) + len(missing) > LARGEST_CODEBOOK:
                    return None
        if not missing.size:
            counts = np.zeros(len(values), np.int64)
            for start in range(0, bits.size, _CHUNK):  # bincount widens its input to 64 bits
                counts += np.bincount(index[start : start + _CHUNK], minlength=len(values))
            return Palette(values, counts, index)
        values = np.union1d(values, missing)
    return None


def has_many_values(bits: Array) -> bool:
    """Whether the first elements alone have more values than a codebook holds: the usual, cheap no."""
    return len(np.unique(bits[: 4 * LARGEST_CODEBOOK])) > LARGEST_CODEBOOK


def _slots(bits: Array, multiplier: int) -> Array:
    width = 8 * bits.itemsize
    if width <= 16:
        return bits
    with np.errstate(over="ignore"):
        slots: Array = (bits * bits.dtype.type(multiplier % (1 << width))) >> bits.dtype.type(width - 16)
    return slots


def _hash_table(values: Array) -> tuple[int, Array]:
    multiplier = 0x9E3779B97F4A7C15
    while True:
        slots = _slots(values, multiplier)
        if len(np.unique(slots)) == len(values):
            table = np.zeros(1 << 16, np.uint8)
            table[slots] = np.arange(len(values))
            return multiplier, table
        multiplier = (multiplier * 0xD1342543DE82EF95 + 2) % (1 << 64)


def narrow_types(flat: Array) -> list[int]:
    """Return the TensorProto types with fewer bytes than the array's that hold every value exactly."""
    name = flat.dtype.name
    if name in _FLOATS:
        names = ["uint8", "int8", "float16", "bfloat16", "int16", "uint16", "float32"]
    elif np.issubdtype(flat.dtype, np.integer):
        names = ["uint8", "int8", "int16", "uint16", "int32", "uint32"]
    else:
        return []
    fitting = []
    for candidate in names:
        dtype = BFLOAT16 if candidate == "bfloat16" else np.dtype(candidate)
        if dtype.itemsize < flat.dtype.itemsize and (
            _survives(flat[: _SAMPLE // 4], dtype) and _survives(flat, dtype)
        ):
            fitting.append(onnx_type(dtype))
    return fitting


def _survives(flat: Array, dtype: np.dtype[np.generic]) -> bool:
    """Return whether a cast there and back keeps every bit; NaN is never trusted to a Cast."""
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        with np.errstate(all="ignore"):
            back = chunk.astype(dtype).astype(chunk.dtype)
        if not np.array_equal(bit_view(chunk), bit_view(back)) or np.isnan(chunk).any():
            return False
    return True
