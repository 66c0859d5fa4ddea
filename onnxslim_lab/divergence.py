"""Divergence: the first node whose output differs between onnxruntime and the NumPy runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from onnxslim_lab.errors import LabError, RunError, SessionError, one_line, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import OutputError, compare_outputs
from onnxslim_lab.running.program import label
from onnxslim_lab.runtime import Interpreter
from onnxslim_lab.sessions import Optimization, Runner
from onnxslim_lab.worker.messages import Value

PROBES = 16  # values asked for at a time
_BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})


@dataclass(frozen=True)
class NodeDivergence:
    """The first node, in topological order, whose output differs between the engines.

    Attributes:
        value: Its output.
        node: The node's name.
        op_type: Its operator.
        relative: Largest of max|a-b| / max|a| over the feeds; infinite when shape, type or finiteness differ.
        alone: The same for the node alone, its inputs being those that onnxruntime computed; NaN when it
            cannot be computed so. Small when the node only amplifies what came before.
        compared: Values that were compared on the way.
    """

    value: str
    node: str
    op_type: str
    relative: float
    alone: float
    compared: int

    def __str__(self) -> str:
        text = f"value {quote(self.value)} of {self.op_type} node {quote(self.node)} is the first to differ"
        return f"{text}: relative difference {self.relative:.2e}" + (
            "" if math.isnan(self.alone) else f", {self.alone:.2e} of it from this node alone"
        )


def first_divergence(
    graph: Graph,
    feeds: Sequence[Mapping[str, Value]],
    runner: Runner,
    tolerance: float,
    *,
    optimization: Optimization = "off",
) -> NodeDivergence | None:
    """Return the first node whose output differs by more than the tolerance; None when none does.

    The values of the main graph are bisected in topological order: a few evenly spread over the open
    interval are computed by both engines, and the interval shrinks to the values after the last that agrees
    and up to the first that does not. When neither the outputs nor any of these differ, all values are
    compared, a few at a time. Either way no more than `PROBES` values are held at once.

    Args:
        graph: A root graph.
        feeds: Inputs by name.
        runner: Where onnxruntime runs.
        tolerance: Largest relative difference of values that agree. 8-bit integers agree when none is
            off by more than one step.
        optimization: onnxruntime's level; "off" keeps every value of the graph.

    Raises:
        UnsupportedError: The NumPy runtime lacks an operator.
        SessionError: onnxruntime does not run the model.
    """
    walk = _Walk(graph, [dict(feed) for feed in feeds], runner, tolerance, optimization)
    return walk.bisect() or walk.scan()


@dataclass(frozen=True)
class _Made:
    """A value and the node that makes it."""

    name: str
    node: NodeProto


class _Walk:
    """One search."""

    def __init__(
        self,
        graph: Graph,
        feeds: list[dict[str, Value]],
        runner: Runner,
        tolerance: float,
        optimization: Optimization,
    ) -> None:
        self.graph = graph
        self.feeds = feeds
        self.runner = runner
        self.tolerance = tolerance
        self.optimization = optimization
        self.interpreter = Interpreter(graph)
        self.values = [
            _Made(name, node)
            for node in graph.nodes
            if node.op_type != "Constant"
            for name in node.output
            if name
        ]
        self.known: dict[str, float] = {}  # relative difference by value; NaN: onnxruntime cannot give it

    def bisect(self) -> NodeDivergence | None:
        """Find a difference by halving; None when the values looked at all agree."""
        low, high = 0, len(self.values)  # what comes before `low` is taken to agree
        while low < high:
            step = max(1, (high - low) // PROBES)
            places = sorted({*range(low + step - 1, high, step), high - 1})
            bad = self.differing(places)
            if bad is None:
                return None
            if step == 1:
                return self.report(bad)
            low = max((place + 1 for place in places if place < bad), default=low)
            high = bad + 1
        return None

    def scan(self) -> NodeDivergence | None:
        """Compare all values, a few at a time."""
        for start in range(0, len(self.values), PROBES):
            bad = self.differing(range(start, min(start + PROBES, len(self.values))))
            if bad is not None:
                return self.report(bad)
        return None

    def differing(self, places: Sequence[int]) -> int | None:
        """Return the first of some places whose value differs."""
        missing = [self.values[place].name for place in places if self.values[place].name not in self.known]
        if missing:
            self.compare(missing)
        for place in places:
            difference = self.known[self.values[place].name]
            if not math.isnan(difference) and difference > self.tolerance:
                return place
        return None

    def compare(self, names: list[str]) -> None:
        """Compute values with both engines and note their differences."""
        try:
            theirs = self.runner.run(self.graph, self.feeds, outputs=names, optimization=self.optimization)
            ours = [self.interpreter.run(feed, names) for feed in self.feeds]
        except (RunError, SessionError) as error:
            if len(names) == 1:  # not computed here, or of a type that cannot be an output there
                self.known[names[0]] = math.inf if isinstance(error, RunError) else math.nan
                return
            middle = len(names) // 2
            self.compare(names[:middle])
            self.compare(names[middle:])
            return
        for difference in compare_outputs(theirs, ours):
            self.known[difference.name] = self.size(difference)

    def size(self, error: OutputError) -> float:
        """Return how far two values are apart, 0 when they agree."""
        if error.structure or error.nonfinite:
            return math.inf
        if self.graph.dtype_of(error.name) in _BYTES:
            return error.relative if error.max_abs > 1 else 0.0
        if error.floating or not error.mismatches:
            return error.relative
        return error.relative or math.inf  # booleans and strings have no magnitude

    def report(self, place: int) -> NodeDivergence:
        """Describe the divergence at a place."""
        made = self.values[place]
        return NodeDivergence(
            value=made.name,
            node=made.node.name or one_line(label(made.node)),
            op_type=made.node.op_type,
            relative=self.known[made.name],
            alone=self.alone(made),
            compared=len(self.known),
        )

    def alone(self, made: _Made) -> float:
        """Return the difference of one node, computed from onnxruntime's values of its inputs."""
        inputs = self.interpreter.reads(made.node)
        computed = [name for name in inputs if self.graph.producer(name) is not None]
        names = [name for name in computed if not self.graph.is_constant(name)]
        try:
            theirs = self.runner.run(
                self.graph, self.feeds, outputs=[*names, made.name], optimization=self.optimization
            )
            ours = [
                {made.name: self.interpreter.compute(made.node, {**feed, **given})[made.name]}
                for feed, given in zip(self.feeds, theirs, strict=True)
            ]
        except LabError:
            return math.nan
        errors = compare_outputs([{made.name: given[made.name]} for given in theirs], ours)
        return max((self.size(error) for error in errors), default=0.0)
