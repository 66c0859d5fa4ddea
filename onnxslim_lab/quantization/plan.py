"""The plan of a static quantization: layers, ranges and weights, measured once, written as often as needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxslim_lab.base import Change, Outcome
from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, find_layers
from onnxslim_lab.quantization.gates import gate_grids
from onnxslim_lab.quantization.numerics import Grid, grid_of, merged, quantize, weight_grid
from onnxslim_lab.quantization.placement import Placement, place
from onnxslim_lab.quantization.ranges import Method, Range, allow_for_unseen, choose_range
from onnxslim_lab.quantization.scheme import Scheme
from onnxslim_lab.quantization.shielding import keep_float, keep_on_codes
from onnxslim_lab.quantization.static_layers import Key, StaticLayer, bias_of, weight_axis, weight_of
from onnxslim_lab.quantization.static_types import widened, widens
from onnxslim_lab.quantization.sums import write_sums
from onnxslim_lab.quantization.terms import write_terms
from onnxslim_lab.quantization.unrolling import Unroller
from onnxslim_lab.quantization.writer import GraphWriter, widen_for_bias
from onnxslim_lab.shapes import Dim
from onnxslim_lab.statistics import Statistics, ValueStatistics
from onnxslim_lab.statistics.collected import Place, node_place
from onnxslim_lab.statistics.collected import place as place_of

Shape = tuple[Dim, ...] | None
Codes = tuple[np.ndarray[Any, Any], Grid]


@dataclass
class Plan:
    """Everything that writing a quantized model takes.

    Attributes:
        model: The prepared float model; copies of it are what `write` takes.
        layers: The layers that can run on codes.
        scheme: The types.
        statistics: Of every value that any choice of these layers quantizes.
        tables: Gather layers whose tables may be stored in codes.
        elements: How many a value has, by name, where that is known.
        rounded: Codes of weights that were rounded otherwise than to nearest, by layer name.
        methods: Ways to choose the ranges of single values.
        method: The way for the others; None: the scheme's.
        shifts: What their rounding takes from the mean of each output, to be added to the bias.
        summed: Names of Conv layers that give the sums of products in float, unrounded, as ConvInteger does.
        residuals: Adds between layers on codes that are computed in float.
        doubled: Names of layers that read their input as two terms (see terms); their results are not rounded.
    """

    model: Graph
    layers: list[StaticLayer]
    scheme: Scheme
    statistics: Statistics
    tables: Sequence[Layer] = ()
    elements: Mapping[str, int] = field(default_factory=dict)
    rounded: dict[str, Codes] = field(default_factory=dict)
    shifts: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    methods: dict[tuple[Place, str], Method] = field(default_factory=dict)
    method: Method | None = None
    summed: set[str] = field(default_factory=set)
    residuals: set[Key] = field(default_factory=set)
    doubled: set[str] = field(default_factory=set)
    _ranges: dict[tuple[Place, str, Method], Range] = field(default_factory=dict)
    _weights: dict[str, Codes] = field(default_factory=dict)
    _roots: dict[Place, dict[str, str]] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers that can run on codes."""
        return sum(layer.macs or 0 for layer in self.layers)

    @property
    def ranges(self) -> Method:
        """The way that ranges are chosen in, but for single values."""
        return self.method or self.scheme.ranges

    @property
    def parameters(self) -> int:
        """Elements of the weights of these layers."""
        return sum(layer.layer.parameters for layer in self.layers)

    def use_ranges(self, method: Method) -> None:
        """Choose the ranges of activations in another way from now on."""
        self.method = method
        self._weights.clear()  # a scale may have made room for a bias

    def write(
        self, graph: Graph, *, without: Iterable[str] = (), only: Iterable[str] | None = None
    ) -> Outcome:
        """Quantize layers of a copy of the model, in place.

        Args:
            graph: A copy of `model`, or the model itself.
            without: Names of layers that stay float.
            only: Names of the layers to quantize; None: all.

        Returns:
            One change for each layer.

        Raises:
            ParameterError: No layer has such a name.
        """
        chosen = self._chosen(without, only)
        outcome = Outcome()
        places: list[tuple[list[tuple[StaticLayer, Layer]], Placement]] = []
        for part in graph.walk():
            found = self._here(part, chosen)
            if found:
                places.append((found, self._place(part, self._single(found))))
        stored: dict[tuple[Any, ...], tuple[str, list[str]]] = {}
        for found, placed in places:
            alone = {layer.node.input[0] for one, layer in found if one.name in self.doubled} - set(
                placed.roots
            )
            own = {value: self._input_grid(placed.graph, value) for value in alone}
            writer = GraphWriter(placed, self.grids(placed) | own)
            for planned, layer in found:
                self._write_layer(writer, planned, layer, stored, outcome)
            outcome.changes += self._table_changes(placed)
            shapes = {planned.name: placed.graph.shape_of(layer.node.input[0]) for planned, layer in found}
            writer.write_activations()
            self._write_sums(writer, found, shapes, outcome)
        if self.scheme.profile.is_onnxruntime:
            for part in graph.walk():
                keep_float(part)
                keep_on_codes(part)
        return outcome

    def _write_sums(
        self,
        writer: GraphWriter,
        found: Sequence[tuple[StaticLayer, Layer]],
        shapes: Mapping[str, Shape],
        outcome: Outcome,
    ) -> None:
        """Write the layers whose results stay float otherwise than by a Conv, and those that read two terms."""
        unroller = Unroller(writer.graph)
        sums: list[tuple[str, NodeProto]] = []
        split: dict[str, tuple[str, str]] = {}
        for planned, layer in found:
            name, nodes, bias = planned.name, [layer.node], ""
            doubled = name in self.doubled
            grid = writer.grid(layer.node.input[0]) if doubled else None
            if layer.op_type == "Conv" and (doubled or name in self.summed):
                product = unroller.write(layer.node, name, shapes[name], apart=doubled)
                if product:
                    nodes, bias = [product.node], product.bias
            if grid:
                nodes.append(write_terms(writer, nodes[0], grid, split, bias))
            sums += [
                (name, node)
                for node in nodes
                if node.op_type == "Conv" and name in self.summed | self.doubled
            ]
        write_sums(writer.graph, sums, outcome)

    def placements(self, without: Iterable[str] = ()) -> list[Placement]:
        """Return where values are quantized, graph by graph, when all layers but some run on codes.

        Raises:
            ParameterError: No layer has such a name.
        """
        chosen = self._chosen(without, None).values()
        found = []
        for part in self.model.walk():
            here = [(planned, planned.layer) for planned in chosen if planned.layer.graph is part]
            if here:
                found.append(self._place(part, self._single(here)))
        return found

    def _single(self, found: Iterable[tuple[StaticLayer, Layer]]) -> list[tuple[StaticLayer, Layer]]:
        """Return the layers that read one term, all that placement knows as layers."""
        return [(planned, layer) for planned, layer in found if planned.name not in self.doubled]

    def _input_grid(self, part: Graph, value: str) -> Grid:
        """Return the grid of the first term of what a layer reads: twice as wide as all that was seen.

        With nearly 16 bits, no range need clip, and one of them is worth it that louder sound than seen is read too.
        """
        where = place_of(part)
        if where not in self._roots:
            here = [planned.layer for planned in self.layers if place_of(planned.layer.graph) == where]
            self._roots[where] = place_all(here, self.scheme, self.tables).roots
        scheme, root = self.scheme, self._roots[where][value]
        statistics = self.statistics_of(part, root)
        low, high = choose_range(
            statistics, scheme.activations, "minmax", symmetric=scheme.symmetric_activations
        )
        return self._activation_grid(part, value, 2 * low, 2 * high)

    def _place(self, part: Graph, found: Sequence[tuple[StaticLayer, Layer]]) -> Placement:
        return place(
            part,
            [layer for _, layer in found],
            self.scheme.profile.operators,
            by_codes=self.scheme.by_codes,
            summed=[id(layer.node) for planned, layer in found if planned.name in self.summed],
            tables=nodes_of(part, self.tables),
            floats=[
                id(node) for node in part.nodes if self.residuals and node_place(part, node) in self.residuals
            ],
        )

    def _chosen(self, without: Iterable[str], only: Iterable[str] | None) -> dict[Key, StaticLayer]:
        names = {layer.name for layer in self.layers}
        barred = set(without)
        wanted = names if only is None else set(only)
        for name in barred | wanted:
            if name not in names:
                raise ParameterError(f"no quantized layer {quote(name)}{suggest(name, names)}")
        return {layer.key: layer for layer in self.layers if layer.name in wanted - barred}

    @staticmethod
    def _here(part: Graph, chosen: Mapping[Key, StaticLayer]) -> list[tuple[StaticLayer, Layer]]:
        pairs = []
        for layer in find_layers(part)[0]:
            planned = chosen.get(node_place(part, layer.node)) if layer.role == "weight" else None
            if planned is not None:
                pairs.append((planned, layer))
        return pairs

    def grids(self, placed: Placement) -> dict[str, Grid]:
        """Return the grids of a placement's root values and constants."""
        scheme = self.scheme
        grids = {}
        for root in set(placed.roots.values()):
            low, high = self.range(placed.graph, root)
            bounds = placed.bounds.get(root)
            if bounds and not scheme.symmetric_activations:
                low, high = max(low, bounds[0]), min(high, bounds[1])
            grids[root] = self._activation_grid(placed.graph, root, low, high)
        for node in placed.gates.values():
            _, high = self.range(placed.graph, node.input[0])
            pair = gate_grids(placed.graph, node, high, scheme.activations)
            grids.update(zip((node.input[0], node.output[0]), pair, strict=True))
        for value in placed.constants:
            if value in placed.tables:
                grids[value] = grids[placed.roots[placed.tables[value]]]
                continue
            array = placed.graph.constant(value)
            assert array is not None
            grids[value] = self._activation_grid(placed.graph, value, float(array.min()), float(array.max()))
        return grids

    def range(self, graph: Graph, value: str) -> Range:
        """Return the range chosen for a value."""
        scheme = self.scheme
        where = place_of(graph), value
        method = self.methods.get(where, self.ranges)
        key = (*where, method)
        if key not in self._ranges:
            statistics = self.statistics_of(graph, value)
            ends = choose_range(
                statistics,
                scheme.activations,
                method,
                symmetric=scheme.symmetric_activations,
                percentile=scheme.percentile,
            )
            self._ranges[key] = allow_for_unseen(ends, statistics) if scheme.ranges == "auto" else ends
        return self._ranges[key]

    def statistics_of(self, graph: Graph, value: str) -> ValueStatistics:
        """Return the statistics of a value where they were measured."""
        scope = graph.scope_of(value)
        return self.statistics[scope or graph, value]

    def _activation_grid(self, graph: Graph, value: str, low: float, high: float) -> Grid:
        scale, zero_point = grid_of(
            low,
            high,
            self.scheme.activations,
            symmetric=self.scheme.symmetric_activations,
            dtype=np.float16 if graph.dtype_of(value) == 10 else np.float32,
        )
        return Grid(self.scheme.activations, scale, zero_point)

    def weight(self, planned: StaticLayer, layer: Layer) -> Codes:
        """Return the codes of a layer's weight, as its node sees it, and their grid."""
        if planned.name in self.rounded:
            return self.rounded[planned.name]
        if planned.name not in self._weights:
            array = weight_of(layer)
            grid = self.grid_of_weight(layer, array)
            self._weights[planned.name] = quantize(array, grid), grid
        return self._weights[planned.name]

    def grid_of_weight(self, layer: Layer, array: np.ndarray[Any, Any]) -> Grid:
        """Return the grid of a layer's weight; it leaves room for the bias in int32."""
        scheme = self.scheme
        half = layer.stored.used_type == 10
        grid = weight_grid(
            array,
            scheme.weights,
            granularity="channel" if scheme.per_channel else "tensor",
            axis=weight_axis(layer),
            symmetric=scheme.symmetric_weights,
            method=scheme.weight_ranges,
            reduce_range=scheme.reduce_range,
            dtype=np.float16 if half else np.float32,
        )
        bias = bias_of(layer)
        if bias is None or half:
            return grid
        value = layer.node.input[0]
        low, high = self.range(layer.graph, value)
        return widen_for_bias(grid, self._activation_grid(layer.graph, value, low, high), bias)

    def _table_changes(self, placed: Placement) -> Iterator[Change]:
        """Yield one change for each table that is about to be stored in codes."""
        for table, value in placed.tables.items():
            array = placed.graph.constant(table)
            assert array is not None
            kind = self.scheme.activations
            yield Change(
                table,
                f"looked up in codes: {kind}, on the grid of {quote(value)}",
                weights=(table,),
                bytes_before=array.nbytes,
                bytes_after=array.size * kind.bits // 8,
                detail={"bits": kind.bits},
            )

    def _write_layer(
        self,
        writer: GraphWriter,
        planned: StaticLayer,
        layer: Layer,
        stored: dict[tuple[Any, ...], tuple[str, list[str]]],
        outcome: Outcome,
    ) -> None:
        codes, grid = self.weight(planned, layer)
        grid = merged(grid)
        owner = layer.weight_graph
        key = (id(owner), layer.weight, grid.axis, grid.scale.tobytes(), codes.shape)
        before = layer.parameters * (2 if layer.stored.data_type == 10 else 4)
        if key not in stored:
            name = owner.fresh_name("w")
            owner.set_constant(name, codes, grid.kind.data_type)
            brief = layer.op_type == "Conv"
            if widens(self.scheme.activations, grid.kind, self.scheme.profile):
                name, read = writer.widen(owner, name), widened(grid)
            else:
                read = grid
            stored[key] = name, writer.parameters(read, owner=owner, brief=brief)
        name, parameters = stored[key]
        writer.write_weight(layer, name, parameters, grid.axis)
        folds = self.scheme.profile.is_onnxruntime
        if layer.stored.used_type != 10:
            writer.write_bias(layer, grid, self.shifts.get(planned.name), parameters[0] if folds else "")
        outcome.changes.append(
            Change(
                planned.name,
                f"runs on codes: weights {grid.kind}, activations {self.scheme.activations}"
                + (" of two terms" if planned.name in self.doubled else ""),
                weights=(layer.weight,),
                bytes_before=before,
                bytes_after=codes.size * grid.kind.bits // 8,
                detail={"macs": planned.macs or 0, "bits": grid.kind.bits},
            )
        )


