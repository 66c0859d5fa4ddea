"""LSTM, GRU and RNN: input projections of all time steps in one product, one product per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.recurrent_activations import Activation, choose
from onnxslim_lab.kernels.registry import Array

States = tuple[Array, ...]
Step = Callable[[Array, States], States]
Product = Callable[[Array], Array]
"""From rows of inputs or states to their products with a matrix of weights."""
Floats = Sequence[float]

FEW_ROWS = 4
"""Rows of all steps up to which laying out the recurrent weights for the product costs more than it saves."""


def directions(op_type: str, direction: str) -> tuple[bool, ...]:
    """Return for every direction whether it runs backwards.

    Raises:
        ValueError: The name is unknown.
    """
    known = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    if direction not in known:
        raise ValueError(f"{op_type}: direction {direction!r} is not forward, reverse or bidirectional")
    return known[direction]


def expect(op_type: str, name: str, value: Array | None, *shape: int) -> None:
    """Check the shape of an input that may be absent.

    Raises:
        ValueError: It is another.
    """
    if value is not None and value.shape != shape:
        raise ValueError(f"{op_type}: {name} has shape {value.shape}, expected {shape}")


def order_of_steps(steps: int, batch: int, lengths: Array | None, *, backwards: bool) -> Array | None:
    """Return (steps, batch): the position read at each step; None where that is the step itself."""
    if not backwards:
        return None
    forward = np.arange(steps)[:, None]
    ends = np.full(batch, steps) if lengths is None else lengths.astype(np.int64)
    return np.where(forward < ends, ends - 1 - forward, forward)


def unroll(
    op_type: str,
    X: Array,
    weights: tuple[Array, Array, Array | None],
    lengths: Array | None,
    initial: Sequence[Array | None],
    make_step: Callable[[int, Array, Array], tuple[Array, Step]],
    gates: int,
    direction: str,
    layout: int,
    projections: Sequence[Product] | None = None,
) -> tuple[Array, ...]:
    """Run a recurrent layer.

    Args:
        X: (steps, batch, inputs), or (batch, steps, inputs) with layout 1.
        weights: W (directions, gates * hidden, inputs), R (directions, gates * hidden, hidden) and
            B (directions, 2 * gates * hidden) or None.
        lengths: int32 (batch,), or None when all sequences are full.
        initial: The first states, each (directions, batch, hidden) or None for zeros.
        make_step: From the direction's number, R (hidden, gates * hidden) and biases (2, gates * hidden): the
            bias of the input projection, and the function from that projection and the states to the next states.
        gates: How many there are.
        direction: As the attribute.
        layout: As the attribute.
        projections: For every direction what computes the product with W, where it is not the plain one.

    Returns:
        The first state at every step (steps, directions, batch, hidden), then the last states.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    if X.ndim != 3:
        raise ValueError(f"{op_type}: X has shape {X.shape}, expected three axes")
    W, R, B = weights
    x = wide(X.transpose(1, 0, 2) if layout else X)
    steps, batch, inputs = x.shape
    backwards = directions(op_type, direction)
    hidden = R.shape[-1]
    count = len(backwards)
    expect(op_type, "W", W, count, gates * hidden, inputs)
    expect(op_type, "R", R, count, gates * hidden, hidden)
    expect(op_type, "B", B, count, 2 * gates * hidden)
    expect(op_type, "sequence_lens", lengths, batch)
    if lengths is not None and lengths.size and not 0 <= lengths.min() <= lengths.max() <= steps:
        raise ValueError(f"{op_type}: sequence_lens must be within 0 and {steps}, X's number of steps")
    firsts = [None if s is None else wide(s.transpose(1, 0, 2) if layout else s) for s in initial]
    for name, first in zip(("initial_h", "initial_c"), firsts, strict=False):
        expect(op_type, name, first, count, batch, hidden)
    Y = np.zeros((steps, count, batch, hidden), x.dtype)
    finals = [np.zeros((count, batch, hidden), x.dtype) for _ in initial]
    for number, reverse in enumerate(backwards):
        order = order_of_steps(steps, batch, lengths, backwards=reverse)
        columns = np.arange(batch)
        ordered = x if order is None else x[order, columns]
        biases = np.zeros((2, gates * hidden), x.dtype) if B is None else wide(B[number]).reshape(2, -1)
        transposed = wide(R[number]).T
        if steps * batch > FEW_ROWS:
            transposed = np.ascontiguousarray(transposed)
        bias, step = make_step(number, transposed, biases)
        rows = ordered.reshape(steps * batch, inputs)
        projected = projections[number](rows) if projections else np.matmul(rows, wide(W[number]).T)
        projected = (projected + bias).reshape(steps, batch, gates * hidden)
        states: States = tuple(
            np.zeros((batch, hidden), x.dtype) if first is None else first[number] for first in firsts
        )
        written = Y[:, number] if order is None else np.zeros((steps, batch, hidden), x.dtype)
        for t in range(steps):
            if lengths is None:
                states = step(projected[t], states)
                written[t] = states[0]
                continue
            runs = (lengths > t)[:, None]
            going = states
            if (
                projections
            ):  # which quantize all rows alike: onnxruntime clears a state one step after its end
                going = tuple(np.where((lengths >= t)[:, None], state, 0) for state in states)
            following = step(projected[t], going)
            states = tuple(np.where(runs, new, old) for new, old in zip(following, states, strict=True))
            np.copyto(written[t], states[0], where=runs)
        if order is not None:
            Y[:, number] = written[order, columns]
        for final, state in zip(finals, states, strict=True):
            final[number] = state
    if layout:
        Y = Y.transpose(2, 0, 1, 3)
        finals = [final.transpose(1, 0, 2) for final in finals]
    return (Y.astype(X.dtype, copy=False), *(final.astype(X.dtype, copy=False) for final in finals))


