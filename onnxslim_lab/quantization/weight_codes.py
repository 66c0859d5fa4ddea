"""Weights that come as 8-bit codes times a scale: decoded while a model is quantized, so that layers show.

    codes (int8) -> Cast -> Mul (scale) -> MatMul        as exporters write weights that they have rounded

Decoded, such a weight is what any float weight is. Its codes come back by themselves where the new scales are
the old ones, and `restore_codes` puts them back where nothing was quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph, domain_of, is_op
from onnxslim_lab.statistics.collected import Place, place

_CODES = (TensorProto.INT8, TensorProto.UINT8)
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Einsum", "LSTM", "GRU", "RNN"})


@dataclass(frozen=True, eq=False)
class Decoded:
    """A weight that was decoded.

    Attributes:
        where: The graph.
        value: The weight's name.
        array: What it was decoded to.
        cast, product: Copies of the nodes that computed it.
        codes, scale: The constants that they read: name and values.
    """

    where: Place
    value: str
    array: Array
    cast: NodeProto
    product: NodeProto
    codes: tuple[str, Array]
    scale: tuple[str, Array]


def decode_codes(model: Graph) -> list[Decoded]:
    """Replace weights that layers read as Mul(Cast(codes), scale) by their values; return what they were.

    Args:
        model: The main graph, edited; local functions are left as they are.
    """
    found = []
    for graph in model.walk():
        if graph.is_function:
            continue
        for product, cast, scale in list(_weights(graph)):
            codes = cast.input[0]
            array = graph.constant(codes), graph.constant(scale)
            if array[0] is None or array[1] is None:
                continue
            values = np.asarray(array[0].astype(array[1].dtype) * array[1])
            one = Decoded(
                where=place(graph),
                value=product.output[0],
                array=values,
                cast=deepcopy(cast),
                product=deepcopy(product),
                codes=(codes, np.array(array[0])),
                scale=(scale, np.array(array[1])),
            )
            graph.remove(product, cast)
            graph.set_constant(one.value, values)
            for name in (codes, scale):
                if name in graph.initializers and not graph.use_count(name):
                    graph.remove_constant(name)
            found.append(one)
    return found


def restore_codes(model: Graph, decoded: Sequence[Decoded]) -> int:
    """Give weights that are still what `decode_codes` made of them their codes back; return how many."""
    graphs = {place(part): part for part in model.walk()}
    count = 0
    for one in decoded:
        graph = graphs.get(one.where)
        if graph is None or one.value not in graph.initializers:
            continue
        array = graph.constant(one.value)
        if array is None or not graph.use_count(one.value) or not np.array_equal(array, one.array):
            continue
        graph.remove_constant(one.value)
        renamed = {}
        for name, values in (one.codes, one.scale):
            known = graph.constant(name) if graph.defines(name) else None
            same = known is not None and known.dtype == values.dtype and np.array_equal(known, values)
            renamed[name] = name if same or not graph.defines(name) else graph.fresh_name(name)
            if not same:
                graph.set_constant(renamed[name], values)
        renamed[one.cast.output[0]] = inner = graph.fresh_name(one.cast.output[0])
        to = next(item.i for item in one.cast.attribute if item.name == "to")
        graph.emit("Cast", [renamed[one.codes[0]]], [inner], name=one.cast.name, to=to)
        inputs = [renamed.get(name, name) for name in one.product.input]
        graph.emit("Mul", inputs, [one.value], name=one.product.name)
        count += 1
    return count


def _weights(graph: Graph) -> Iterator[tuple[NodeProto, NodeProto, str]]:
    """Yield (Mul, Cast, name of the scale) of every weight in codes that a layer of the graph reads."""
    for product in graph.nodes:
        if not is_op(product, "Mul") or graph.is_output(product.output[0]):
            continue
        if not any(
            reader.op_type in _LAYERS and not domain_of(reader.domain)
            for reader in graph.consumers(product.output[0])
        ):
            continue
        for value, scale in (product.input, product.input[::-1]):
            cast = graph.producer(value)
            if cast is None or not is_op(cast, "Cast") or graph.use_count(value) != 1:
                continue
            kind, wide = graph.constant_type(cast.input[0]), graph.constant_type(scale)
            if kind and wide and kind[0] in _CODES and wide[0] in (TensorProto.FLOAT, TensorProto.FLOAT16):
                yield product, cast, scale
                break
