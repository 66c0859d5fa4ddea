"""What stands around attention: RotaryEmbedding and TensorScatter."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.registry import Array, kernel


@kernel("RotaryEmbedding", since=23)
def RotaryEmbedding(
    X: Array,
    cos_cache: Array,
    sin_cache: Array,
    position_ids: Array | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Array:
    """Return X with pairs of its last axis rotated by the angles of their positions.

    Args:
        X: (batch, heads, length, size), or (batch, length, heads * size) with `num_heads`.
        cos_cache, sin_cache: (positions, half) with position_ids, else (batch, length, half).
        position_ids: int64 (batch, length).

    Raises:
        ValueError: The shapes do not fit.
    """
    if X.ndim == 3:
        if not num_heads or X.shape[2] % num_heads:
            raise ValueError(
                f"RotaryEmbedding: X {X.shape} does not divide into num_heads, which is {num_heads}"
            )
        x = X.reshape(*X.shape[:2], num_heads, -1)
    elif X.ndim == 4:
        x = X.transpose(0, 2, 1, 3)
    else:
        raise ValueError(f"RotaryEmbedding: X has shape {X.shape}, expected three or four axes")
    turned = rotary_embedding_dim or x.shape[3]
    cos, sin = wide(cos_cache), wide(sin_cache)
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    expected = (*x.shape[:2], turned // 2)
    if cos.shape != expected or sin.shape != expected:
        raise ValueError(f"RotaryEmbedding: the caches give {cos.shape} and {sin.shape}, expected {expected}")
    cos, sin = cos[:, :, None], sin[:, :, None]
    result = wide(x).copy()
    half = turned // 2
    pair = (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(half), slice(half, turned))
    first, second = wide(x)[..., pair[0]], wide(x)[..., pair[1]]
    result[..., pair[0]] = cos * first - sin * second
    result[..., pair[1]] = sin * first + cos * second
    result = result.astype(X.dtype, copy=False)
    return result.reshape(X.shape) if X.ndim == 3 else result.transpose(0, 2, 1, 3)


@kernel("TensorScatter", since=24)
def TensorScatter(
    past_cache: Array,
    update: Array,
    write_indices: Array | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Array:
    """Return the cache with the update written along `axis`, from each sample's write index on.

    Raises:
        ValueError: The mode is unknown, a shape does not fit or a linear update goes past the end.
    """
    place = axis % past_cache.ndim
    length = past_cache.shape[place]
    expected = (*past_cache.shape[:place], update.shape[place], *past_cache.shape[place + 1 :])
    if place == 0 or update.shape != expected or update.shape[place] > length:
        raise ValueError(
            f"TensorScatter: update {update.shape} does not fit the cache {past_cache.shape} on axis {axis}"
        )
    if mode not in {"linear", "circular"}:
        raise ValueError(f"TensorScatter: mode {mode!r} is not linear or circular")
    result = past_cache.copy()
    starts = [0] * len(update) if write_indices is None else write_indices.tolist()
    for sample, start in enumerate(starts):
        places = np.arange(start, start + update.shape[place])
        if mode == "circular":
            places %= length
        elif start < 0 or start + update.shape[place] > length:
            raise ValueError(f"TensorScatter: sample {sample} writes from {start} past the length {length}")
        result[sample][(*[slice(None)] * (place - 1), places)] = update[sample]
    return result
