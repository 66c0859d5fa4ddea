"""com.microsoft: attention whose queries share keys and values in groups, with a cache."""

from __future__ import annotations

import math

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.microsoft_attention import heads, joined, refuse, rotated
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.registry import Array, kernel


def scaled_heads(x: Array, weight: Array | None, epsilon: float) -> Array:
    """Return x (B, heads, S, size) over its root mean square times the weight; x itself without one."""
    if weight is None:
        return x
    power = np.square(wide(x)).mean(-1, keepdims=True)
    return np.asarray(wide(x) / np.sqrt(power + np.float32(epsilon)) * wide(weight)).astype(x.dtype)


def visible(queries: int, before: int, keys: int, window: int, *, causal: bool) -> Array:
    """Return which keys every query sees: (queries, keys); query i stands at the place before + i.

    >>> visible(2, 1, 3, 2, causal=True).astype(int).tolist()
    [[1, 1, 0], [0, 1, 1]]
    """
    place = np.arange(queries)[:, None] + before
    key = np.arange(keys)
    if not causal:
        return np.ones((queries, keys), np.bool_)
    seen = key <= place
    return np.asarray(seen & (key > place - window) if window > 0 else seen)


def chances_of(scores: Array, sink: Array | None) -> Array:
    """Return the softmax of (heads, S, T), with one more score per head in the sum when there is a sink."""
    top = scores.max(-1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink)
    powers = np.exp(scores - top)
    total = powers.sum(-1, keepdims=True)
    return np.asarray(powers / (total if sink is None else total + np.exp(sink - top)))


@kernel("GroupQueryAttention", since=1, domain=MS)
def GroupQueryAttention(
    query: Array,
    key: Array | None,
    value: Array | None,
    past_key: Array | None,
    past_value: Array | None,
    seqlens_k: Array,
    total_sequence_length: Array,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    position_ids: Array | None = None,
    attention_bias: Array | None = None,
    head_sink: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    query_seqlens: Array | None = None,
    *,
    causal: int = 1,
    do_rotary: int | None = None,
    k_norm_epsilon: float | None = None,
    k_quant_type: str = "NONE",
    kv_cache_bit_width: int | None = None,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    q_norm_epsilon: float | None = None,
    qk_norm_epsilon: float = 9.999999974752427e-07,
    qk_output: int = 0,
    rotary_interleaved: int | None = None,
    scale: float | None = None,
    sliding_window_cache: int = 0,
    smooth_softmax: int = -1,
    softcap: float | None = None,
    v_quant_type: str = "NONE",
) -> tuple[Array, Array, Array]:
    """Return the attention of queries (B, S, heads * size), and the cached keys and values with the new ones.

    Without `key` the query holds all three side by side. Row b has seqlens_k[b] + 1 keys in all, the new
    ones last; what lies behind them in the cache, and queries behind them, mean nothing.

    Raises:
        NotImplementedError: The cache is quantized or slides, the scores are asked for, or queries are padded
            (`query_seqlens`, onnxruntime 1.32).
        ValueError: There is no rotation table though `do_rotary` is set.
    """
    refuse(
        "GroupQueryAttention",
        k_quant_type=k_quant_type,
        v_quant_type=v_quant_type,
        kv_cache_bit_width=kv_cache_bit_width,
        sliding_window_cache=sliding_window_cache,
        qk_output=qk_output,
        query_seqlens=query_seqlens is not None,
    )
    batch, length = query.shape[:2]
    if key is None or value is None:
        size = query.shape[2] // (num_heads + 2 * kv_num_heads)
        ends = [num_heads * size, (num_heads + kv_num_heads) * size]
        query, key, value = np.split(query, ends, -1)
    q = scaled_heads(heads(query, num_heads), q_norm_weight, q_norm_epsilon or qk_norm_epsilon)
    k = scaled_heads(heads(key, kv_num_heads), k_norm_weight, k_norm_epsilon or qk_norm_epsilon)
    v = heads(value, kv_num_heads)
    size, most = q.shape[-1], int(total_sequence_length.reshape(()))
    totals = seqlens_k.reshape(-1).astype(np.int64) + 1
    befores = np.zeros(batch, np.int64) if most == length else totals - length
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise ValueError("GroupQueryAttention: do_rotary needs cos_cache and sin_cache")
        places = befores[:, None] + np.arange(length) if position_ids is None else position_ids
        cos, sin = (wide(cache)[places][:, None] for cache in (cos_cache, sin_cache))
        q, k = (rotated(x, cos, sin, interleaved=bool(rotary_interleaved)) for x in (q, k))
    capacity = max(most, 0 if past_key is None else past_key.shape[2])
    states = []
    for past, new in ((past_key, k), (past_value, v)):
        state = np.zeros((batch, kv_num_heads, capacity, new.shape[-1]), new.dtype)
        if past is not None:
            state[:, :, : past.shape[2]] = past
        for row, before in enumerate(befores.tolist()):
            state[row, :, before : before + length] = new[row]
        states.append(state)
    sink = None
    if head_sink is not None:
        sink = wide(head_sink).reshape(-1, 1, 1)
    elif smooth_softmax > 0:
        sink = np.zeros((num_heads, 1, 1), np.float32)
    group, factor = num_heads // kv_num_heads, np.float32(scale or 1 / math.sqrt(size))
    output = np.empty((batch, num_heads, length, states[1].shape[-1]), query.dtype)
    for row in range(batch):
        count = max(int(totals[row]), int(befores[row]) + length if most == length else 0)
        keys, values = (np.repeat(wide(state[row, :, :count]), group, 0) for state in states)
        scores = np.matmul(wide(q[row]), keys.swapaxes(-1, -2)) * factor
        if softcap:
            scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
        if attention_bias is not None:
            added = attention_bias[row if len(attention_bias) > 1 else 0]
            scores = scores + wide(added)[..., :length, :count]
        seen = visible(length, int(befores[row]), count, local_window_size, causal=bool(causal))
        output[row] = np.matmul(chances_of(np.where(seen, scores, -np.inf), sink), values)
    return joined(output), states[0], states[1]
