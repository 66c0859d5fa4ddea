"""The operators LSTM, GRU and RNN in all their versions; `recurrent` has the mathematics."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim_lab.kernels.recurrent import gru, lstm, rnn
from onnxslim_lab.kernels.registry import Array, earlier, kernel

Floats = Sequence[float]
TANH = ("Tanh", "Tanh")


@kernel("LSTM", since=14)
def LSTM_14(
    X: Array,
    W: Array,
    R: Array,
    B: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    initial_c: Array | None = None,
    P: Array | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Array, ...]:
    """Return the hidden state at every step, the last one and the last cell state.

    X is (steps, batch, inputs), W (directions, 4 * hidden, inputs), R (directions, 4 * hidden, hidden), with
    gates in the order input, output, forget, cell; Y is (steps, directions, batch, hidden), zero after a
    sequence's end, Y_h and Y_c are (directions, batch, hidden). With layout 1 the batch comes first.

    Raises:
        ValueError: The shapes do not fit, or an activation or direction is unknown.
    """
    return lstm(
        X,
        (W, R, B),
        sequence_lens,
        (initial_h, initial_c),
        P,
        activations,
        (activation_alpha, activation_beta),
        clip,
        direction,
        input_forget,
        layout,
    )


earlier(LSTM_14, "LSTM", 7, lacks=["layout"])
earlier(LSTM_14, "LSTM", 1, lacks=["layout"], unread={"output_sequence": 0})  # Y is there in any case


@kernel("GRU", since=14)
def GRU_14(
    X: Array,
    W: Array,
    R: Array,
    B: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Array, ...]:
    """Return the hidden state at every step and the last one.

    X is (steps, batch, inputs), W (directions, 3 * hidden, inputs), R (directions, 3 * hidden, hidden), with
    gates in the order update, reset, hidden; Y is (steps, directions, batch, hidden), zero after a
    sequence's end, Y_h is (directions, batch, hidden). With layout 1 the batch comes first.

    Raises:
        ValueError: The shapes do not fit, or an activation or direction is unknown.
    """
    return gru(
        X,
        (W, R, B),
        sequence_lens,
        initial_h,
        activations,
        (activation_alpha, activation_beta),
        clip,
        direction,
        layout,
        linear_before_reset,
    )


earlier(GRU_14, "GRU", 7, lacks=["layout"])
earlier(GRU_14, "GRU", 3, lacks=["layout"], unread={"output_sequence": 0})


@kernel("GRU", since=1)
def GRU_1(
    X: Array,
    W: Array,
    R: Array,
    B: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "foward",
    hidden_size: int | None = None,
    output_sequence: int = 0,
) -> tuple[Array, ...]:
    """Return Y and Y_h as `GRU_14` with layout 0; the default direction is misspelt in the specification."""
    return gru(
        X,
        (W, R, B),
        sequence_lens,
        initial_h,
        activations,
        (activation_alpha, activation_beta),
        clip,
        "forward" if direction == "foward" else direction,
        0,
        0,
    )


@kernel("RNN", since=14)
def RNN_14(
    X: Array,
    W: Array,
    R: Array,
    B: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: Sequence[str] = TANH,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Array, ...]:
    """Return the hidden state at every step and the last one.

    X is (steps, batch, inputs), W (directions, hidden, inputs), R (directions, hidden, hidden); Y is
    (steps, directions, batch, hidden), zero after a sequence's end, Y_h is (directions, batch, hidden). With
    layout 1 the batch comes first.

    Raises:
        ValueError: The shapes do not fit, or an activation or direction is unknown.
    """
    return rnn(
        X,
        (W, R, B),
        sequence_lens,
        initial_h,
        activations,
        (activation_alpha, activation_beta),
        clip,
        direction,
        layout,
    )


earlier(RNN_14, "RNN", 7, lacks=["layout"])
earlier(RNN_14, "RNN", 1, lacks=["layout"], unread={"output_sequence": 0})
