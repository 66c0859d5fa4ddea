"""Random numbers, from NumPy's generator: repeatable, but not those of another runtime.

A node with a seed draws the same numbers at every run. Nodes without one share a generator that is seeded
when the module is imported; `reseed` starts it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxslim_lab.kernels.dtypes import HALF, dtype_of_number
from onnxslim_lab.kernels.registry import Array, kernel

_SHARED = np.random.default_rng(0)


def reseed(seed: int = 0) -> None:
    """Start the generator of the nodes without a seed anew."""
    _SHARED.bit_generator.state = np.random.default_rng(seed).bit_generator.state


def generator(seed: float | None) -> np.random.Generator:
    """Return the generator of a node: of its own when it has a seed."""
    if seed is None:
        return _SHARED
    return np.random.default_rng(int.from_bytes(np.float64(seed).tobytes(), "little"))


def element(dtype: int | None, like: Array) -> np.dtype[Any]:
    """Return the dtype the attribute names, else that of the input."""
    return like.dtype if dtype is None else dtype_of_number(dtype)


@kernel("RandomNormal", since=1)
def RandomNormal(
    *, dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None, shape: Sequence[int]
) -> Array:
    """Return numbers of the normal distribution."""
    drawn = generator(seed).normal(mean, scale, tuple(shape))
    return np.asarray(drawn).astype(dtype_of_number(dtype))


@kernel("RandomUniform", since=1)
def RandomUniform(
    *, dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None, shape: Sequence[int]
) -> Array:
    """Return numbers evenly spread over [low, high)."""
    drawn = generator(seed).uniform(low, high, tuple(shape))
    return np.asarray(drawn).astype(dtype_of_number(dtype))


@kernel("RandomNormalLike", since=1)
def RandomNormalLike(
    input: Array,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Array:
    """Return numbers of the normal distribution in the input's shape."""
    drawn = generator(seed).normal(mean, scale, input.shape)
    return np.asarray(drawn).astype(element(dtype, input))


@kernel("RandomUniformLike", since=1)
def RandomUniformLike(
    input: Array, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Array:
    """Return numbers evenly spread over [low, high) in the input's shape."""
    drawn = generator(seed).uniform(low, high, input.shape)
    return np.asarray(drawn).astype(element(dtype, input))


@kernel("Bernoulli", since=15)
def Bernoulli(input: Array, *, dtype: int | None = None, seed: float | None = None) -> Array:
    """Return 1 with the probability that the input is, else 0."""
    drawn = generator(seed).random(input.shape) < input.astype(np.float64)
    return np.asarray(drawn).astype(element(dtype, input))


@kernel("Multinomial", since=7)
def Multinomial(input: Array, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Array:
    """Return classes drawn by unnormalized log-probabilities: (batch, classes) -> (batch, sample_size)."""
    logits = input.astype(np.float64)
    weights = np.cumsum(np.exp(logits - logits.max(1, keepdims=True)), 1)
    drawn = generator(seed).random((len(input), sample_size)) * weights[:, -1:]
    chosen = (weights[:, None, :] <= drawn[:, :, None]).sum(2)
    return np.asarray(chosen).astype(dtype_of_number(dtype))


def dropped(data: Array, ratio: float, seed: float | None) -> tuple[Array, Array]:
    """Return data with a share `ratio` of it zeroed and the rest scaled up, and what was kept.

    Raises:
        ValueError: The ratio is not in [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"Dropout: ratio {ratio} is not in [0, 1)")
    kept = np.asarray(generator(seed).random(data.shape) >= ratio)
    wide = data.astype(np.float32) if data.dtype in HALF else data
    scaled = wide * np.asarray(1 / (1 - ratio), wide.dtype)
    return np.where(kept, scaled, np.zeros((), wide.dtype)).astype(data.dtype), kept


@kernel("Dropout", since=1)
def Dropout_1(data: Array, *, is_test: int = 0, ratio: float = 0.5) -> tuple[Array, Array]:
    """Return data, zeroed at random unless `is_test`, and the mask in data's type."""
    if is_test or ratio == 0:
        return data, np.ones_like(data)
    result, kept = dropped(data, ratio, None)
    return result, kept.astype(data.dtype)


@kernel("Dropout", since=7)
def Dropout_7(data: Array, *, ratio: float = 0.5) -> tuple[Array, Array]:
    """Return data as it is, and a mask of ones in its type."""
    return data, np.ones_like(data)


@kernel("Dropout", since=10)
def Dropout_10(data: Array, *, ratio: float = 0.5) -> tuple[Array, Array]:
    """Return data as it is, and a mask that is true."""
    return data, np.ones(data.shape, np.bool_)


@kernel("Dropout", since=12)
def Dropout_12(
    data: Array, ratio: Array | None = None, training_mode: Array | None = None, *, seed: int | None = None
) -> tuple[Array, Array]:
    """Return data, zeroed at random in training mode, and where it was kept."""
    share = 0.5 if ratio is None else float(ratio.reshape(()))
    if training_mode is None or not training_mode.reshape(()) or share == 0:
        return data, np.ones(data.shape, np.bool_)
    return dropped(data, share, seed)
