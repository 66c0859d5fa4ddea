"""A model run once, layer by layer: each next layer's inputs are computed from where the last one's were taken.

Running the whole model anew for every layer would cost as many passes over the data as it has layers.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from onnxslim_lab.errors import DataError
from onnxslim_lab.graph import Graph
from onnxslim_lab.statistics import Calibration

Feed = dict[str, Any]


class Stored(Sequence[Feed]):
    """Values of each feed in one file each."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return pickle.loads((self.folder / str(index)).read_bytes())  # noqa: S301 - written by `put`

    def put(self, index: int, values: Feed) -> None:
        """Write the values of one feed."""
        (self.folder / str(index)).write_bytes(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))

    def drop(self) -> None:
        """Remove the files."""
        for index in range(self._count):
            (self.folder / str(index)).unlink(missing_ok=True)


class Frontier:
    """The values of a model's main graph between what has been run of it and what has not.

    Weights of nodes behind the frontier must not change any more. The values are kept in files.

    Args:
        model: The main graph; weights ahead of the frontier may change as it moves.
        calibration: The data and what runs it.
        folder: An empty folder.
    """

    def __init__(self, model: Graph, calibration: Calibration, folder: Path) -> None:
        self._model = model
        self._calibration = calibration
        self._kept: Stored | None = None
        self._folder = folder
        self._place = 0

    def advance(self, node: NodeProto, values: Sequence[str]) -> Iterator[Feed]:
        """Yield values for each feed and move the frontier to just before a node.

        Args:
            node: A node of the main graph; from one behind the frontier the model is run anew.
            values: What to yield; values that the node does not depend on may lie ahead of it.
        """
        place = next(number for number, other in enumerate(self._model.nodes) if other is node)
        if place < self._place:
            self._forget()
        live = live_before(self._model, place)
        feeds: Sequence[Feed] = self._calibration.data.feeds if self._kept is None else self._kept
        if not len(feeds):
            raise DataError("there is no calibration data: the data set has no feeds")
        have = set(self._model.inputs) if self._kept is None else set(feeds[0])
        made = [name for name in dict.fromkeys([*live, *values]) if name not in have]
        ahead = Stored(Path(tempfile.mkdtemp(dir=self._folder)), len(feeds))
        movable = True
        runs: Iterator[Feed] = iter([])
        if made:
            part = part_of(self._model, feeds[0] if self._kept is not None else None, made)
            runs = self._calibration.runner.stream(
                part, Only(feeds, part.inputs), outputs=[name for name in made if part.is_output(name)]
            )
        for index in range(len(feeds)):
            found = dict(feeds[index]) | (next(runs) if made else {})
            known = {name: found[name] for name in live if name in found}
            movable = movable and all(isinstance(value, np.ndarray) for value in known.values())
            if movable:
                ahead.put(index, known)
            yield {name: found[name] for name in values}
        if movable:  # sequences and optional values cannot be fed to a part
            self._forget()
            self._kept, self._place = ahead, place
        else:
            ahead.drop()

    def _forget(self) -> None:
        """Go back to the inputs."""
        if self._kept is not None:
            self._kept.drop()
        self._kept, self._place = None, 0


class Only(Sequence[Feed]):
    """Feeds with the named values alone."""

    def __init__(self, feeds: Sequence[Feed], names: Sequence[str]) -> None:
        self._feeds = feeds
        self._names = set(names)

    def __len__(self) -> int:
        return len(self._feeds)

    def __getitem__(self, index: Any) -> Any:
        return {name: value for name, value in self._feeds[index].items() if name in self._names}


def live_before(graph: Graph, place: int) -> list[str]:
    """Return the values that the nodes before a place in graph order make and those from there on read."""
    order = graph.nodes
    made = {name for other in order[:place] for name in other.output} | set(graph.inputs)
    read = set(graph.outputs).union(*(graph.read_by(other) for other in order[place:]))
    return [name for name in sorted(made & read) if name and not graph.is_constant(name)]


def part_of(graph: Graph, given: Feed | None, wanted: Sequence[str]) -> Graph:
    """Return the part of a model that computes values from others, as a model of its own.

    Args:
        graph: The main graph.
        given: Values to start from, with an array of each; None for the inputs of the model.
        wanted: Its outputs.
    """
    start = set(graph.inputs) if given is None else set(given)
    needed = set(wanted)
    kept: set[tuple[str, ...]] = set()
    for node in reversed(graph.nodes):
        if needed.intersection(node.output):
            kept.add(tuple(node.output))
            needed |= graph.read_by(node) - start
    model = graph.to_model()
    nodes = [node for node in model.graph.node if tuple(node.output) in kept]
    read = {name for node in graph.nodes if tuple(node.output) in kept for name in graph.read_by(node)}
    del model.graph.node[:], model.graph.output[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    sparse = [tensor for tensor in model.graph.sparse_initializer if tensor.values.name in read]
    del model.graph.initializer[:], model.graph.sparse_initializer[:]
    model.graph.initializer.extend(constants)
    model.graph.sparse_initializer.extend(sparse)
    if given is None:
        inputs = [value for value in model.graph.input if value.name in read]
    else:
        inputs = [_declared(name, value) for name, value in given.items() if name in read]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return Graph.load(model)


def _declared(name: str, value: NDArray[Any]) -> Any:
    """Return the declaration of an input like an array, of any size."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(name, kind, [None] * value.ndim)
