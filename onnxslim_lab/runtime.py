"""The NumPy runtime: runs any model with the kernels of this package, sharing no code with onnxruntime.

    outputs = runtime.run("model.onnx", {"x": x})

An `Interpreter` plans once and runs many feeds. It frees every value after its last use and reads large
weights from the model's file when a node needs them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, TypeProto

from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.model_inputs import ModelInput, check_feed, model_inputs
from onnxslim_lab.running.plan import Machine, Plan
from onnxslim_lab.running.program import UNUSED, Exchange, Hook, Program, Step, Watch, label
from onnxslim_lab.running.support import Missing, require
from onnxslim_lab.running.support import supports as _supports
from onnxslim_lab.worker.messages import Value, narrowed

__all__ = ["Exchange", "Hook", "Interpreter", "Missing", "Run", "run", "supports"]

Source = Graph | ModelProto | str | os.PathLike[str]


@dataclass(frozen=True)
class Run:
    """The result of a measured run.

    Attributes:
        outputs: The values asked for, by name.
        peak_bytes: The most bytes that values made by nodes took at one time; feeds and constants not
            counted, nor what a kernel takes while it works.
    """

    outputs: dict[str, Value]
    peak_bytes: int


class Interpreter:
    """A model planned for the NumPy runtime.

    Args:
        source: A root Graph, which must not change while the interpreter is in use, a ModelProto or a path.
        memory: Bytes of weights kept between runs; those that do not fit are read at each use.

    Raises:
        UnsupportedError: Operators are missing; the error names them and their nodes.
        ModelError: The model cannot be read.
    """

    def __init__(self, source: Source, *, memory: int = 512 << 20) -> None:
        self.graph = source if isinstance(source, Graph) else Graph.load(source)
        if self.graph.root is not self.graph or self.graph.is_function:
            raise ParameterError(f"graph {quote(self.graph.name)} is a body or function; run the whole model")
        require(self.graph)
        reuse_memory()
        self._machine = Machine(memory)
        self._plan = Plan(self.graph, self._machine)
        self._inputs = {name: _fed(info) for name, info in model_inputs(self.graph).items()}
        halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        self._narrow = {name: info.dtype for name, info in self._inputs.items() if info.element in halves}
        self._programs: dict[tuple[tuple[str, ...], str | None], Program] = {}

    @property
    def values(self) -> list[str]:
        """The values of the main graph that can be asked for, in topological order."""
        made = [name for node in self.graph.nodes for name in node.output if name]
        return [*dict.fromkeys((*self.graph.inputs, *self.graph.initializers, *made))]

    def run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None = None,
        *,
        until: str | None = None,
        hook: Hook | None = None,
        exchange: Exchange | None = None,
    ) -> dict[str, Value]:
        """Run one feed; only the nodes that the outputs need are computed.

        Args:
            feeds: Inputs by name: arrays, lists (sequences), dicts (maps), None (empty optionals).
            outputs: Names of the values to return, any of the main graph's; None for the model's outputs,
                or those of the node named by `until`.
            until: Name of a node (or of a value it makes) after which the run stops.
            hook: Called after every node, in bodies and functions too, with the node, its inputs, its
                outputs and its seconds; not for nodes that need constants only, which run once.
            exchange: Called as the hook is, but before it, with the node and its outputs; where it returns
                values, these take the place of the outputs for all that follows.

        Returns:
            The values by name. They may be views of feeds and weights: copy before changing them in place.

        Raises:
            DataError: A feed has unknown or missing inputs, or one of the wrong type or shape.
            ParameterError: No value or node has such a name.
            RunError: A node could not be computed; the error names it and describes its inputs.
        """
        watched = hook is not None or exchange is not None
        return self._run(feeds, outputs, until, Watch(hook, exchange) if watched else None)

    def measure(self, feeds: Mapping[str, Value], outputs: Sequence[str] | None = None) -> Run:
        """Run one feed and count the bytes of live values; arguments and errors are those of `run`."""
        watch = Watch()
        values = self._run(feeds, outputs, None, watch)
        return Run(values, watch.peak)

    def reads(self, node: NodeProto) -> list[str]:
        """Return the values that a node of the main graph reads, what its bodies capture included."""
        step = next(step for step in self._plan.steps if step.node is node)
        return [name for name in self._names(step.inputs) if name]

    def compute(self, node: NodeProto, values: Mapping[str, Value]) -> dict[str, Value]:
        """Compute one node of the main graph from given values of its inputs; constants need not be given.

        Raises:
            ParameterError: An input is neither given nor constant.
            RunError: It cannot be computed.
        """
        step = next(step for step in self._plan.steps if step.node is node)
        for name in self._names(step.inputs):
            if name and name not in values and self._plan.slots[name] not in self._plan.constants:
                raise ParameterError(f"value {quote(name)} is needed to compute {label(node)}")
        names = [name for name in node.output if name]
        held = self._plan.template.copy()
        for name, value in values.items():
            if name in self._plan.slots:
                held[self._plan.slots[name]] = value
        with np.errstate(all="ignore"):
            self._plan.execute(self._plan.compile([self._plan.slots[name] for name in names], [step]), held)
        return {name: held[self._plan.slots[name]] for name in names}

    def _names(self, slots: Sequence[int]) -> list[str]:
        by_slot = {slot: name for name, slot in self._plan.slots.items()}
        return [by_slot[slot] for slot in slots]

    def _run(
        self,
        feeds: Mapping[str, Value],
        outputs: Sequence[str] | None,
        until: str | None,
        watch: Watch | None,
    ) -> dict[str, Value]:
        feed = check_feed(narrowed(feeds, self._narrow), self._inputs, "feed")
        names, program = self._program(outputs, until)
        plan = self._plan
        values = plan.template.copy()
        for name, value in feed.items():
            values[plan.slots[name]] = value
            if watch is not None:
                watch.ignore(value)
        before, self._machine.watch = self._machine.watch, watch
        try:
            with np.errstate(all="ignore"):
                plan.execute(program, values)
        finally:
            self._machine.watch = before
        return {name: values[plan.slots[name]] for name in names}

    def _program(self, outputs: Sequence[str] | None, until: str | None) -> tuple[Sequence[str], Program]:
        """Return the names to return and the program for them, made once."""
        plan = self._plan
        if outputs is None:
            names: tuple[str, ...] = tuple(self.graph.outputs)
            if until is not None:
                names = tuple(filter(None, plan.steps[self._position(until)].node.output))
        else:
            names = tuple(outputs)
        key = (names, until)
        if key not in self._programs:
            for name in names:
                if not name or name not in plan.slots:
                    raise ParameterError(
                        f"the main graph has no value {quote(name)}{suggest(name, filter(None, plan.slots))}"
                    )
            steps: Sequence[Step] = plan.steps
            if until is not None:
                steps = steps[: self._position(until) + 1]
                later = {slot for step in plan.steps[len(steps) :] for slot in step.outputs}
                for name in names:
                    if plan.slots[name] in later - {UNUSED}:
                        raise ParameterError(f"value {quote(name)} is made after node {quote(until)}")
            self._programs[key] = plan.compile([plan.slots[name] for name in names], steps)
        return names, self._programs[key]

    def _position(self, until: str) -> int:
        """Return the position of the step of a node, by its name or an output's."""
        for position, step in enumerate(self._plan.steps):
            if step.node.name == until or until in step.node.output:
                return position
        known = [name for step in self._plan.steps for name in (step.node.name, *step.node.output) if name]
        raise ParameterError(f"the main graph has no node {quote(until)}{suggest(until, known)}")


