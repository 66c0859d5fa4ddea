"""When two runtimes that differ on a 16-bit model differ by its rounding only."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from onnxslim_lab.graph import Graph
from onnxslim_lab.metrics import OutputError
from onnxslim_lab.precision.measure import worst

HALF_TYPES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
LEAST = {"float16": 0.9995, "bfloat16": 0.99}  # cosine of two runtimes that round at different places


def rounding_explains(graph: Graph, errors: Sequence[OutputError]) -> str:
    """Return why outputs of a 16-bit model that differ are to be taken as equal, "" when they are not.

    onnxruntime computes many 16-bit nodes in float32 and leaves out roundings between them, so that a runtime
    that does round differs by more than float32 explains.
    """
    graph.infer()
    made = {
        part.dtype_of(name)
        for part in graph.walk()
        for node in part.nodes
        if node.op_type != "Constant"
        for name in node.output
        if name
    }
    names = [name for kind, name in HALF_TYPES.items() if kind in made]
    score, _ = worst(errors)
    if not names or score < min(LEAST[name] for name in names):
        return ""
    return f"onnxruntime and the NumPy runtime agree within the rounding of {names[-1]}: cosine {score:.6f}"