def nodes_of(part: Graph, layers: Iterable[Layer]) -> list[int]:
    """Return the ids of the nodes of one graph that layers have, in the model it is of or a copy of it."""
    keys = {node_place(layer.graph, layer.node) for layer in layers}
    return [id(node) for node in part.nodes if keys and node_place(part, node) in keys]


def place_all(layers: Sequence[Layer], scheme: Scheme, tables: Sequence[Layer]) -> Placement:
    """Return where values of one graph are quantized when these layers of it run on codes, nothing in float."""
    part = layers[0].graph
    return place(
        part,
        layers,
        scheme.profile.operators,
        by_codes=scheme.by_codes,
        tables=nodes_of(part, tables),
    )


def values_of(
    model: Graph, layers: Collection[StaticLayer], scheme: Scheme, tables: Sequence[Layer] = ()
) -> list[tuple[Graph, str]]:
    """Return every value that quantizing these layers, or any of them, needs the range of."""
    found: dict[tuple[int, str], tuple[Graph, str]] = {}
    for part in model.walk():
        here = [planned.layer for planned in layers if planned.layer.graph is part]
        if here:
            for value in place_all(here, scheme, tables).roots:
                scope = part.scope_of(value) or part
                found[id(scope), value] = scope, value
    return list(found.values())
