"""Constant integers of a node, such as the widths of Pad and the bounds of Slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.layer_views.storage import numpy_dtype
from onnxslim_lab.rewriting.affine import drop_unused


def put_integers(graph: Graph, node: NodeProto, index: int, values: Sequence[int]) -> None:
    """Give a node other constant integers as an input; what else reads the old ones does not see them.

    Args:
        graph: The node's graph.
        node: The node.
        index: The input. Its type stays; one that is not there yet gets that of the input after the data.
        values: The integers.
    """
    old = node.input[index] if len(node.input) > index else ""
    known = graph.constant_type(old or node.input[1])
    data_type = known[0] if known else TensorProto.INT64
    own = bool(old) and graph.scope_of(old) is graph and graph.use_count(old) == 1 and not graph.is_input(old)
    name = old if own else graph.fresh_name(old or f"{node.output[0]}_{index}")
    graph.set_constant(name, np.array(values, numpy_dtype(data_type)), data_type)
    if not own:
        graph.set_input(node, index, name)
        drop_unused(graph, (old,) if old else ())
