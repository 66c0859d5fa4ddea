"""How the entries of a table count: the Gram matrix of what changes of them do to the model's outputs.

A Gather has no Gram matrix of inputs: each of its rows is looked up or not. But what follows a lookup makes more
of some directions of an entry than of others, as a product does of its inputs. With J the derivative of the outputs
by the looked-up values, an entry that is off by e moves the outputs by |J e|^2 = e^T (J^T J) e, so that J^T J plays
the part of X^T X in GPTQ. J is measured: one run of the model for every element of an entry, in which all
looked-up entries are moved along that element, each to a random side (Hutchinson 1990, "A stochastic estimator of
the trace of the influence matrix"), which averages the products of different positions out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.errors import SessionError
from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.quantization.weight_forms import is_table
from onnxslim_lab.selection import find_targets
from onnxslim_lab.statistics.collected import place
from onnxslim_lab.worker.messages import Value

_RUNS = 4096  # of the model, at most, for one table
_FEEDS = 16
_STEP = 0.03  # of the table's standard deviation
_NOISE = 1e-5  # two runs alike differ by more only where random numbers are drawn
_BUCKETS = 4096  # outputs of more values are hashed to so many sums


def table_metric(model: Graph, layers: Sequence[Layer], context: Context) -> Array | None:
    """Return the matrix (length, length) by which errors of a table's entries count; None where there is none.

    There is none for tables that are not float32 and looked up as they are stored, in functions, without
    calibration data, in models that draw random numbers or do not notice the table.

    Args:
        model: The main graph, which is not changed.
        layers: The lookups.
        context: Its calibration has the feeds.
    """
    plain = is_table(layers) and layers[0].stored.used_type == TensorProto.FLOAT
    if context.calibration is None or not plain or any(layer.graph.is_function for layer in layers):
        return None
    rows, length = layers[0].stored.stored_shape
    probe, direction, sides = _probe(model, layers)
    random = np.random.default_rng(context.seed)
    step = _STEP * max(float(np.std(layers[0].matrix)), 1e-6)
    moves = np.concatenate([np.zeros((2, length)), step * np.eye(length)]).astype(np.float32)
    feeds, sketch = context.calibration.data.feeds, _Sketch(context.seed)
    found = Spread(length)
    for number in range(min(len(feeds), _FEEDS, max(1, _RUNS // length))):
        side = random.choice(np.array([-1, 1], np.float32), (rows, 1))
        fed = ({**feeds[number], sides: side, direction: move} for move in moves)
        try:
            shorts = list(map(sketch.of, context.calibration.runner.stream(probe, fed)))
        except SessionError:
            return None
        if np.linalg.norm(shorts[0] - shorts[1]) > _NOISE * np.linalg.norm(shorts[0]):
            return None
        slopes = np.stack(shorts[2:]) - shorts[0]
        found.add(slopes @ slopes.T)
    metric = found.shrunk()
    return metric if np.isfinite(metric).all() and np.diagonal(metric).any() else None


class Spread:
    """The sum of matrices that measure one thing, and how far they agree about it.

    Args:
        length: Of their sides.
    """

    def __init__(self, length: int) -> None:
        self._count = 0
        self._sum, self._squares = np.zeros((length, length)), np.zeros((length, length))

    def add(self, matrix: Array) -> None:
        """Count one more matrix, (length, length)."""
        self._count += 1
        self._sum += matrix
        self._squares += matrix**2

    def shrunk(self) -> Array:
        """Return the sum, float64 (length, length), with what is off its diagonal made less the less sure it is.

        The part kept, 1 - sum(var) / sum(m^2) over the elements off the diagonal with the means m and their
        variances var, leaves the least expected squared error: Ledoit & Wolf 2004, "A well-conditioned estimator
        for large-dimensional covariance matrices", with the diagonal as the target. Of one matrix, half is kept.
        """
        off = ~np.eye(len(self._sum), dtype=bool)
        power = self._sum[off] ** 2
        kept = 0.5
        if self._count > 1 and power.any():
            noise = (self._count * self._squares[off] - power) / (self._count - 1)
            kept = min(max(1 - float(noise.sum() / power.sum()), 0.0), 1.0)
        return np.where(off, kept * self._sum, self._sum)


def _probe(model: Graph, layers: Sequence[Layer]) -> tuple[Graph, str, str]:
    """Return a copy of the model that adds inputs to what is looked up, and their names.

    The first, (length,), is what is added; the second, (rows, 1), a factor for every row of the table.
    """
    probe = model.copy()
    wanted = {(place(layer.graph), layer.node.output[0]) for layer in layers}
    rows, length = layers[0].stored.stored_shape
    direction, sides = probe.fresh_name("direction"), probe.fresh_name("sides")
    probe.add_input(direction, TensorProto.FLOAT, [length])
    probe.add_input(sides, TensorProto.FLOAT, [rows, 1])
    found = [layer for t in find_targets(probe, Outcome(), step="probe") for layer in t.layers]
    for layer in found:
        graph, node = layer.graph, layer.node
        if (place(graph), node.output[0]) not in wanted:
            continue
        output = node.output[0]
        graph.set_outputs(node, [graph.fresh_name(output)])
        side = graph.emit("Gather", [sides, node.input[1]])
        move = graph.emit("Mul", [side.output[0], direction])
        graph.emit("Add", [node.output[0], move.output[0]], [output])
    return probe, direction, sides


class _Sketch:
    """Outputs as one vector, each relative to its size; long ones as random sums, which keep inner products.

    Charikar, Chen & Farach-Colton 2002, "Finding frequent items in data streams" (count sketch).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sizes: list[float] = []
        self._hashes: dict[int, tuple[Array, Array]] = {}

    def of(self, outputs: Mapping[str, Value]) -> Array:
        """Return the vector, float64; the sizes are those of the first outputs."""
        values = [
            value.reshape(-1).astype(np.float64)
            for value in outputs.values()
            if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        ]
        self._sizes = self._sizes or [float(np.linalg.norm(value)) or 1.0 for value in values]
        parts = [self._short(value / size) for value, size in zip(values, self._sizes, strict=True)]
        return np.concatenate([*parts, np.zeros(1)])

    def _short(self, values: Array) -> Array:
        if values.size <= _BUCKETS:
            return values
        if values.size not in self._hashes:
            random = np.random.default_rng(self._seed)
            self._hashes[values.size] = (
                random.integers(_BUCKETS, size=values.size),
                random.choice(np.array([-1.0, 1.0]), values.size),
            )
        bucket, side = self._hashes[values.size]
        return np.bincount(bucket, side * values, _BUCKETS)
