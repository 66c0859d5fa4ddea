"""What the data says: ranges of the original's values, and how far a converted model is from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.errors import LabError
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import OutputError, compare_outputs
from onnxslim_lab.precision.model import Anatomy, Item, Value
from onnxslim_lab.precision.rules import Range
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.statistics import Calibration, Want
from onnxslim_lab.worker.messages import Value as Data

Outputs = list[dict[str, Data]]


_MOVES = (  # operators that make no larger values than they read
    *(
        "Cast",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Dropout",
        "Slice",
        "Gather",
    ),
    *(
        "Split",
        "Expand",
        "Tile",
        "MaxPool",
        "DepthToSpace",
        "SpaceToDepth",
        "Relu",
        "GatherElements",
        "GatherND",
    ),
)


def measure_ranges(anatomy: Anatomy, calibration: Calibration) -> tuple[dict[Value, Range], set[Value]]:
    """Return the range of every float32 value of 16-bit nodes, and the values that are not finite somewhere.

    What only moves values has the range of what it reads. What no run computed, and bodies that cannot be
    looked into, are left out.
    """
    values = dict.fromkeys(value for item in anatomy.items if item.low for value in anatomy.floats(item))
    source = {value: _source(anatomy, value) for value in values}
    wanted = dict.fromkeys(source.values())
    ranges: dict[Value, Range] = {}
    odd: set[Value] = set()
    for place, name in wanted:
        if place == 0 and anatomy.model.is_input(name):
            for feed in calibration.data.feeds:
                fed = feed.get(name)
                if isinstance(fed, np.ndarray) and fed.size:
                    _widen(ranges, (0, name), float(np.nanmin(fed)), float(np.nanmax(fed)))
    main = [value for value in wanted if value[0] == 0 and not anatomy.model.is_input(value[1])]
    inner = [value for value in wanted if value[0] and not anatomy.graphs[value[0]].root.is_function]
    for group in (main, inner):
        _collect(anatomy, calibration, group, ranges, odd)
    return (
        {value: ranges[first] for value, first in source.items() if first in ranges},
        {value for value, first in source.items() if first in odd},
    )


def _source(anatomy: Anatomy, value: Value) -> Value:
    """Return the value whose range holds for this one too."""
    while (maker := anatomy.makers.get(value)) is not None and maker.node.op_type in _MOVES:
        before = anatomy.value(maker.place, maker.node.input[0])
        if not anatomy.is_float(before) or anatomy.is_constant(before):
            break
        value = before
    return value


def _collect(
    anatomy: Anatomy,
    calibration: Calibration,
    values: list[Value],
    ranges: dict[Value, Range],
    odd: set[Value],
) -> None:
    if not values:
        return
    graphs = anatomy.graphs
    try:
        wants = [Want(graphs[place], name, average=False) for place, name in values]
        found = calibration.collect(anatomy.model, wants)
    except LabError:
        if not values[0][0]:
            raise
        return  # the NumPy runtime, which looks into bodies, does not run every model
    for value in values:
        seen = found.get(graphs[value[0]], value[1])
        if seen is not None:
            if math.isfinite(seen.low) and math.isfinite(seen.high):
                _widen(ranges, value, seen.low, seen.high)
            if seen.nonfinite:
                odd.add(value)


def _widen(ranges: dict[Value, Range], value: Value, low: float, high: float) -> None:
    before = ranges.get(value, (low, high))
    ranges[value] = min(before[0], low), max(before[1], high)


def agreement(error: OutputError) -> float:
    """Return how alike two results are for one output, 1 when equal: cosine, or the share of equal items."""
    if error.nonfinite or error.structure:
        return -1.0
    if error.floating:
        return error.cosine
    return 1.0 - error.mismatches / max(error.count, 1)


def worst(errors: Sequence[OutputError]) -> tuple[float, str]:
    """Return the least agreement and its output's name."""
    return min(((agreement(error), error.name) for error in errors), default=(1.0, ""))


def rank_by_error(
    anatomy: Anatomy, converted: Graph, low: Sequence[Item], calibration: Calibration, *, exact: bool
) -> list[Item]:
    """Return the 16-bit nodes, those first that add most to the relative error of what they read.

    A node in a body counts as its outermost owner does: only values of the main graph are seen.

    Args:
        anatomy: The original model.
        converted: The converted one.
        low: The nodes to rank.
        calibration: The data; its first feed is run.
        exact: Whether the NumPy runtime can run the model; else onnxruntime does.
    """
    model = anatomy.model
    owner_of = {item.number: _outermost(anatomy, item) for item in low}
    names = [name for item in anatomy.members.get(0, ()) for name in filter(None, item.node.output)]
    names = [name for name in dict.fromkeys(names) if anatomy.is_float((0, name))]
    known = {name for node in converted.nodes for name in node.output}
    names = [name for name in names if name in known]
    if exact:
        feed = next(iter(calibration.data.feeds))
        one, two = ([Interpreter(graph).run(feed, names)] for graph in (model, converted))
    else:
        one, two = (list(calibration.stream(graph, names, limit=1)) for graph in (model, converted))
    sums: dict[str, float] = {}
    for error in compare_outputs(one, two):
        sums[error.name] = math.inf if error.nonfinite or error.structure else 10 ** (-error.sqnr_db / 20)

    def gain(item: Item) -> float:
        made = max((sums.get(name, 0.0) for name in item.node.output), default=0.0)
        read = max((sums.get(name, 0.0) for name in item.node.input), default=0.0)
        return made if math.isinf(made) else max(made - read, 0.0) + 1e-3 * made

    gains = {item.number: gain(owner_of[item.number]) for item in low}
    # A difference of large numbers shows the rounding of its operands: these share the blame.
    shared = dict(gains)
    for item in low:
        for value, _ in anatomy.inputs(item):
            maker = anatomy.makers.get(value)
            if maker is not None and maker.number in shared:
                shared[maker.number] = max(shared[maker.number], gains[item.number] / 2)
    return sorted(low, key=lambda item: -shared[item.number])


def _outermost(anatomy: Anatomy, item: Item) -> Item:
    while item.place in anatomy.owners:
        item = anatomy.owners[item.place]
    return item
