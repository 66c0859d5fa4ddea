"""Inspect: what is in a model - operators, parameters, multiply-accumulates, bytes, warnings."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from onnx import TensorProto
from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.errors import one_line
from onnxslim_lab.graph import Graph, domain_of, is_op
from onnxslim_lab.layers import Layer
from onnxslim_lab.macs import model_macs
from onnxslim_lab.shapes import shape_from_type

SCHEMA_VERSION = 1
_MANY_CONSTANTS = 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ValueReport(_Part):
    """An input or output: its type and shape, dynamic axes by name ("?" when nameless)."""

    name: str
    type: str
    shape: tuple[int | str, ...] | None


class LayerReport(_Part):
    """A node with weights."""

    node: str
    op_type: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    macs: int | None
    density: float | None


class Inspection(_Part):
    """Everything `inspect` says; `operators` counts bodies and functions too."""

    schema_version: int = SCHEMA_VERSION
    source: str
    file_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[ValueReport, ...]
    outputs: tuple[ValueReport, ...]
    nodes: int
    operators: dict[str, int]
    graphs: int
    functions: tuple[str, ...]
    parameters: int
    bytes_by_dtype: dict[str, int]
    macs: int | None
    macs_unknown: int
    layers: tuple[LayerReport, ...]
    dynamic_axes: tuple[str, ...]
    metadata: dict[str, str]
    warnings: tuple[str, ...]

    def table(self) -> Group:
        """Return what a person wants to see."""
        facts = Table(show_header=False, title=_safe(self.source), title_justify="left")
        opsets = ", ".join(f"{name or 'ai.onnx'} {number}" for name, number in self.opsets.items())
        facts.add_row("file", f"{self.file_bytes:,} bytes, IR {self.ir_version}, {_safe(opsets)}")
        facts.add_row("producer", _safe(self.producer))
        facts.add_row("inputs", "\n".join(map(_signature, self.inputs)))
        facts.add_row("outputs", "\n".join(map(_signature, self.outputs)))
        facts.add_row("graphs", f"{self.graphs} (main graph, bodies and functions)")
        facts.add_row("nodes", f"{self.nodes:,}")
        facts.add_row("parameters", f"{self.parameters:,}")
        unknown = f" and {self.macs_unknown} layers of unknown shape" if self.macs_unknown else ""
        macs = "unknown" if self.macs is None else f"{self.macs:,}"
        facts.add_row("MACs", f"{macs}{unknown} (dynamic axes counted as 1)")
        stored = ", ".join(f"{name} {size:,} B" for name, size in self.bytes_by_dtype.items())
        facts.add_row("tensors", stored)
        operators = ", ".join(f"{_safe(name)} {count}" for name, count in self.operators.items())
        facts.add_row("operators", operators)
        layers = Table(title="layers", title_justify="left")
        for heading in ("node", "operator", "weight", "shape", "type"):
            layers.add_column(heading, overflow="fold")
        for heading in ("parameters", "bytes", "MACs", "nonzero"):
            layers.add_column(heading, justify="right")
        for layer in self.layers:
            layers.add_row(
                _safe(layer.node),
                layer.op_type,
                _safe(layer.weight),
                "x".join(map(str, layer.shape)),
                layer.dtype,
                f"{layer.parameters:,}",
                f"{layer.bytes:,}",
                "" if layer.macs is None else f"{layer.macs:,}",
                "" if layer.density is None else f"{layer.density:.0%}",
            )
        warnings = [f"[yellow]warning: {_safe(warning)}[/yellow]" for warning in self.warnings]
        return Group(facts, layers, *warnings)


def inspect(graph: Graph, progress: Progress = silent) -> Inspection:
    """Return what is in a model; only weights are read, one at a time."""
    graph.infer()
    operators: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    parameters = graphs = constants = 0
    for part in graph.walk():
        graphs += 1
        for node in part.nodes:
            if is_op(node, "Constant"):
                constants += 1
            else:
                domain = domain_of(node.domain)
                operators[f"{domain}.{node.op_type}" if domain else node.op_type] += 1
        for name in constant_names(part):
            kind, shape, size = part.constant_type(name) or (0, (), 0)
            stored[TensorProto.DataType.Name(kind).lower()] += size
            if kind not in (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING):
                parameters += math.prod(shape)
    layers = []
    counted = model_macs(graph).layers
    for number, (layer, count) in enumerate(counted):
        progress(number, len(counted), "reading weights")
        layers.append(_layer(layer, count))
    known = [layer.macs for layer in layers if layer.macs is not None]
    return Inspection(
        source=graph.source.name,
        file_bytes=graph.source.total_bytes,
        ir_version=graph.ir_version,
        opsets=graph.opsets,
        producer=" ".join(filter(None, graph.producer_name)),
        inputs=tuple(_value(name, kind) for name, kind in graph.input_types().items()),
        outputs=tuple(_value(name, kind) for name, kind in graph.output_types().items()),
        nodes=sum(operators.values()),
        operators=dict(operators.most_common()),
        graphs=graphs,
        functions=tuple(".".join(filter(None, key)) for key in graph.functions),
        parameters=parameters,
        bytes_by_dtype=dict(stored.most_common()),
        macs=sum(known) if known else None,
        macs_unknown=sum(layer.macs is None for layer in layers),
        layers=tuple(layers),
        dynamic_axes=tuple(_dynamic_axes(graph)),
        metadata=graph.metadata,
        warnings=tuple(_warnings(graph, operators, constants)),
    )


def constant_names(graph: Graph) -> list[str]:
    """Return the names of a graph's own dense constants: initializers and Constant nodes."""
    nodes = [node.output[0] for node in graph.nodes if is_op(node, "Constant")]
    return [*graph.initializers, *(name for name in nodes if graph.is_constant(name))]


