"""The steps of a planned graph, and running them on a list of values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxslim_lab.errors import LabError, RunError, one_line, quote
from onnxslim_lab.kernels.registry import settle
from onnxslim_lab.nodes import domain_of
from onnxslim_lab.running.types import wrong_type
from onnxslim_lab.worker.messages import Value

ABSENT = 0  # slot of an optional input that is not there: always None
UNUSED = 1  # slot that takes outputs nobody asked for

Hook = Callable[[NodeProto, Sequence[Value], Sequence[Value], float], None]
"""Called after a node with its inputs, outputs (None for absent ones) and seconds."""

Exchange = Callable[[NodeProto, Sequence[Value]], Sequence[Value] | None]
"""Called after a node with its outputs; what it returns takes their place."""


@dataclass(frozen=True, slots=True)
class Step:
    """A node ready to run.

    Attributes:
        node: The node.
        function: Takes the values of `inputs` by position and `attributes` by keyword.
        inputs: Slots read: the node's inputs, then what its bodies capture.
        attributes: The node's attributes.
        outputs: Slot of each output of the node.
        formal: Names of the operator's inputs and attributes, for errors.
        constant: Whether the outputs are constants when the inputs are.
        opset: Version of the operator's domain; 0 for calls of local functions.
    """

    node: NodeProto
    function: Callable[..., Any]
    inputs: tuple[int, ...]
    attributes: dict[str, Any]
    outputs: tuple[int, ...]
    formal: tuple[str, ...] = ()
    constant: bool = False
    opset: int = 0

    def check(self, arguments: Sequence[Value]) -> None:
        """Check the types of the inputs.

        Raises:
            TypeError: One is not of a type the operator takes.
        """
        if self.opset:
            given = arguments[: len(self.node.input)]
            problem = wrong_type(self.node.op_type, domain_of(self.node.domain), self.opset, given)
            if problem:
                raise TypeError(problem)

    def failure(self, error: Exception, arguments: Sequence[Value]) -> LabError:
        """Return the error to raise: node, operator, what went wrong, and what the inputs were."""
        if isinstance(error, LabError):  # a node inside a body or a function says it best
            return error
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, (ValueError, TypeError, NotImplementedError)) and str(error):
            text = str(error)
        shown = []
        for position, name in enumerate(self.node.input):
            formal = self.formal[min(position, len(self.formal) - 1)] if self.formal else str(position)
            value = describe(arguments[position]) if position < len(arguments) else "?"
            shown.append(f"{formal} = {quote(name)} {value}" if name else f"{formal} absent")
        given = ", ".join(shown) or "none"
        return RunError(f"{label(self.node)}: {one_line(text, 400)}; inputs: {given}")


Entry = tuple[
    Callable[..., Any],
    tuple[int, ...],
    dict[str, Any],
    tuple[int, ...],
    tuple[int, ...],
    tuple[int, ...],
    Step,
]
"""Function, slots read, attributes, slots written, constants to load before, slots to free after, step."""


@dataclass(slots=True)
class Program:
    """The steps that some outputs need, in order.

    Attributes:
        entries: What the loop over the nodes reads.
        wanted: Slots of the outputs.
        loads: Constants among the outputs.
        checked: Whether it ran once, with the types of all inputs checked: they are the same each time.
    """

    entries: tuple[Entry, ...]
    wanted: tuple[int, ...]
    loads: tuple[int, ...]
    checked: bool = False


def compile_program(steps: Sequence[Step], wanted: Sequence[int], constants: Iterable[int]) -> Program:
    """Return the steps needed for the wanted slots, each with what to load before and free after it.

    Args:
        steps: Steps in topological order.
        wanted: Slots whose values stay.
        constants: Slots that are loaded before their first use, unless something was fed.
    """
    unloaded = set(constants)
    needed = set(wanted) - unloaded
    kept: list[Step] = []
    for step in reversed(steps):
        if not needed.isdisjoint(step.outputs) and unloaded.isdisjoint(step.outputs):
            kept.append(step)
            needed.update(step.inputs)
    last: dict[int, Step] = {}
    for step in kept:  # from the last to the first
        for slot in (*step.inputs, *step.outputs):
            last.setdefault(slot, step)
    for slot in (*wanted, ABSENT):
        last.pop(slot, None)
    entries: list[Entry] = []
    for step in reversed(kept):
        loads = tuple(dict.fromkeys(slot for slot in step.inputs if slot in unloaded))
        unloaded.difference_update(loads)
        frees = tuple(slot for slot in dict.fromkeys((*step.inputs, *step.outputs)) if last.get(slot) is step)
        entries.append((step.function, step.inputs, step.attributes, step.outputs, loads, frees, step))
    return Program(tuple(entries), tuple(wanted), tuple(slot for slot in wanted if slot in unloaded))


def execute(program: Program, values: list[Value], load: Callable[[int], Value]) -> None:
    """Run a program on its values, in place.

    Args:
        program: The program.
        values: Value of each slot.
        load: Returns the constant of a slot.

    Raises:
        RunError: A node could not be computed.
    """
    step: Step | None = None
    arguments: list[Value] = []
    unchecked = not program.checked
    try:
        for function, inputs, attributes, outputs, loads, frees, step in program.entries:
            for slot in loads:
                if values[slot] is None:
                    values[slot] = load(slot)
            arguments = [values[slot] for slot in inputs]
            if unchecked:
                step.check(arguments)
            result = function(*arguments, **attributes)
            if type(result) is np.ndarray and len(outputs) == 1:
                values[outputs[0]] = result
            else:
                store(values, outputs, result)
            for slot in frees:
                values[slot] = None
    except Exception as error:
        if step is None:
            raise
        raise step.failure(error, arguments) from error
    program.checked = True
    for slot in program.loads:
        if values[slot] is None:
            values[slot] = load(slot)


def store(values: list[Value], outputs: Sequence[int], result: Any) -> None:
    """Put the results of a node into its output slots.

    Raises:
        ValueError: There are fewer results than outputs.
    """
    results = result if isinstance(result, tuple) else (result,)
    if len(results) < len(outputs):
        raise ValueError(f"the operator gives {len(results)} outputs, the node asks for {len(outputs)}")
    for slot, value in zip(outputs, results, strict=False):
        values[slot] = value if type(value) is np.ndarray else settle(value)


class Watch:
    """Follows a run: calls a hook after every node and counts the bytes of live values.

    Bytes are those of the buffers that nodes made; views, constants and feeds take none of their own.

    Args:
        hook: Called after every node.
        exchange: Called after every node, before the hook.
    """

    def __init__(self, hook: Hook | None = None, exchange: Exchange | None = None) -> None:
        self.hook = hook
        self.exchange = exchange
        self.live = 0
        self.peak = 0
        self._buffers: dict[int, list[Any]] = {}  # id -> uses, bytes, the buffer itself
        self._ignored: dict[int, Any] = {}

    def ignore(self, value: Value) -> None:
        """Take a value's buffers for somebody else's."""
        for buffer in buffers(value):
            self._ignored[id(buffer)] = buffer

    def made(self, value: Value) -> None:
        """Note that a slot holds a value now."""
        for buffer in buffers(value):
            known = self._buffers.get(id(buffer))
            if known is not None:
                known[0] += 1
            elif id(buffer) not in self._ignored and buffer.flags.writeable:
                self._buffers[id(buffer)] = [1, buffer.nbytes, buffer]
                self.live += buffer.nbytes
        self.peak = max(self.peak, self.live)

    def freed(self, value: Value) -> None:
        """Note that a slot lost its value."""
        for buffer in buffers(value):
            known = self._buffers.get(id(buffer))
            if known is not None:
                known[0] -= 1
                if not known[0]:
                    self.live -= known[1]
                    del self._buffers[id(buffer)]

    def execute(self, program: Program, values: list[Value], load: Callable[[int], Value]) -> None:
        """Do what `execute` does, watched."""
        for value in values:
            self.made(value)
        for function, inputs, attributes, outputs, loads, frees, step in program.entries:
            for slot in loads:
                if values[slot] is None:
                    values[slot] = load(slot)
            arguments = [values[slot] for slot in inputs]
            start = time.perf_counter()
            try:
                if not program.checked:
                    step.check(arguments)
                store(values, outputs, function(*arguments, **attributes))
            except Exception as error:
                raise step.failure(error, arguments) from error
            seconds = time.perf_counter() - start
            if self.exchange is not None:
                other = self.exchange(step.node, [values[slot] for slot in outputs])
                if other is not None:
                    store(values, outputs, tuple(other))
            for slot in outputs:
                self.made(values[slot])
            if self.hook is not None:
                self.hook(step.node, arguments, [values[slot] for slot in outputs], seconds)
            for slot in frees:
                self.freed(values[slot])
                values[slot] = None
        for slot in program.loads:
            if values[slot] is None:
                values[slot] = load(slot)
        for slot in program.wanted:
            self.freed(values[slot])


def buffers(value: Value) -> list[np.ndarray[Any, Any]]:
    """Return the arrays that own the memory of a value."""
    if isinstance(value, np.ndarray):
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        return [base]
    items: Iterable[Any] = ()
    if isinstance(value, list):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    return [buffer for item in items for buffer in buffers(item)]


def label(node: NodeProto) -> str:
    """Return what errors call a node.

    >>> from onnx import helper
    >>> label(helper.make_node("Relu", ["x"], ["y"])), label(helper.make_node("Relu", ["x"], ["y"], "act"))
    ("node of 'y' (Relu)", "node 'act' (Relu)")
    """
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    if node.name:
        return f"node {quote(node.name)} ({operator})"
    return f"node of {quote(next(filter(None, node.output), ''))} ({operator})"


def describe(value: Value) -> str:
    """Return a value's type and shape.

    >>> describe(np.zeros((2, 3), np.float32)), describe([np.zeros(2)]), describe(None)
    ('float32[2, 3]', 'sequence of 1 (float64[2])', 'empty')
    """
    if isinstance(value, np.ndarray):
        return f"{'string' if value.dtype == object else value.dtype}{list(value.shape)}"
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return f"map of {len(value)}"
    return f"sequence of {len(value)}" + (f" ({describe(value[0])})" if value else "")
