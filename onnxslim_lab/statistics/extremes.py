"""Nodes that reduce values to their least and greatest elements, placed so that they run at once.

onnxruntime orders nodes depth first from those that nothing reads, the last in the list first. Reductions are
added deepest value first, therefore, and each is such a node itself: it then runs right behind the node that
made its value, while that is in the cache and before its memory is needed. In the order of the values, all
reductions would run at the end, every activation alive till then.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import helper

from onnxslim_lab.graph import Graph
from onnxslim_lab.statistics.following import finite
from onnxslim_lab.statistics.formulas import Formula, dip_of, dip_range, formula_of
from onnxslim_lab.statistics.instrument import FLOATS, REDUCED, Instruments, clipped_image
from onnxslim_lab.statistics.sizes import Shape, Sizes

_PREFIX = "onnxslim_lab.extreme"


@dataclass(frozen=True)
class Reached:
    """What earlier feeds showed of a value: the bounds that it cannot pass and has reached."""

    low: float | None = None
    high: float | None = None


@dataclass
class Extremes:
    """How to measure the ranges of values, and what follows from it.

    Attributes:
        instruments: To run.
        formulas: Values that follow from others, in an order to work them out.
        witnessed: Values of which only a sample of the elements goes into `lows`, with the bound below them:
            the range is certain if that was reached.
        reached: Bounds that are not measured again.
    """

    instruments: Instruments = field(default_factory=Instruments)
    formulas: dict[str, Formula] = field(default_factory=dict)
    witnessed: dict[str, float] = field(default_factory=dict)
    reached: dict[str, Reached] = field(default_factory=dict)


def reducible(model: Graph, values: Collection[str]) -> bool:
    """Whether all values have types that can be reduced in the graph."""
    return model.opset() >= 1 and all(model.dtype_of(name) in REDUCED for name in values)


def measure_extremes(
    model: Graph,
    wanted: Sequence[str],
    sizes: Sizes,
    shapes: Mapping[str, Shape],
    *,
    full: Container[str] = (),
    witness: Container[str] = (),
    reached: Mapping[str, Reached] | None = None,
) -> Extremes:
    """Return how to measure the ranges of values.

    Args:
        model: The main graph.
        wanted: The values, in topological order.
        sizes: Which sizes follow from the feeds.
        shapes: Shapes in some run.
        full: Values that are not to be reduced but exposed.
        witness: Values whose least element may be taken from a sample.
        reached: What is known already.
    """
    made = Extremes()
    nodes = made.instruments
    fed = [
        name
        for name in model.inputs
        if name not in wanted and model.dtype_of(name) in FLOATS and model.consumers(name)
    ]
    sound: set[str] = set()  # values that are finite and not huge if the feed is not doubtful
    known: set[str] = set()  # values whose range will be known
    groups: list[list[str]] = []
    for name in (*fed, *wanted):
        if name in full:
            nodes.expose(name)
            nodes.exposed[name] = {"histogram": False, "axis": None, "samples": None}
            continue
        here = (reached or {}).get(name, Reached())
        formula = formula_of(model, name, known) or _dip(model, name, here, known)
        if formula is not None and (formula.same_size or name in sizes):
            made.formulas[name] = formula
            sound.add(name)
            known.add(name)
            continue
        is_sound = model.dtype_of(name) not in FLOATS or finite(model, name, sound)
        if not is_sound:
            here = Reached()
        made.reached[name] = here
        groups.append(_reductions(model, name, shapes.get(name), here, name in witness, made))
        if not is_sound:
            nodes.running["sums"][name] = _add(groups[-1], nodes, "ReduceSum", name)
        if name not in sizes and name in wanted:
            nodes.running["sizes"][name] = _add(groups[-1], nodes, "Size", name)
        sound.add(name)
        known.add(name)
    by_output = {node.output[0]: node for node in nodes.nodes}
    nodes.nodes = [by_output[output] for group in reversed(groups) for output in group]
    nodes.outputs += [output for part in nodes.running.values() for output in part.values()]
    return made


def _dip(model: Graph, name: str, reached: Reached, known: Container[str]) -> Formula | None:
    """Return the formula of a value that cannot get lower and is greatest where another one is."""
    found = dip_of(model, name) if reached.low is not None else None
    if found is None or found[0] not in known:
        return None
    source, function, _ = found
    low = reached.low
    assert low is not None
    return Formula((source,), lambda ranges: dip_range(ranges[0], function, low))


def _add(group: list[str], made: Instruments, operator: str, source: str, **attributes: Any) -> str:
    """Add a node with one output; reductions leave a scalar."""
    output = f"{_PREFIX}.{len(made.nodes)}"
    if operator.startswith("Reduce"):
        attributes["keepdims"] = 0
    made.nodes.append(helper.make_node(operator, [source], [output], name=output, **attributes))
    group.append(output)
    return output


def _reductions(
    model: Graph, name: str, shape: Shape | None, reached: Reached, witness: bool, made: Extremes
) -> list[str]:
    """Add the nodes that find what is not known of a value's range; return their outputs."""
    group: list[str] = []
    nodes, running = made.instruments, made.instruments.running
    bound = clipped_image(model, name, shape)
    if reached.low is None:
        source = name
        if bound is not None and witness and shape is not None:
            strides = [max(1, min(8, size // 4)) for size in shape[2:]]
            source = _add(group, nodes, "MaxPool", name, kernel_shape=[1] * len(strides), strides=strides)
            made.witnessed[name] = bound
        running["lows"][name] = _add(group, nodes, "ReduceMin", source)
    if reached.high is None:
        source = name if bound is None else _add(group, nodes, "GlobalMaxPool", name)
        running["highs"][name] = _add(group, nodes, "ReduceMax", source)
    return group
