"""The sparse encodings: positions of what differs from the background, and the values there.

Positions are Rice coded: a bitmap of steps, each `2**low` elements wide, has a one for every stored
element and zeros where a distance takes further steps; beside each one stand `low` bits, by how much its
distance to the next falls short of whole steps. The decoder has static shapes only, because onnxruntime
folds nothing else: with s the steps, k = CumSum(s) * s counts the ones and is 0 elsewhere, so that

    position = CumSum(2**low - rest[k], exclusive)        value = values[k]

where rest[0] = 0 and values[0] is the background: a zero of the bitmap writes the background to a place
between two stored elements. This takes within 0.03 bits an element of the entropy of random positions.
`low` = 0 is the plain bitmap mask and needs no positions: Gather(values, k) is the tensor. Slices along an
axis that hold only background (dead pixels, removed channels) are left out before, all mapped to one.

R. F. Rice, Some practical universal noiseless coding techniques, JPL 79-22, 1979; relative positions with
a codebook: S. Han et al., Deep Compression, ICLR 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import TensorProto

from onnxslim_lab.encodings.facts import Facts, find_palette, narrow_types
from onnxslim_lab.encodings.options import Option
from onnxslim_lab.encodings.packing import (
    binary_weights,
    codebook_of,
    index_width,
    packed_bytes,
    trim,
    unpack_bits,
)
from onnxslim_lab.encodings.plan import Array, Plan, Target, numpy_type

FIRST_OPSET = 11  # CumSum, ScatterElements, BitShift
MOST_LOW_BITS = 8
_LARGEST = 2**31 - 2**12  # elements; positions are int32
_BITMAP_BEST = 0.5  # density from which on no low bits pay
_LEAST_BACKGROUND = 0.05  # share of the tensor below which no position code pays


@dataclass(frozen=True)
class Values:
    """What is stored: the background first, then the value at each position.

    Attributes:
        stored: Codebook indices (uint8) or the values themselves, shape [n + 1].
        kind: Their TensorProto type when there is no codebook.
        codebook: Bit patterns of the values that indices stand for.
        width: Bits of an index.
    """

    stored: Array
    kind: int
    codebook: Array | None = None
    width: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes they take packed, without the codebook."""
        return packed_bytes(len(self.stored), self.width) if self.width else int(self.stored.nbytes)


@dataclass(frozen=True)
class Kept:
    """The slices along some adjacent axes, first to last - 1, that hold more than background."""

    mask: Array
    first: int
    last: int


def distances_of(positions: Array, size: int) -> Array:
    """Return the distance from each position to the next; the last one's to the end counts as 1.

    The first position must be 0.
    """
    assert positions[0] == 0
    return np.diff(positions, append=min(positions[-1] + 1, size))


def rice_bits(distances: Array, low: int) -> int:
    """Return the bits that Rice coding takes for these distances."""
    return len(distances) * low + int(_steps(distances, low).sum())


def _steps(distances: Array, low: int) -> Array:
    return (distances + ((1 << low) - 1)) >> low


def best_low(distances: Array) -> int:
    """Return the number of low bits with the shortest Rice code."""
    guess = min(MOST_LOW_BITS, max(0, round(math.log2(0.69 * float(distances.mean())))))
    tried: set[int] = {0, *range(max(0, guess - 1), min(MOST_LOW_BITS, guess + 1) + 1)}
    return min(sorted(tried), key=lambda low: rice_bits(distances, low))


def rice_code(distances: Array, low: int) -> tuple[Array, Array]:
    """Return the bitmap of steps (bool) and the rest of each distance (0 to 2**low - 1)."""
    steps = _steps(distances, low)
    bitmap = np.zeros(int(steps.sum()), np.bool_)
    bitmap[np.cumsum(steps) - steps] = True
    rest: Array = ((steps << low) - distances).astype(np.uint8)
    return bitmap, rest


