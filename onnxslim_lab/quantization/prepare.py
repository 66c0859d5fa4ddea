"""What has to be done to a model before it is quantized: exact simplification and the opset."""

from __future__ import annotations

from onnx import helper

from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.graph import Graph
from onnxslim_lab.opset import raise_opset
from onnxslim_lab.quantization.gates import split_hard_swish
from onnxslim_lab.rewriting.window_rows import write_gemms

_NO_INPUTS = 4  # the first IR version in which initializers need not be listed as inputs, which takes bytes


def prepare(model: Graph, opset: int, context: Context, outcome: Outcome, *, gemms: bool = False) -> None:
    """Fuse what would stand between layers and their quantization, and raise the opset.

    BatchNormalization and constant factors move into the weights, activations get their names, functions are
    inlined: all of it exact (see `simplify`).

    Args:
        model: The main graph, edited.
        opset: The least opset that the result may have.
        context: Of the pass.
        outcome: Receives one change for the simplification, for the opset and for convolutions.
        gemms: Whether convolutions along one axis whose windows are rows of a matrix become Gemm.

    Raises:
        ModelError: A node cannot be written in that opset.
    """
    edits = _simplify(model, context)
    if edits:
        outcome.change(model.name or "model", f"simplified before quantization: {edits} exact edits")
    before = model.opset()
    if before < opset:
        raise_opset(model, opset)
        outcome.change(model.name or "model", f"opset raised from {before} to {opset}")
        if model.ir_version < _NO_INPUTS:
            model.raise_ir(helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])
    written = 0
    for graph in model.walk():
        split_hard_swish(graph)
        written += write_gemms(graph) if gemms else 0
    if written:
        outcome.change(model.name or "model", f"{written} convolutions whose windows are rows became Gemm")
        _simplify(model, context)  # of the views beside them
    model.infer()


def _simplify(model: Graph, context: Context) -> int:
    """Simplify a model; return the number of edits."""
    from onnxslim_lab.passes.simplify import Simplify  # noqa: PLC0415 - passes import this package

    return len(Simplify().run(model, Context(seed=context.seed, memory=context.memory)).changes)
