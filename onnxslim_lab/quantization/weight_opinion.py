"""When two runtimes differ on a model with quantized weights because onnxruntime rounds the inputs of its products.

onnxruntime (CPU, 1.31) computes MatMulNBits of accuracy_level 4, and a MatMul or Gemm whose weight a
DequantizeLinear makes (its input not, or from codes of 16 bits), which it fuses to that, with inputs rounded to 8
bits by block. The NumPy runtime does not round them.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import NodeProto, TensorProto

from onnxslim_lab.errors import LabError
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.judging import judge
from onnxslim_lab.metrics import Feed, compare_outputs
from onnxslim_lab.quantization.microsoft import DOMAIN, INT8_ACTIVATIONS
from onnxslim_lab.report import Verdict
from onnxslim_lab.sessions import Runner

_MULTIPLIED = (TensorProto.INT8, TensorProto.UINT8)  # codes of inputs that it has kernels for

LARGEST = 0.1
"""Relative difference that inputs rounded to 8 bits may cause, at most; more is no rounding."""


def rounded_inputs_explain(
    graph: Graph,
    feeds: Sequence[Feed],
    given: Sequence[Feed],
    mine: Sequence[Feed],
    runner: Runner,
    tolerance: float,
) -> Verdict | None:
    """Return that two runtimes agree where onnxruntime rounds no inputs; None when that is not the reason.

    Args:
        graph: The model.
        feeds: Its inputs.
        given: What onnxruntime gave, as users run it.
        mine: What the NumPy runtime gave.
        runner: Runs the model without the rounding.
        tolerance: Largest relative difference.
    """
    exact = graph.copy()
    products = 0
    for part in exact.walk():
        for node in part.nodes:
            if (
                is_op(node, "MatMulNBits", DOMAIN)
                and attribute(node, "accuracy_level", 0) == INT8_ACTIVATIONS
            ):
                part.remove_attribute(node, "accuracy_level")
                products += 1
            products += _fused(part, node)
    errors = compare_outputs(given, mine)
    if not products or any(not error.relative <= LARGEST for error in errors):
        return None
    try:
        unrounded = runner.run(exact, feeds, optimization="basic")
    except LabError:
        return None
    verdict = judge(compare_outputs(unrounded, mine), tolerance)
    if verdict.status != "passed":
        return None
    largest = max(error.relative for error in errors)
    reason = (
        f"onnxruntime and the NumPy runtime agree where both compute in float; onnxruntime rounds the inputs of "
        f"{products} products to 8 bits when it runs, which changes its outputs by {largest:.1e}"
    )
    return verdict.model_copy(update={"reason": reason})


def _fused(graph: Graph, node: NodeProto) -> bool:
    """Whether onnxruntime makes MatMulNBits of a node: its weight is dequantized, its input not, or from 16 bits."""
    if not (is_op(node, "MatMul") or is_op(node, "Gemm")):
        return False
    first, second = (graph.producer(name) for name in node.input[:2])
    if second is None or not is_op(second, "DequantizeLinear") or not graph.is_constant(second.input[0]):
        return False
    on_codes = first is not None and is_op(first, "DequantizeLinear")
    return not (on_codes and first is not None and graph.dtype_of(first.input[0]) in _MULTIPLIED)
