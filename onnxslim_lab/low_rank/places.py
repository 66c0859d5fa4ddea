"""What can be factorized, and how: the layers of a weight, their arrangement, the forms that may pay."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from onnxslim_lab.layer_views.convolutions import ConvKind
from onnxslim_lab.layer_views.kinds import GatherKind, GemmKind
from onnxslim_lab.layer_views.products import MatMulKind
from onnxslim_lab.layer_views.storage import readers
from onnxslim_lab.layers import Layer
from onnxslim_lab.low_rank.sites import FormName, Site
from onnxslim_lab.selection import Target

ConvChoice = Literal["auto", "channel", "spatial", "tucker"]


def arranged(target: Target) -> list[tuple[Layer, bool]] | str:
    """Return the layers of a weight, each with whether its matrix is the first's transposed.

    Returns:
        The layers, or the reason why the weight cannot be replaced in all of them.
    """
    for layer in target.layers:
        reason = _unfit(layer)
        if reason:
            return reason if len(target.layers) == 1 else f"{layer.name}: {reason}"
    known = {id(layer.node) for layer in target.layers}
    for use in readers(target.layer.weight_graph, target.weight):
        if use is None or id(use[1]) not in known:
            what = "an output" if use is None else f"a {use[1].op_type}"
            return f"the weight is also read by {what}, which needs it whole"
    found = [(target.layer, False)]
    for layer in target.layers[1:]:
        flipped = _flipped(target.layer, layer)
        if flipped is None:
            return f"{layer.name} uses the same weight in another arrangement"
        found.append((layer, flipped))
    return found


def _unfit(layer: Layer) -> str:
    kind, opset = layer.kind, layer.graph.opset()
    if type(kind) is ConvKind:
        return ""
    if isinstance(kind, GemmKind):
        return "" if opset >= 7 else f"Gemm of opset {opset} is older than 7: raise the opset first"
    if isinstance(kind, MatMulKind):
        return "" if len(kind.weight_shape) > 1 else "the weight is a vector"
    if isinstance(kind, GatherKind):
        plain = kind.axis == 0 and len(kind.weight_shape) == 2
        return "" if plain else f"a lookup along axis {kind.axis} of {len(kind.weight_shape)}"
    return f"{layer.op_type} cannot be written as two"


def _flipped(first: Layer, other: Layer) -> bool | None:
    """Return whether the other's matrix is the first's transposed; None when it is neither that nor the same."""
    one, two = first.kind, other.kind
    if isinstance(one, ConvKind) or isinstance(two, ConvKind):
        same = (
            type(one) is type(two)
            and first.stored.views == other.stored.views
            and one.weight_shape == two.weight_shape
        )
        return False if same and first.groups == other.groups else None
    if max(len(one.weight_shape), len(two.weight_shape)) > 2:
        return False if first.stored.views == other.stored.views and one == two else None
    index = np.arange(first.parameters).reshape(first.stored.stored_shape)
    here = one.matrix(first.stored.forward(index))[0]
    there = two.matrix(other.stored.forward(index))[0]
    if np.array_equal(here, there):
        return False
    return True if np.array_equal(here.T, there) else None


def site_of(layers: list[tuple[Layer, bool]]) -> Site:
    """Return the sizes of a weight's first layer, and the positions of the worst of its layers."""
    layer = layers[0][0]
    groups, out, inputs = layer.shape
    kind = layer.kind
    if not isinstance(kind, ConvKind):
        lookup = all(isinstance(other.kind, GatherKind) for other, _ in layers)
        return Site(groups, out, inputs, lookup=lookup)
    spreads = [_spread(other) for other, _ in layers]
    return Site(
        groups,
        out,
        inputs,
        kind.weight_shape[2:],
        max(whole for whole, _ in spreads),
        max(row for _, row in spreads),
    )


def _spread(layer: Layer) -> tuple[float, float]:
    """Return input positions for each output position of a Conv: of all axes, and of the last."""
    assert isinstance(layer.kind, ConvKind)
    rank = len(layer.kind.weight_shape) - 2
    x, y = (layer.graph.shape_of(value) for value in (layer.node.input[0], layer.node.output[0]))
    ratios = [float(stride) for stride in layer.kind.strides]
    if x is not None and y is not None and len(x) == len(y) == rank + 2:
        for axis, (before, after) in enumerate(zip(x[2:], y[2:], strict=True)):
            if isinstance(before, int) and isinstance(after, int) and after > 0:
                ratios[axis] = before / after
    return math.prod(ratios), ratios[-1]


def forms_of(site: Site, conv: ConvChoice, *, ranked: bool) -> list[FormName] | str:
    """Return the forms to try for a layer, or why there is none.

    Args:
        site: The layer.
        conv: The form asked for where there is a choice.
        ranked: Whether a rank was asked for: "auto" is then the plain form.
    """
    if math.prod(site.kernel) == 1:
        return ["matrix"]
    upright = len(site.kernel) == 2 and min(site.kernel) > 1
    if conv == "channel" or (conv == "auto" and ranked):
        return ["matrix"]
    if conv == "spatial":
        return ["spatial"] if upright else f"a kernel of {list(site.kernel)} has no rows and columns to part"
    mixes = min(site.channels, site.out) > 1
    if conv == "tucker":
        return ["tucker"] if mixes else "one channel in each group: nothing to mix"
    found: list[FormName] = ["matrix"]
    found += ["spatial"] if upright else []
    found += ["tucker"] if mixes else []
    return found
