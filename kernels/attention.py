"""Attention over queries, keys and values, with a cache, masks and windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.dtypes import dtype_of_number
from onnxslim_lab.kernels.registry import Array, kernel


@dataclass(frozen=True)
class Settings:
    """The attributes of Attention."""

    is_causal: int = 0
    kv_num_heads: int | None = None
    q_num_heads: int | None = None
    output_mode: int = 0
    scale: float | None = None
    softcap: float = 0.0
    softmax_precision: int | None = None
    left_window_size: int = -1
    right_window_size: int = -1


def heads(name: str, x: Array, count: int | None) -> Array:
    """Return x as (batch, heads, length, size), from that or from (batch, length, heads * size).

    Raises:
        ValueError: x has another rank, or its last axis does not divide into the heads.
    """
    if x.ndim == 4:
        return x
    if x.ndim != 3 or not count or x.shape[2] % count:
        raise ValueError(
            f"Attention: {name} has shape {x.shape}, expected four axes, or three whose last divides into "
            f"the number of heads, which is {count}"
        )
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(0, 2, 1, 3)


def visible(queries: int, keys: int, offset: Array, filled: Array | None, settings: Settings) -> Array | None:
    """Return which keys each query may attend, bool (batch or 1, 1, queries, keys); None for all.

    Args:
        offset: Position of the first query: int64 (batch or 1, 1, 1, 1).
        filled: Number of keys that are no padding, the same shape, or None.
    """
    place = np.arange(queries)[:, None] + offset
    key = np.arange(keys)
    rules = []
    if filled is not None:
        rules.append(key < filled)
    if settings.is_causal:
        rules.append(key <= place)
    if settings.left_window_size >= 0:
        rules.append(key >= place - settings.left_window_size)
    if settings.right_window_size >= 0:
        rules.append(key <= place + settings.right_window_size)
    if not rules:
        return None
    allowed = rules[0]
    for rule in rules[1:]:
        allowed = allowed & rule
    return np.asarray(allowed)


def masked(scores: Array, mask: Array | None, allowed: Array | None) -> Array:
    """Return the scores with a float mask added, and -inf where a boolean one or the rules forbid."""
    if mask is not None:
        missing = scores.shape[-1] - mask.shape[-1]
        if missing > 0 and mask.shape[-1] != 1:
            filling = np.asarray(0 if mask.dtype == np.bool_ else -np.inf, mask.dtype)
            mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=filling)
        if mask.dtype == np.bool_:
            scores = np.where(mask, scores, np.asarray(-np.inf, scores.dtype))
        else:
            scores = np.asarray(scores + mask.astype(scores.dtype))
    return scores if allowed is None else np.where(allowed, scores, np.asarray(-np.inf, scores.dtype))


def softmax_rows(scores: Array) -> Array:
    """Return the softmax along the last axis, zero in a row of only -inf."""
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    empty = top == -np.inf
    powers = np.exp(scores - np.where(empty, np.zeros((), scores.dtype), top))
    total = np.sum(powers, axis=-1, keepdims=True)
    return np.asarray(powers / np.where(empty, np.ones((), scores.dtype), total))


def attention(
    Q: Array,
    K: Array,
    V: Array,
    mask: Array | None,
    past: tuple[Array | None, Array | None],
    filled: Array | None,
    settings: Settings,
) -> tuple[Array, Array, Array, Array]:
    """Return Y, the keys and values including the past, and the scores that `output_mode` asks for.

    Raises:
        ValueError: The shapes or the numbers of heads do not fit.
    """
    q = heads("Q", Q, settings.q_num_heads)
    k = heads("K", K, settings.kv_num_heads)
    v = heads("V", V, settings.kv_num_heads)
    if (past[0] is None) != (past[1] is None):
        raise ValueError("Attention: past_key and past_value must be given together")
    before = 0
    if past[0] is not None and past[1] is not None:
        before = past[0].shape[2]
        k, v = np.concatenate([past[0], k], axis=2), np.concatenate([past[1], v], axis=2)
    if q.shape[1] % max(k.shape[1], 1) or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"Attention: Q {q.shape}, K {k.shape} and V {v.shape} (by heads) do not fit together"
        )
    batch, count, queries, size = q.shape
    keys, shared = k.shape[2], k.shape[1]
    scale = 1 / math.sqrt(size) if settings.scale is None else settings.scale
    root = np.asarray(math.sqrt(scale), wide(q).dtype)
    grouped = (batch, shared, count // max(shared, 1) * queries, size)
    scores = np.matmul((wide(q) * root).reshape(grouped), (wide(k) * root).transpose(0, 1, 3, 2))
    scores = scores.reshape(batch, count, queries, keys)
    shown = scores
    if settings.softcap:
        cap = np.asarray(settings.softcap, scores.dtype)
        scores = np.tanh(scores / cap) * cap
    shown = scores if settings.output_mode == 1 else shown
    offset = np.full((1, 1, 1, 1), before, np.int64)
    if filled is not None:
        filled = filled.astype(np.int64).reshape(-1, 1, 1, 1)
        offset = offset if before else filled - queries
    scores = masked(scores, mask, visible(queries, keys, offset, filled, settings))
    shown = scores if settings.output_mode == 2 else shown
    if settings.softmax_precision is not None:
        precision = dtype_of_number(settings.softmax_precision)
        weights = softmax_rows(wide(scores.astype(precision))).astype(precision)
    else:
        weights = softmax_rows(scores)
    weights = weights.astype(Q.dtype, copy=False)
    shown = weights if settings.output_mode == 3 else shown
    rows = wide(weights).reshape(batch, shared, -1, keys)
    y = np.matmul(rows, wide(v)).reshape(batch, count, queries, v.shape[3]).astype(Q.dtype, copy=False)
    if Q.ndim == 3:
        y = y.transpose(0, 2, 1, 3).reshape(batch, queries, -1)
    return y, k, v, shown.astype(Q.dtype, copy=False)


@kernel("Attention", since=23)
def Attention_23(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Array, ...]:
    """Return the attention of Q over K and V, their concatenation with the past, and the scores."""
    settings = Settings(
        is_causal, kv_num_heads, q_num_heads, qk_matmul_output_mode, scale, softcap, softmax_precision
    )
    return attention(Q, K, V, attn_mask, (past_key, past_value), None, settings)


@kernel("Attention", since=24)
def Attention_24(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Array, ...]:
    """Return the attention of Q over K and V, of which `nonpad_kv_seqlen` rows are filled."""
    settings = Settings(
        is_causal, kv_num_heads, q_num_heads, qk_matmul_output_mode, scale, softcap, softmax_precision
    )
    return attention(Q, K, V, attn_mask, (past_key, past_value), nonpad_kv_seqlen, settings)


@kernel("Attention", since=25)
def Attention_25(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Array, ...]:
    """Return the attention of Q over the keys within a window around each query.

    Args:
        Q: (batch, heads, length, size), or (batch, length, heads * size) with `q_num_heads`.
        K, V: Likewise, with a number of heads that divides Q's.
        attn_mask: Bool (True: attend) or added to the scores; broadcast to (batch, heads, length, keys).
        past_key, past_value: Go before K and V.
        nonpad_kv_seqlen: int64 (batch,), the keys that are no padding.

    Returns:
        Y in Q's layout, the keys, the values, and the scores before (0) or after (1) the soft cap, after
        the mask (2) or the softmax (3). A query that may attend nothing gives zeros.
    """
    settings = Settings(
        is_causal,
        kv_num_heads,
        q_num_heads,
        qk_matmul_output_mode,
        scale,
        softcap,
        softmax_precision,
        left_window_size,
        right_window_size,
    )
    return attention(Q, K, V, attn_mask, (past_key, past_value), nonpad_kv_seqlen, settings)