def _layer(layer: Layer, macs: int | None) -> LayerReport:
    kind, shape, size = layer.weight_graph.constant_type(layer.weight) or (0, (), 0)
    array = layer.weight_graph.constant(layer.weight)
    density = None
    if array is not None and array.size:
        density = float((array != 0).sum()) / array.size
    return LayerReport(
        node=layer.node.name or f"{layer.op_type} -> {layer.node.output[0]}",
        op_type=layer.op_type,
        weight=layer.weight,
        shape=shape,
        dtype=TensorProto.DataType.Name(kind).lower(),
        parameters=layer.parameters,
        bytes=size,
        macs=macs,
        density=density,
    )


def _value(name: str, kind: Any) -> ValueReport:
    which = kind.WhichOneof("value") or "unknown"
    if which != "tensor_type":
        return ValueReport(name=name, type=which.removesuffix("_type"), shape=None)
    shape = shape_from_type(kind)
    shown = None if shape is None else tuple("?" if size is None else size for size in shape)
    return ValueReport(
        name=name, type=TensorProto.DataType.Name(kind.tensor_type.elem_type).lower(), shape=shown
    )


def _dynamic_axes(graph: Graph) -> list[str]:
    found = []
    for name, kind in graph.input_types().items():
        for axis, size in enumerate(shape_from_type(kind) or ()):
            if not isinstance(size, int):
                found.append(f"{name}[{axis}]" + (f" = {size}" if size else ""))
    return found


def _warnings(graph: Graph, operators: Counter[str], constants: int) -> list[str]:
    found = []
    for name, declared, inferred in graph.disagreements():
        found.append(f"value '{name}' is declared as {declared} but inference gives {inferred}")
    if operators["BatchNormalization"]:
        found.append(f"{operators['BatchNormalization']} BatchNormalization nodes may fuse: run simplify")
    if constants > _MANY_CONSTANTS:
        found.append(f"{constants} Constant nodes hold values that could be initializers: run simplify")
    unknown = sorted({name.rpartition(".")[0] for name in operators if "." in name})
    if unknown:
        found.append(f"operators of other domains: {', '.join(unknown)}; not every runtime has them")
    if 0 < graph.opset() < 11:
        found.append(f"opset {graph.opset()} is old: some encodings and fusions need 11, 13 or 21")
    return found


def _signature(value: ValueReport) -> str:
    shape = "" if value.shape is None else "[" + ", ".join(map(str, value.shape)) + "]"
    return _safe(f"{value.name}: {value.type}{shape}")


def _safe(text: str) -> str:
    return escape(one_line(text, limit=200))
