"""How far two results are apart, output by output.

Everything floating is compared in float64. A value that is NaN or infinite on one side only is counted
and makes the error infinite; it is never averaged away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxslim_lab.errors import DataError
from onnxslim_lab.worker.messages import Array, Value

Feed = dict[str, Value]
Float64 = npt.NDArray[np.float64]

_SLICE_VALUES = 8  # fewer values than this make a cosine that says nothing
_SLICE_LIMIT = 4096  # longer axes are positions, not channels
_SLICE_NOISE = 1e-6  # slices this far below the largest value are rounding noise of float32


@dataclass(frozen=True)
class OutputError:
    """The difference between two results for one output, over all feeds.

    Attributes:
        name: The output.
        floating: Whether it holds floating-point values (somewhere, for sequences and maps).
        count: Values compared.
        max_abs: Largest absolute difference.
        relative: Largest over the feeds of max|a-b| / max|a|; 1 when a is all zero and b is not.
        sqnr_db: 10 log10 of signal over noise energy; inf when equal.
        cosine: Cosine of the two results as one vector each; 1 when both are zero, 0 when one is.
        worst_slice: Least cosine over the slices along each axis but the first (one class score of a
            detector, one key of a map): the whole vector hides a slice that is all zero.
        worst_slice_at: Where that slice is: "axis 1, index 7".
        mismatches: Integers, booleans and strings that differ; `relative` does not see the last two.
        nonfinite: Values that are NaN or infinite on one side only, or infinite with different signs.
        structure: The first difference in shape, dtype kind, length, keys or presence; "" when alike.
    """

    name: str
    floating: bool
    count: int
    max_abs: float
    relative: float
    sqnr_db: float
    cosine: float
    worst_slice: float
    worst_slice_at: str
    mismatches: int
    nonfinite: int
    structure: str

    @property
    def equal(self) -> bool:
        """Whether nothing differs, bit patterns of NaN aside."""
        return not (self.max_abs or self.mismatches or self.nonfinite or self.structure)


def flatten(value: Value, path: str = "") -> Iterator[tuple[str, str, Array | None]]:
    """Yield (place, kind of place, array) for every leaf of a value; None for an empty optional.

    Items of sequences share a kind of place, keys of maps have one each.

    >>> [(p, k) for p, k, _ in flatten([{"cat": 1.0}])]
    [("[0]['cat']", "['cat']")]
    """
    yield from _leaves(value, path, path)


def _leaves(value: Any, path: str, kind: str) -> Iterator[tuple[str, str, Array | None]]:
    if value is None:
        yield path, kind, None
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key!r}]", f"{kind}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]", kind)
    else:
        yield path, kind, np.asarray(value)


def _is_float(array: Array) -> bool:
    """Whether an array is floating point; numpy calls some types of ml_dtypes kind "V", ints too."""
    return array.dtype.kind in "fcV" and "int" not in array.dtype.name


def _as_float64(array: Array) -> Float64:
    """Return the values as float64; complex ones as pairs on a last axis."""
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], axis=-1).astype(np.float64)
    return array.astype(np.float64)


@dataclass
class _Sums:
    """Energies and dot product of two vectors, summed along the way."""

    aa: Any = 0.0
    bb: Any = 0.0
    ab: Any = 0.0
    count: int = 0

    def add(self, a: Float64, b: Float64, axes: tuple[int, ...] | None = None) -> None:
        self.aa = self.aa + (a * a).sum(axis=axes)
        self.bb = self.bb + (b * b).sum(axis=axes)
        self.ab = self.ab + (a * b).sum(axis=axes)

    def cosines(self) -> Float64:
        aa, bb = np.atleast_1d(self.aa), np.atleast_1d(self.bb)
        norm = np.sqrt(aa) * np.sqrt(bb)
        both_zero = (aa == 0) & (bb == 0)
        cosine = np.divide(self.ab, norm, out=np.zeros_like(norm), where=norm > 0)
        return np.where(both_zero, 1.0, np.clip(cosine, -1.0, 1.0))


@dataclass
class _Comparison:
    """Accumulates one output's difference over the feeds."""

    name: str
    floating: bool = False
    count: int = 0
    max_abs: float = 0.0
    relative: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    mismatches: int = 0
    nonfinite: int = 0
    structure: str = ""
    whole: _Sums = field(default_factory=_Sums)
    slices: dict[tuple[str, int, int], _Sums] = field(default_factory=dict)

    def add(self, reference: Value, result: Value) -> None:
        """Compare one feed's values."""
        left = {place: (kind, array) for place, kind, array in flatten(reference)}
        right = {place: array for place, _, array in flatten(result)}
        if left.keys() != right.keys():
            odd = next(iter(left.keys() ^ right.keys()))
            self._differ(f"item {odd or 'value'} is on one side only", 1)
        difference = magnitude = 0.0
        for place, (kind, a) in left.items():
            if place in right:
                difference, magnitude = self._leaf(place, kind, a, right[place], difference, magnitude)
        if difference:
            self.relative = max(self.relative, difference / magnitude if magnitude else 1.0)
        self.max_abs = max(self.max_abs, difference)

    def _differ(self, what: str, count: int) -> None:
        self.structure = self.structure or what
        self.mismatches += count

    def _leaf(
        self, place: str, kind: str, a: Array | None, b: Array | None, difference: float, magnitude: float
    ) -> tuple[float, float]:
        """Compare two leaves; return the feed's largest difference and magnitude so far."""
        at = f"{place}: " if place else ""
        if a is None or b is None:
            if a is not b:
                self._differ(f"{at}present on one side only", 1)
            return difference, magnitude
        self.count += a.size
        if a.shape != b.shape:
            self._differ(f"{at}shape {a.shape} became {b.shape}", a.size)
            return difference, magnitude
        if _is_float(a) != _is_float(b) or (a.dtype.kind in "OUS") != (b.dtype.kind in "OUS"):
            self._differ(f"{at}type {a.dtype} became {b.dtype}", a.size)
            return difference, magnitude
        if not _is_float(a):
            if a.dtype.kind == "V":  # int4 and the like
                a, b = a.astype(np.int64), b.astype(np.int64)
            wrong = a != b
            self.mismatches += int(np.count_nonzero(wrong))
            if a.dtype.kind in "iu" and a.size:
                gap = [abs(int(x) - int(y)) for x, y in zip(a[wrong].flat, b[wrong].flat, strict=True)]
                largest = max(abs(int(a.max())), abs(int(a.min())))
                return max(difference, float(max(gap, default=0))), max(magnitude, float(largest))
            return difference, magnitude
        self.floating = True
        return self._floats(kind, _as_float64(a), _as_float64(b), difference, magnitude)

    def _floats(
        self, kind: str, a: Float64, b: Float64, difference: float, magnitude: float
    ) -> tuple[float, float]:
        usual = np.isfinite(a) & np.isfinite(b)
        if not usual.all():
            odd = ~usual
            alike = (a[odd] == b[odd]) | (np.isnan(a[odd]) & np.isnan(b[odd]))
            self.nonfinite += int(np.count_nonzero(~alike))
            a, b = np.where(usual, a, 0.0), np.where(usual, b, 0.0)
        if not a.size:
            return difference, magnitude
        gap = np.abs(a - b)
        self.noise += float((gap * gap).sum())
        self.largest = max(self.largest, float(np.abs(a).max()), float(np.abs(b).max()))
        self.whole.add(a, b)
        self._add_slices(kind, a, b)
        return max(difference, float(gap.max())), max(magnitude, float(np.abs(a).max()))

    def _add_slices(self, kind: str, a: Float64, b: Float64) -> None:
        places = range(1, a.ndim) if a.ndim > 1 else [-1] if kind else []
        for axis in places:
            size = a.shape[axis] if axis > 0 else 1
            if 0 < size <= _SLICE_LIMIT:
                sums = self.slices.setdefault((kind, axis, size), _Sums())
                sums.add(a, b, tuple(i for i in range(a.ndim) if i != axis) if axis > 0 else None)
                sums.count += a.size // size

    def _worst_slice(self) -> tuple[float, str]:
        worst, where = 1.0, ""
        for (kind, axis, _), sums in self.slices.items():
            if sums.count < _SLICE_VALUES:
                continue
            energy = np.maximum(np.atleast_1d(sums.aa), np.atleast_1d(sums.bb)) / sums.count
            audible = np.sqrt(energy) > _SLICE_NOISE * self.largest
            cosines = np.where(audible, sums.cosines(), 1.0)
            index = int(cosines.argmin())
            if cosines[index] < worst:
                place = f"axis {axis}, index {index}" if axis > 0 else ""
                worst, where = float(cosines[index]), " ".join(filter(None, (kind, place)))
        return worst, where

    def result(self) -> OutputError:
        """Return the figures."""
        worst, where = self._worst_slice()
        cosine = float(self.whole.cosines()[0])
        signal = float(self.whole.aa)
        sqnr = np.inf if not self.noise else -np.inf
        if self.noise and signal:
            sqnr = 10 * np.log10(signal / self.noise)
        max_abs, relative = self.max_abs, self.relative
        if self.nonfinite or self.structure:
            max_abs = relative = np.inf
            sqnr, cosine, worst = -np.inf, 0.0, 0.0
        return OutputError(
            self.name,
            self.floating,
            self.count,
            float(max_abs),
            float(relative),
            float(sqnr),
            cosine,
            min(worst, cosine),
            where,
            self.mismatches,
            self.nonfinite,
            self.structure,
        )


