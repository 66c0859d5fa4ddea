"""Plan: a graph, body or function prepared for running: slots for its values, a function for each node."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto

from onnxslim_lab.errors import ModelError, quote
from onnxslim_lab.graph import FunctionKey, Graph, domain_of, is_op
from onnxslim_lab.kernels import Kernel, lookup
from onnxslim_lab.running import control as runtime_control
from onnxslim_lab.running import functions as runtime_functions
from onnxslim_lab.running.attributes import Bound, dense, keywords, resolve
from onnxslim_lab.running.program import (
    ABSENT,
    UNUSED,
    Program,
    Step,
    Watch,
    compile_program,
    execute,
    store,
)
from onnxslim_lab.weights import Array
from onnxslim_lab.worker.messages import Value


def unwrapped(kernel: Kernel) -> Callable[..., Any]:
    """Return the function a kernel was made from; the interpreter silences floating point warnings itself."""
    function: Callable[..., Any] = inspect.unwrap(kernel.function)
    return function


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a kernel's inputs and attributes."""
    return tuple(inspect.signature(function).parameters)


@dataclass
class Machine:
    """What the plans of one interpreter share.

    Attributes:
        memory: Bytes of constants that may still be kept between runs; the others are read at each use.
        watch: Follows the nodes while a watched run lasts.
        calls: Functions that are being planned, to notice recursion.
    """

    memory: int
    watch: Watch | None = None
    calls: list[FunctionKey] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    """A constant of the plan around a body.

    Attributes:
        plan: That plan.
        slot: Its slot there.
    """

    plan: Plan
    slot: int


