"""Which weights go together, and the masks that scores and a budget make of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.second_order.obs import Doubles, Mask


@dataclass(frozen=True)
class Pattern:
    """Which sets of weights go together: single ones, N of every M, or blocks of consecutive columns.

    >>> Pattern.parse("2:4"), Pattern.parse("block:8").block
    (Pattern(keep=2, group=4, block=1), 8)
    """

    keep: int = 0
    group: int = 0
    block: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern "any", "N:M" or "block:N"; raises ValueError for anything else."""
        if text == "any":
            return cls()
        if parts := re.fullmatch(r"block:(\d{1,4})", text):
            if int(parts[1]) > 1:
                return cls(block=int(parts[1]))
        elif (parts := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)) and 0 < int(parts[1]) < int(parts[2]):
            return cls(keep=int(parts[1]), group=int(parts[2]))
        raise ValueError('must be "any", N:M with 0 < N < M such as 2:4, or block:N with N > 1')


def by_pattern(scores: Doubles, pattern: Pattern) -> Doubles:
    """Return independent scores (groups, out, in) made to follow a pattern.

    Blocks share the mean of their scores; in N:M groups the N largest become infinite.
    """
    columns = scores.shape[-1]
    step = pattern.block if pattern.block > 1 else pattern.group
    if not step:
        return scores
    result = scores.copy()
    for start in range(0, columns, step):
        part = result[..., start : start + step]
        if pattern.block > 1:
            part[...] = part.mean(axis=-1, keepdims=True)
        else:
            largest = np.argsort(-part, axis=-1, kind="stable")[..., : pattern.keep]
            np.put_along_axis(part, largest, np.inf, axis=-1)
    return result


def cheapest(losses: Doubles, count: int) -> Mask:
    """Return the mask of the `count` smallest losses; infinite ones never go; ties in storage order."""
    flat = losses.reshape(-1)
    count = min(count, int(np.isfinite(flat).sum()))
    mask = np.zeros(flat.shape, np.bool_)
    if count:
        threshold = np.partition(flat, count - 1)[count - 1]
        mask[flat < threshold] = True
        ties = np.flatnonzero(flat == threshold)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(losses.shape)
