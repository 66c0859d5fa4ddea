"""Layers between DequantizeLinear and QuantizeLinear as operators on codes: Conv, MatMul and Gemm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.floats import Array
from onnxslim_lab.graph import attribute
from onnxslim_lab.layer_views.storage import set_by_caller
from onnxslim_lab.quantization.microsoft import DOMAIN
from onnxslim_lab.quantization.operands import (
    Operand,
    Result,
    bias_codes,
    bias_values,
    codes_shape,
    is_single,
    made,
    misfit,
    read,
    scales_of,
    zero_of,
)
from onnxslim_lab.quantization.operator_writer import OperatorWriter
from onnxslim_lab.rewriting.patterns import added_to
from onnxslim_lab.rewriting.removal import release


@dataclass
class LayerWriter(OperatorWriter):
    """Writes the layers of one graph.

    Attributes:
        microsoft: Whether to use com.microsoft's operators too.
    """

    microsoft: bool

    def layer(self, node: NodeProto) -> str:
        """Replace a layer; return why not, "" when done or when it is not between codes."""
        graph = self.graph
        x, w = read(graph, node.input[0]), read(graph, node.input[1])
        if x is None or w is None:
            return ""
        reason = "its attributes are set by the caller" if set_by_caller(node) else misfit(graph, x, w)
        if reason:
            return reason
        result = made(graph, node.output[0])
        if result and (result.operand.kind != x.kind or not is_single(graph, result.operand)):
            result = None
        return (self._conv if node.op_type == "Conv" else self._product)(node, x, w, result)

    def _conv(self, node: NodeProto, x: Operand, w: Operand, result: Result | None) -> str:
        graph = self.graph
        if not is_single(graph, w) and w.axis != 0:
            return "its weight has scales along another axis than the output channels"
        zeros = zero_of(graph, w)
        if np.unique(zeros).size > 1:
            return "the zero points of its weight differ by channel"
        scale = scales_of(graph, x, w)
        bias = node.input[2] if len(node.input) > 2 else ""
        if result:
            codes = bias_codes(graph, bias, scale) if bias else ""
            if codes is None:
                return "its bias is not int32 in units of the sums"
            inputs = [*self.triple(x), *self.triple(w), *self.triple(result.operand)[1:], codes]
            self.quantized(node, result, "QLinearConv", inputs)
            return ""
        if x.kind != TensorProto.UINT8:
            return "its output stays float, and onnxruntime has ConvInteger for uint8 alone"
        values = bias_values(graph, bias) if bias else None
        if bias and values is None:
            return "its bias is computed"
        shape = codes_shape(graph, w.codes)
        if shape is None:
            return "its weight is computed"
        ones = (1,) * (len(shape) - 2)
        factor = self.store(scale.reshape(-1, *ones) if scale.size > 1 else scale.reshape(()))
        codes, zero = self._unsigned(w, zeros.reshape(-1)[0])
        inputs = [x.codes, codes, self.zero(x), zero]
        added = "" if values is None else self.store(values.reshape(-1, *ones))
        self.floating(node, "ConvInteger", inputs, factor, added, node.attribute)
        return ""

    def _unsigned(self, w: Operand, zero: Array) -> tuple[str, str]:
        """Return a weight's codes and its zero point as uint8, moved up by 128 where they are stored in int8.

        The sums are the same. onnxruntime multiplies int8 by uint8 in ConvInteger without the processor's
        instructions for it, and takes 4 to 11 times as long on images (1.31 on x86 with VNNI).
        """
        stored = self.graph.constant(w.codes)
        if w.kind != TensorProto.INT8 or stored is None:
            return w.codes, self.store(zero.astype(np.int8 if w.kind == TensorProto.INT8 else np.uint8))
        moved = (stored.astype(np.int16) + 128).astype(np.uint8)
        return self.store(moved), self.store(np.asarray(zero + 128).astype(np.uint8))

    def _product(self, node: NodeProto, x: Operand, w: Operand, result: Result | None) -> str:
        graph, gemm = self.graph, node.op_type == "Gemm"
        turned = gemm and bool(attribute(node, "transB", 0))
        if gemm and (
            attribute(node, "transA", 0) or {attribute(node, k, 1.0) for k in ("alpha", "beta")} != {1.0}
        ):
            return "alpha or beta is not 1, or its input is transposed"
        shape = codes_shape(graph, w.codes)
        rank = len(shape) if shape else 0
        single = is_single(graph, w)
        if not single and (not rank or w.axis % rank != (0 if turned else rank - 1)):
            return "its weight has scales along another axis than the columns"
        bias = node.input[2] if gemm and len(node.input) > 2 else ""
        scale = scales_of(graph, x, w)
        if gemm and self.microsoft:
            codes = bias_codes(graph, bias, scale) if bias else ""
            if codes is None:
                return "its bias is not int32 in units of the sums"
            inputs = [*self.triple(x), *self.triple(w), codes]
            kept = [item for item in node.attribute if item.name != "beta"]
            if result:
                inputs += self.triple(result.operand)[1:]
                self.quantized(node, result, "QGemm", inputs, DOMAIN, kept)
            else:
                graph.remove(node)
                self.put("QGemm", inputs, node.output[0], node.name, DOMAIN, kept)
                release(graph, node.input)
            return ""
        values = bias_values(graph, bias) if bias else None
        if bias and values is None:
            return "its bias is computed"
        if turned and shape is None:
            return "its weight is computed and transposed"
        if turned:
            w = Operand(self.transposed(w.codes), w.scale, w.zero, w.kind, 1, 0)
        if result and not bias and (single or rank == 2):
            inputs = [*self.triple(x), *self.triple(w), *self.triple(result.operand)[1:]]
            self.quantized(node, result, "QLinearMatMul", inputs, attributes=())
            return ""
        zero = w.zero if zero_of(graph, w).any() else ""
        if zero and not single and rank != 2:
            return "the zero points of its weight differ by column"
        if self.microsoft and (single or rank == 2):
            self._to_float(node, x, w, zero)
            return ""
        added = "" if values is None else self.store(values)
        inputs = [x.codes, w.codes, self.zero(x), zero]
        self.floating(node, "MatMulInteger", inputs, self.store(scale), added, ())
        self._add_float(node)
        return ""

    def _to_float(self, node: NodeProto, x: Operand, w: Operand, zero: str) -> None:
        """Replace a MatMul, and the Add of a constant vector behind it, by MatMulIntegerToFloat."""
        graph, output, bias = self.graph, node.output[0], ""
        found = self._bias_behind(node)
        removed = [node]
        shape = codes_shape(graph, w.codes)
        if found and shape and found[2].shape == shape[-1:]:
            add, _, values = found
            removed.append(add)
            output, bias = add.output[0], self.store(values)
        read_names = [name for gone in removed for name in gone.input]
        graph.remove(*removed)
        inputs = [x.codes, w.codes, x.scale, w.scale, self.zero(x), zero, bias]
        self.put("MatMulIntegerToFloat", inputs, output, node.name, DOMAIN)
        release(graph, read_names)

    def _bias_behind(self, node: NodeProto) -> tuple[NodeProto, int, Array] | None:
        """Return the Add behind a MatMul, the index of a constant there, and its values."""
        found = added_to(self.graph, node.output[0]) if node.op_type == "MatMul" else None
        if found is None:
            return None
        add, index = found
        values = bias_values(self.graph, add.input[index])
        return None if values is None else (add, index, values)

    def _add_float(self, node: NodeProto) -> None:
        """Let the Add behind a product read its constant in float, which nothing need compute."""
        graph = self.graph
        found = self._bias_behind(node)
        if found and not graph.is_constant(found[0].input[found[1]]):
            add, index, values = found
            old = add.input[index]
            graph.set_input(add, index, self.store(values))
            release(graph, [old])