def clipped(x: Array, clip: float | None) -> Array:
    """Return x kept in [-clip, clip], in place."""
    if clip is not None:
        np.clip(x, -clip, clip, out=x)
    return x


def lstm_step(
    recurrent: Product,
    hidden: int,
    peepholes: Array | None,
    functions: Sequence[Activation],
    clip: float | None,
    input_forget: int,
) -> Step:
    """Return the step of an LSTM with gates in the order input, output, forget, cell."""
    f, g, h = functions

    def step(projected: Array, states: States) -> States:
        before, cell = states
        gates = recurrent(before)
        gates += projected
        if peepholes is not None:
            gates[:, :hidden] += peepholes[:hidden] * cell
            gates[:, 2 * hidden : 3 * hidden] += peepholes[2 * hidden :] * cell
            new = g(clipped(gates[:, 3 * hidden :], clip))
            written = f(clipped(gates[:, :hidden], clip))
            forget = f(clipped(gates[:, 2 * hidden : 3 * hidden], clip))
        else:
            clipped(gates, clip)
            opened = f(gates[:, : 3 * hidden])
            written, forget = opened[:, :hidden], opened[:, 2 * hidden :]
            output = opened[:, hidden : 2 * hidden]
            new = g(gates[:, 3 * hidden :])
        if input_forget:
            forget = 1 - written
        following = forget * cell
        following += written * new
        if peepholes is not None:
            output = gates[:, hidden : 2 * hidden] + peepholes[hidden : 2 * hidden] * following
            output = f(clipped(output, clip))
        return output * h(following.copy()), following

    return step


