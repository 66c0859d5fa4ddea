"""Recurrent sequence operators with an explicit state: CausalConvWithState and LinearAttention."""

from __future__ import annotations

import math

import numpy as np

from onnxslim_lab.kernels.activation import Sigmoid, wide
from onnxslim_lab.kernels.conv import convolve
from onnxslim_lab.kernels.registry import Array, kernel
from onnxslim_lab.kernels.windows import slide


@kernel("CausalConvWithState", since=27)
def CausalConvWithState(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    past_state: Array | None = None,
    *,
    activation: str = "none",
) -> tuple[Array, Array]:
    """Return the depthwise convolution of each position and the ones before it, and the last inputs.

    Args:
        input: (batch, channels, length).
        weight: (channels, 1, k).
        bias: (channels,).
        past_state: (batch, channels, k - 1): what came before, zero unless given.

    Raises:
        ValueError: A shape does not fit or the activation is unknown.
    """
    if input.ndim != 3 or weight.ndim != 3 or weight.shape[:2] != (input.shape[1], 1):
        raise ValueError(
            f"CausalConvWithState: input {input.shape} and weight {weight.shape}, "
            "expected (batch, channels, length) and (channels, 1, k)"
        )
    batch, channels, _ = input.shape
    kept = (batch, channels, weight.shape[2] - 1)
    past = np.zeros(kept, input.dtype) if past_state is None else past_state
    if past.shape != kept:
        raise ValueError(f"CausalConvWithState: past_state has shape {past.shape}, expected {kept}")
    if activation not in {"none", "silu", "swish"}:
        raise ValueError(f"CausalConvWithState: activation {activation!r} is not none, silu or swish")
    whole = np.concatenate([past, input], axis=2)
    window = slide("CausalConvWithState", whole.shape[2:], weight.shape[2:])
    y = convolve(wide(whole), wide(weight), None if bias is None else wide(bias), window, channels)
    if activation != "none":
        y = y * Sigmoid(y)
    return np.asarray(y).astype(input.dtype, copy=False), whole[:, :, whole.shape[2] - kept[2] :]


def split(name: str, x: Array, heads: int) -> Array:
    """Return x (batch, length, heads * size) as (length, batch, heads, size), fit for accumulation.

    Raises:
        ValueError: x has another rank or does not divide into the heads.
    """
    if x.ndim != 3 or heads < 1 or x.shape[2] % heads:
        raise ValueError(
            f"LinearAttention: {name} has shape {x.shape}, expected (batch, length, {heads} * size)"
        )
    return wide(x).reshape(*x.shape[:2], heads, -1).transpose(1, 0, 2, 3)


@kernel("LinearAttention", since=27)
def LinearAttention(
    query: Array,
    key: Array,
    value: Array,
    past_state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    *,
    kv_num_heads: int,
    q_num_heads: int,
    chunk_size: int = 64,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Array, Array]:
    """Return what the queries read from a state that every key and value updates, and the last state.

    Args:
        query, key, value: (batch, length, heads * size), with q_num_heads and kv_num_heads heads.
        past_state: (batch, kv heads, key size, value size), zero unless given.
        decay: (batch, length, kv heads * key size) or (batch, length, kv heads): logarithms.
        beta: (batch, length, kv heads) or (batch, length, 1): how much of the error is corrected.

    Raises:
        ValueError: A shape does not fit, the rule is unknown or lacks its decay or beta.
    """
    if update_rule not in {"linear", "gated", "delta", "gated_delta"}:
        raise ValueError(f"LinearAttention: update_rule {update_rule!r} is not known")
    gated, corrects = "gated" in update_rule, "delta" in update_rule
    if (gated and decay is None) or (corrects and beta is None):
        needed = [name for name, needs in (("decay", gated), ("beta", corrects)) if needs]
        raise ValueError(f"LinearAttention: the rule {update_rule!r} needs {' and '.join(needed)}")
    if q_num_heads % kv_num_heads:
        raise ValueError(f"LinearAttention: {q_num_heads} query heads do not divide among {kv_num_heads}")
    q, k, v = (
        split("query", query, q_num_heads),
        split("key", key, kv_num_heads),
        split("value", value, kv_num_heads),
    )
    length, batch, _, size = k.shape
    shared = q_num_heads // kv_num_heads
    shape = (batch, kv_num_heads, size, v.shape[3])
    state = np.zeros(shape, k.dtype) if past_state is None else wide(past_state).copy()
    if state.shape != shape:
        raise ValueError(f"LinearAttention: past_state has shape {state.shape}, expected {shape}")
    gates = np.exp(split("decay", decay, kv_num_heads)) if gated and decay is not None else None
    rates = None
    if corrects and beta is not None:
        rates = wide(beta).transpose(1, 0, 2)[..., None]
    factor = np.asarray(scale or 1 / math.sqrt(size), q.dtype)
    output = np.empty((length, batch, kv_num_heads, shared, shape[3]), q.dtype)
    grouped = q.reshape(length, batch, kv_num_heads, shared, size)
    for t in range(length):
        if gates is not None:
            state *= gates[t][..., None]
        written = v[t]
        if rates is not None:
            written = (written - np.matmul(k[t][..., None, :], state)[..., 0, :]) * rates[t]
        state += k[t][..., None] * written[..., None, :]
        np.matmul(grouped[t], state, out=output[t])
    output *= factor
    y = output.transpose(1, 0, 2, 3, 4).reshape(batch, length, -1).astype(query.dtype, copy=False)
    last = state if past_state is None else state.astype(past_state.dtype, copy=False)
    return y, last.astype(query.dtype, copy=False) if past_state is None else last
