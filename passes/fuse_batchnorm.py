"""fuse-batchnorm: a BatchNormalization disappears into the layer before or after it."""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.graph import Graph, is_op
from onnxslim_lab.rewriting.affine import Affine, read_affine
from onnxslim_lab.rewriting.folding import fold_after, fold_before
from onnxslim_lab.rewriting.merging import merge
from onnxslim_lab.rewriting.sinks import find_sink, sink_at


class FuseBatchnorm(Pass):
    """Fold BatchNormalization into its neighbour: a scale and shift of channels, s = scale / sqrt(var + epsilon).

    before: y = BatchNormalization(Conv(x, W, b))     after: y = Conv(x, s W, s (b - mean) + B)
    before: y = Conv(BatchNormalization(x), W, b)     after: y = Conv(x, W s, b + W (B - s mean))
    before: y = BatchNormalization(BatchNormalization(x))     after: y = BatchNormalization(x)

    Into Conv, ConvTranspose, Gemm, MatMul and MatMul + Add before it; into those after it when it has no
    other reader and no shift would have to cross padding. Computed in float64, rounded once.

    refuses: training mode, per-element statistics, parameters that are not constant or not finite; a layer
    with other readers; weights used by several nodes, quantized, computed, or stored in a narrower type than
    used; results that would leave the range of their type or make the file larger.
    """

    exact: ClassVar[bool] = True

    def apply(self, graph: Graph, _context: Context) -> Outcome:
        """Fold every BatchNormalization of the graph that can be."""
        outcome = Outcome()
        reasons: dict[int, tuple[str, str]] = {}
        waiting = [node for node in graph.nodes if is_op(node, "BatchNormalization")]
        while waiting:
            left = []
            for node in waiting:
                where = node.name or node.output[0]
                done, reason, weights = fuse(graph, node)
                if done:
                    outcome.changes.append(Change(where, done, weights))
                else:
                    left.append(node)
                    reasons[id(node)] = where, reason
            if len(left) == len(waiting):
                break
            waiting = left
        for node in waiting:
            outcome.refuse(*reasons[id(node)])
        return outcome


def fuse(graph: Graph, node: NodeProto) -> tuple[str, str, tuple[str, ...]]:
    """Fold one BatchNormalization; return what was done ("" for nothing), why not, and the weights edited."""
    before = graph.producer(node.input[0])
    sink = find_sink(graph, node.input[0])
    affine = read_affine(graph, node, None if isinstance(sink, str) else sink.rank)
    if isinstance(affine, str):
        return "", affine, ()
    if isinstance(sink, str):
        reason = sink
    else:
        reason = fold_after(affine, sink)
        if not reason:
            return f"folded into {sink.layer.op_type} {sink.layer.name}", "", (sink.layer.weight,)
    if before is not None and is_op(before, "BatchNormalization"):
        first = read_affine(graph, before)
        reason = merge(graph, first, affine) if isinstance(first, Affine) else first
        if not reason:
            return f"merged into BatchNormalization {before.name or before.output[0]}", "", ()
    readers = graph.consumers(affine.y)
    if len(readers) == 1 and not graph.is_output(affine.y):
        after = sink_at(graph, readers[0])
        later = after if isinstance(after, str) else fold_before(affine, after)
        if not isinstance(after, str) and not later:
            return f"folded into {after.layer.op_type} {after.layer.name} after it", "", (after.layer.weight,)
        reason = f"{reason}; {later}"
    return "", reason, ()
