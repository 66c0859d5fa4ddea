"""Layer after layer against the original model: each one makes good what those before it have lost.

A layer's inputs are taken from the model as pruned so far, the outputs that it should give from the original.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, layer_of
from onnxslim_lab.low_rank.bases import shrinkage
from onnxslim_lab.modelfile import LARGEST_PROTO
from onnxslim_lab.second_order.choose import removal_losses
from onnxslim_lab.second_order.frontier import Frontier
from onnxslim_lab.second_order.landing import Landing
from onnxslim_lab.second_order.obs import Doubles, Mask, damped
from onnxslim_lab.second_order.patterns import Pattern
from onnxslim_lab.second_order.repair import Array, Moments, moments, paired, repaired
from onnxslim_lab.second_order.wide import removed_in_wide, too_wide
from onnxslim_lab.statistics import Calibration, Gram
from onnxslim_lab.statistics.calibration import gram_input
from onnxslim_lab.statistics.gathering import arrangement


def twin(original: Graph, layer: Layer) -> Layer | None:
    """Return a layer's counterpart in the original; None where its inputs cannot be had from both models."""
    if layer.graph.root is not layer.graph or layer.graph.is_function or layer.role != "weight":
        return None
    if layer.op_type == "Gather":
        return None
    for node in original.nodes:
        if node.output[0] == layer.node.output[0]:
            found = layer_of(original, node)
            return found if isinstance(found, Layer) and found.shape == layer.shape else None
    return None


class Network:
    """The layers of a model refitted one after the other, in graph order.

    Args:
        original: The model as it was.
        model: The model as it is pruned.
        calibration: The data.
        pattern: Which weights go together.
        damping: Part of the mean energy of an input that is added to the Gram matrix; more where there are few
            rows for so many inputs.
        folder: An empty folder for the values between two layers.
    """

    def __init__(
        self,
        original: Graph,
        model: Graph,
        calibration: Calibration,
        pattern: Pattern,
        damping: float,
        folder: Path,
    ) -> None:
        self.original = original
        self._calibration = calibration
        self._pattern = pattern
        self._damping = damping
        self._frontiers = tuple(Frontier(graph, calibration, folder) for graph in (model, original))
        self._last: tuple[object, Moments] | None = None  # query, key and value read the same input

    def fitted(self, layer: Layer, other: Layer, gone: Mask | None) -> Array:
        """Return a layer's new weights in the stored layout; its bias is updated in the model.

        Args:
            layer: In the model as pruned so far.
            other: Its counterpart in the original.
            gone: True where weights go; None to choose them by the pattern, from the inputs as they are now.
        """
        matrix = np.asarray(layer.matrix, np.float64)
        columns = matrix.shape[2]
        place = Landing.of(layer)
        bias = None if place.bias is None else place.bias.read()
        found = self._moments(layer, other, place)
        damping = max(self._damping, shrinkage(int(found.own[0, -1, -1]), columns))
        if gone is None or (too_wide(columns) and self._pattern.block == 1):
            goal, gram = wanted(matrix, bias, found, damping)
            if too_wide(columns):
                gone = removed_in_wide(goal, gram, gone, self._pattern, damping)
            else:
                gone = np.isfinite(removal_losses(goal, gram, "obs", self._pattern, damping))
        result, shifted = repaired(matrix, bias, ~gone, found, damping=damping)
        if place.bias is not None and shifted is not None:
            place.bias.write(shifted)
        return layer.with_matrix(result)

    def _moments(self, layer: Layer, other: Layer, place: Landing) -> Moments:
        key = None if place.added else (gram_input(layer), gram_input(other), arrangement(layer))
        if self._last is None or key is None or self._last[0] != key:
            added = place.added if self.original.scope_of(place.added) is self.original else ""
            self._last = None  # before the next matrices are made
            if self.original.file_bytes() > LARGEST_PROTO:
                self._last = key, moments(self._calibration, layer, other, added=added)
            else:
                mine, theirs = (
                    frontier.advance(one.node, [gram_input(one), *([added] if added else [])])
                    for frontier, one in zip(self._frontiers, (layer, other), strict=True)
                )
                self._last = key, paired(mine, theirs, layer, other, added=added)
        return self._last[1]


def wanted(matrix: Doubles, bias: Doubles | None, found: Moments, damping: float) -> tuple[Doubles, Gram]:
    """Return the dense weights that meet the original's outputs best, and the Gram matrix of their error.

    Where the layer has a bias it is free: the Gram matrix is then that of the centred inputs, and removing
    weights from the result costs what it costs with the best bias.
    """
    own = found.own[:, :-1, :-1]
    moved = 0.0 if found.moved is None else found.moved
    meant = matrix @ found.cross[:, :-1] + moved
    goal = meant[..., :-1]
    total, count = found.own[:, -1, :-1], float(found.own[:, -1, -1].max())
    if bias is not None and count:
        goal = goal + bias[..., None] * total[:, None, :]
        sums = meant[..., -1:] + bias[..., None] * count
        goal = goal - sums * (total / count)[:, None, :]
        own = own - np.einsum("gi,gj->gij", total, total) / count
        total = np.zeros_like(total)
    hessian = damped(own, damping)
    goal = goal + matrix @ (hessian - own)
    dense = np.linalg.solve(hessian, goal.swapaxes(1, 2)).swapaxes(1, 2)
    return np.ascontiguousarray(dense), Gram(own, total, int(count))
