"""Refit of LSTM, GRU and RNN: each gate shall get what it got, from the inputs and hidden units that are left.

What goes into a gate is linear in the input and the state of the step before: W x + R h + b. Of a gate whose
hidden unit stays, [W R b] is found by least squares on the calibration data, first on the states of the
original model, then on those that the edited model runs into with the weights so found; of the three (with
the weights as they were cut) the one whose states are nearest to the original's is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxslim_lab.channels.behind import Kinship
from onnxslim_lab.channels.gates import Cell, Weights
from onnxslim_lab.channels.least_squares import Sums
from onnxslim_lab.channels.pairs import pairs
from onnxslim_lab.equalization.ends import write_constant
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.statistics import Calibration

Array = NDArray[Any]
Doubles = NDArray[np.float64]
ROUNDS = 2


def refit_recurrent(
    w: Layer, kinship: Kinship, calibration: Calibration, *, damping: float, most: int
) -> str:
    """Refit the recurrent node of its input weights; returns why that was not done, "" when it was.

    Args:
        w: The layer of W.
        kinship: The layers of the edited model and of the original.
        calibration: The data.
        damping: See `Sums.solve`.
        most: Rows to use of each run.
    """
    r = kinship.beside(w, "R")
    if r is None:
        return "its recurrent weights are no constant"
    if w.sharers or r.sharers:
        return "other layers use its weights"
    twin = kinship.twin(w)
    node, other = w.node, twin.node
    held = [node.input[3] if len(node.input) > 3 else "" for node in (node, other)]
    if held[0] and not w.graph.is_constant(held[0]):
        return "its bias is no constant"
    task = _Task(Cell(node), w, r, kinship, calibration, damping, most)
    if task.bytes_needed > calibration.memory:
        return f"its sums take {task.bytes_needed} bytes, the memory budget is {calibration.memory}"
    with states_of(w.graph, node), states_of(twin.graph, other):
        return task.run()


@contextmanager
def states_of(graph: Graph, node: NodeProto) -> Iterator[None]:
    """Let a recurrent node give its states at every step for a while, where it does not."""
    before = list(node.output)
    if before and before[0]:
        yield
        return
    graph.set_outputs(node, [graph.fresh_name(f"{next(filter(None, before))}_states"), *before[1:]])
    graph.infer()
    try:
        yield
    finally:
        graph.set_outputs(node, before)


class _Task:
    """The refit of one node."""

    def __init__(
        self,
        cell: Cell,
        w: Layer,
        r: Layer,
        kinship: Kinship,
        calibration: Calibration,
        damping: float,
        most: int,
    ) -> None:
        self._cell, self._w, self._r, self._kinship = cell, w, r, kinship
        self._calibration, self._damping, self._most = calibration, damping, most
        self._twins = kinship.twin(w), kinship.twin(r)
        self._units = kinship.kept(r).columns
        self._inputs = kinship.kept(w).columns
        self._hidden = int(self._units.sum())
        self._full = _weights(*self._twins)
        rows = np.tile(self._units, cell.gates)
        bias = self._full.b
        self._cut = Weights(
            self._full.w[:, rows][:, :, self._inputs],
            self._full.r[:, rows][:, :, self._units],
            None if bias is None else bias[:, np.tile(rows, 2)],
        )

    @property
    def bytes_needed(self) -> int:
        """Bytes of the sums of all gates and directions."""
        columns, out = self._w.shape[2] + self._hidden, self._w.shape[1]
        return len(self._cell.blocks) * len(self._cell.backwards) * Sums.bytes_needed(1, out, columns)

    def run(self) -> str:
        """Find the weights and write the best; returns why not, "" when it was done."""
        tried: list[tuple[float, Weights]] = []
        now = self._cut
        for number in range(ROUNDS + 1):
            found = self._pass(now, own=number > 0, solve=number < ROUNDS)
            if not np.isfinite(found.error):
                break
            tried.append((found.error, now))
            if found.weights is None:
                break
            now = found.weights
            if reason := self._write(now):
                return reason
        if not tried:
            return "no feed reaches it, or its states are not all finite"
        self._write(min(tried, key=lambda pair: pair[0])[1])
        return ""

    def _pass(self, now: Weights, *, own: bool, solve: bool) -> _Found:
        """Run the data once: how far the states are off, and what the sums so found give.

        Args:
            now: The edited model's weights.
            own: Whether the sums are over the edited model's states; the original's otherwise.
            solve: Whether to find weights.
        """
        cell, error, power = self._cell, 0.0, 0.0
        sums = {
            (direction, number): self._empty(block) if solve else None
            for direction in range(len(cell.backwards))
            for number, block in enumerate(cell.blocks)
        }
        layers = self._w, self._twins[0]
        one, other = ((layer.graph, _values(layer.node)) for layer in layers)
        random = np.random.default_rng(0)
        for mine, theirs in pairs(self._kinship.models, (one, other), self._calibration):
            if any(value is None for value in (*mine[:2], *theirs[:2])):
                continue
            runs = [self._run(values) for values in (mine, theirs)]
            goal = runs[1].y[..., self._units]
            error += float(((runs[0].y - goal) ** 2).sum())
            power += float((goal**2).sum())
            for direction in range(len(cell.backwards)) if solve else ():
                self._sum(sums, direction, runs, now, random, own=own)
        if not power or not np.isfinite(error):
            return _Found(np.inf if not np.isfinite(error) or error else 0.0, None)
        return _Found(error / power, self._solved(sums) if solve else None)

    def _empty(self, block: Any) -> Sums:
        columns = self._w.shape[2] * block.inputs + self._hidden * (block.states != "none")
        out = len(block.gates) * self._hidden
        return Sums.empty(1, out, columns, shifts=self._full.b is not None)

    def _run(self, values: list[Array | None]) -> _Run:
        x, y, initial, lengths = values
        assert x is not None
        assert y is not None
        return _Run(
            self._cell.inputs(np.asarray(x, np.float64)),
            self._cell.states(np.asarray(y, np.float64)),
            None if initial is None else np.asarray(initial, np.float64),
            lengths,
        )

    def _sum(
        self,
        sums: dict[tuple[int, int], Sums | None],
        direction: int,
        runs: list[_Run],
        now: Weights,
        random: np.random.Generator,
        *,
        own: bool,
    ) -> None:
        """Add the rows of one run to the sums of one direction."""
        cell, (mine, theirs) = self._cell, runs
        steps, batch = mine.x.shape[:2]
        places = np.arange(steps * batch)
        if mine.lengths is not None:
            places = places[(np.arange(steps)[:, None] < mine.lengths).reshape(-1)]
        if places.size > self._most:
            places = random.choice(places, self._most, replace=False)
        x, x_full = (run.x.reshape(steps * batch, -1)[places] for run in runs)
        h_full = theirs.before(cell, direction)[places]
        h = mine.before(cell, direction)[places] if own else h_full[:, self._units]
        gated, gated_full = h, h_full
        if any(block.states == "reset" for block in cell.blocks):
            reset = cell.reset(direction, x_full, h_full, self._full)
            gated_full = reset * h_full
            gated = (cell.reset(direction, x, h, now) if own else reset[:, self._units]) * h
        for number, block in enumerate(cell.blocks):
            held = sums[direction, number]
            assert held is not None
            rows = block.rows(self._full.r.shape[2])[np.tile(self._units, len(block.gates))]
            wanted = np.zeros((places.size, rows.size))
            parts = []
            if block.inputs:
                parts.append(x)
                wanted += x_full @ self._full.w[direction, rows].T
            if block.states != "none":
                parts.append(gated if block.states == "reset" else h)
                state = gated_full if block.states == "reset" else h_full
                wanted += state @ self._full.r[direction, rows].T
            held.add(np.concatenate(parts, axis=1)[None], wanted[None])

    def _solved(self, sums: dict[tuple[int, int], Sums | None]) -> Weights | None:
        """Return the weights that the sums give; None where they are not finite."""
        found = self._cut.copy()
        split = self._w.shape[2]
        for (direction, number), held in sums.items():
            block = self._cell.blocks[number]
            rows = block.rows(self._hidden)
            parts = [found.w[direction, rows]] if block.inputs else []
            parts += [found.r[direction, rows]] if block.states != "none" else []
            assert held is not None
            if not np.isfinite(held.own).all() or not np.isfinite(held.goal).all():
                return None
            weights, shift = held.solve(np.concatenate(parts, axis=1)[None], self._damping)
            if block.inputs:
                found.w[direction, rows] = weights[0, :, :split]
            if block.states != "none":
                found.r[direction, rows] = weights[0, :, split * block.inputs :]
            if found.b is not None:
                found.b[direction, rows + block.half * found.w.shape[1]] += shift[0]
        return found

    def _write(self, weights: Weights) -> str:
        with np.errstate(over="ignore"):
            arrays = [
                layer.with_matrix(values) for layer, values in ((self._w, weights.w), (self._r, weights.r))
            ]
        if not all(np.isfinite(array.astype(np.float64)).all() for array in arrays):
            return "the weights found do not fit its type"
        for layer, array in zip((self._w, self._r), arrays, strict=True):
            layer.set(array)
        if weights.b is not None:
            node, graph = self._w.node, self._w.graph
            held = graph.constant(node.input[3])
            assert held is not None
            write_constant(graph, node, 3, weights.b.astype(held.dtype))
        return ""


@dataclass(frozen=True)
class _Found:
    """How far the states are off, relative, and better weights."""

    error: float
    weights: Weights | None


@dataclass(frozen=True)
class _Run:
    """What one run of a node read and gave: x (steps, batch, inputs), y (steps, directions, batch, hidden)."""

    x: Doubles
    y: Doubles
    initial: Doubles | None
    lengths: Array | None

    def before(self, cell: Cell, direction: int) -> Doubles:
        """Return the state that each step starts from, (steps * batch, hidden)."""
        found = cell.before(self.y, self.initial, self.lengths, direction)
        return np.asarray(found.reshape(-1, found.shape[-1]))


def _values(node: NodeProto) -> list[str]:
    """Return the names of X, Y, initial_h and sequence_lens."""
    slots = [node.input[slot] if slot < len(node.input) else "" for slot in (5, 4)]
    return [node.input[0], node.output[0], *slots]


def _weights(w: Layer, r: Layer) -> Weights:
    bias = w.graph.constant(w.node.input[3]) if len(w.node.input) > 3 and w.node.input[3] else None
    wide = [None if array is None else np.asarray(array, np.float64) for array in (w.matrix, r.matrix, bias)]
    assert wide[0] is not None
    assert wide[1] is not None
    return Weights(wide[0], wide[1], wide[2])
