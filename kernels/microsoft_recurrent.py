"""com.microsoft: recurrent layers with quantized weights (onnxruntime's ContribOperators.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.integer import FLOAT32_EXACT, DynamicQuantizeLinear, centred
from onnxslim_lab.kernels.microsoft_quantized import MS
from onnxslim_lab.kernels.recurrent import Product, lstm
from onnxslim_lab.kernels.registry import Array, kernel

Floats = Sequence[float]


def dynamic_product(weights: Array, scale: Array, zero_point: Array) -> Product:
    """Return what quantizes rows by their common range, multiplies in integers and scales back to float32.

    Args:
        weights: 8-bit integers (inputs, outputs).
        scale: Of the weights, one or (outputs,).
        zero_point: Likewise.
    """
    matrix = centred(weights, zero_point, -1)
    if 255 * np.abs(matrix).sum(0, dtype=np.float64).max(initial=0) >= FLOAT32_EXACT:
        matrix = matrix.astype(np.float64)

    def product(rows: Array) -> Array:
        quantized, row_scale, row_zero = DynamicQuantizeLinear(rows)
        total = np.matmul(centred(quantized, row_zero).astype(matrix.dtype, copy=False), matrix)
        return np.asarray(total.astype(np.float32, copy=False) * (row_scale * scale))

    return product


@kernel("DynamicQuantizeLSTM", since=1, domain=MS)
def DynamicQuantizeLSTM(
    X: Array,
    W: Array,
    R: Array,
    B: Array | None,
    sequence_lens: Array | None,
    initial_h: Array | None,
    initial_c: Array | None,
    P: Array | None,
    W_scale: Array,
    W_zero_point: Array,
    R_scale: Array,
    R_zero_point: Array,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
) -> tuple[Array, ...]:
    """Return Y, Y_h and Y_c as LSTM does, with products in integers.

    W (directions, inputs, 4 * hidden) and R (directions, hidden, 4 * hidden) have scales and zero points per
    direction or per column. All of X is quantized by one range, the hidden states of a step by theirs.

    Raises:
        ValueError: The shapes do not fit, or an activation or direction is unknown.
    """
    products = [
        (dynamic_product(*of_inputs), dynamic_product(*of_states))
        for of_inputs, of_states in zip(
            zip(W, W_scale, W_zero_point, strict=True),
            zip(R, R_scale, R_zero_point, strict=True),
            strict=True,
        )
    ]
    return lstm(
        X,
        (W.transpose(0, 2, 1), R.transpose(0, 2, 1), B),
        sequence_lens,
        (initial_h, initial_c),
        P,
        activations,
        (activation_alpha, activation_beta),
        clip,
        direction,
        input_forget,
        0,
        products,
    )
