"""Remove what no output of the model depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import onnx
from onnx import NodeProto
from pydantic import Field

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.graph import FunctionKey, Graph, attribute, domain_of, is_op
from onnxslim_lab.rewriting.removal import is_spare, is_unused, label


class EliminateDead(Pass):
    """Remove nodes, initializers, optional outputs and functions that no output depends on.

    before: y = Relu(x); z = Random(x); y, mask = Dropout(y); the initializer w without readers
    after:  y = Relu(x); y = Dropout(y)

    In bodies too: an output of If, and what Loop and Scan stack up, goes when the owner's output is unused.
    Operators with side effects or random numbers go like others. Opset imports stay.

    refuses: initializers that a caller may override, or that annotations or training information name;
    inputs, unless asked for.

    >>> EliminateDead(inputs=True).inputs
    True
    """

    exact: ClassVar[bool] = True
    level: ClassVar[Literal["graph", "model"]] = "model"

    inputs: bool = Field(False, description="also remove unused inputs: this changes the interface")

    def apply(self, graph: Graph, context: Context) -> Outcome:  # noqa: ARG002 - nothing to draw or measure
        """Clean the main graph and the functions it calls, each from its outputs upwards."""
        outcome = Outcome()
        _clean(graph, outcome)
        called = _called(graph)
        for key, function in list(graph.functions.items()):
            if key in called:
                _clean(function, outcome)
        called = _called(graph)
        for key in list(graph.functions):
            if key not in called:
                graph.remove_function(key)
                outcome.change(key[1], "removed a function that nothing calls")
        if self.inputs:
            for name in graph.inputs:
                if not graph.use_count(name) and not graph.is_constant(name):
                    _remove_input(graph, name, outcome)
        return outcome


def _remove_input(graph: Graph, name: str, outcome: Outcome) -> None:
    if name in graph.initializers:  # a default value that nobody reads
        graph.remove_input(name)
        graph.remove_constant(name)
    else:
        graph.remove_input(name)
    outcome.change(name, "removed an unused input")


def _clean(graph: Graph, outcome: Outcome) -> None:
    """Remove what is unused in a graph and its bodies: every reader is seen before what it reads."""
    for node in reversed(graph.nodes):
        if is_unused(graph, node):
            graph.remove(node)
            outcome.change(label(node), f"removed {node.op_type}, whose outputs are unused")
            continue
        bodies = [body for group in graph.bodies(node).values() for body in group]
        if bodies:
            _cut_body_outputs(graph, node, bodies, outcome)
            for body in bodies:
                _clean(body, outcome)
        _cut_optional_outputs(graph, node, outcome)
    referenced = graph.referenced()
    for name in (*graph.initializers, *graph.sparse_initializers):
        if is_spare(graph, name, referenced):
            found = graph.constant_type(name)
            graph.remove_constant(name)
            outcome.changes.append(
                Change(name, "removed an unused initializer", bytes_before=0 if found is None else found[2])
            )


def _cut_body_outputs(graph: Graph, node: NodeProto, bodies: list[Graph], outcome: Outcome) -> None:
    """Cut unused outputs of If, Loop and Scan together with the bodies' outputs they stand for."""
    if is_op(node, "If"):
        first, shift = 0, 0
    elif is_op(node, "Loop"):
        first, shift = len(node.input) - 2, 1  # states stay; the bodies' first output is the condition
    elif is_op(node, "Scan") and graph.opset() >= 9:
        first, shift = len(node.input) - int(attribute(node, "num_scan_inputs")), 0
    else:
        return
    outputs = list(node.output)
    if any(len(body.outputs) != len(outputs) + shift for body in bodies):
        return
    for index in reversed(range(first, len(outputs))):
        if outputs[index] and graph.use_count(outputs[index]):
            continue
        if len(outputs) == 1:
            break
        del outputs[index]
        for body in bodies:
            body.remove_output(index + shift)
        for name in ("scan_output_axes", "scan_output_directions"):
            values = attribute(node, name)
            if values is not None:
                graph.set_attribute(node, name, values[: index - first] + values[index - first + 1 :])
    if len(outputs) < len(node.output):
        graph.set_outputs(node, outputs)
        outcome.change(label(node), f"cut unused outputs of {node.op_type}")


def _cut_optional_outputs(graph: Graph, node: NodeProto, outcome: Outcome) -> None:
    """Blank optional outputs that nothing reads."""
    unused = [bool(name) and not graph.use_count(name) for name in node.output]
    if not any(unused) or attribute(node, "training_mode", 0):
        return
    try:
        schema = onnx.defs.get_schema(
            node.op_type, graph.opset(domain_of(node.domain)), domain_of(node.domain)
        )
    except onnx.defs.SchemaError:
        return
    optional = [item.option == onnx.defs.OpSchema.FormalParameterOption.Optional for item in schema.outputs]
    kept = [
        "" if idle and index < len(optional) and optional[index] else name
        for index, (name, idle) in enumerate(zip(node.output, unused, strict=True))
    ]
    if kept != list(node.output):
        graph.set_outputs(node, kept)
        outcome.change(label(node), f"cut unused outputs of {node.op_type}")


def _called(graph: Graph) -> set[FunctionKey]:
    """Return the functions the main graph calls, directly or through others."""
    found: set[FunctionKey] = set()
    waiting: list[Graph] = [graph]
    while waiting:
        for key in _calls(waiting.pop()):
            if key in graph.functions and key not in found:
                found.add(key)
                waiting.append(graph.functions[key])
    return found


def _calls(graph: Graph) -> Iterator[FunctionKey]:
    for node in graph.nodes:
        yield domain_of(node.domain), node.op_type, node.overload
        for bodies in graph.bodies(node).values():
            for body in bodies:
                yield from _calls(body)