class Plan:
    """One graph prepared for running.

    A value's slot is its place in a list; slot 0 is the absent input. What a body captures comes as further
    arguments, so that nothing is ever looked up by name while it runs. Nodes that need constants only make
    constants: they are computed when first used, and kept like weights. What a body captures of the constants
    around it is constant in it too.

    Args:
        graph: The graph; it must not change afterwards.
        machine: Shared by all plans of an interpreter.
        bound: Attributes of the call, for a function and the bodies in it.
        captured: What the node around passes to the bodies of this one, in order.
        around: The plan of that node.

    Raises:
        UnsupportedError: An operator has neither a kernel nor a function body.
    """

    def __init__(
        self,
        graph: Graph,
        machine: Machine,
        bound: Bound | None = None,
        captured: Sequence[str] = (),
        around: Plan | None = None,
    ) -> None:
        self.graph = graph
        self.machine = machine
        self.bound: Bound = bound or {}
        self.slots: dict[str, int] = {"": ABSENT}
        self.template: list[Value] = [None, None]
        self.constants: dict[int, str | Step | Outer] = {}  # slot -> the tensor's name, or what gives it
        self._initializers = {*graph.initializers, *graph.sparse_initializers}
        self.inputs = tuple(self._slot(name) for name in graph.inputs)
        self._given = {  # IR version 3 lists all initializers as inputs, and no feed replaces them
            self.slots[name]
            for name in graph.inputs
            if graph.root is not graph or not graph.is_constant(name)
        }
        takes = []
        for position, name in enumerate(captured):
            if graph.defines(name):
                continue
            if around is not None and around.is_fixed(around.slots[name]):
                self.constants[self._slot(name)] = Outer(around, around.slots[name])
            else:
                takes.append((self._slot(name), position))
        self._takes = tuple(takes)
        self.steps: list[Step] = []
        for node in graph.nodes:
            if not is_op(node, "Constant"):
                self._add(self._step(node))
        self.outputs = tuple(self._slot(name) for name in graph.outputs)
        self.program = self.compile(self.outputs)

    def compile(self, wanted: Sequence[int], steps: Sequence[Step] | None = None) -> Program:
        """Return the program that computes the wanted slots."""
        return compile_program(self.steps if steps is None else steps, wanted, self.constants)

    def call(self, arguments: Sequence[Value], captured: Sequence[Value] = ()) -> tuple[Value, ...]:
        """Run the graph and return its outputs.

        Args:
            arguments: Its inputs; those missing at the end are absent.
            captured: The values its owner captures, in the order the plan was made with.
        """
        values = self.template.copy()
        for slot, value in zip(self.inputs, arguments, strict=False):
            values[slot] = value
        for slot, position in self._takes:
            values[slot] = captured[position]
        self.execute(self.program, values)
        return tuple([values[slot] for slot in self.outputs])

    def execute(self, program: Program, values: list[Value]) -> None:
        """Run a program of this plan, watched if somebody watches."""
        if self.machine.watch is None:
            execute(program, values, self.load)
        else:
            self.machine.watch.execute(program, values, self.load)

    def load(self, slot: int) -> Array:
        """Return a constant, kept for the next time while there is room."""
        source = self.constants[slot]
        if isinstance(source, Outer):
            held = source.plan.template[source.slot]
            outer = source.plan.load(source.slot) if held is None else held
            self.template[slot] = source.plan.template[source.slot]
            assert isinstance(outer, np.ndarray)
            return outer
        array = self._computed(source, slot) if isinstance(source, Step) else self._read(source)
        if not array.flags.aligned:
            array = array.copy()
        array.flags.writeable = False
        if array.nbytes <= self.machine.memory:
            self.machine.memory -= array.nbytes
            self.template[slot] = array
        return array

    def _computed(self, step: Step, slot: int) -> Array:
        """Return the output of a node that needs constants only."""
        held = self.template
        arguments = [held[i] if held[i] is not None or i == ABSENT else self.load(i) for i in step.inputs]
        try:
            step.check(arguments)
            results = step.function(*arguments, **step.attributes)
            values: list[Value] = [None] * len(step.outputs)
            store(values, range(len(values)), results)
        except Exception as error:
            raise step.failure(error, arguments) from error
        array = values[step.outputs.index(slot)]
        assert isinstance(array, np.ndarray)
        return array

    def _add(self, step: Step) -> None:
        """Take a step in, or only its outputs where these are constants."""
        self.steps.append(step)
        if step.constant and all(slot == ABSENT or self.is_fixed(slot) for slot in step.inputs):
            self.constants.update({slot: step for slot in step.outputs if slot != UNUSED})

    def is_fixed(self, slot: int) -> bool:
        """Whether a slot holds a constant that no feed can replace."""
        return slot in self.constants and slot not in self._given

    def _read(self, name: str) -> Array:
        graph = self.graph
        sparse = graph.sparse_initializer(name)
        if sparse is not None:
            return dense(sparse, graph.store)
        array = graph.default(name)
        if array is None:  # a Constant node whose value is sparse or an attribute of the call
            node = graph.producer(name)
            assert node is not None
            found = lookup("Constant", "", graph.opset())
            assert found is not None
            array = np.asarray(found.function(**keywords(node, self.bound, graph.store)))
        return array

    def _slot(self, name: str) -> int:
        slot = self.slots.get(name)
        if slot is None:
            slot = self.slots[name] = len(self.template)
            self.template.append(None)
            if name in self._initializers or is_op(self.graph.producer(name), "Constant"):
                self.constants[slot] = name
        return slot

    def _step(self, node: NodeProto) -> Step:
        graph, domain = self.graph, domain_of(node.domain)
        inputs = [self._slot(name) for name in node.input]
        outputs = tuple(self._slot(name) if name else UNUSED for name in node.output)
        key = (domain, node.op_type, node.overload)
        attributes: dict[str, Any] = {}
        formal: tuple[str, ...] = ()
        function: Callable[..., Any]
        kernel = lookup(node.op_type, domain, graph.opset(domain))
        bodies = graph.bodies(node)
        if key in graph.functions:
            called = graph.functions[key]
            formal = tuple(called.inputs)
            function = self._call(called, key, resolve(node, self.bound))
        elif (domain, node.op_type) in runtime_control.CONTROL:
            captured = sorted(graph.captured_by(node))
            outside = [self._slot(name) for name in captured]
            plans = {
                name: Plan(group[0], self.machine, self.bound, captured, self)
                for name, group in bodies.items()
            }
            given = keywords(node, self.bound, graph.store)
            make = runtime_control.CONTROL[domain, node.op_type]
            function = make(plans, given, len(inputs), graph.opset())
            inputs += outside
        elif kernel is not None:
            function = unwrapped(kernel)
            attributes = keywords(node, self.bound, graph.store)
            if kernel.counts_outputs:
                attributes["output_count"] = len(node.output)
            formal = parameters(function)
        else:
            function = self._body_of_schema(node)
        drawn = "seed" in formal
        constant = kernel is not None and function is unwrapped(kernel) and kernel.tensors and not drawn
        opset = 0 if key in graph.functions else graph.opset(domain)
        return Step(node, function, tuple(inputs), attributes, outputs, formal, constant, opset)

    def _call(self, called: Graph, key: FunctionKey, given: dict[str, AttributeProto]) -> Callable[..., Any]:
        """Plan the call of a function with these attributes."""
        if key in self.machine.calls:
            raise ModelError(f"function {quote(key[1])} of domain {quote(key[0])} calls itself")
        self.machine.calls.append(key)
        try:
            plan = Plan(called, self.machine, {**called.attribute_defaults(), **given})
        finally:
            self.machine.calls.pop()
        return lambda *arguments: plan.call(arguments)

    def _body_of_schema(self, node: NodeProto) -> Callable[..., Any]:
        """Plan the body that the specification gives for an operator without a kernel."""
        schema = runtime_functions.schema_of(node, self.graph)
        if schema is None:
            raise runtime_functions.unsupported(node, self.graph)
        plain = NodeProto(op_type=node.op_type, domain=node.domain, input=node.input, output=node.output)
        given = {**runtime_functions.defaults(schema), **resolve(node, self.bound)}
        plain.attribute.extend(resolve(node, self.bound).values())
        opset = self.graph.opset(node.domain)
        calls: dict[object, Callable[..., Any]] = {}
        key = (domain_of(node.domain), node.op_type, node.overload)

        def run(*arguments: Value) -> Any:
            types = None if schema.has_function else [runtime_functions.type_of(value) for value in arguments]
            signature = None if types is None else tuple(item.SerializeToString() for item in types)
            if signature not in calls:
                body = runtime_functions.body(schema, plain, opset, types)
                if body is None:
                    raise runtime_functions.unsupported(node, self.graph)
                calls[signature] = self._call(body, key, given)
            return calls[signature](*arguments)

        if schema.has_function:
            body = runtime_functions.body(schema, plain, opset, None)
            if body is not None:
                calls[None] = self._call(body, key, given)
        return run
