"""Which inputs and outputs of a node become 16-bit when the node does: what its operator's schema ties together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, TensorProto

from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.precision.half import Half
from onnxslim_lab.running.types import schema_for

_FREE = {
    "Cast": 0,
    "CastLike": 0,
    "Shape": 0,
    "Size": 0,
    "IsNaN": 0,
}  # inputs whose float type does not matter
_FREE_OUTPUT = ("Cast", "ConstantOfShape", "If")  # an attribute or a body says what they make

# Operators that stay as they are, and why.
STAYS = {
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "its scales are float32 for a reason"
    ),
    **dict.fromkeys(
        (
            "RandomNormal",
            "RandomUniform",
            "RandomNormalLike",
            "RandomUniformLike",
            "Bernoulli",
            "Multinomial",
        ),
        "it draws in float32",
    ),
    "EyeLike": "onnxruntime has no kernel of it in 16 bits, and no input to cast",
    "MeanVarianceNormalization": "its definition has float32 constants",
    "BitCast": "it reads bits",
    "Loop": "its state would be rounded in every iteration",
    "Scan": "its state would be rounded in every iteration",
}


@dataclass(frozen=True)
class Slots:
    """What becomes 16-bit with a node.

    Attributes:
        inputs: For each input, True: becomes 16-bit; False: stays; None: taken as it comes.
        outputs: For each output, whether it becomes 16-bit.
    """

    inputs: tuple[bool | None, ...]
    outputs: tuple[bool, ...]

    @property
    def any(self) -> bool:
        """Whether anything becomes 16-bit."""
        return any(self.outputs) or any(self.inputs)


def node_slots(graph: Graph, node: NodeProto, half: Half) -> tuple[Slots, str]:
    """Return what becomes 16-bit with a node, and why nothing does where it has float32 values ("" otherwise)."""
    types = [_type(graph, name) for name in node.input], [_type(graph, name) for name in node.output]
    free = _FREE.get(node.op_type) if domain_of(node.domain) == "" else None
    still = Slots(
        tuple(None if i == free else False for i in range(len(node.input))), (False,) * len(node.output)
    )
    floats = [kind == TensorProto.FLOAT for kind in (*types[0], *types[1])]
    if not any(floats):
        return still, ""
    if domain_of(node.domain):
        return still, f"{domain_of(node.domain)}.{node.op_type} is not a standard operator"
    if node.op_type in STAYS:
        return still, STAYS[node.op_type]
    if -1 in types[0] or -1 in types[1]:
        return still, "it has sequences, maps or optional values"
    schema = schema_for(node.op_type, "", graph.opset())
    if schema is None:
        return still, f"{node.op_type} is not a standard operator"
    if node.op_type in _FREE_OUTPUT:
        if half.type_name not in schema.outputs[0].types:
            return still, f"it makes no {half.name} in opset {graph.opset()}"
        return Slots(still.inputs, tuple(kind == TensorProto.FLOAT for kind in types[1])), ""
    if 0 in [kind for name, kind in zip(node.input, types[0], strict=True) if name]:
        return still, "the type of an input is not known"
    return _by_schema(schema, still, types, half), ""


def _by_schema(schema: Any, still: Slots, types: tuple[list[int], list[int]], half: Half) -> Slots:
    inputs = [_formal(schema.inputs, i) for i in range(len(types[0]))]
    outputs = [_formal(schema.outputs, i) for i in range(len(types[1]))]
    tied: set[str] = set()
    for formal, kind in zip(inputs, types[0], strict=True):
        if kind == TensorProto.FLOAT and half.type_name in formal.types:
            tied.add(formal.type_str)
    for formal in (*inputs, *outputs):
        if half.type_name not in formal.types:
            tied.discard(formal.type_str)
    return Slots(
        tuple(
            None if old is None else kind == TensorProto.FLOAT and formal.type_str in tied
            for old, formal, kind in zip(still.inputs, inputs, types[0], strict=True)
        ),
        tuple(
            kind == TensorProto.FLOAT and formal.type_str in tied
            for formal, kind in zip(outputs, types[1], strict=True)
        ),
    )


def _formal(formals: Any, position: int) -> Any:
    return formals[min(position, len(formals) - 1)]


def _type(graph: Graph, name: str) -> int:
    """Return a value's TensorProto type: 0 unknown, -1 not a tensor."""
    found = graph.type_of(name) if name else None
    if found is None:
        return 0
    kind = found.WhichOneof("value")
    return int(found.tensor_type.elem_type) if kind == "tensor_type" else 0 if kind is None else -1
