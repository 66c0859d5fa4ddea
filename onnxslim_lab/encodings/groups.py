"""One codebook for each group of slices: what sharing weights by row groups leaves.

Groups are runs of slices along the first or the last axis. Their length is read off the values: the number
of distinct values among the first slices stays small inside a group and grows past its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxslim_lab.encodings.facts import LARGEST_CODEBOOK, Facts, has_many_values
from onnxslim_lab.encodings.options import Option
from onnxslim_lab.encodings.packing import codebook_of, index_width, packed_bytes, unpack
from onnxslim_lab.encodings.plan import Array, Plan, Target

_LONGEST_GROUP = 1024  # slices
_FEWEST = 4  # elements for each value of a codebook, at least


@dataclass(frozen=True)
class Groups:
    """Codebooks of groups of `length` slices along `axis`: bit patterns [groups, 2**width], and indices."""

    axis: int
    length: int
    codebooks: Array
    index: Array
    width: int


def group_options(facts: Facts, target: Target) -> Iterable[Option]:
    """Yield codebooks by groups of slices, where the tensor as a whole has over 256 values."""
    if facts.palette is not None or facts.array.ndim < 2:
        return
    for axis in sorted({0, facts.array.ndim - 1}):
        slices: Array = np.moveaxis(facts.bits.reshape(facts.array.shape), axis, 0)
        slices = slices.reshape(len(slices), -1)
        for length, width in group_lengths(slices, target):
            if len(slices) <= length or slices.shape[1] * length < _FEWEST << width:
                continue
            groups = _find_groups(slices, axis, length, width, facts.array.shape)
            if groups is not None:
                payload = packed_bytes(facts.flat.size, width) + 4 * len(slices)
                yield Option(payload, partial(_build, facts, target, groups))


def group_lengths(slices: Array, target: Target) -> list[tuple[int, int]]:
    """Return (length, index width) of the groups that the first slices [n, m] may be part of."""
    values = slices[0][:0]
    lengths: dict[int, int] = {}
    for number, row in enumerate(slices[:_LONGEST_GROUP], 1):
        if has_many_values(row):
            break
        values = np.union1d(values, row)
        if len(values) > LARGEST_CODEBOOK:
            break
        lengths[index_width(len(values), target)] = number
    return [(length, width) for width, length in lengths.items()]


def _find_groups(slices: Array, axis: int, length: int, width: int, shape: tuple[int, ...]) -> Groups | None:
    count = -(-len(slices) // length)
    codebooks = np.zeros((count, 1 << width), slices.dtype)
    index = np.empty(slices.shape, np.uint8)
    for number in range(count):
        group = slice(number * length, (number + 1) * length)
        if len(np.unique(slices[number * length])) > 1 << width:
            return None
        values, found = np.unique(slices[group], return_inverse=True)
        if len(values) > 1 << width:
            return None
        codebooks[number, : len(values)] = values
        index[group] = found.reshape(index[group].shape)
    order = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return Groups(axis, length, codebooks, np.moveaxis(index.reshape(order), 0, axis), width)


def _build(facts: Facts, target: Target, groups: Groups) -> Plan:
    size = groups.codebooks.shape[1]
    plan = Plan(target, f"codebook of {size} for every {groups.length} slices, {groups.width}-bit index")
    starts = np.arange(facts.array.shape[groups.axis], dtype=np.int32) // groups.length * size
    aside = [1] * facts.array.ndim
    aside[groups.axis] = -1
    index = unpack(plan, "index", np.ascontiguousarray(groups.index), groups.width)
    index = plan.op("Add", index, plan.tensor("starts", starts.astype(np.int32).reshape(aside)))
    codebook_of(groups.codebooks.reshape(-1), facts.data_type, plan, index)
    return plan.finish()