def lstm(
    X: Array,
    weights: tuple[Array, Array, Array | None],
    lengths: Array | None,
    initial: tuple[Array | None, Array | None],
    P: Array | None,
    names: Sequence[str] | None,
    parameters: tuple[Floats | None, Floats | None],
    clip: float | None,
    direction: str,
    input_forget: int,
    layout: int,
    products: Sequence[tuple[Product, Product]] | None = None,
) -> tuple[Array, ...]:
    """Return Y, Y_h and Y_c; see `LSTM_14`.

    For every direction `products` may give what computes the products with W and with R.
    """
    count = len(directions("LSTM", direction))
    hidden = weights[1].shape[-1]
    expect("LSTM", "P", P, count, 3 * hidden)
    functions = choose("LSTM", names or ["Sigmoid", "Tanh", "Tanh"] * count, parameters, 3 * count)

    def make_step(number: int, recurrent: Array, biases: Array) -> tuple[Array, Step]:
        peepholes = None if P is None else wide(P[number])
        chosen = functions[3 * number : 3 * number + 3]
        product = products[number][1] if products else lambda before: np.matmul(before, recurrent)
        return biases.sum(0), lstm_step(product, hidden, peepholes, chosen, clip, input_forget)

    projections = [projection for projection, _ in products] if products else None
    return unroll("LSTM", X, weights, lengths, initial, make_step, 4, direction, layout, projections)


def gru_step(
    recurrent: Array,
    reset_bias: Array,
    functions: Sequence[Activation],
    clip: float | None,
    linear_before_reset: int,
) -> Step:
    """Return the step of a GRU with gates in the order update, reset, hidden."""
    f, g = functions
    hidden = recurrent.shape[0]

    def step(projected: Array, states: States) -> States:
        (before,) = states
        if linear_before_reset:
            product = np.matmul(before, recurrent)
            gates = product[:, : 2 * hidden]
            candidate = product[:, 2 * hidden :]
            candidate += reset_bias
        else:
            gates = np.matmul(before, recurrent[:, : 2 * hidden])
        gates += projected[:, : 2 * hidden]
        opened = f(clipped(gates, clip))
        update, reset = opened[:, :hidden], opened[:, hidden:]
        if linear_before_reset:
            candidate *= reset
        else:
            candidate = np.matmul(reset * before, recurrent[:, 2 * hidden :])
        candidate += projected[:, 2 * hidden :]
        candidate = g(clipped(candidate, clip))
        return (candidate + update * (before - candidate),)

    return step


def gru(
    X: Array,
    weights: tuple[Array, Array, Array | None],
    lengths: Array | None,
    initial_h: Array | None,
    names: Sequence[str] | None,
    parameters: tuple[Floats | None, Floats | None],
    clip: float | None,
    direction: str,
    layout: int,
    linear_before_reset: int,
) -> tuple[Array, ...]:
    """Return Y and Y_h; see `GRU_14`."""
    count = len(directions("GRU", direction))
    functions = choose("GRU", names or ["Sigmoid", "Tanh"] * count, parameters, 2 * count)

    def make_step(number: int, recurrent: Array, biases: Array) -> tuple[Array, Step]:
        hidden = recurrent.shape[0]
        chosen = functions[2 * number : 2 * number + 2]
        added = biases.sum(0)
        reset_bias = biases[1, 2 * hidden :]
        if linear_before_reset:
            added[2 * hidden :] = biases[0, 2 * hidden :]
        return added, gru_step(recurrent, reset_bias, chosen, clip, linear_before_reset)

    return unroll("GRU", X, weights, lengths, [initial_h], make_step, 3, direction, layout)


def rnn(
    X: Array,
    weights: tuple[Array, Array, Array | None],
    lengths: Array | None,
    initial_h: Array | None,
    names: Sequence[str],
    parameters: tuple[Floats | None, Floats | None],
    clip: float | None,
    direction: str,
    layout: int,
) -> tuple[Array, ...]:
    """Return Y and Y_h; see `RNN_14`."""
    count = len(directions("RNN", direction))
    functions = choose("RNN", names[:count], parameters, count)

    def make_step(number: int, recurrent: Array, biases: Array) -> tuple[Array, Step]:
        f = functions[number]
        return biases.sum(0), lambda projected, states: (
            f(clipped(np.matmul(states[0], recurrent) + projected, clip)),
        )

    return unroll("RNN", X, weights, lengths, [initial_h], make_step, 1, direction, layout)
