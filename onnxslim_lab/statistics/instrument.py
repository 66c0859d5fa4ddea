"""How to measure values of the main graph in one session: what to reduce inside it, what to expose.

A range alone is reduced where the value is made: ReduceMin and ReduceMax see it while it is in the cache,
and only two numbers leave the graph. After a Relu or Clip the least element almost always is the bound, for
which every eighth row and column suffice as a witness, and GlobalMaxPool finds the greatest element in the
layout that onnxruntime's convolutions use. Neither operator shows NaN reliably: where one can arise a sum is
asked for too. A feed on which any of this fails to be certain is measured again, in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.statistics.following import bounds, finite, source_of
from onnxslim_lab.worker.tally import Tally

Shape = tuple[int, ...]

REDUCED = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64}
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE}
_PREFIX = "onnxslim_lab.measured"
_BEFORE_CLIP = {"Conv", "BatchNormalization", "Add"}


@dataclass
class Instruments:
    """Nodes and outputs to add to a model, and what to make of them.

    Attributes:
        nodes, outputs: To add.
        exposed, reduced, derived, grams, running: Arguments of worker.measure.Measurement.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    exposed: dict[str, dict[str, Any]] = field(default_factory=dict)
    reduced: dict[str, dict[str, Any]] = field(default_factory=dict)
    derived: dict[str, dict[str, Any]] = field(default_factory=dict)
    grams: list[dict[str, Any]] = field(default_factory=list)
    running: dict[str, dict[str, str]] = field(
        default_factory=lambda: {"lows": {}, "highs": {}, "sums": {}, "sizes": {}}
    )

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output and return that output."""
        name = f"{_PREFIX}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        self.outputs.append(name)
        return name

    def constant(self, values: Sequence[int]) -> str:
        """Add an int64 constant that is no output."""
        name = f"{_PREFIX}.{len(self.nodes)}"
        self.nodes.append(helper.make_node("Constant", [], [name], name=name, value_ints=list(values)))
        return name

    def expose(self, name: str) -> None:
        """Make a value an output."""
        self.outputs.append(name)

    @property
    def specification(self) -> dict[str, Any]:
        """What the child takes."""
        names = ("exposed", "reduced", "derived", "grams", "running")
        return {name: getattr(self, name) for name in names}


def sample_axes(model: Graph, values: Sequence[str], batch: str) -> dict[str, int | None]:
    """Return where each value has the samples: the axis with the symbol of the batch, None when not known."""
    found: dict[str, int | None] = {}
    for value in values:
        shape = (model.shape_of(value) or ()) if batch else ()
        places = [axis for axis, size in enumerate(shape) if size == batch]
        found[value] = places[0] if len(places) == 1 else None
    return found


def instrument(
    model: Graph,
    wanted: Mapping[str, Tally],
    *,
    full: frozenset[str],
    axes: Mapping[str, int | None],
    shapes: Mapping[str, Shape],
    steady: bool = False,
) -> Instruments:
    """Return how to measure values.

    Args:
        model: The main graph.
        wanted: By name, the tallies to fill, in topological order.
        full: Values to expose in any case.
        axes: Where each value has the samples.
        shapes: Shapes in some run, which give the ranks; values that are missing are reduced to scalars.
        steady: Whether the shapes are these in every run.
    """
    made = Instruments()
    opset = model.opset()
    plain = {
        name
        for name, tally in wanted.items()
        if not tally.histogram and tally.axis is None and name not in full
    }
    sources = {name: source_of(model, name, wanted) for name in plain}
    hidden = [found.value for found in sources.values() if found and found.value not in wanted]
    hidden += [
        name
        for name in model.inputs
        if name not in wanted and model.dtype_of(name) in FLOATS and model.consumers(name)
    ]
    order = list(dict.fromkeys([*hidden, *wanted]))
    reducible = {
        name
        for name in order
        if (name in plain or name not in wanted)
        and name not in full
        and opset >= 1
        and model.dtype_of(name) in REDUCED
    }
    for name in order:
        source = sources.get(name)
        axis = axes.get(name)
        known = source is not None and any(
            source.value in part for part in (made.reduced, made.derived, made.exposed)
        )
        if source is None or not known:
            if name in reducible:
                _reduce(model, made, name, axis, shapes.get(name), wanted.keys() | set(hidden), steady=steady)
            else:
                tally = wanted.get(name, Tally())
                made.expose(name)
                made.exposed[name] = {"histogram": tally.histogram, "axis": tally.axis, "samples": axis}
            continue
        form: dict[str, Any] = {"source": source.value}
        if source.pads or source.fixed_pads:
            constant = model.constant(source.pads) if source.pads else None
            form["fixed"] = list(source.fixed_pads) if constant is None else constant.reshape(-1).tolist()
            form["pads"] = source.pads if constant is None else ""
            form["fill"], form["padded"] = source.fill, True
            if form["pads"]:
                made.expose(form["pads"])
        else:
            form["low"], form["high"] = source.low, source.high
        made.derived[name] = form
    return made


def _reduce(
    model: Graph,
    made: Instruments,
    name: str,
    axis: int | None,
    shape: Shape | None,
    measured: set[str],
    *,
    steady: bool,
) -> None:
    """Add what reduces a value to its extremes, for each sample where its rank is known."""
    form: dict[str, Any] = {"samples": axis, "shape": "", "bound": None}
    clipped = clipped_image(model, name, shape) if steady else None
    if clipped is not None and shape is not None:
        strides = [max(1, min(8, size // 4)) for size in shape[2:]]
        form["bound"], form["size"] = clipped, list(shape)
        form["seen"] = [
            *shape[:2],
            *(-(-size // step) for size, step in zip(shape[2:], strides, strict=True)),
        ]
        form["low"] = made.add("MaxPool", [name], kernel_shape=[1] * len(strides), strides=strides)
        form["high"] = made.add("GlobalMaxPool", [name])
    else:
        form["shape"] = made.add("Shape", [name])
        keep = 0 if axis is None else axis
        rest = [] if shape is None else [at for at in range(len(shape)) if at != keep]
        inputs, attributes = [name], {"keepdims": int(bool(rest))}
        if rest and model.opset() >= 18:
            inputs.append(made.constant(rest))
        elif rest:
            attributes["axes"] = rest  # type: ignore[assignment]
        form["low"] = made.add("ReduceMin", inputs, **attributes)
        form["high"] = made.add("ReduceMax", inputs, **attributes)
    form["sum"] = ""
    if model.dtype_of(name) in FLOATS and not finite(model, name, measured):
        form["sum"] = made.add("ReduceSum", [name], keepdims=0)
    made.reduced[name] = form


def clipped_image(model: Graph, name: str, shape: Shape | None) -> float | None:
    """Return the bound below an image that a convolution's Relu or Clip gives, None for anything else."""
    node = model.producer(name)
    if node is None or shape is None or len(shape) not in (4, 5) or model.dtype_of(name) != TensorProto.FLOAT:
        return None
    if 0 in shape or int(np.prod(shape[2:])) < 16:
        return None
    before = model.producer(node.input[0]) if node.input else None
    if before is None or before.op_type not in _BEFORE_CLIP or domain_of(before.domain):
        return None
    found = bounds(model, node)
    return found[0] if found and np.isfinite(found[0]) else None
