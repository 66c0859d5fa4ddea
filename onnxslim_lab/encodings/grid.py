"""Integer grids: values that are integers times a scale, one scale for the tensor, an axis or a block.

What quantizers leave when they write their result back as floats. The integers are stored in 1 to 8 bits,
with an offset for all or for each scale, and Cast, Add and Mul give the values back. A scale is searched
among the largest magnitude divided by 1 to 255 and its neighbours in float32, and taken only when every
product has the value's bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxslim_lab.encodings.facts import Facts
from onnxslim_lab.encodings.options import Option
from onnxslim_lab.encodings.packing import index_width, packed_bytes, unpack
from onnxslim_lab.encodings.plan import Array, Plan, Target, bit_view

BLOCKS = (256, 128, 64, 32, 16)
_LEVELS = 255
_ULPS = np.arange(-2, 3)
_TRIAL = 24  # elements that rule out most scales
_FEWEST = 16  # elements a scale serves at least
_SEARCHED = 64  # rows searched in full
_MOST_LEVELS = 16  # numbers of levels then tried on all rows
_PIECE = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Integers and scales: the tensor, seen in `view`, is (integers + offset) * scale.

    Attributes:
        view: Shape the tensor is seen in; blocks have an axis of their own.
        integers: From 0, below 2**width; shape `view`.
        scale: float32, of `view`'s rank with 1 for the axes it is constant along.
        offset: int32, likewise.
        width: Bits of an integer.
        per: What has a scale of its own, in words.
    """

    view: tuple[int, ...]
    integers: Array
    scale: Array
    offset: Array
    width: int
    per: str


