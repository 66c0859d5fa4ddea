"""com.microsoft: attention and rotary positions (onnxruntime's ContribOperators.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.activation import softmax, wide
from onnxslim_lab.kernels.integer import centred, integer_matmul
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.registry import Array, kernel

MASKED = -10000.0


def refuse(op_type: str, **attributes: object) -> None:
    """Refuse attributes that only other devices know.

    Raises:
        NotImplementedError: One is set.
    """
    given = [name for name, value in attributes.items() if value is not None and value not in (0, "NONE")]
    if given:
        raise NotImplementedError(f"{op_type}: {', '.join(given)} is not supported")


def heads(x: Array, count: int) -> Array:
    """Return (B, S, count * size) as (B, count, S, size)."""
    return x.reshape(*x.shape[:2], count, x.shape[2] // count).transpose(0, 2, 1, 3)


def joined(x: Array) -> Array:
    """Return (B, count, S, size) as (B, S, count * size)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def mask_bias(mask: Array | None, batch: int, total: int, value: float) -> Array | None:
    """Return what a mask adds to the scores, broadcasting over (B, heads, S, T): `value` where it masks.

    Args:
        mask: (B, T) or (B, S, T) with 0 where masked; or 1-D: lengths (B,), or ends and starts (2 B,).
        batch, total: B and T.
        value: What is added.

    Raises:
        ValueError: The shape is none of these.
    """
    if mask is None:
        return None
    if mask.ndim == 1:
        if mask.shape[0] not in {batch, 2 * batch}:
            raise ValueError(f"a mask index of {mask.shape[0]} numbers for a batch of {batch}")
        places = np.arange(total)
        shown = places < mask[:batch, None]
        if mask.shape[0] > batch:
            shown &= places >= mask[batch:, None]
    elif mask.ndim in {2, 3} and mask.shape[-1] == total:
        shown = mask != 0
    else:
        raise ValueError(f"a mask {mask.shape} for {total} keys")
    added = np.where(shown, np.float32(0), np.float32(value))
    return np.asarray(added[:, None, None] if added.ndim == 2 else added[:, None])


def attend(
    query: Array,
    key: Array,
    value: Array,
    scale: float | None,
    added: Sequence[Array | None],
    *,
    causal: bool = False,
) -> tuple[Array, Array]:
    """Return softmax(query key' * scale + added) value, and the softmax: all (B, heads, length, size).

    Causal means that a query sees the keys up to its own place, queries standing at the end of the keys.
    """
    factor = scale or 1 / math.sqrt(query.shape[-1])
    scores = np.matmul(wide(query), wide(key).swapaxes(-1, -2)) * np.float32(factor)
    for bias in added:
        if bias is not None:
            scores = scores + wide(bias)
    if causal:
        queries, keys = scores.shape[-2:]
        later = np.arange(keys) > np.arange(queries)[:, None] + (keys - queries)
        scores = np.where(later, np.finfo(np.float32).min, scores)
    chances = softmax(scores, -1)
    return np.matmul(chances, wide(value)).astype(query.dtype), chances.astype(query.dtype)


def with_past(past: Array | None, new: Array) -> Array:
    """Return keys or values (B, heads, S, size) after those of the past."""
    return new if past is None else np.concatenate((past, new), 2)


def self_attention(
    projected: Array,
    sizes: Sequence[int],
    num_heads: int,
    scale: float | None,
    mask: Array | None,
    mask_filter_value: float | None,
    past: Array | None,
    attention_bias: Array | None,
    unidirectional: int,
) -> tuple[Array, Array]:
    """Return the attention of a projection (B, S, Q + K + V) with itself, and the keys and values."""
    query, key, value = (
        heads(part, num_heads) for part in np.split(projected, np.cumsum(sizes)[:-1].tolist(), -1)
    )
    key = with_past(None if past is None else past[0], key)
    value = with_past(None if past is None else past[1], value)
    filling = MASKED if mask_filter_value is None else mask_filter_value
    added = [mask_bias(mask, len(query), key.shape[2], filling), attention_bias]
    output, _ = attend(query, key, value, scale, added, causal=bool(unidirectional))
    present = np.stack((key, value)) if key.shape == value.shape else key
    return joined(output), present


