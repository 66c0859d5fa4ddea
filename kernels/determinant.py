"""Determinants of square matrices."""

from __future__ import annotations

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.registry import Array, kernel


def square(X: Array) -> Array:
    """Return X (half types in float32) when its last two axes are equal.

    Raises:
        ValueError: They are not.
    """
    if X.ndim < 2 or X.shape[-1] != X.shape[-2]:
        raise ValueError(f"square matrices are required, the input is {X.shape}")
    return wide(X)


@kernel("Det", since=11)
def Det(X: Array) -> Array:
    """Return the determinants of the last two axes."""
    return np.asarray(np.linalg.det(square(X))).astype(X.dtype)
