"""Random values for one input of a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto, TypeProto

from onnxslim_lab.errors import DataError, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.model_inputs import ModelInput, Shape, axis_key, numpy_dtype, tensor_shape
from onnxslim_lab.inputs.value_ranges import find_range
from onnxslim_lab.worker.messages import Array, Value

_CHANNELS = {1, 3, 4}
_DEFAULT_LENGTH = 16
_NO_BOUND = 9  # integers that nothing bounds are drawn from 0..9
_WORDS = ("alpha", "beta", "gamma", "42", "")


def is_image(shape: Shape) -> bool:
    """Whether a shape looks like that of images: rank 4 with 1, 3 or 4 channels."""
    return len(shape) == 4 and (shape[1] in _CHANNELS or shape[3] in _CHANNELS)


class ValueMaker:
    """Makes the values of one input."""

    def __init__(self, graph: Graph, info: ModelInput, sizes: dict[str, int]) -> None:
        self.info = info
        self.sizes = sizes
        self.range = find_range(graph, info.name, sizes)
        self.note = ""

    def make(self, generator: np.random.Generator, kind: TypeProto | None = None) -> Value:
        """Return one value of a type; the input's own when not given."""
        kind = kind or self.info.type
        if kind.HasField("tensor_type"):
            shape = tensor_shape(kind.tensor_type)
            return self._tensor(generator, kind.tensor_type.elem_type, shape or ())
        if kind.HasField("sequence_type"):
            return [self.make(generator, kind.sequence_type.elem_type) for _ in range(2)]
        if kind.HasField("optional_type"):
            return self.make(generator, kind.optional_type.elem_type)
        if kind.HasField("map_type"):
            keys = self.range.vocabulary or list(range(4))
            element = kind.map_type.value_type.tensor_type.elem_type
            values = [self._tensor(generator, element, ()) for _ in keys]
            return {key: value.item() for key, value in zip(keys, values, strict=True)}
        raise DataError(f"input {quote(self.info.name)} has no type that random data can be made for")

    def _tensor(self, generator: np.random.Generator, element: int, shape: Shape) -> Array:
        sizes = tuple(
            size if isinstance(size, int) else self.sizes.get(axis_key(self.info.name, axis, size), 1)
            for axis, size in enumerate(shape)
        )
        dtype = numpy_dtype(element)
        if math.prod(sizes) * dtype.itemsize > 1 << 31:
            raise DataError(
                f"input {quote(self.info.name)} of shape {list(sizes)} is over 2 GB; give smaller dims"
            )
        if element == TensorProto.STRING:
            words = [str(w) for w in self.range.vocabulary] or list(_WORDS)
            self.note = "known words" if self.range.vocabulary else "made-up words"
            return np.array([*generator.choice(words, math.prod(sizes)), None], dtype=object)[:-1].reshape(
                sizes
            )
        if dtype.kind == "b" and sizes and "mask" in self.info.name.lower():
            self.note = "mask of ones and trailing zeros"
            return _mask(generator, sizes).astype(dtype)
        if self.range.value is not None:
            return self._given(sizes).astype(dtype)
        if dtype.kind == "b":
            self.note = "true or false"
            return np.asarray(generator.random(sizes) < 0.5)
        if dtype.kind == "c":
            self.note = "standard normal"
            return (generator.standard_normal(sizes) + 1j * generator.standard_normal(sizes)).astype(dtype)
        integer = dtype.kind in "iu" or "int" in dtype.name
        if integer:
            return self._integers(generator, dtype, sizes)
        return self._floats(generator, sizes, shape).astype(dtype)

    def _given(self, sizes: tuple[int, ...]) -> Array:
        """Return the number that the node wants; of a new shape all but one axis are 1."""
        assert self.range.value is not None
        number, where = self.range.value
        self.note = f"{number:g}, within what it may be ({where})"
        array = np.full(sizes, number, np.float64)
        if number < 0 and array.size > 1:
            array.reshape(-1)[:-1] = 1
        return array

    def _floats(self, generator: np.random.Generator, sizes: tuple[int, ...], shape: Shape) -> Array:
        numbers = [v for v in self.range.vocabulary if isinstance(v, (int, float))]
        if numbers:
            self.note = "values of a lookup table"
            return generator.choice(np.array(numbers, np.float64), sizes)
        if "mask" in self.info.name.lower() and self.range.mask:
            self.note = f"mask of ones and trailing zeros ({self.range.mask})"
            return _mask(generator, sizes)
        if self.range.high is not None:
            self.note = f"whole numbers {self.range.low}..{self.range.high} ({self.range.reason})"
            return generator.integers(self.range.low, self.range.high, sizes, endpoint=True)
        if not sizes and self.range.equals:
            self.note = f"{self.range.equals[0]:g}, a value it is compared with ({self.range.reason})"
            return np.full(sizes, self.range.equals[0])
        if is_image(shape):
            self.note = "uniform in [0, 1), as an image"
            return generator.random(sizes)
        self.note = "standard normal"
        return generator.standard_normal(sizes)

    def _integers(
        self, generator: np.random.Generator, dtype: np.dtype[Any], sizes: tuple[int, ...]
    ) -> Array:
        found = self.range
        numbers = [v for v in found.vocabulary if isinstance(v, int)]
        count = math.prod(sizes)
        if numbers:
            self.note = "values of a lookup table"
            return generator.choice(np.array(numbers), sizes).astype(dtype)
        if found.high is not None:
            self.note = f"{found.low}..{max(found.low, found.high)}: it indexes ({found.reason})"
            return self._between(generator, found.low, max(found.low, found.high), sizes, dtype)
        if found.equals and count == 1:
            value = int(found.equals[0])
            others = sorted({int(x) for x in found.equals} - {value})
            rest = f"; also compared with {', '.join(map(str, others[:5]))}" if others else ""
            self.note = f"{value}: it is compared with that ({found.reason}){rest}"
            return np.full(sizes, value, dtype)
        if found.length is not None:
            where, shape = found.length
            longest = _longest(shape, self.sizes)
            self.note = f"{longest}: a sequence length ({where})"
            return np.full(sizes, longest, dtype)
        if found.size or found.axis:
            value = 1 if found.size else 0
            self.note = f"{value}: a {'size' if found.size else 'position'} ({found.size or found.axis})"
            return np.full(sizes, value, dtype)
        if found.mask:
            self.note = f"mask of ones and trailing zeros ({found.mask})"
            return _mask(generator, sizes).astype(dtype)
        limits = _limits(dtype)
        low, high = limits if dtype.itemsize == 1 else (0, _NO_BOUND)
        if found.equals:
            low, high = min(0, *map(int, found.equals)), max(_NO_BOUND, *map(int, found.equals))
            low, high = max(low, limits[0]), min(high, limits[1])
            self.note = f"{low}..{high}: it is compared with values in that range ({found.reason})"
        else:
            self.note = f"{low}..{high}: nothing bounds it"
        if found.divisor and low <= 0:
            low, self.note = 1, f"1..{high}: it divides ({found.divisor})"
        return self._between(generator, low, high, sizes, dtype)

    @staticmethod
    def _between(
        generator: np.random.Generator, low: int, high: int, sizes: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Array:
        limits = _limits(dtype)
        drawn = generator.integers(max(low, limits[0]), min(high, limits[1]), sizes, np.int64, endpoint=True)
        return np.asarray(drawn).astype(dtype)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the least and largest integer of a dtype, as far as int64 reaches."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return int(info.min), min(int(info.max), 2**63 - 1)
    bits = int("".join(c for c in dtype.name if c.isdigit()))  # int4, uint2 of ml_dtypes
    return (0, 2**bits - 1) if dtype.name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _mask(generator: np.random.Generator, sizes: tuple[int, ...]) -> Array:
    """Return ones followed by zeros along the last axis; every row has a one, the first only ones."""
    if not sizes:
        return np.ones(())
    lengths = generator.integers(1, max(sizes[-1], 1), sizes[:-1], endpoint=True)
    lengths = np.asarray(lengths)
    lengths.reshape(-1)[:1] = sizes[-1]
    return (np.arange(sizes[-1]) < lengths[..., None]).astype(np.float64)


def _longest(shape: Shape | None, sizes: dict[str, int]) -> int:
    """Return the length of the longest sequence: the first axis of what an RNN reads."""
    first = shape[0] if shape else None
    if isinstance(first, str):
        first = sizes.get(first)
    return first if isinstance(first, int) and first > 0 else _DEFAULT_LENGTH
