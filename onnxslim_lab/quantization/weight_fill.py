"""Weights that ConstantOfShape makes: one value in a few bytes, however many weights there are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from onnxslim_lab.base import Outcome
from onnxslim_lab.graph import Graph, attribute, is_op

_WORTH_A_NODE = 128  # bytes
_FILLS = frozenset(  # types that ConstantOfShape gives since opset 9
    {
        *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL),
        *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
        *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
    }
)
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Einsum"})


def refuse_fills(model: Graph, outcome: Outcome) -> None:
    """Record why weights that are one value repeated are not stored in fewer bits: they have none to spare."""
    for graph, node, shape in _fills(model):
        readers = [reader for reader in graph.consumers(node.output[0]) if reader.op_type in _WEIGHTED]
        for reader in readers:
            if node.output[0] in reader.input[1:2]:
                outcome.refuse(
                    reader.name or reader.output[0],
                    f"ConstantOfShape makes its {math.prod(shape)} weights from one value: codes would not be smaller",
                )


def spread_fills(model: Graph) -> int:
    """Replace each ConstantOfShape of a constant shape by the tensor it makes; return how many there were.

    Their file grows from kilobytes to what the weights take, until `refill` is called.
    """
    count = 0
    for graph, node, shape in list(_fills(model)):
        value, name = _value(node), node.output[0]
        graph.remove(node)
        graph.set_constant(name, np.full(shape, value))
        count += 1
    return count


def refill(model: Graph) -> int:
    """Replace constants of one value repeated by ConstantOfShape; return how many there were."""
    count = 0
    for graph in model.walk():
        shapes: dict[tuple[int, ...], str] = {}
        for name in graph.initializers:
            found = graph.constant_type(name)
            if found is None or found[0] not in _FILLS or found[2] < _WORTH_A_NODE or graph.is_output(name):
                continue
            array = graph.constant(name)
            if array is None or not (array == array.reshape(-1)[0]).all():
                continue
            if array.shape not in shapes:
                shapes[array.shape] = graph.fresh_name("fill_shape")
                graph.set_constant(shapes[array.shape], np.array(array.shape, np.int64))
            value = numpy_helper.from_array(np.array(array.reshape(-1)[:1]))
            graph.remove_constant(name)
            graph.emit("ConstantOfShape", [shapes[array.shape]], [name], name=f"{name}_fill", value=value)
            count += 1
    return count


def _fills(model: Graph) -> Iterator[tuple[Graph, NodeProto, tuple[int, ...]]]:
    """Yield every ConstantOfShape of a constant shape that is no output, with its graph and shape."""
    for graph in model.walk():
        if graph.is_function:
            continue
        for node in graph.nodes:
            if not is_op(node, "ConstantOfShape") or graph.is_output(node.output[0]):
                continue
            shape = graph.constant(node.input[0])
            sizes: tuple[int, ...] = () if shape is None else tuple(map(int, shape.reshape(-1)))
            if shape is not None and math.prod(sizes) > 0:
                yield graph, node, sizes


def _value(node: NodeProto) -> np.generic:
    """Return the value that a ConstantOfShape repeats."""
    given = attribute(node, "value")
    return np.float32(0) if given is None else numpy_helper.to_array(given).reshape(-1)[0]
