"""Constant subgraphs: which nodes can be computed now, how large their results are, and computing them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.base import Refusal
from onnxslim_lab.errors import quote
from onnxslim_lab.graph import Graph, attribute, domain_of, is_op
from onnxslim_lab.kernels import Kernel, lookup, run, sizes
from onnxslim_lab.kernels.dtypes import dtype_of_number
from onnxslim_lab.rewriting.certain import trusted_shape
from onnxslim_lab.rewriting.signature import is_random
from onnxslim_lab.weights import Array, to_array

SMALL = 1 << 16  # results up to these bytes are computed while looking, larger ones only on demand
WRONG = (ArithmeticError, LookupError, MemoryError, NotImplementedError, TypeError, ValueError)


@dataclass
class Step:
    """A node that can be computed now.

    Attributes:
        node: The node.
        kernel: What computes it; None when the result is known already.
        attributes: Its attributes as keywords of the kernel.
        freed: Bytes gone with the node and what only it needs.
        excess: Bytes its results take above those.
        folded: Its results become constants, as far as they are needed.
        absorbed: It goes, as all its readers go.
    """

    node: NodeProto
    kernel: Kernel | None
    attributes: dict[str, Any] = field(default_factory=dict)
    freed: int = 0
    excess: int = 0
    folded: bool = False
    absorbed: bool = False

    @property
    def outputs(self) -> list[str]:
        """The values the node makes."""
        return [name for name in self.node.output if name]

    @property
    def inputs(self) -> list[str]:
        """The values that computing it reads, each once."""
        return [] if self.kernel is None else list(dict.fromkeys(name for name in self.node.input if name))


@dataclass
class Done:
    """A step that was computed: its results, or what went wrong."""

    step: Step
    results: dict[str, Array]
    error: Exception | None = None


class ConstantSteps:
    """The nodes of a graph whose results depend on constants only, in topological order.

    Small results are computed while looking, since the shapes of others may depend on them; of large ones
    only type and shape are known until `compute` is asked for them.
    """

    def __init__(self, graph: Graph, limit: int) -> None:
        """Look through the graph; no result may take more than `limit` bytes."""
        self.graph = graph
        self.limit = limit
        self.steps: list[Step] = []
        self.maker: dict[str, Step] = {}  # value -> the step that computes it
        self.step_of: dict[int, Step] = {}  # id of a node -> its step
        self.refusals: list[Refusal] = []
        self.known: dict[str, Array] = {}  # values computed while looking
        self.types: dict[str, Array] = {}  # all values of steps, large ones as stand-ins
        self._spare = limit // 4  # bytes that may still be kept in `known`
        self._work = 1000 + 8 * len(graph)  # steps that may be computed while looking
        self._find()
        self._work = 1000 + 8 * len(graph)

    def _find(self) -> None:
        """Collect the steps in topological order."""
        for node in self.graph.nodes:
            if is_op(node, "Constant") or not any(node.output):
                continue
            if self._static(node):
                continue
            if not all(name in self.maker or self.graph.is_constant(name) for name in node.input if name):
                continue
            reason = self._unfit(node)
            if reason is None:
                try:
                    reason = self._plan(node)
                except WRONG as error:
                    reason = f"cannot be computed: {error}"
            if reason:
                self.refusals.append(Refusal(label(node), reason))

    def _static(self, node: NodeProto) -> bool:
        """Take a Shape or Size whose result the inferred shape gives."""
        if not (is_op(node, "Shape") or is_op(node, "Size")) or has_reference(node) or not node.input:
            return False
        shape = trusted_shape(self.graph, node.input[0])
        if shape is None:
            return False
        if node.op_type == "Shape":
            shape = shape[attribute(node, "start", 0) : attribute(node, "end", None)]
        if not all(isinstance(length, int) for length in shape):
            return False
        lengths = np.array(shape, np.int64)
        result = lengths if node.op_type == "Shape" else np.array(math.prod(lengths.tolist()), np.int64)
        self._add(Step(node, None), (result,), (result,))
        return True

    def _unfit(self, node: NodeProto) -> str | None:
        """Say why a node with constant inputs is not computed; "" where other passes see to it."""
        domain = domain_of(node.domain)
        if self.graph.bodies(node) or (domain, node.op_type, node.overload) in self.graph.functions:
            return ""
        if domain == "" and is_random(self.graph, node):
            return "its result is random"
        if not self.graph.opset():
            return "the model does not import the operators of ai.onnx, so it can hold no Constant node"
        if node.op_type == "DequantizeLinear":
            return "folding it would undo the quantization"
        if has_reference(node):
            return "an attribute depends on the function's call"
        kernel = lookup(node.op_type, domain, self.graph.opset(domain))
        if kernel is None:
            return f"there is no kernel for {quote(node.op_type)}" + (
                f" of {quote(domain)}" if domain else ""
            )
        return None if kernel.tensors else "sequences, optionals and maps are not folded"

    def _plan(self, node: NodeProto) -> str | None:
        """Add a step for the node, computing it now when it is small; or return why not."""
        domain = domain_of(node.domain)
        kernel = lookup(node.op_type, domain, self.graph.opset(domain))
        assert kernel is not None
        step = Step(node, kernel, self._attributes(node))
        exact = node.op_type in sizes.READS_VALUES
        first = 0 if node.op_type in sizes.READS_FIRST else 1
        inputs, real = [], True
        for position, name in enumerate(node.input):
            value = self._small(name, force=exact and position >= first) if name else None
            real = real and (value is not None or not name)
            inputs.append(self._type(name) if value is None and name else value)
        count = len(node.output)
        predicted = sizes.predict(kernel, inputs, step.attributes, count)
        if predicted is None:
            needed = sizes.bound(kernel, inputs, step.attributes)
        else:
            needed = sum(map(sizes.stored_bytes, predicted))
        if needed > self.limit:
            return f"its result may take {needed} bytes, over the memory allowed, {self.limit}"
        if predicted is None or (real and needed <= SMALL):
            if not real:
                inputs = [self._value(name) if name else None for name in node.input]
            results = run(kernel, inputs, step.attributes, count)
            self._add(step, results, results)
        else:
            self._add(step, predicted, None)
        return None

    def _attributes(self, node: NodeProto) -> dict[str, Any]:
        given = {item.name: attribute(node, item.name) for item in node.attribute}
        return {
            name: to_array(value, self.graph.store) if isinstance(value, TensorProto) else value
            for name, value in given.items()
        }

    def _add(self, step: Step, types: tuple[Array, ...], results: tuple[Array, ...] | None) -> None:
        self.steps.append(step)
        self.step_of[id(step.node)] = step
        for position, name in enumerate(step.node.output):
            if not name:
                continue
            self.maker[name] = step
            self.types[name] = types[position]
            if results is None:
                continue
            size = results[position].nbytes
            if step.kernel is None or size <= self._spare:
                self.known[name] = results[position]
                self._spare -= size
            if (size > SMALL or name not in self.known) and results[position].dtype != object:
                self.types[name] = sizes.stand_in(results[position].shape, results[position].dtype)

    def _small(self, name: str, *, force: bool) -> Array | None:
        """Return a value that is at hand or cheap to read; when forced, any."""
        if name in self.known:
            return self.known[name]
        if name not in self.maker:
            known = self.graph.constant_type(name)
            if known is not None and (force or known[2] <= SMALL):
                return self.graph.constant(name)
        return self._value(name) if force else None

    def _type(self, name: str) -> Array:
        """Return a stand-in for a value."""
        if name in self.types:
            return self.types[name]
        known = self.graph.constant_type(name)
        assert known is not None
        if known[0] == TensorProto.STRING:
            array = self.graph.constant(name)
            assert array is not None
            return array
        return sizes.stand_in(known[1], dtype_of_number(known[0]))

    def _value(self, name: str) -> Array:
        """Return a value, computing what leads to it."""
        if name not in self.known and name in self.maker:
            for done in self.compute([name]):
                if done.error is not None:
                    raise done.error
                if name in done.results:
                    return done.results[name]
        found = self.known[name] if name in self.known else self.graph.constant(name)
        assert found is not None
        return found

    def compute(self, names: Iterable[str]) -> Iterator[Done]:
        """Compute values of steps in order, dropping each after its last use."""
        pending: dict[str, int] = {}
        order: list[Step] = []
        seen: set[int] = set()
        stack = [(self.maker[name], False) for name in names]
        while stack:
            step, done = stack.pop()
            if done:
                order.append(step)
            elif id(step) not in seen:
                seen.add(id(step))
                stack.append((step, True))
                if all(name in self.known for name in step.outputs):
                    continue
                for name in step.inputs:
                    pending[name] = pending.get(name, 0) + 1
                    if name in self.maker:
                        stack.append((self.maker[name], False))
        values: dict[str, Array] = {}
        for step in order:
            if all(name in self.known for name in step.outputs):
                yield Done(step, {name: self.known[name] for name in step.outputs})
                continue
            try:
                results = self._run(step, values)
            except WRONG as error:
                yield Done(step, {}, error)
            else:
                values.update(results)
                yield Done(step, results)
            for name in (*step.inputs, *step.outputs):
                pending[name] = pending.get(name, 0) - (name in step.inputs)
                if pending[name] <= 0:
                    values.pop(name, None)

    def _run(self, step: Step, values: dict[str, Array]) -> dict[str, Array]:
        assert step.kernel is not None
        self._work -= 1
        if self._work < 0:
            raise ValueError("its inputs would be computed too often")
        inputs: list[Array | None] = []
        for name in step.node.input:
            if name in self.maker and name not in self.known and name not in values:
                raise ValueError(f"its input {quote(name)} could not be computed")
            inputs.append((values[name] if name in values else self._value(name)) if name else None)
        results = run(step.kernel, inputs, step.attributes, len(step.node.output))
        return {name: result for name, result in zip(step.node.output, results, strict=False) if name}


def label(node: NodeProto) -> str:
    """Return a node's name, or its operator and first output when it has none."""
    return node.name or f"{node.op_type} {next(filter(None, node.output), '')}"


def has_reference(node: NodeProto) -> bool:
    """Whether an attribute's value comes from the call of the function around the node."""
    return any(item.ref_attr_name for item in node.attribute)
