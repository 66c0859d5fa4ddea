"""FlexAttention of ai.onnx.preview: attention whose scores and probabilities bodies may change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxslim_lab.kernels.dtypes import dtype_of_number
from onnxslim_lab.weights import Array


def make_flex_attention(
    bodies: Mapping[str, Any], attributes: Mapping[str, Any], count: int, opset: int
) -> Callable[..., tuple[Array, ...]]:
    """Return FlexAttention over (batch, heads, length, size) tensors.

    Scores and probabilities have the type `softmax_precision` names: float32, or float64 for such inputs.
    Key and value heads are shared by groups of query heads that follow each other.
    """
    del opset

    def change(name: str, values: Array, captured: tuple[Any, ...]) -> Array:
        body = bodies.get(name)
        return values if body is None else np.asarray(body.call((values,), captured)[0])

    def run(Q: Array, K: Array, V: Array, *captured: Any) -> tuple[Array, ...]:  # noqa: N803 - the operator's names
        batch, heads, length, size = Q.shape
        shared, keys = K.shape[1:3]
        if not shared or heads % shared:
            raise ValueError(f"{heads} query heads are not a multiple of {shared} key heads")
        number = attributes.get("softmax_precision")
        plain = np.dtype(np.float64 if Q.dtype == np.float64 else np.float32)
        dtype = plain if number is None else dtype_of_number(number)
        scale = attributes.get("scale", 1 / math.sqrt(size))
        grouped = (Q.astype(plain) * plain.type(scale)).reshape(batch, shared, heads // shared, length, size)
        products = grouped @ K.astype(plain)[:, :, None].swapaxes(-1, -2)
        scores = change(
            "score_mod", products.reshape(batch, heads, length, keys).astype(dtype), captured[count - 3 :]
        )
        wide = scores.astype(plain)
        wide = np.exp(wide - wide.max(-1, keepdims=True))
        probabilities = (wide / wide.sum(-1, keepdims=True)).astype(dtype)
        probabilities = change("prob_mod", probabilities, captured[count - 3 :]).astype(plain)
        grouped = probabilities.reshape(batch, shared, heads // shared, length, keys)
        result = grouped @ V.astype(plain)[:, :, None]
        return (result.reshape(batch, heads, length, V.shape[-1]).astype(Q.dtype),)

    return run