def find_scale(values: Array) -> np.float32 | None:
    """Return the largest scale that makes all values integers times it, bit for bit, None without one.

    Args:
        values: float32, shape [n]; the integers may reach 255 in magnitude.

    >>> float(find_scale(np.float32([0.25, -0.5, 0.0, 31.75])))
    0.25
    """
    top = np.abs(values).max(initial=np.float32(0))
    if not top:
        return np.float32(1) if not bit_view(values).any() else None
    if not np.isfinite(top) or (np.signbit(values) & (values == 0)).any():
        return None  # an integer has no negative zero
    exact = (top / np.arange(1, _LEVELS + 1, dtype=np.float64)).astype(np.float32)
    scales = (exact.view(np.int32)[:, None] + _ULPS.astype(np.int32)).reshape(-1).view(np.float32)
    scales = scales[(scales > 0) & np.isfinite(scales)]
    for some in (values[:: max(1, values.size // _TRIAL)], values):
        if some.size * scales.size > 1 << 22:
            scales = scales[[_fits(some, scale) for scale in scales]]
        else:
            products = np.rint(some / scales[:, None]) * scales[:, None]
            scales = scales[(bit_view(products.astype(np.float32)) == bit_view(some)).all(axis=1)]
        if not scales.size:
            return None
    best: np.float32 = scales.max()
    return best


def find_scales(rows: Array) -> Array | None:
    """Return the scale of each row of float32 [n, m], None when a row has none.

    Some rows are searched in full; the numbers of levels found there are tried on all rows at once, and of
    what they leave, a search in full is affordable for few rows only.
    """
    some = rows[:: max(1, len(rows) // _SEARCHED)]
    found = []
    for row in some:
        scale = find_scale(row)
        if scale is None:
            return None
        found.append(scale)
    top = np.abs(rows).max(axis=1)
    levels = np.rint(np.abs(some).max(axis=1) / np.array(found, np.float32)).astype(np.int64)
    scales = np.where(top == 0, np.float32(1), np.float32(0))
    pending = np.flatnonzero(top)
    for level in [number for number, _ in Counter(levels[levels > 0].tolist()).most_common(_MOST_LEVELS)]:
        for ulps in sorted(_ULPS, key=abs):
            tried = ((top[pending] / level).astype(np.float32).view(np.int32) + np.int32(ulps)).view(
                np.float32
            )
            fits = _rows_fit(rows, pending, tried)
            scales[pending[fits]] = tried[fits]
            pending = pending[~fits]
    if len(pending) > _SEARCHED * _MOST_LEVELS:
        return None
    for number in pending:
        scale = find_scale(rows[number])
        if scale is None:
            return None
        scales[number] = scale
    return scales


def _rows_fit(rows: Array, numbers: Array, scales: Array) -> Array:
    """Return for each numbered row whether all its values are integers times its scale."""
    trial = rows[numbers, : min(8, rows.shape[1])]
    fits = _on_grid(trial, scales)
    left = np.flatnonzero(fits)
    step = max(1, _PIECE // rows.shape[1])
    for start in range(0, len(left), step):
        piece = left[start : start + step]
        fits[piece] = _on_grid(rows[numbers[piece]], scales[piece])
    return fits


def _on_grid(rows: Array, scales: Array) -> Array:
    integers = np.rint(rows / scales[:, None])
    exact = bit_view((integers * scales[:, None]).astype(np.float32)) == bit_view(rows)
    fits: Array = (exact & (np.abs(integers) <= _LEVELS)).all(axis=1)
    return fits


def _fits(values: Array, scale: np.float32) -> bool:
    return bool(np.array_equal(bit_view(np.rint(values / scale) * scale), bit_view(values)))


def grid_options(facts: Facts, target: Target) -> Iterable[Option]:
    """Yield the grids that float32 values lie on."""
    if facts.array.dtype != np.float32:
        return
    if facts.palette is not None and len(facts.palette.values) <= 16:
        return  # a codebook takes as few bits and no scales
    found = False
    for view, axes, per in _views(facts.array.shape):
        if found and len(axes) > 1:
            return  # blocks of what lies on a coarser grid
        if facts.array.size // int(np.prod([view[axis] for axis in axes])) < _FEWEST:
            continue
        with np.errstate(all="ignore"):
            grid = _find_grid(facts.array.reshape(view), axes, per, target)
        if grid is not None:
            found = True
            payload = packed_bytes(facts.flat.size, grid.width) + grid.scale.nbytes
            yield Option(payload, partial(_build, facts, target, grid))


def _views(shape: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], tuple[int, ...], str]]:
    """Yield (view, axes along which scales differ, words)."""
    yield shape, (), "tensor"
    for axis, size in enumerate(shape):
        if size > 1:
            yield shape, (axis,), f"axis {axis}"
    if len(shape) == 2:
        for block in BLOCKS:
            rows, columns = shape
            if columns % block == 0 and columns > block:
                yield (rows, columns // block, block), (0, 1), f"block of {block}"
            if rows % block == 0 and rows > block:
                yield (rows // block, block, columns), (0, 2), f"block of {block}"


def _find_grid(array: Array, axes: tuple[int, ...], per: str, target: Target) -> Grid | None:
    others = tuple(axis for axis in range(array.ndim) if axis not in axes)
    rows = array.transpose(*axes, *others).reshape(int(np.prod([array.shape[axis] for axis in axes])), -1)
    scale = find_scales(rows)
    if scale is None:
        return None
    aside = tuple(size if axis in axes else 1 for axis, size in enumerate(array.shape))
    scale = scale.reshape(aside)
    integers = np.rint(array / scale).astype(np.int32)
    low, high = integers.min(axis=others, keepdims=True), integers.max(axis=others, keepdims=True)
    if high.max() - low.min() <= _LEVELS:
        low = low.min(keepdims=True).reshape(())
        span = int(high.max() - low) + 1
    else:
        span = int((high - low).max()) + 1
    if span > _LEVELS + 1:
        return None
    return Grid(array.shape, integers - low, scale, low.astype(np.int32), index_width(span, target), per)


def _build(facts: Facts, target: Target, grid: Grid) -> Plan:
    plan = Plan(target, f"{grid.width}-bit integers, scale per {grid.per}")
    if (
        grid.width == 8
        and not grid.offset.ndim
        and -128 <= grid.offset <= int(grid.offset + grid.integers.max()) <= 127
    ):
        value = plan.tensor("integers", (grid.integers + grid.offset).astype(np.int8))
    else:
        value = unpack(plan, "integers", grid.integers, grid.width)
        if grid.offset.any():
            value = plan.op("Add", value, plan.tensor("offset", grid.offset))
    value = plan.op("Cast", value, to=facts.data_type)
    value = plan.op("Mul", value, plan.tensor("scale", grid.scale))
    if grid.view != facts.array.shape:
        plan.op("Reshape", value, plan.tensor("shape", np.array(facts.array.shape, np.int64)))
    return plan.finish()
