"""Saturation: where products of 8-bit integers do not fit the 16-bit sums of pairs.

x86 CPUs without VNNI multiply unsigned by signed bytes and add each two neighbours in 16 bits, which saturate
at 32767. onnxruntime's products of such types are wrong there, and exact everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from onnxslim_lab.graph import Graph, attribute
from onnxslim_lab.weights import Array
from onnxslim_lab.worker.messages import Value

PRODUCTS: Mapping[str, tuple[int, int]] = {
    "Conv": (0, 1),
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "DynamicQuantizeMatMul": (0, 1),
}
"""Operators that multiply, with the places of the activations and of the weights among their inputs."""
MOST = 32767


def overflow(graph: Graph, node: NodeProto, values: Mapping[str, Value]) -> int:
    """Return a bound on the sums of two neighbouring products of a node where it exceeds 16 bits, else 0.

    The bound takes the range of the activations in each column (of a product) or channel (of a convolution);
    which two are neighbours is what onnxruntime's layouts make it: consecutive columns or channels.

    Args:
        graph: The main graph.
        node: One of `PRODUCTS`, or any other, for which the answer is 0.
        values: Known values by name; constants need not be among them.
    """
    if node.op_type not in PRODUCTS:
        return 0
    left, right = (_integers(graph, node.input[place], values) for place in PRODUCTS[node.op_type])
    if right is None or right.dtype != np.int8 or right.ndim < 2:
        return 0
    if "Conv" in node.op_type:
        rows = np.moveaxis(right, 1, -1).reshape(right.shape[0], -1)
        low, high = _ranges(left, 1, right.shape[1], attribute(node, "group", 1))
        times = rows.shape[1] // right.shape[1]
        low, high = np.tile(low, times), np.tile(high, times)
    else:
        rows = right if attribute(node, "transB", 0) else np.swapaxes(right, -1, -2)
        rows = rows.reshape(-1, rows.shape[-1])
        axis = 0 if attribute(node, "transA", 0) else -1
        low, high = _ranges(left, axis, rows.shape[1], 1)
    reach = np.maximum(rows * high, rows * low), np.minimum(rows * high, rows * low)
    odd = [(0, 0), (0, rows.shape[1] % 2)]
    up, down = (np.pad(side, odd).reshape(len(rows), -1, 2).sum(-1) for side in reach)
    most = int(max(up.max(initial=0), -down.min(initial=0)))
    return most if most > MOST else 0


def _ranges(x: Array | None, axis: int, size: int, groups: int) -> tuple[Array, Array]:
    """Return the least and the greatest value of each index of an axis as unsigned bytes, over all groups."""
    if x is None or x.dtype not in (np.uint8, np.int8) or x.shape[axis] != size * groups or not x.size:
        return np.zeros(size, np.int64), np.full(size, 255)
    unsigned = x.astype(np.int64) + (128 if x.dtype == np.int8 else 0)  # signed bytes are shifted first
    columns = np.moveaxis(unsigned, axis, -1).reshape(-1, size)
    return columns.min(0), columns.max(0)


def _integers(graph: Graph, name: str, values: Mapping[str, Value]) -> Array | None:
    """Return the integers that a value is or dequantizes, None when they are not known."""
    maker = graph.producer(name)
    if maker is not None and maker.op_type == "DequantizeLinear":
        name = maker.input[0]
    known = values.get(name)
    found = known if isinstance(known, np.ndarray) else graph.constant(name)
    return found if found is not None and found.dtype in (np.uint8, np.int8) else None