def compare_outputs(reference: Sequence[Feed], result: Sequence[Feed]) -> list[OutputError]:
    """Return the error of each output of the reference, over all feeds.

    Args:
        reference: One dict of outputs for each feed: arrays, sequences, maps, None.
        result: Likewise, of the model that is judged.

    Raises:
        DataError: The two have different numbers of feeds.
    """
    if len(reference) != len(result):
        raise DataError(f"cannot compare {len(reference)} feeds of outputs with {len(result)}")
    comparisons: dict[str, _Comparison] = {}
    for expected, actual in zip(reference, result, strict=True):
        for name in expected:
            comparison = comparisons.setdefault(name, _Comparison(name))
            if name in actual:
                comparison.add(expected[name], actual[name])
            else:
                comparison._differ("the output is missing", 1)  # noqa: SLF001
        for name in actual:
            if name not in expected:
                comparisons.setdefault(name, _Comparison(name))._differ("the output is new", 1)  # noqa: SLF001
    return [comparison.result() for comparison in comparisons.values()]


def errors_by_feed(reference: Sequence[Feed], result: Sequence[Feed]) -> Float64:
    """Return what each feed adds to the error: noise over the signal of all feeds, the mean over real outputs.

    Where no output is real, the values that differ. Infinite for a feed whose outputs differ in structure, or are
    finite on one side only.

    Args:
        reference: One dict of outputs for each feed: arrays, sequences, maps, None.
        result: Likewise, of the model that is judged.

    Returns:
        One number for each feed.

    >>> errors_by_feed([{"y": np.float32([3])}, {"y": np.float32([4])}], [{"y": np.float32([3])}, {"y": np.float32([3])}])
    array([0.  , 0.04])
    """
    found: dict[str, list[_Comparison]] = {}
    odd = np.zeros(len(reference))
    for number, (expected, actual) in enumerate(zip(reference, result, strict=True)):
        for name, value in expected.items():
            one = _Comparison(name)
            one.add(value, actual.get(name))
            found.setdefault(name, []).append(one)
            if one.structure or one.nonfinite:
                odd[number] = np.inf
    errors = []
    for parts in found.values():
        if any(one.floating for one in parts):
            signal = sum(float(one.whole.aa) for one in parts)
            errors.append([one.noise / (signal or np.finfo(np.float64).tiny) for one in parts])
    if not errors:
        errors = [[sum(one.mismatches for one in feed) for feed in zip(*found.values(), strict=True)]]
    return np.asarray(np.mean(errors, axis=0) + odd, np.float64)
