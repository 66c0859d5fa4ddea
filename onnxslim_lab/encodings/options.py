"""The dense encodings of a tensor: narrower storage, one codebook, and repetition.

Every function here looks at an array and yields `Option`s: an encoding that applies, the bytes its data
takes at least, and how to build the `Plan` that decodes it. Nothing is approximate: an option is offered
only for values it can keep bit for bit, and the choice decodes the winner in NumPy before it trusts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import TensorProto

from onnxslim_lab.encodings.facts import Facts, Palette
from onnxslim_lab.encodings.packing import codebook_of, index_width, packed_bytes, unpack
from onnxslim_lab.encodings.plan import BFLOAT16, Array, Plan, Target, numpy_type, storage_bytes


@dataclass(frozen=True)
class Option:
    """An encoding that applies: `payload` bytes of data at least, and how to build its decoder."""

    payload: int
    build: Callable[[], Plan]


def cast_options(facts: Facts, target: Target) -> Iterable[Option]:
    """Yield storage in a smaller type: Cast."""
    for kind in facts.narrow_types:
        if kind != TensorProto.BFLOAT16 or target.opset >= 13:
            yield Option(storage_bytes(kind, facts.flat.size), partial(_cast, facts, target, kind))


def _cast(facts: Facts, target: Target, kind: int) -> Plan:
    dtype = numpy_type(kind)
    plan = Plan(target, f"{dtype.name} storage")
    plan.op("Cast", plan.tensor("narrow", facts.array.astype(dtype)), to=facts.data_type)
    return plan.finish()


def codebook_options(facts: Facts, target: Target) -> Iterable[Option]:
    """Yield, for at most 256 distinct values, Gather from a codebook with packed indices."""
    palette = facts.palette
    if palette is not None:
        width = index_width(len(palette.values), target)
        payload = packed_bytes(facts.flat.size, width)
        yield Option(payload, partial(_codebook, facts, target, palette, width))


def _codebook(facts: Facts, target: Target, palette: Palette, width: int) -> Plan:
    plan = Plan(target, f"codebook of {len(palette.values)}, {width}-bit index")
    index = unpack(plan, "index", palette.index.reshape(facts.array.shape), width)
    codebook_of(palette.values, facts.data_type, plan, index)
    return plan.finish()


def repeat_options(facts: Facts, target: Target) -> Iterable[Option]:
    """Yield, for slices that are equal along some axes (or all elements), Expand."""
    if target.opset < 8 or facts.array.dtype == BFLOAT16:  # onnxruntime has no Expand for bfloat16
        return
    bits: Array = facts.bits.reshape(facts.array.shape)
    for axis, size in enumerate(bits.shape):
        first = bits.take([0], axis)
        if size > 1 and (bits.take([-1], axis) == first).all() and (bits == first).all():
            bits = first
    if bits.size < facts.flat.size:
        kept = bits.view(facts.array.dtype)
        yield Option(
            int(kept.nbytes), partial(_repeat, facts, target, kept.reshape(()) if kept.size == 1 else kept)
        )


def _repeat(facts: Facts, target: Target, part: Array) -> Plan:
    plan = Plan(target, "slices repeated" if part.ndim else "one value repeated")
    shape = plan.tensor("shape", np.array(facts.array.shape, np.int64))
    plan.op("Expand", plan.tensor("part", part), shape)
    return plan.finish()
