"""What goes into the gates of LSTM, GRU and RNN: linear parts, and the states that they are taken from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxslim_lab.graph import attribute
from onnxslim_lab.kernels.recurrent import clipped, directions
from onnxslim_lab.kernels.recurrent_activations import choose

Array = NDArray[Any]
Doubles = NDArray[np.float64]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Block:
    """Gates that are linear in the same things.

    Attributes:
        gates: Which.
        inputs: Whether they read the input.
        states: What they read of the state: as it is, times the reset gate, or nothing.
        half: Which half of B takes their bias: 0 beside W, 1 beside R.
    """

    gates: tuple[int, ...]
    inputs: bool = True
    states: Literal["plain", "reset", "none"] = "plain"
    half: int = 0

    def rows(self, hidden: int) -> NDArray[np.int64]:
        """Return the rows of W and R that are those gates'."""
        return np.concatenate([np.arange(gate * hidden, (gate + 1) * hidden) for gate in self.gates])


@dataclass
class Weights:
    """W, R (directions, gates * hidden, n) and B (directions, 2 * gates * hidden) or None, in float64."""

    w: Doubles
    r: Doubles
    b: Doubles | None

    def copy(self) -> Weights:
        """Return a copy."""
        return Weights(self.w.copy(), self.r.copy(), None if self.b is None else self.b.copy())

    @property
    def finite(self) -> bool:
        """Whether all of them are."""
        return all(array is None or bool(np.isfinite(array).all()) for array in (self.w, self.r, self.b))


class Cell:
    """One recurrent node."""

    def __init__(self, node: NodeProto) -> None:
        self.op_type = node.op_type
        self.gates = GATES[node.op_type]
        self.backwards = directions(node.op_type, attribute(node, "direction", "forward"))
        self._batch_first = attribute(node, "layout", 0) == 1
        self._clip = attribute(node, "clip")
        self._activations = None
        if node.op_type != "GRU":
            self.blocks: Sequence[Block] = (Block(tuple(range(self.gates))),)
            return
        count = len(self.backwards)
        names = attribute(node, "activations", ["Sigmoid", "Tanh"] * count)
        names = [name.decode() if isinstance(name, bytes) else name for name in names]
        parameters = attribute(node, "activation_alpha"), attribute(node, "activation_beta")
        self._activations = choose("GRU", names, parameters, 2 * count)
        if attribute(node, "linear_before_reset", 0):
            self.blocks = Block((0, 1)), Block((2,), inputs=False, half=1), Block((2,), states="none")
        else:
            self.blocks = Block((0, 1)), Block((2,), states="reset")

    def inputs(self, x: Array) -> Array:
        """Return X as (steps, batch, inputs)."""
        return x.swapaxes(0, 1) if self._batch_first else x

    def states(self, y: Array) -> Array:
        """Return Y as (steps, directions, batch, hidden)."""
        return np.moveaxis(y, 0, 2) if self._batch_first else y

    def before(self, y: Array, initial: Array | None, lengths: Array | None, direction: int) -> Array:
        """Return the state that each step of a direction starts from, (steps, batch, hidden).

        Args:
            y: As `states` returns it.
            initial: The node's initial_h.
            lengths: The node's sequence_lens.
            direction: Its number.
        """
        own = y[:, direction]
        first = np.zeros_like(own[:1])
        if initial is not None:
            first = (initial.swapaxes(0, 1) if self._batch_first else initial)[direction][None]
        if not self.backwards[direction]:
            return np.concatenate([first, own[:-1]])
        found = np.concatenate([own[1:], first])
        if lengths is not None:
            last = np.arange(len(own))[:, None] == lengths.astype(np.int64) - 1
            found = np.where(last[:, :, None], first, found)
        return found

    def reset(self, direction: int, x: Array, h: Array, weights: Weights) -> Array:
        """Return the reset gate of a GRU for rows of inputs and states, (rows, hidden)."""
        assert self._activations is not None
        hidden = weights.r.shape[2]
        rows = slice(hidden, 2 * hidden)
        total = x @ weights.w[direction, rows].T + h @ weights.r[direction, rows].T
        if weights.b is not None:
            halves = weights.b[direction].reshape(2, -1)
            total = total + halves[0, rows] + halves[1, rows]
        return self._activations[2 * direction](clipped(total, self._clip))
