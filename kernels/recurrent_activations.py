"""The activation functions of LSTM, GRU and RNN, with their parameters; each may change its argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxslim_lab.kernels.registry import Array

Activation = Callable[[Array], Array]


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), in place."""
    np.multiply(x, -1, out=x)  # np.negative in place is wrong on rows of 16 bytes (numpy 2.4, AVX)
    np.exp(x, out=x)
    x += 1
    np.reciprocal(x, out=x)
    return x


def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent, in place."""
    np.tanh(x, out=x)
    return x


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)) without overflow."""
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def affine(x: Array, alpha: float, beta: float) -> Array:
    """Return alpha * x + beta."""
    return np.asarray(alpha * x + beta)


_PLAIN: dict[str, Activation] = {
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": lambda x: np.maximum(x, 0),
    "softsign": lambda x: np.asarray(x / (1 + np.abs(x))),
    "softplus": softplus,
}
_WITH_ALPHA: dict[str, tuple[float, Callable[[Array, float], Array]]] = {
    "leakyrelu": (0.01, lambda x, alpha: np.where(x < 0, alpha * x, x)),
    "thresholdedrelu": (1.0, lambda x, alpha: np.where(x > alpha, x, 0).astype(x.dtype)),
    "elu": (1.0, lambda x, alpha: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)),
}
_WITH_BOTH: dict[str, tuple[float, float, Callable[[Array, float, float], Array]]] = {
    "affine": (1.0, 0.0, affine),
    "scaledtanh": (1.0, 1.0, lambda x, alpha, beta: np.asarray(alpha * np.tanh(beta * x))),
    "hardsigmoid": (0.2, 0.5, lambda x, alpha, beta: np.clip(affine(x, alpha, beta), 0, 1)),
}


def choose(
    op_type: str,
    names: Sequence[str],
    parameters: tuple[Sequence[float] | None, Sequence[float] | None],
    count: int,
) -> list[Activation]:
    """Return the functions of these names; each takes the next alpha and beta if it has such parameters.

    Raises:
        ValueError: A name is unknown, or there are not `count`.
    """
    if len(names) != count:
        raise ValueError(f"{op_type}: {len(names)} activations are given, expected {count}")
    alphas, betas = iter(parameters[0] or ()), iter(parameters[1] or ())
    return [_bound(op_type, name, alphas, betas) for name in names]


def _bound(op_type: str, name: str, alphas: Iterator[float], betas: Iterator[float]) -> Activation:
    key = name.lower()
    if key in _PLAIN:
        return _PLAIN[key]
    if key in _WITH_ALPHA:
        default, with_alpha = _WITH_ALPHA[key]
        alpha = float(next(alphas, default))
        return lambda x: with_alpha(x, alpha)
    if key in _WITH_BOTH:
        first, second, with_both = _WITH_BOTH[key]
        alpha, beta = float(next(alphas, first)), float(next(betas, second))
        return lambda x: with_both(x, alpha, beta)
    known = sorted([*_PLAIN, *_WITH_ALPHA, *_WITH_BOTH])
    raise ValueError(f"{op_type}: activation {name!r} is not one of {', '.join(known)}")
