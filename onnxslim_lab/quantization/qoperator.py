"""Quantized operators instead of operators between DequantizeLinear and QuantizeLinear.

    before  DequantizeLinear(x), DequantizeLinear(w), DequantizeLinear(b) -> Conv -> Relu -> QuantizeLinear
    after   QLinearConv(x, w, b)                      a Clip of codes behind it where a Relu or Clip shows

Of ONNX:
    Conv                                QLinearConv; ConvInteger -> Cast -> Mul (-> Add) when its output stays float
    MatMul, Gemm                        QLinearMatMul; MatMulInteger -> Cast -> Mul (-> Add) with a bias, or when
                                        the output stays float
    Reshape, MaxPool, Concat, ...       the same operator on codes, where all parameters are equal
Of com.microsoft (format "microsoft") also:
    Gemm                                QGemm
    MatMul                              MatMulIntegerToFloat instead of MatMulInteger
    Add, Mul, Concat, AveragePool, GlobalAveragePool, LeakyRelu, Sigmoid    QLinear...

What has no such form keeps its DequantizeLinear and QuantizeLinear. ONNX operators of opset 10;
onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from onnxslim_lab.base import Outcome
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.graph import Graph, attribute, domain_of
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.quantization.microsoft import DOMAIN
from onnxslim_lab.quantization.operands import (
    BYTES,
    Operand,
    Result,
    is_single,
    made,
    read,
    same_grid,
)
from onnxslim_lab.quantization.operator_layers import LayerWriter
from onnxslim_lab.quantization.operators import clip_bounds
from onnxslim_lab.rewriting.removal import label, release
from onnxslim_lab.targets.model import Profile

_LAYERS = ("Conv", "MatMul", "Gemm")
_MOVES = (
    *("DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
    *("MaxPool", "Reshape", "Resize", "Slice", "SpaceToDepth", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
)
_COMPUTE = ("Add", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid")


def format_of(chosen: str, profile: Profile) -> str:
    """Return the format to write: the chosen one, for "auto" the profile's.

    Raises:
        ParameterError: The target does not run it.
    """
    name = profile.format if chosen == "auto" else chosen
    if name not in profile.formats:
        raise ParameterError(
            f"quantize: target {profile.name} does not run format={name}; choose {', '.join(profile.formats)}"
        )
    return name


def write_operators(model: Graph, *, microsoft: bool) -> Outcome:
    """Replace operators between DequantizeLinear and QuantizeLinear by operators on codes, in place.

    Args:
        model: The main graph; bodies and functions are walked.
        microsoft: Whether to use com.microsoft's operators too.

    Returns:
        One change that counts the operators written; a refusal for each Conv, MatMul and Gemm between codes
        that has no such form.
    """
    outcome = Outcome()
    written: Counter[str] = Counter()
    for graph in model.walk():
        rewriter = _Rewriter(graph, written, microsoft, outcome)
        for node in graph.nodes:
            if node in graph:
                rewriter.rewrite(node)
    if written:
        counts = ", ".join(f"{count} {op_type}" for op_type, count in sorted(written.items()))
        outcome.change(model.name or "model", f"operators on codes: {counts}")
    return outcome


@dataclass
class _Rewriter(LayerWriter):
    """Finds the form of every node of a graph.

    Attributes:
        outcome: Takes the refusals.
    """

    outcome: Outcome

    def rewrite(self, node: NodeProto) -> None:
        """Replace one node if it has a form on codes."""
        op_type = node.op_type
        if domain_of(node.domain):
            return
        if op_type in _LAYERS:
            reason = self.layer(node)
            if reason:
                place = "it stays between DequantizeLinear and QuantizeLinear"
                self.outcome.refuse(label(node), f"{place}: {reason}")
        elif op_type == "Split":
            self._split(node)
        elif op_type == "Concat":
            self._concat(node)
        elif op_type in ("Relu", "Clip"):
            self._clip(node)
        elif op_type in _MOVES:
            self._move(node)
        elif self.microsoft and op_type in _COMPUTE:
            self._elementwise(node)

    def _elementwise(self, node: NodeProto) -> None:
        graph = self.graph
        result = made(graph, node.output[0])
        operands = [read(graph, value) for value in node.input]
        if result is None or set_by_caller(node) or not self._joined(operands, result):
            return
        if node.op_type == "AveragePool" and any(size != 1 for size in attribute(node, "dilations", ())):
            return
        kept = [item for item in node.attribute if item.name != "dilations"]
        inputs = [name for operand in operands if operand for name in self.triple(operand)]
        inputs += self.triple(result.operand)[1:]
        self.quantized(node, result, f"QLinear{node.op_type}", inputs, DOMAIN, kept)

    def _joined(self, operands: Sequence[Operand | None], result: Result) -> bool:
        """Whether inputs and output are of one 8-bit type, with one constant scale each."""
        every = [*operands, result.operand]
        return result.operand.kind in BYTES and all(
            operand is not None and operand.kind == result.operand.kind and is_single(self.graph, operand)
            for operand in every
        )

    def _concat(self, node: NodeProto) -> None:
        graph = self.graph
        result = made(graph, node.output[0])
        operands = [read(graph, value) for value in node.input]
        if result is None or set_by_caller(node) or not self._joined(operands, result):
            return
        found = [operand for operand in operands if operand]
        if all(same_grid(graph, operand, result.operand) for operand in found):
            self.quantized(node, result, "Concat", [operand.codes for operand in found])
        elif self.microsoft:
            inputs = self.triple(result.operand)[1:]
            inputs += [name for operand in found for name in self.triple(operand)]
            self.quantized(node, result, "QLinearConcat", inputs, DOMAIN)

    def _move(self, node: NodeProto) -> None:
        """Put an operator that only moves values on codes."""
        graph = self.graph
        x, result = read(graph, node.input[0]), made(graph, node.output[0])
        if x is None or result is None or len([name for name in node.output if name]) > 1:
            return
        if node.op_type == "Resize":
            crops = attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
            if set_by_caller(node) or crops or attribute(node, "mode", "nearest") != "nearest":
                return
        if x.kind in BYTES and same_grid(graph, x, result.operand):
            self.quantized(node, result, node.op_type, [x.codes, *node.input[1:]])

    def _split(self, node: NodeProto) -> None:
        graph = self.graph
        x, results = read(graph, node.input[0]), [made(graph, value) for value in node.output]
        found = [result for result in results if result and result.activation is None]
        if x is None or x.kind not in BYTES or len(found) < len(results):
            return
        if not all(same_grid(graph, x, result.operand) for result in found):
            return
        quantizers = [result.quantizer for result in found]
        outputs = [quantizer.output[0] for quantizer in quantizers]
        freed = [name for quantizer in quantizers for name in quantizer.input[1:]]
        source = node.input[0]
        graph.remove(*quantizers)
        graph.set_input(node, 0, x.codes)
        graph.set_outputs(node, outputs)
        self.written["Split"] += 1
        release(graph, [source, *freed])

    def _clip(self, node: NodeProto) -> None:
        """Put a Relu or Clip between equal grids on codes."""
        graph = self.graph
        x, result = read(graph, node.input[0]), made(graph, node.output[0])
        bounds = clip_bounds(graph, node)
        if x is None or result is None or result.activation or bounds is None or x.kind not in BYTES:
            return
        if same_grid(graph, x, result.operand):
            graph.remove(node, result.quantizer)
            self.limit(x.codes, result.quantizer.output[0], self.limits(bounds, result.operand), node.name)
            release(graph, [*node.input, *result.quantizer.input[1:]])
