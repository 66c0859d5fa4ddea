"""Operators with bodies: If, Loop, Scan, SequenceMap and FlexAttention over planned bodies.

Each is made once, from its bodies and attributes, and gives a function that takes the node's own inputs and
then what the bodies capture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from onnx import TypeProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.kernels.dtypes import dtype_of_number
from onnxslim_lab.running.attention import make_flex_attention
from onnxslim_lab.weights import Array
from onnxslim_lab.worker.messages import Value

Attributes = Mapping[str, Any]


class Body(Protocol):
    """A planned body."""

    graph: Graph

    def call(self, arguments: Sequence[Value], captured: Sequence[Value] = ()) -> tuple[Value, ...]:
        """Run the body and return its outputs."""


Bodies = Mapping[str, Body]
Control = Callable[..., tuple[Value, ...]]


def make_if(bodies: Bodies, attributes: Attributes, count: int, opset: int) -> Control:  # noqa: ARG001
    """Return If: the outputs of the branch that the condition chooses."""
    then, other = bodies["then_branch"], bodies["else_branch"]

    def run(cond: Array, *captured: Value) -> tuple[Value, ...]:
        return (then if truth(cond) else other).call((), captured)

    return run


def make_loop(bodies: Bodies, attributes: Attributes, count: int, opset: int) -> Control:  # noqa: ARG001
    """Return Loop: carried values, then the values that each turn adds, stacked on a new first axis."""
    body = bodies["body"]
    carried = count - 2

    def run(*arguments: Value) -> tuple[Value, ...]:
        most, go_on = arguments[0], arguments[1] if count > 1 else None
        state, captured = list(arguments[2:count]), arguments[count:]
        turns = None if most is None else int(np.asarray(most).item())
        going = go_on is None or truth(go_on)
        collected: list[list[Array]] = [[] for _ in body.graph.outputs[1 + carried :]]
        turn = 0
        while going and (turns is None or turn < turns):
            condition = np.asarray(going)
            given = [np.asarray(turn, np.int64), condition, *state]
            state.clear()
            results = body.call(given, captured)
            going = truth(results[0])
            state.extend(results[1 : 1 + carried])
            collect(collected, results[1 + carried :])
            turn += 1
        kinds = [body.graph.output_types()[name] for name in body.graph.outputs[1 + carried :]]
        return (*state, *(stack(items, kind, 0) for items, kind in zip(collected, kinds, strict=True)))

    return run


def make_scan(bodies: Bodies, attributes: Attributes, count: int, opset: int) -> Control:
    """Return Scan: carried values, then what each turn gives, stacked along an axis."""
    body = bodies["body"]
    scanned = int(attributes["num_scan_inputs"])
    if opset < 9:
        return _scan_batches(body, attributes, count, scanned)
    carried = count - scanned
    made = len(body.graph.outputs) - carried
    input_axes = attributes.get("scan_input_axes", [0] * scanned)
    output_axes = attributes.get("scan_output_axes", [0] * made)
    backwards = [bool(flag) for flag in attributes.get("scan_input_directions", [0] * scanned)]
    reverse = [bool(flag) for flag in attributes.get("scan_output_directions", [0] * made)]

    def run(*arguments: Any) -> tuple[Value, ...]:
        sources = [
            turned(np.moveaxis(value, axis, 0), flag)
            for value, axis, flag in zip(arguments[carried:count], input_axes, backwards, strict=True)
        ]
        state, collected = scan(body, list(arguments[:carried]), sources, arguments[count:])
        kinds = [body.graph.output_types()[name] for name in body.graph.outputs[carried:]]
        stacked = [
            stack(items[::-1] if flag else items, kind, axis)
            for items, kind, axis, flag in zip(collected, kinds, output_axes, reverse, strict=True)
        ]
        return (*state, *stacked)

    return run


def scan(
    body: Body, state: list[Value], sources: Sequence[Array], captured: Sequence[Value]
) -> tuple[list[Value], list[list[Array]]]:
    """Run a body once for each slice of the sources; return the carried values and what each turn gave.

    Raises:
        ValueError: The sources have different lengths.
    """
    lengths = {len(source) for source in sources}
    if len(lengths) > 1:
        raise ValueError(f"the scan inputs have different lengths: {sorted(lengths)}")
    carried = len(state)
    collected: list[list[Array]] = [[] for _ in body.graph.outputs[carried:]]
    for turn in range(lengths.pop() if lengths else 0):
        given = [*state, *(np.asarray(source[turn]) for source in sources)]
        state.clear()
        results = body.call(given, captured)
        state.extend(results[:carried])
        collect(collected, results[carried:])
    return state, collected


def _scan_batches(body: Body, attributes: Attributes, count: int, scanned: int) -> Control:
    """Return Scan of opset 8: a batch axis first, the sequence axis second, a length for each batch item."""
    carried = count - 1 - scanned
    backwards = [bool(flag) for flag in attributes.get("directions", [0] * scanned)]

    def run(*arguments: Any) -> tuple[Value, ...]:
        sources = [
            turned(value, flag, axis=1)
            for value, flag in zip(arguments[1 + carried : count], backwards, strict=True)
        ]
        batch, longest = sources[0].shape[:2]
        lengths = [longest] * batch if arguments[0] is None else arguments[0].tolist()
        states: list[list[Any]] = []
        outputs: list[list[Any]] = []
        kinds = [body.graph.output_types()[name] for name in body.graph.outputs[carried:]]
        for item, length in enumerate(lengths):
            state: list[Value] = [np.asarray(value[item]) for value in arguments[1 : 1 + carried]]
            parts = [
                source[item][longest - length :] if flag else source[item][:length]
                for source, flag in zip(sources, backwards, strict=True)
            ]
            state, collected = scan(body, state, parts, arguments[count:])
            states.append(state)
            stacked = [stack(items, kind, 0) for items, kind in zip(collected, kinds, strict=True)]
            outputs.append([_padded(value, longest) for value in stacked])
        return tuple(np.stack(column) for group in (states, outputs) for column in zip(*group, strict=True))

    return run


def make_sequence_map(bodies: Bodies, attributes: Attributes, count: int, opset: int) -> Control:  # noqa: ARG001
    """Return SequenceMap: sequences of what the body gives for the items of the inputs."""
    body = bodies["body"]

    def run(sequence: Sequence[Any], *arguments: Any) -> tuple[Value, ...]:
        others, captured = arguments[: count - 1], arguments[count - 1 :]
        for other in others:
            if isinstance(other, list) and len(other) != len(sequence):
                raise ValueError(f"sequences of {len(sequence)} and {len(other)} tensors do not go together")
        results = [
            body.call(
                (item, *(other[turn] if isinstance(other, list) else other for other in others)), captured
            )
            for turn, item in enumerate(sequence)
        ]
        return tuple([result[position] for result in results] for position in range(len(body.graph.outputs)))

    return run


CONTROL: Mapping[tuple[str, str], Callable[[Bodies, Attributes, int, int], Control]] = {
    ("", "If"): make_if,
    ("", "Loop"): make_loop,
    ("", "Scan"): make_scan,
    ("", "SequenceMap"): make_sequence_map,
    ("ai.onnx.preview", "FlexAttention"): make_flex_attention,
}
"""What makes the function of an operator with bodies, by domain and operator."""


def truth(condition: Any) -> bool:
    """Return a condition as a bool.

    Raises:
        ValueError: It is not one value.
    """
    array = np.asarray(condition)
    if array.size != 1:
        raise ValueError(f"a condition is one value, this has shape {list(array.shape)}")
    return bool(array.item())


def collect(collected: Sequence[list[Array]], results: Sequence[Any]) -> None:
    """Add one turn's results to the lists of each output."""
    for items, result in zip(collected, results, strict=True):
        items.append(result)


def turned(array: Array, backwards: bool, axis: int = 0) -> Array:
    """Return the array, reversed along an axis when asked for."""
    return np.flip(array, axis) if backwards else array


def stack(items: Sequence[Array], kind: TypeProto, axis: int) -> Array:
    """Return tensors stacked along a new axis; without any, an empty one of the declared type.

    Raises:
        ValueError: The shapes differ.
    """
    if items:
        return np.stack(items, axis)
    shape = [dim.dim_value for dim in kind.tensor_type.shape.dim]
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 0)
    return np.zeros(shape, dtype_of_number(kind.tensor_type.elem_type))


def _padded(array: Array, length: int) -> Array:
    """Return the array with zeros added along the first axis up to a length."""
    if len(array) == length:
        return array
    result = np.zeros((length, *array.shape[1:]), array.dtype)
    result[: len(array)] = array
    return result
