"""What rules need of a node."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from onnxslim_lab.channels.axes import Axes


def label(node: NodeProto) -> str:
    """Return how a node is called in reasons."""
    return f"{node.op_type} {node.name or next(filter(None, node.output), '')}"


def freeze_node(axes: Axes, node: NodeProto, reason: str) -> Iterable[int]:
    """Freeze everything around a node; returns its inputs."""
    for slot in range(len(node.input)):
        axes.freeze_all(axes.input(node, slot), reason)
    for slot in range(len(node.output)):
        axes.freeze_all(axes.output(node, slot), reason)
    return range(len(node.input))
