"""Gram matrices of layers, as many at a time as fit the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxslim_lab.base import Progress
from onnxslim_lab.graph import Graph
from onnxslim_lab.layer_views.kinds import GatherKind
from onnxslim_lab.layers import Layer
from onnxslim_lab.sessions import Runner, SessionTooLarge
from onnxslim_lab.statistics.collected import Place, key, place
from onnxslim_lab.statistics.gram import Gram
from onnxslim_lab.statistics.hooked import Observer
from onnxslim_lab.statistics.instrument import Instruments
from onnxslim_lab.statistics.over_feeds import Feeds, OverFeeds
from onnxslim_lab.worker.grams import GramTally, pack_kind

_SHARE = 4  # of the memory, for the matrices of a group: they are there twice when they change processes


def gram_input(layer: Layer) -> str:
    """Return the value whose rows a layer multiplies; "" for hidden states, which are no value of a graph."""
    if layer.role == "R":
        return ""
    index = 0 if layer.slot or layer.role != "weight" else 1
    return str(layer.node.input[index])


def gram_source(layer: Layer) -> str:
    """Return the value that a layer's Gram matrix is made of; "" where there is none.

    It is what the layer multiplies. Of R it is the hidden states that the node gives: all that R met but the
    initial ones, and the last, which it did not meet. A node that gives its last state alone does not tell them.
    """
    return str(layer.node.output[0]) if layer.role == "R" else gram_input(layer)


def arrangement(layer: Layer) -> str:
    """Return a text that is equal for layers of the main graph that make the same rows of the same input."""
    form = pack_kind(layer.kind)
    shape = form.pop("weight_shape")
    groups, _, size = layer.shape
    if form["kind"] == "ConvKind":
        return repr((sorted(form.items()), shape[1:]))
    if form["kind"] == "MatMulKind" and len(shape) == 2:
        return repr((form["kind"], form["left"], groups, size))
    return repr((sorted(form.items()), shape))


class Gathering(OverFeeds):
    """Measures the Gram matrices of layers."""

    def __init__(self, runner: Runner, model: Graph, feeds: Feeds, memory: int, progress: Progress) -> None:
        super().__init__(runner, model, feeds, memory, progress)
        self._graphs = {place(graph): graph for graph in model.walk()}
        self._values: dict[int, str] = {}
        self._places: dict[int, Place] = {}

    def run(self, layers: Sequence[Layer]) -> Iterator[Gram]:
        """Yield the Gram matrix of each layer, in order."""
        self._values = {id(layer): gram_source(layer) for layer in layers}
        self._places = {id(layer): key(layer.graph, gram_source(layer))[0] for layer in layers}
        groups = self._groups(layers)
        if len(groups) > 1:  # who takes the first may edit the model before asking for the next
            self._model = self._model.copy()
            self._graphs = {place(graph): graph for graph in self._model.walk()}
        for number, group in enumerate(groups):
            part = f", part {number + 1} of {len(groups)}" if len(groups) > 1 else ""
            yield from self._group(group, f"Gram matrices{part}")

    def is_full(self, layer: Layer) -> bool:
        """Whether the whole matrix of a layer is kept: not of a lookup, nor when it is too large."""
        groups, _, size = layer.shape
        return not isinstance(layer.kind, GatherKind) and groups * size * size * 8 <= self._memory // _SHARE

    def _groups(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        found: list[list[Layer]] = [[]]
        used = 0
        for layer in layers:
            groups, _, size = layer.shape
            cost = groups * size * 8 * (size + 1 if self.is_full(layer) else 2)
            if found[-1] and used + cost > self._memory // _SHARE:
                found.append([])
                used = 0
            found[-1].append(layer)
            used += cost
        return found

    def _group(self, layers: Sequence[Layer], what: str) -> list[Gram]:
        """Return the Gram matrices of some layers, from one pass over the feeds."""
        found: dict[int, Gram] = {}
        values = [self._values[id(layer)] for layer in layers]
        places = [self._places[id(layer)] for layer in layers]
        inside = [at for at in range(len(layers)) if not places[at] and values[at]]
        if inside:
            try:
                found = self._in_session(layers, values, inside, what)
            except SessionTooLarge:
                inside = []
        rest = [at for at in range(len(layers)) if at not in inside]
        tallies = {at: GramTally(layers[at].kind, full=self.is_full(layers[at])) for at in rest}
        if any(values[at] for at in rest):
            observer = Observer(self._model, self._memory // 2)
            for at in rest:
                if values[at]:
                    observer.watch(self._graphs[places[at]], values[at], tallies[at].add)
            for done, feed in enumerate(self._feeds):
                observer.run(feed)
                self._progress(done + 1, len(self._feeds), f"{what} of bodies")
        for at, tally in tallies.items():
            found[at] = Gram(tally.matrix, tally.total, tally.count)
        return [found[at] for at in range(len(layers))]

    def _in_session(
        self, layers: Sequence[Layer], values: Sequence[str], inside: Sequence[int], what: str
    ) -> dict[int, Gram]:
        """Measure the layers of the main graph in the child process; layers with one input share its matrix."""
        shared = [(values[at], arrangement(layers[at]), self.is_full(layers[at])) for at in inside]
        first = {same: at for at, same in reversed(list(zip(inside, shared, strict=True)))}
        forms = [
            {"value": values[at], "kind": pack_kind(layers[at].kind), "full": self.is_full(layers[at])}
            for at in first.values()
        ]
        told = self._runner.measure(
            self._model,
            self._numbered(what=what),
            Instruments(grams=forms).specification,
            outputs=list(dict.fromkeys(values[at] for at in first.values())),
        )
        grams = {
            same: Gram(np.asarray(state["matrix"]), np.asarray(state["total"]), state["count"])
            for same, state in zip(first, told["grams"], strict=True)
        }
        return {at: grams[same] for at, same in zip(inside, shared, strict=True)}