@functools.cache
def reuse_memory() -> None:
    """Make the C library keep the memory of freed arrays for the next ones.

    glibc returns arrays above a threshold to the system, and each new one is slow to touch at first. Freeing
    one array just below 32 MB raises that threshold for good; its pages are never touched. Elsewhere this
    does nothing.
    """
    np.empty((1 << 25) - (1 << 16), np.uint8)


def _fed(info: ModelInput) -> ModelInput:
    """Return what a feed is held to: a scalar may have any shape, as with onnxruntime."""
    if info.shape != ():
        return info
    kind = TypeProto()
    kind.tensor_type.elem_type = info.element
    return replace(info, type=kind)


def run(
    source: Source,
    feeds: Mapping[str, Value],
    outputs: Sequence[str] | None = None,
    *,
    until: str | None = None,
    hook: Hook | None = None,
) -> dict[str, Value]:
    """Plan a model and run one feed; see `Interpreter`.

    >>> graph = Graph.parse('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) {y = Neg(x)}')
    >>> run(graph, {"x": np.ones(2, np.float32)})
    {'y': array([-1., -1.], dtype=float32)}
    """
    return Interpreter(source).run(feeds, outputs, until=until, hook=hook)


def supports(source: Source) -> list[Missing]:
    """Return every node whose operator the runtime lacks, before anything runs; empty when all is there."""
    return _supports(source if isinstance(source, Graph) else Graph.load(source))
