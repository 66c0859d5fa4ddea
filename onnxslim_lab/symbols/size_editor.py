"""Editing one graph by what is known of its sizes: constants, values read from elsewhere, shorter chains."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxslim_lab.base import Outcome
from onnxslim_lab.graph import Graph
from onnxslim_lab.symbols.dimensions import Expression, Size
from onnxslim_lab.symbols.facts import Elements, Facts
from onnxslim_lab.symbols.targets import same_shape
from onnxslim_lab.weights import Array

MOST_CONSTANT = 64  # elements of a constant made here: smaller than the nodes it replaces
MOST_CONE = 64  # nodes looked at to see what a shorter computation would save
MOST_SOURCES = 4  # values looked at to find a run of sizes

Key = tuple[int, tuple[int, ...], tuple[Size, ...]]  # type, shape and elements of an integer tensor
Run = list[int] | tuple[str, int, int]  # constants, or (value, first axis, end axis)


class SizeEditor:
    """Edits a graph in the order of its nodes, knowing what the graphs around it computed before.

    What `Facts` says of a value stays true while the graph is edited, since edits keep what values hold.
    """

    def __init__(self, facts: Facts, outcome: Outcome, parent: SizeEditor | None = None) -> None:
        self.facts = facts
        self.graph: Graph = facts.graph
        self.outcome = outcome
        self.parent = parent
        self.seen: dict[Key, str] = {}
        self.constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        self.sources: dict[Size, list[tuple[str, int]]] = {}  # size -> axes of inputs of Shape nodes

    # ------------------------------------------------------------------ small edits

    def constant(self, values: Array | list[int], data_type: int = TensorProto.INT64) -> str:
        """Return the name of a constant of this graph, made once."""
        array = np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(data_type))
        key = (data_type, array.shape, array.tobytes())
        if key not in self.constants:
            name = self.graph.fresh_name("sizes")
            self.graph.set_constant(name, array, data_type)
            self.constants[key] = name
        return self.constants[key]

    def scalar(self, value: int) -> str:
        """Return the name of an int64 constant without axes."""
        return self.constant(np.array(value))

    def replace(self, node: NodeProto, source: str, why: str) -> None:
        """Remove a node of one output; `source` takes the output's place, by an Identity if it must."""
        value = node.output[0]
        served = self.graph.replace_value(value, source)
        self.graph.remove(node)
        if not served:
            self.graph.emit("Identity", [source], [value])
        self.outcome.change(node.name, why)

    def exchange(
        self, node: NodeProto, op_type: str, inputs: list[str], why: str, **attributes: Any
    ) -> NodeProto:
        """Put another operator in the place of a node of one output."""
        self.graph.remove(node)
        self.outcome.change(node.name, why)
        return self.graph.emit(op_type, inputs, [node.output[0]], name=node.name, **attributes)

    def drop(self, node: NodeProto) -> None:
        """Remove a node that nothing reads any more."""
        if not any(self.graph.use_count(value) for value in node.output if value):
            self.graph.remove(node)

    def unchanged(self, node: NodeProto) -> bool:
        """Remove a node whose output has its input's shape, where that means that it is its input."""
        if not same_shape(self.facts.shape(node.input[0]), self.facts.shape(node.output[0])):
            return False
        if not self.graph.replace_value(node.output[0], node.input[0]):
            return False
        self.graph.remove(node)
        self.outcome.change(node.name, f"{node.op_type} to the same shape removed")
        return True

    # ------------------------------------------------------------------ integer tensors

    def shorten(self, node: NodeProto, value: str) -> None:
        """Read a small integer tensor from a constant, an earlier value or a shorter computation."""
        if not value or not self.graph.consumers(value):
            return
        values = self.facts.values(value)
        if values is None:
            return
        key = (self.graph.dtype_of(value), values.shape, tuple(values.reshape(-1).tolist()))
        if all(isinstance(item, int) for item in key[2]):
            if values.size <= MOST_CONSTANT:
                self.graph.replace_uses(value, self.constant(values, key[0]))
                self.outcome.change(node.name, f"{node.op_type} of known sizes became a constant")
            return
        earlier = self.find(key)
        if earlier is not None:
            self.graph.replace_uses(value, earlier)
            self.outcome.change(node.name, f"{node.op_type} repeated what an earlier value holds")
            return
        made = self._compose(node, value, key)
        if made is not None:
            self.graph.replace_uses(value, made)
            self.outcome.change(node.name, "sizes are read in fewer steps")
        self.seen[key] = made or value

    def find(self, key: Key) -> str | None:
        """Return an earlier value of this or a surrounding graph that equals the key."""
        editor: SizeEditor | None = self
        while editor is not None:
            if key in editor.seen:
                return editor.seen[key]
            editor = editor.parent
        return None

    def remember(self, source: str) -> None:
        """Note that sizes can be read from the shape of this value."""
        for axis, size in enumerate(self.facts.shape(source) or ()):
            if isinstance(size, Expression):
                self.sources.setdefault(size, []).append((source, axis))

    def _compose(self, node: NodeProto, value: str, key: Key) -> str | None:
        """Return a new value equal to the key made of fewer nodes than the present chain, else None."""
        if len(key[1]) != 1 or key[0] != TensorProto.INT64 or node.op_type == "Shape":
            return None
        runs = self._runs(key[2])
        if runs is None:
            return None
        cost = int(len(runs) > 1)
        kept = set()
        for run in runs:
            if not isinstance(run, list):
                held = self.find(self._range_key(*run))
                kept.add(held)
                cost += 0 if held else 1 if self.graph.opset() >= 15 else 2
        if cost >= self._cone(node, value, kept):
            return None
        parts = [self.constant(run) if isinstance(run, list) else self._read(*run) for run in runs]
        if len(parts) == 1:
            return parts[0]
        made = self.graph.emit("Concat", parts, axis=0).output[0]
        self._record(made, key)
        return made

    def _record(self, value: str, key: Key) -> None:
        """Note what a value made here holds."""
        self.graph.set_type(value, key[0], key[1])
        values: Elements = np.array(key[2], dtype=object).reshape(key[1])
        self.facts.know(value, key[1], values)
        self.seen[key] = value

    def _runs(self, items: tuple[Size, ...]) -> list[Run] | None:
        """Return items as constant pieces and ranges of axes; None if one is neither."""
        result: list[Run] = []
        index = 0
        while index < len(items):
            item = items[index]
            if isinstance(item, int):
                last = result[-1] if result else None
                if isinstance(last, list):
                    last.append(item)
                else:
                    result.append([item])
                index += 1
                continue
            best: tuple[str, int, int] | None = None
            for source, axis in self.sources.get(item, ())[:MOST_SOURCES]:
                shape = self.facts.shape(source) or ()
                length = 0
                while index + length < len(items) and shape[axis + length :][:1] == (items[index + length],):
                    length += 1
                if best is None or length > best[2] - best[1]:
                    best = (source, axis, axis + length)
            if best is None:
                return None
            result.append(best)
            index += best[2] - best[1]
        return result

    def _range_key(self, source: str, start: int, end: int) -> Key:
        """Return the key of the sizes of a range of axes."""
        shape = self.facts.shape(source) or ()
        return int(TensorProto.INT64), (end - start,), shape[start:end]

    def _read(self, source: str, start: int, end: int) -> str:
        """Return the sizes of a range of axes; one node from opset 15 on, at most two before."""
        shape = self.facts.shape(source)
        assert shape is not None
        key = self._range_key(source, start, end)
        earlier = self.find(key)
        if earlier is not None:
            return earlier
        if self.graph.opset() >= 15:
            limits: dict[str, Any] = {"start": start} if start else {}
            limits |= {"end": end} if end < len(shape) else {}
            made = self.graph.emit("Shape", [source], **limits).output[0]
        else:
            whole = (int(TensorProto.INT64), (len(shape),), shape)
            sizes = self.find(whole)
            if sizes is None:
                sizes = self.graph.emit("Shape", [source]).output[0]
                self._record(sizes, whole)
            if end - start == len(shape):
                return sizes
            made = self.graph.emit("Gather", [sizes, self.constant(list(range(start, end)))]).output[0]
        self._record(made, key)
        return made

    def _cone(self, node: NodeProto, value: str, kept: set[str | None]) -> int:
        """Return how many nodes nothing needs any more once nothing reads the value; `kept` are still read."""
        if self.graph.is_output(value) or len(node.output) > 1:
            return 0
        gone = {id(node)}
        open_nodes = [node]
        while open_nodes and len(gone) < MOST_CONE:
            for name in set(open_nodes.pop().input):
                source = self.graph.producer(name)
                if source is None or source.op_type == "Constant" or id(source) in gone:
                    continue
                outputs = [output for output in source.output if output]
                readers = [reader for output in outputs for reader in self.graph.consumers(output)]
                if (
                    kept.isdisjoint(outputs)
                    and not any(map(self.graph.is_output, outputs))
                    and all(
                        id(reader) in gone or not any(map(self.graph.use_count, filter(None, reader.output)))
                        for reader in readers
                    )
                ):
                    gone.add(id(source))
                    open_nodes.append(source)
        return len(gone)
