"""How far a changed model's outputs are from the original's, in one figure that no large slice can hide.

An output that mixes scales (a detector's boxes of 0..320 beside its scores of 0..1) is judged slice by slice:
every slice's noise is taken relative to that slice's own signal, and the shares are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_lab.metrics import Feed, flatten
from onnxslim_lab.worker.messages import Array

Float64 = npt.NDArray[np.float64]

_LEAST = 8  # values of a slice; fewer say nothing
_MOST = 4096  # slices along an axis; longer axes are positions
_SPREAD = 8.0  # slices whose magnitudes differ by more than this are judged each by itself
_AUDIBLE = 1e-6  # slices this far below the largest value are rounding noise


@dataclass(frozen=True)
class ModelError:
    """The difference of a model's outputs from those of the original.

    Attributes:
        noise: Noise over signal energy of the worst output, averaged over its slices; inf where a value is
            not finite that was.
        output: That output.
        where: Its worst slice, "" when it is judged as a whole.
    """

    noise: float
    output: str = ""
    where: str = ""

    @property
    def sqnr_db(self) -> float:
        """Signal to noise ratio in decibels; inf when nothing differs."""
        return float("inf") if self.noise == 0 else -10 * float(np.log10(self.noise))

    @property
    def relative(self) -> float:
        """The error's magnitude relative to the signal's."""
        return float(np.sqrt(self.noise))


class OutputJudge:
    """Compares results with reference outputs, kept as they are given.

    Args:
        references: Outputs of the original, one dict for each feed.
    """

    def __init__(self, references: Sequence[Feed]) -> None:
        self.references = references
        self._leaves = [_leaves(feed) for feed in references]
        self._axes = {name: self._axis(name) for feed in self._leaves for name in feed}

    def axis(self, output: str) -> int | None:
        """Return the axis along which an output is judged slice by slice, None for as a whole."""
        return self._axes.get(output)

    def _axis(self, name: str) -> int | None:
        """Choose the axis whose slices differ most in magnitude, if they do."""
        arrays = [feed[name] for feed in self._leaves if name in feed]
        if any(array.dtype.kind != "f" or array.ndim != arrays[0].ndim for array in arrays):
            return None
        best, chosen = _SPREAD, None
        for axis in range(1, arrays[0].ndim):
            if len({array.shape[axis] for array in arrays}) != 1 or not 2 <= arrays[0].shape[axis] <= _MOST:
                continue
            energy = np.sum([_along(array * array, axis) for array in arrays], axis=0)
            count = sum(array.size for array in arrays) // arrays[0].shape[axis]
            heard = _audible(energy, count, arrays)
            if count < _LEAST or np.count_nonzero(heard) < 2:
                continue
            sizes = np.sqrt(energy[heard])
            spread = float(np.quantile(sizes, 0.9) / max(np.quantile(sizes, 0.1), 1e-300))
            if spread > best:
                best, chosen = spread, axis
        return chosen

    def judge(self, results: Iterable[Feed]) -> ModelError:
        """Return the error of results, one dict for each feed, taken one at a time."""
        sums: dict[str, list[Float64]] = {}
        lost: set[str] = set()
        for expected, result in zip(self._leaves, results, strict=True):
            found = _leaves(result)
            for name, array in expected.items():
                other = found.get(name)
                if other is None or other.shape != array.shape:
                    lost.add(name)
                    continue
                if not np.array_equal(np.isfinite(array), np.isfinite(other)):
                    lost.add(name)
                    continue
                pair = _energies(array, other, self._axes[name])
                total = sums.setdefault(name, [np.zeros_like(pair[0]), np.zeros_like(pair[1])])
                total[0] += pair[0]
                total[1] += pair[1]
        worst = ModelError(0.0)
        for name, (signal, noise) in sums.items():
            error = ModelError(float("inf"), name) if name in lost else self._combine(name, signal, noise)
            if error.noise > worst.noise or not worst.output:
                worst = error
        return next((ModelError(float("inf"), name) for name in sorted(lost)), worst)

    def _combine(self, name: str, signal: Float64, noise: Float64) -> ModelError:
        """Average the slices' shares of noise; a slice is lost at 1."""
        axis = self._axes[name]
        if axis is None:
            if not noise[0]:
                return ModelError(0.0, name)
            return ModelError(float(noise[0] / signal[0]) if signal[0] else float("inf"), name)
        heard = _audible(
            signal, self._count(name, axis), [feed[name] for feed in self._leaves if name in feed]
        )
        shares = np.minimum(noise[heard] / signal[heard], 1.0)
        index = int(np.flatnonzero(heard)[int(shares.argmax())])
        return ModelError(float(shares.mean()), name, f"axis {axis}, index {index}" if shares.any() else "")

    def _count(self, name: str, axis: int) -> int:
        arrays = [feed[name] for feed in self._leaves if name in feed]
        return int(sum(array.size for array in arrays) // arrays[0].shape[axis])


def _leaves(feed: Mapping[str, Any]) -> dict[str, Array]:
    """Return every tensor of the outputs as float64, strings aside; sequences and maps taken apart."""
    found: dict[str, Array] = {}
    for name, value in feed.items():
        for place, _, array in flatten(value):
            if array is not None and array.dtype.kind not in "OUS":
                real = np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array
                found[name + place] = real.astype(np.float64)
    return found


def _along(array: Float64, axis: int) -> Float64:
    """Return the sums over all axes but one."""
    return np.asarray(array.sum(axis=tuple(i for i in range(array.ndim) if i != axis)))


def _audible(energy: Float64, count: int, arrays: Sequence[Float64]) -> npt.NDArray[np.bool_]:
    largest = max(
        (float(np.abs(array).max(initial=0.0, where=np.isfinite(array))) for array in arrays), default=0
    )
    return np.asarray(np.sqrt(energy / max(count, 1)) > _AUDIBLE * largest)


def _energies(array: Float64, other: Float64, axis: int | None) -> tuple[Float64, Float64]:
    """Return signal and noise energy, (1,) or one for each slice; values that are not finite in both aside."""
    usual = np.isfinite(array)
    a, b = np.where(usual, array, 0.0), np.where(usual, other, 0.0)
    difference = (a - b) ** 2
    if axis is None:
        return np.atleast_1d((a * a).sum()), np.atleast_1d(difference.sum())
    return _along(a * a, axis), _along(difference, axis)