def sparse_options(facts: Facts, target: Target) -> Iterable[Option]:
    """Yield an option for each way to keep positions and values that applies."""
    if target.opset < FIRST_OPSET or not 2 <= facts.flat.size <= _LARGEST:
        return
    palette = facts.palette
    background = facts.bits.dtype.type(0 if palette is None else palette.values[palette.counts.argmax()])
    stored = facts.bits != background
    count = int(np.count_nonzero(stored))
    if not 0 < count <= (1 - _LEAST_BACKGROUND) * facts.flat.size:
        return
    emptied = list(_emptied(stored.reshape(facts.array.shape)))
    if palette is not None and not emptied:
        density = count / facts.flat.size
        width = index_width(len(palette.values))
        if _entropy(density) + density * width >= width:
            return  # the codebook alone takes less
    for kept in (None, *emptied):
        mask = (
            stored.reshape(facts.array.shape) if kept is None else _compact(stored, kept, facts.array.shape)
        )
        yield from _options(facts, target, background, mask, kept)


def _entropy(density: float) -> float:
    """Return the bits of information in a random mask, per element."""
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density)


def _options(
    facts: Facts, target: Target, background: Array, mask: Array, kept: Kept | None
) -> Iterable[Option]:
    flat = mask.reshape(-1)
    found = facts.bits[facts.bits != background]
    codings = list(_values(np.insert(found, 0, background), facts, target))
    for values in codings:  # the plain bitmap
        yield Option(flat.size // 8 + values.nbytes, partial(_build, facts, target, mask, 0, values, kept))
    if np.count_nonzero(flat) > _BITMAP_BEST * flat.size:
        return
    first = not flat[0]  # position 0 is always stored
    positions = np.flatnonzero(flat)
    if first:
        positions = np.insert(positions, 0, 0)
    distances = distances_of(positions, flat.size)
    low = best_low(distances)
    if low == 0:
        return
    bits = rice_bits(distances, low)
    for values in codings:
        stored = np.insert(values.stored, 1, values.stored[0]) if first else values.stored
        full = Values(stored, values.kind, values.codebook, values.width)
        yield Option(bits // 8 + full.nbytes, partial(_build, facts, target, mask, low, full, kept))


def _values(patterns: Array, facts: Facts, target: Target) -> Iterable[Values]:
    palette = find_palette(patterns)
    if palette is not None:
        yield Values(palette.index, facts.data_type, palette.values, index_width(len(palette.values)))
        return
    plain = patterns.view(facts.array.dtype)
    yield Values(plain, facts.data_type)
    for kind in narrow_types(plain):
        if kind != TensorProto.BFLOAT16 or target.opset >= 13:
            yield Values(plain.astype(numpy_type(kind)), kind)


def _emptied(stored: Array) -> Iterable[Kept]:
    """Yield the axes, and the trailing axes taken as one, with at least two slices that hold nothing."""
    for first in range(stored.ndim):
        for last in sorted({first + 1, stored.ndim}):
            others = tuple(axis for axis in range(stored.ndim) if not first <= axis < last)
            if others:
                mask = stored.any(axis=others).reshape(-1)
                if np.count_nonzero(~mask) > 1:
                    yield Kept(mask, first, last)


def _compact(stored: Array, kept: Kept, shape: tuple[int, ...]) -> Array:
    """Return the mask without the empty slices, but with one of them in front."""
    whole = stored.reshape(*shape[: kept.first], len(kept.mask), *shape[kept.last :])
    slices = np.concatenate([np.flatnonzero(~kept.mask)[:1], np.flatnonzero(kept.mask)])
    return whole.take(slices, kept.first)


def _build(facts: Facts, target: Target, mask: Array, low: int, values: Values, kept: Kept | None) -> Plan:
    how = (
        f"codebook of {len(values.codebook)}" if values.codebook is not None else numpy_type(values.kind).name
    )
    place = f"{low}-bit Rice gaps" if low else "bitmap"
    plan = Plan(target, f"sparse: {place}, {how}" + (", empty slices left out" if kept else ""))
    flat = mask.reshape(-1)
    if low:
        positions = np.flatnonzero(flat)
        if not flat[0]:
            positions = np.insert(positions, 0, 0)
        bitmap, rest = rice_code(distances_of(positions, flat.size), low)
        rest[-1] = (1 << low) - 1
        spare = -len(bitmap) % 8
        fits = not spare or positions[-1] + 1 + ((spare - 1) << low) < flat.size
        number = _numbers(plan, "steps", bitmap, exact=not fits)
        rest_of, found = _rest_and_values(plan, facts, np.insert(rest, 0, 0), low, values)
        short = plan.op("Gather", rest_of, number, axis=1)
        step = plan.op("Sub", plan.share(f"step{low}", np.array(1 << low, np.int32)), short)
        where = plan.op("CumSum", step, plan.share("one", np.array(1, np.int64)), exclusive=1)
        update = plan.op("Gather", found, number, axis=1)
        size = plan.tensor("size", np.array([1, flat.size], np.int64))
        fill = _fill(facts.data_type, int(_background(values, facts)))
        result = plan.op("ScatterElements", plan.op("ConstantOfShape", size, **fill), where, update, axis=1)
    else:
        number = _numbers(plan, "mask", flat, exact=True)
        _, found = _rest_and_values(plan, facts, None, 0, values)
        result = plan.op("Gather", found, number, axis=1)
    shape = facts.array.shape
    if kept is None:
        plan.op("Reshape", result, plan.tensor("shape", np.array(shape, np.int64)))
        return plan.finish()
    compact = plan.op("Reshape", result, plan.tensor("compact", np.array(mask.shape, np.int64)))
    whole = plan.op("Gather", compact, _numbers(plan, "kept", kept.mask, exact=True), axis=kept.first)
    if kept.last > kept.first + 1:
        plan.op("Reshape", whole, plan.tensor("shape", np.array(shape, np.int64)))
    return plan.finish()


def _background(values: Values, facts: Facts) -> int:
    """Return the bit pattern of the background."""
    if values.codebook is not None:
        return int(values.codebook[values.stored[0]])
    return int(values.stored[:1].astype(facts.array.dtype).view(facts.bits.dtype)[0])


def _numbers(plan: Plan, word: str, bitmap: Array, *, exact: bool) -> str:
    """Add a bitmap and the nodes that number its ones from 1, 0 elsewhere: int32 [n].

    `exact` cuts off the bits that fill up the last byte.
    """
    bits = unpack_bits(plan, plan.tensor(word, np.packbits(bitmap).reshape(-1, 1)), 0)
    if exact and bitmap.size % 8:
        bits = trim(plan, bits, bitmap.size)
    flags = plan.op("Cast", bits, to=TensorProto.INT32)
    count = plan.op("CumSum", flags, plan.share("zero", np.array(0, np.int64)))
    return plan.op("Mul", count, flags)


def _rest_and_values(
    plan: Plan, facts: Facts, rest: Array | None, low: int, values: Values
) -> tuple[str, str]:
    """Add the rests ("" when there are none) and the values, background first, both of shape [1, n + 1].

    The bits of both stand in one matrix of bit planes, which costs fewer nodes than one for each.
    """
    width = values.width
    planes = [_planes(rest, low)] if rest is not None else []
    if values.codebook is not None:
        planes.append(_planes(values.stored, width))
    bits = ""
    if planes:
        column = plan.tensor("bits", np.concatenate(planes).reshape(-1, 1))
        bits = unpack_bits(plan, column, low + width)
    rest_of = plan.op("MatMulInteger", binary_weights(plan, low, 0, width), bits) if low else ""
    if values.codebook is not None:
        index = plan.op("MatMulInteger", binary_weights(plan, width, low, 0), bits)
        return rest_of, codebook_of(values.codebook, facts.data_type, plan, index)
    found = plan.tensor("values", values.stored.reshape(1, -1))
    if values.kind != facts.data_type:
        found = plan.op("Cast", found, to=facts.data_type)
    return rest_of, found


def _planes(field: Array, width: int) -> Array:
    """Return the bit planes of integers, highest first, each a whole number of bytes."""
    return np.concatenate([np.packbits((field >> bit) & 1) for bit in range(width - 1, -1, -1)])


def _fill(data_type: int, background: int) -> dict[str, TensorProto]:
    """Return the attributes of a ConstantOfShape that fills with a bit pattern; float 0 is its default."""
    if data_type == TensorProto.FLOAT and not background:
        return {}
    raw = background.to_bytes(numpy_type(data_type).itemsize, "little")
    return {"value": TensorProto(dims=[1], data_type=data_type, raw_data=raw)}
