"""Gram matrices that grow feed by feed: x^T x of a layer's input rows, in float32 blocks summed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from onnxslim_lab.layer_views.convolutions import ConvKind, ConvTransposeKind, conv_pads
from onnxslim_lab.layer_views.kinds import GatherKind, GemmKind, Kind, RecurrentKind
from onnxslim_lab.layer_views.products import EinsumKind, MatMulKind
from onnxslim_lab.worker.tally import Array, real

_KINDS: dict[str, type[Kind]] = {
    kind.__name__: kind
    for kind in (ConvKind, ConvTransposeKind, GatherKind, GemmKind, RecurrentKind, EinsumKind, MatMulKind)
}
_BLOCK = 8 << 20  # bytes of rows made at a time
_NEAR = 1 << 20  # bytes that stay in the cache of a core


def pack_kind(kind: Kind) -> dict[str, Any]:
    """Return a kind of layer in a form that can be sent."""
    return {"kind": type(kind).__name__, **asdict(kind)}


def unpack_kind(form: dict[str, Any]) -> Kind:
    """Return the kind that `pack_kind` packed."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in form.items()}
    return _KINDS[str(fields.pop("kind"))](**fields)


def row_blocks(kind: Kind, x: Array, block: int = _BLOCK) -> Iterator[Array]:
    """Yield the rows of `kind.rows(x)` in pieces (groups, n, in) of about `block` bytes where possible."""
    _, _, size = kind.shape
    if type(kind) is not ConvKind:
        if isinstance(kind, ConvTransposeKind):
            for sample in x:
                yield kind.rows(sample[None])
        else:
            yield kind.rows(x)
        return
    kernel = kind.weight_shape[2:]
    pads = conv_pads(x.shape[2:], kernel, kind.strides, kind.dilations, kind.pads, kind.auto_pad)
    bare = replace(kind, pads=(0,) * (2 * len(kernel)), auto_pad="NOTSET")
    window = (kernel[0] - 1) * kind.dilations[0] + 1
    for sample in x:
        padded = np.pad(sample[None], [(0, 0), (0, 0), *pads]) if np.any(pads) else sample[None]
        spatial = [
            (n - (k - 1) * d - 1) // s + 1
            for n, k, d, s in zip(padded.shape[2:], kernel, kind.dilations, kind.strides, strict=True)
        ]
        if min(spatial) < 1:
            continue
        each = (
            kind.shape[0] * size * math.prod(spatial[1:]) * x.itemsize
        )  # bytes for one step of the first axis
        step = max(1, block // max(each, 1))
        for start in range(0, spatial[0], step):
            stop = min(start + step, spatial[0])
            first = start * kind.strides[0]
            last = (stop - 1) * kind.strides[0] + window
            yield bare.rows(padded[:, :, first:last])


class GramTally:
    """The Gram matrix of one layer so far.

    Args:
        kind: The kind of layer.
        full: Whether to keep the whole matrix, not just its diagonal.
    """

    def __init__(self, kind: Kind, *, full: bool) -> None:
        groups, _, size = kind.shape
        self.kind = kind
        self.matrix = np.zeros((groups, size, size) if full else (groups, size))
        self.total = np.zeros((groups, size))
        self.count = 0
        self.nonfinite = 0

    def add(self, x: Array) -> None:
        """Add a layer's input; rows with NaN or infinite elements are counted in `nonfinite` and left out.

        Raises:
            TypeError: It holds no real numbers.
        """
        x = real(x)
        if isinstance(self.kind, GatherKind):
            self._count_entries(x)
            return
        x = x.astype(np.float32, copy=False)
        if not x.size:
            return
        if not (np.isfinite(x.min()) and np.isfinite(x.max())):
            for rows in row_blocks(self.kind, x):
                bad = ~np.isfinite(rows).all(axis=(0, 2))
                self.nonfinite += int(bad.sum())
                self._add_rows(rows[:, ~bad])
        elif self._plain(x):
            self._add_channels(x)
        elif self._depthwise(x):
            for sample in x:
                self._add_windows(sample)
        else:
            for rows in row_blocks(self.kind, x):
                self._add_rows(rows)

    def _plain(self, x: Array) -> bool:
        """Whether the rows are the channels as they are: a Conv with a kernel of 1."""
        kind = self.kind
        return (
            type(kind) is ConvKind
            and all(size == 1 for size in (*kind.weight_shape[2:], *kind.strides))
            and not any(kind.pads)
            and x.ndim == len(kind.weight_shape)
        )

    def _add_channels(self, x: Array) -> None:
        """Add (N, C, *spatial) without making rows of it."""
        groups, _, size = self.kind.shape
        split = np.ascontiguousarray(x).reshape(x.shape[0], groups, size, -1)
        for sample in split:
            if self.matrix.ndim == 3:
                for group, columns in enumerate(sample):
                    self.matrix[group] += columns @ columns.T
            else:
                self.matrix += np.square(sample, dtype=np.float64).sum(axis=2)
            self.total += sample.sum(axis=2, dtype=np.float64)
        self.count += x.shape[0] * split.shape[3]

    def _depthwise(self, x: Array) -> bool:
        """Whether each channel of an image has a window of its own, few enough rows to be taken at once."""
        kind = self.kind
        return (
            type(kind) is ConvKind
            and kind.weight_shape[1] == 1
            and x.ndim == len(kind.weight_shape) == 4
            and kind.shape[2] * math.prod(x.shape[2:]) * x.itemsize <= _BLOCK
            and self.matrix.ndim == 3
        )

    def _add_windows(self, sample: Array) -> None:
        """Add (C, H, W): places of the window are rows here and images its columns, so that copies are long."""
        kind = self.kind
        assert isinstance(kind, ConvKind)
        kernel = kind.weight_shape[2:]
        pads = conv_pads(sample.shape[1:], kernel, kind.strides, kind.dilations, kind.pads, kind.auto_pad)
        padded = np.pad(sample, [(0, 0), *pads]) if np.any(pads) else sample
        reach = [(k - 1) * d for k, d in zip(kernel, kind.dilations, strict=True)]
        size = [(n - r - 1) // s + 1 for n, r, s in zip(padded.shape[1:], reach, kind.strides, strict=True)]
        if min(size) < 1:
            return
        places, count = math.prod(kernel), math.prod(size)
        step = max(1, _NEAR // (places * count * sample.itemsize))
        rows = np.empty((step, places, *size), sample.dtype)
        for start in range(0, len(padded), step):
            part = padded[start : start + step]
            for place, offset in enumerate(np.ndindex(*kernel)):
                firsts = [at * d for at, d in zip(offset, kind.dilations, strict=True)]
                window = tuple(
                    slice(first, first + (n - 1) * s + 1, s)
                    for first, n, s in zip(firsts, size, kind.strides, strict=True)
                )
                rows[: len(part), place] = part[(slice(None), *window)]
            flat = rows[: len(part)].reshape(len(part), places, count)
            self.matrix[start : start + step] += flat @ flat.swapaxes(1, 2)
            self.total[start : start + step] += flat.sum(axis=2)
        self.count += count

    def _add_rows(self, rows: Array) -> None:
        step = max(1, _BLOCK // max(1, rows.shape[0] * rows.shape[2] * 4))
        for start in range(0, rows.shape[1], step):
            block = rows[:, start : start + step]
            if self.matrix.ndim == 3:
                if len(block) > 1:
                    self.matrix += np.matmul(block.swapaxes(1, 2), block)
                else:
                    self.matrix[0] += block[0].T @ block[0]
            else:
                self.matrix += np.square(block, dtype=np.float64).sum(axis=1)
            self.total += block.sum(axis=1, dtype=np.float64)
        self.count += rows.shape[1]

    def _count_entries(self, x: Array) -> None:
        """Add how often each entry of a lookup occurs."""
        size = self.kind.shape[2]
        index = x.reshape(-1).astype(np.int64)
        index = np.where(index < 0, index + size, index)
        counts = np.bincount(index, minlength=size)[:size]
        self.total[0] += counts
        if self.matrix.ndim == 3:
            self.matrix[0][np.diag_indices(size)] += counts
        else:
            self.matrix[0] += counts
        self.count += index.size

    def state(self) -> dict[str, Any]:
        """Return what it holds, ready to be sent."""
        names = ("matrix", "total", "count", "nonfinite")
        return {name: getattr(self, name) for name in names}
