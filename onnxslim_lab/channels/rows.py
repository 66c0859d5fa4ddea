"""Rows of a layer's input at some places only, a block at a time: a Conv's other patches are never made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.layer_views.convolutions import ConvKind, ConvTransposeKind, conv_pads
from onnxslim_lab.layer_views.kinds import Kind

Array = NDArray[Any]
Places = NDArray[np.int64]


class Rows:
    """The rows that a kind of layer makes of an input x.

    Attributes:
        count: How many there are in each group: `kind.rows(x).shape[1]`.

    >>> kind = ConvKind((4, 2, 3, 3), strides=(2, 1), dilations=(1, 1), pads=(1, 0, 1, 2))
    >>> x = np.random.default_rng(0).standard_normal((2, 2, 7, 5))
    >>> places = np.array([3, 0, 17])
    >>> (block,) = Rows(kind, x).blocks(places, step=8)
    >>> bool((block == kind.rows(x)[:, places]).all())
    True
    """

    def __init__(self, kind: Kind, x: Array) -> None:
        self._kind = kind
        if isinstance(kind, ConvKind):
            self._views = _windows(kind, x)
            self._positions = self._views.shape[2 : x.ndim]
            self.count = x.shape[0] * math.prod(self._positions)
        else:
            self._rows = kind.rows(x)
            self.count = int(self._rows.shape[1])

    def blocks(self, places: Places, *, step: int) -> Iterator[Array]:
        """Yield the rows at these places, (groups, n, in), at most `step` at a time."""
        for start in range(0, places.size, step):
            yield self._at(places[start : start + step])

    def _at(self, places: Places) -> Array:
        if not isinstance(self._kind, ConvKind):
            return self._rows[:, places]
        sample, *at = np.unravel_index(places, (self._views.shape[0], *self._positions))
        index: tuple[Any, ...] = (sample, slice(None), *at)
        found = self._views[index]  # (places, channels, *kernel)
        if isinstance(self._kind, ConvTransposeKind):
            found = np.flip(found, tuple(range(2, found.ndim)))
        groups, _, size = self._kind.shape
        return np.asarray(found.reshape(len(places), groups, size).swapaxes(0, 1))


def _windows(kind: ConvKind, x: Array) -> Array:
    """Return a view of what the kernel meets: (N, C, *positions, *kernel)."""
    kernel = kind.weight_shape[2:]
    if isinstance(kind, ConvTransposeKind):
        padded, strides = kind.spread(x), (1,) * len(kernel)
    else:
        pads = conv_pads(x.shape[2:], kernel, kind.strides, kind.dilations, kind.pads, kind.auto_pad)
        padded, strides = (np.pad(x, [(0, 0), (0, 0), *pads]) if np.any(pads) else x), kind.strides
    window = tuple((k - 1) * d + 1 for k, d in zip(kernel, kind.dilations, strict=True))
    views = np.lib.stride_tricks.sliding_window_view(padded, window, tuple(range(2, padded.ndim)))
    index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in (*strides, *kind.dilations)))
    return np.asarray(views[index])