@kernel("Attention", since=1, domain=MS)
def Attention(
    input: Array,
    weights: Array,
    bias: Array | None = None,
    mask_index: Array | None = None,
    past: Array | None = None,
    attention_bias: Array | None = None,
    past_sequence_length: Array | None = None,
    *,
    do_rotary: int | None = None,
    mask_filter_value: float | None = None,
    num_heads: int,
    past_present_share_buffer: int | None = None,
    qkv_hidden_sizes: Sequence[int] | None = None,
    rotary_embedding_dim: int | None = None,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Array, Array]:
    """Return the attention of input (B, S, D) projected by the weights (D, Q + K + V), and the state."""
    refuse("Attention", do_rotary=do_rotary, past_present_share_buffer=past_present_share_buffer)
    projected = np.matmul(wide(input), wide(weights))
    if bias is not None:
        projected = projected + wide(bias)
    sizes = list(qkv_hidden_sizes or [weights.shape[1] // 3] * 3)
    output, present = self_attention(
        np.asarray(projected),
        sizes,
        num_heads,
        scale,
        mask_index,
        mask_filter_value,
        None if past is None else wide(past),
        attention_bias,
        unidirectional,
    )
    return output.astype(input.dtype), present.astype(input.dtype)


@kernel("QAttention", since=1, domain=MS)
def QAttention(
    input: Array,
    weight: Array,
    bias: Array,
    input_scale: Array,
    weight_scale: Array,
    mask_index: Array | None = None,
    input_zero_point: Array | None = None,
    weight_zero_point: Array | None = None,
    past: Array | None = None,
    *,
    do_rotary: int | None = None,
    mask_filter_value: float | None = None,
    num_heads: int,
    past_present_share_buffer: int | None = None,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Array, Array]:
    """Return the attention of a quantized input projected by quantized weights, and the state."""
    refuse("QAttention", do_rotary=do_rotary, past_present_share_buffer=past_present_share_buffer)
    total = integer_matmul(centred(input, input_zero_point), centred(weight, weight_zero_point, -1))
    factor = input_scale.reshape(()) * (weight_scale.reshape(()) if weight_scale.size == 1 else weight_scale)
    return self_attention(
        np.asarray(total.astype(np.float32) * factor + bias),
        [weight.shape[1] // 3] * 3,
        num_heads,
        scale,
        mask_index,
        mask_filter_value,
        past,
        None,
        unidirectional,
    )


@kernel("MultiHeadAttention", since=1, domain=MS)
def MultiHeadAttention(
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    bias: Array | None = None,
    key_padding_mask: Array | None = None,
    attention_bias: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    past_sequence_length: Array | None = None,
    cache_indirection: Array | None = None,
    *,
    mask_filter_value: float | None = None,
    num_heads: int,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Array, Array, Array, Array]:
    """Return the attention of projected queries, keys and values, the keys, the values, and the softmax.

    The query is (B, S, Q), or packed with the others (B, S, heads, 3, size); keys and values are (B, L, K),
    packed (B, L, heads, 2, size), or of another attention (B, heads, L, size), without bias then.
    """
    refuse(
        "MultiHeadAttention", past_sequence_length=past_sequence_length, cache_indirection=cache_indirection
    )
    if query.ndim == 5:
        parts = [query[:, :, :, place].transpose(0, 2, 1, 3) for place in range(3)]
    elif key is None:
        raise ValueError(f"MultiHeadAttention: no key, and the query {query.shape} is not packed")
    elif key.ndim == 5:
        packed = [key[:, :, :, place].transpose(0, 2, 1, 3) for place in range(2)]
        parts = [heads(query, num_heads), *packed]
    elif value is None:
        raise ValueError(f"MultiHeadAttention: no value, and the key {key.shape} is not packed")
    else:
        parts = [x if x.ndim == 4 else heads(x, num_heads) for x in (query, key, value)]
    if bias is not None:
        ends = np.cumsum([part.shape[1] * part.shape[3] for part in parts])[:-1].tolist()
        split = [part.reshape(num_heads, 1, -1) for part in np.split(bias, ends)]
        kept = 3 if key is None or key.ndim != 4 else 1
        parts = [part + split[k] if k < kept else part for k, part in enumerate(parts)]
    keys, values = with_past(past_key, parts[1]), with_past(past_value, parts[2])
    filling = MASKED if mask_filter_value is None else mask_filter_value
    added = [mask_bias(key_padding_mask, len(query), keys.shape[2], filling), attention_bias]
    output, chances = attend(parts[0], keys, values, scale, added, causal=bool(unidirectional))
    return joined(output), keys, values, chances


def rotated(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Return x (..., S, size) with pairs of its first entries turned by angles (..., S, pairs)."""
    pairs = cos.shape[-1]
    turned, rest = wide(x[..., : 2 * pairs]), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    parts = (first * cos - second * sin, first * sin + second * cos)
    both = np.stack(parts, -1).reshape(turned.shape) if interleaved else np.concatenate(parts, -1)
    return np.concatenate((both.astype(x.dtype), rest), -1)


@kernel("RotaryEmbedding", since=1, domain=MS)
def RotaryEmbedding(
    input: Array,
    position_ids: Array,
    cos_cache: Array,
    sin_cache: Array,
    *,
    interleaved: int | None = None,
    is_packed_batching: int | None = None,
    num_heads: int | None = None,
    rotary_embedding_dim: int | None = None,
    scale: float | None = None,
) -> Array:
    """Return input (B, S, D) or (B, heads, S, size) turned by the angles of its positions.

    `position_ids` is (B, S), or (1,): the position of the first entry.
    """
    refuse("RotaryEmbedding", is_packed_batching=is_packed_batching)
    size = rotary_embedding_dim or 2 * cos_cache.shape[1]
    flat = input.ndim == 3
    count = num_heads or (input.shape[-1] // size if flat else 1)
    x = heads(input, count) if flat else input
    places = position_ids
    if places.size == 1 and places.ndim == 1:
        places = np.broadcast_to(places + np.arange(x.shape[2]), (len(x), x.shape[2]))
    cos, sin = (wide(cache)[places][:, None, :, : size // 2] for cache in (cos_cache, sin_cache))
    result = rotated(x, cos, sin, interleaved=bool(interleaved))
    return joined(result) if flat else result
