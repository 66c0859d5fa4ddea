"""fuse-linear: what is linear with constants becomes part of the layer beside it."""

from __future__ import annotations

from typing import ClassVar

from onnx import NodeProto

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.rewriting.affine import ELEMENTWISE, Affine, read_affine
from onnxslim_lab.rewriting.commuting import scale_further_up, scale_past_shift
from onnxslim_lab.rewriting.folding import fold_after, fold_before
from onnxslim_lab.rewriting.gemms import absorb_result_transpose, absorb_transposes, add_to_gemm
from onnxslim_lab.rewriting.merging import merge
from onnxslim_lab.rewriting.pads import fold_pad
from onnxslim_lab.rewriting.sinks import Sink, find_sink, sink_at
from onnxslim_lab.rewriting.taps import drop_taps
from onnxslim_lab.rewriting.windows import skip_windows, trim_end

_SUMS = ("Add", "Sum")
_PRODUCTS = ("MatMul", "Gemm")

Result = tuple[str, str, tuple[str, ...]]  # what was done ("": nothing), why not, the weights edited


class FuseLinear(Pass):
    """Fold constants that scale, shift or pad into the layer beside them, and form Gemm.

    before: y = Mul(Conv(x, W, b), s)            after: y = Conv(x, s W, s b)
    before: y = Conv(Div(x, s), W, b)            after: y = Conv(x, W / s, b)
    before: y = Add(MatMul(A, B), C)             after: y = Gemm(A, B, C)
    before: y = MatMul(A, Transpose(B))          after: y = Gemm<transB = 1>(A, B)
    before: y = Conv<pads = p>(Pad<q>(x))        after: y = Conv<pads = p + q>(x)
    before: y = Mul(Mul(x, a), b)                after: y = Mul(x, a b)
    before: y = Conv<pads = [1, 1]>(x, W[3])     after: y = Conv<pads = [0, 0]>(x, W[1]), x of size 1
    before: y = Slice<i>(Conv(Pad<b>(x), W))     after: y = Slice<i - n>(Conv(Pad<b - n stride>(x), W))

    A scalar factor also goes back through Reshape, Transpose, MatMul, Relu ... into the layer before them,
    and a scale that a shift separates from the layer after it changes places with the shift.
    Add, Sub, Mul, Div and Neg go into Conv, ConvTranspose, Gemm, MatMul (+ Add) before them, into those
    after them, or into a neighbouring BatchNormalization, Mul or Add. Pad goes into Conv, AveragePool and
    MaxPool where the border means the same. Computed in float64, rounded once.

    Taps at the ends of a kernel that only ever meet padding go. A Pad of any mode but wrap adds less where all
    that reads the Conv after it slices its first windows away, and where its last window ends before the Pad.

    refuses: layers with other readers; weights used by several nodes, quantized, computed or stored in a
    narrower type than used; constants that are not one number per channel; shifts that would have to cross
    padding; zero divisors; results that would leave the range of their type or make the file larger; taps
    along axes whose size is not known.
    """

    exact: ClassVar[bool] = True

    def apply(self, graph: Graph, _context: Context) -> Outcome:
        """Fold until nothing folds any more."""
        outcome = Outcome()
        changed = True
        while changed:
            changed = False
            refused: dict[str, str] = {}
            for node in graph.nodes:
                if node not in graph or domain_of(node.domain):
                    continue
                where = node.name or next(filter(None, node.output), node.op_type)
                done, reason, weights = fuse(graph, node)
                if done:
                    outcome.changes.append(Change(where, done, weights))
                    changed = True
                elif reason:
                    refused[where] = reason
        for where, reason in refused.items():
            outcome.refuse(where, reason)
        return outcome


def fuse(graph: Graph, node: NodeProto) -> Result:
    """Fuse one node where it can be."""
    reason = ""
    if node.op_type in ELEMENTWISE:
        done, reason, weights = _fuse_affine(graph, node)
        if done:
            return done, "", weights
    if node.op_type in _SUMS and not add_to_gemm(graph, node):
        return "made the C of a Gemm", "", ()
    if node.op_type in _PRODUCTS and not absorb_transposes(graph, node):
        return "read its operands untransposed", "", ()
    if node.op_type == "Transpose" and not absorb_result_transpose(graph, node):
        return "made the product in transposed form", "", ()
    if node.op_type == "Pad":
        return _fuse_pad(graph, node)
    if node.op_type == "Conv":
        done = drop_taps(graph, node)
        return done, "", (node.input[1],) if done else ()
    return "", reason, ()


def _fuse_pad(graph: Graph, node: NodeProto) -> Result:
    done = skip_windows(graph, node)  # first, since the Conv may take what is left
    if done:
        return done, "", ()
    reason = fold_pad(graph, node)
    if not reason:
        return "folded into the pads after it", "", ()
    done = trim_end(graph, node)
    return done, "" if done else reason, ()


def _folded(sink: Sink, how: str = "") -> Result:
    return f"folded into {sink.layer.op_type} {sink.layer.name}{how}", "", (sink.layer.weight,)


def _fuse_affine(graph: Graph, node: NodeProto) -> Result:
    affine = read_affine(graph, node)
    if isinstance(affine, str):
        return "", "", ()
    sink = find_sink(graph, affine.x)
    reason = ""
    if isinstance(sink, Sink):
        reason = fold_after(affine, sink)
        if not reason:
            return _folded(sink)
        if sink.layer.op_type == "MatMul" and sink.add is None and affine.scale is None:
            reason = ""  # it is the MatMul's bias
    else:
        above = scale_further_up(graph, affine)
        if above:
            return _folded(above, " further up")
    before = graph.producer(affine.x)
    first = read_affine(graph, before) if before is not None else ""
    if isinstance(first, Affine) and not merge(graph, first, affine):
        return f"merged with {first.node.op_type} before it", "", ()
    readers = graph.consumers(affine.y)
    if len(readers) != 1 or graph.is_output(affine.y):
        return "", reason, ()
    after = sink_at(graph, readers[0])
    if isinstance(after, Sink):
        later = fold_before(affine, after)
        if not later:
            return _folded(after, " after it")
        if isinstance(first, Affine) and scale_past_shift(graph, first, affine, after):
            return _folded(after, " after it: the scale before the shift")
        reason = f"{reason}; {later}" if reason else later
    if readers[0].op_type == "BatchNormalization":
        second = read_affine(graph, readers[0])
        if isinstance(second, Affine) and not merge(graph, affine, second):
            return "merged into BatchNormalization after it", "", ()
    return "", reason, ()
