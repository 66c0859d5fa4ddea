"""Layer after layer against the original model: each one makes good what those before it have lost.

A layer's inputs are taken from the model as pruned so far, the outputs that it should give from the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, layer_of
from onnxslim_lab.low_rank.bases import shrinkage
from onnxslim_lab.second_order.choose import Pattern, removal_losses, removed_in_wide, too_wide
from onnxslim_lab.second_order.obs import Doubles, Mask, damped
from onnxslim_lab.second_order.repair import Array, Moments, moments, repaired
from onnxslim_lab.statistics import Calibration, Gram


@dataclass(frozen=True)
class Bias:
    """A layer's own constant bias as (groups, out)."""

    read: Callable[[], Doubles]
    write: Callable[[Doubles], None]


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


def fitted(
    layer: Layer,
    other: Layer,
    gone: Mask | None,
    pattern: Pattern,
    calibration: Calibration,
    *,
    damping: float,
) -> Array:
    """Return a layer's new weights in the stored layout; its bias is updated in the model.

    Args:
        layer: In the model as pruned so far.
        other: Its counterpart in the original.
        gone: True where weights go; None to choose them by the pattern, from the inputs as they are now.
        pattern: Which weights go together.
        calibration: The data.
        damping: Part of the mean energy of an input that is added to the Gram matrix; more where there are few
            rows for so many inputs.
    """
    matrix = np.asarray(layer.matrix, np.float64)
    bias = own_bias(layer)
    before = None if bias is None else bias.read()
    found = moments(calibration, layer, other)
    damping = max(damping, shrinkage(int(found.own[0, -1, -1]), matrix.shape[2]))
    if gone is None or (too_wide(matrix.shape[2]) and pattern.block == 1):
        goal, gram = wanted(matrix, before, found, damping)
        if too_wide(matrix.shape[2]):
            gone = removed_in_wide(goal, gram, gone, pattern, damping)
        else:
            gone = np.isfinite(removal_losses(goal, gram, "obs", pattern, damping))
    result, shifted = repaired(matrix, before, ~gone, found, damping=damping)
    if bias is not None and shifted is not None:
        bias.write(shifted)
    return layer.with_matrix(result)


def wanted(matrix: Doubles, bias: Doubles | None, found: Moments, damping: float) -> tuple[Doubles, Gram]:
    """Return the dense weights that meet the original's outputs best, and the Gram matrix of their error.

    Where the layer has a bias it is free: the Gram matrix is then that of the centred inputs, and removing
    weights from the result costs what it costs with the best bias.
    """
    own = found.own[:, :-1, :-1]
    goal = matrix @ found.cross[:, :-1, :-1]
    total, count = found.own[:, -1, :-1], float(found.own[:, -1, -1].max())
    if bias is not None and count:
        goal = goal + bias[..., None] * total[:, None, :]
        sums = matrix @ found.cross[:, :-1, -1:] + bias[..., None] * count
        goal = goal - sums * (total / count)[:, None, :]
        own = own - np.einsum("gi,gj->gij", total, total) / count
        total = np.zeros_like(total)
    hessian = damped(own, damping)
    goal = goal + matrix @ (hessian - own)
    dense = np.linalg.solve(hessian, goal.swapaxes(1, 2)).swapaxes(1, 2)
    return np.ascontiguousarray(dense), Gram(own, total, int(count))


def own_bias(layer: Layer) -> Bias | None:
    """Return the bias of a Conv or Gemm that nothing else reads and that has one value for each output."""
    name = layer.bias
    groups, outputs, _ = layer.shape
    if name is None or layer.op_type not in ("Conv", "Gemm") or layer.kind.scale != 1.0:
        return None
    values = layer.graph.constant(name)
    home = layer.graph.scope_of(name)
    if values is None or home is not layer.graph or layer.graph.use_count(name) != 1:
        return None
    if (
        values.size != groups * outputs
        or values.shape[-1:] != (values.size,)
        or getattr(layer.kind, "left", False)
    ):
        return None
    scale = float(getattr(layer.kind, "beta", 1.0))
    if not scale:
        return None

    def read() -> Doubles:
        return np.asarray(values, np.float64).reshape(groups, outputs) * scale

    def write(new: Doubles) -> None:
        layer.graph.set_constant(name, (new / scale).reshape(values.shape).astype(values.dtype))

    return Bias(read, write)
