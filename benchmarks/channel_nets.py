"""Networks with random weights whose channels are removed: ResNet-18, MobileNetV2, dense blocks, LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """A network of convolutions in the making."""

    def __init__(self, side: int) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.side = side

    def weight(self, *shape: int) -> str:
        """Add a random weight."""
        name = f"w{len(self.tensors)}"
        scale = (2 / max(1, int(np.prod(shape[1:])))) ** 0.5
        array = (self.random.standard_normal(shape) * scale).astype(np.float32)
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; returns its output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, inputs, [name], name=f"{op_type}{len(self.nodes)}", **attributes)
        )
        return name

    def conv(self, x: str, inputs: int, out: int, size: int = 3, stride: int = 1, groups: int = 1) -> str:
        """Add a convolution that keeps the size."""
        weight, bias = self.weight(out, inputs // groups, size, size), self.weight(out)
        return self.add(
            "Conv",
            x,
            weight,
            bias,
            kernel_shape=[size] * 2,
            pads=[size // 2] * 4,
            strides=[stride] * 2,
            group=groups,
        )

    def model(self, y: str, channels: int) -> onnx.ModelProto:
        """Finish with a classifier."""
        y = self.add("Flatten", self.add("GlobalAveragePool", y))
        self.nodes.append(
            helper.make_node("Gemm", [y, self.weight(channels, 1000)], ["y"], name="classifier")
        )
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, self.side, self.side])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])
        graph = helper.make_graph(self.nodes, "built", [x], [out], self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def resnet18(side: int = 224) -> onnx.ModelProto:
    """Return ResNet-18 with random weights."""
    b = Builder(side)
    x, width = b.add("Relu", b.conv("x", 3, 64, 7, 2)), 64
    x = b.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for out, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        inner = b.conv(b.add("Relu", b.conv(x, width, out, 3, stride)), out, out)
        x = x if width == out else b.conv(x, width, out, 1, stride)
        x, width = b.add("Relu", b.add("Add", inner, x)), out
    return b.model(x, 512)


def mobilenetv2(side: int = 224) -> onnx.ModelProto:
    """Return MobileNetV2 with random weights."""
    b = Builder(side)
    low, high = (b.weight(), b.weight())
    b.tensors[-2:] = [numpy_helper.from_array(np.array(v, np.float32), n) for v, n in ((0, low), (6, high))]

    def bounded(x: str) -> str:
        return b.add("Clip", x, low, high)

    x, width = bounded(b.conv("x", 3, 32, 3, 2)), 32
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for times, out, count, first in stages:
        for number in range(count):
            inner = x if times == 1 else bounded(b.conv(x, width, width * times, 1))
            stride, wide = (first if number == 0 else 1), width * times
            inner = b.conv(bounded(b.conv(inner, wide, wide, 3, stride, wide)), wide, out, 1)
            x, width = (b.add("Add", x, inner) if stride == 1 and width == out else inner), out
    return b.model(bounded(b.conv(x, width, 1280, 1)), 1280)


def densenet(side: int = 224) -> onnx.ModelProto:
    """Return a network of three dense blocks with random weights."""
    b = Builder(side)
    x, width = b.add("Relu", b.conv("x", 3, 64, 7, 4)), 64
    for count in (6, 12, 8):
        for _ in range(count):
            new = b.add("Relu", b.conv(b.add("Relu", b.conv(x, width, 128, 1)), 128, 32))
            x, width = b.add("Concat", x, new, axis=1), width + 32
        x, width = (
            b.add("AveragePool", b.conv(x, width, width // 2, 1), kernel_shape=[2, 2], strides=[2, 2]),
            width // 2,
        )
    return b.model(x, width)


def lstm(hidden: int = 512) -> onnx.ModelProto:
    """Return two LSTM layers and a classifier with random weights."""
    b = Builder(0)
    x, width = "x", 80
    for _ in range(2):
        name = b.add(
            "LSTM", x, b.weight(1, 4 * hidden, width), b.weight(1, 4 * hidden, hidden), hidden_size=hidden
        )
        x, width = b.add("Squeeze", name, _axis(b)), hidden
    b.nodes.append(helper.make_node("MatMul", [x, b.weight(hidden, 200)], ["y"], name="classifier"))
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [50, 1, size])
        for n, size in (("x", 80), ("y", 200))
    ]
    graph = helper.make_graph(b.nodes, "built", ends[:1], ends[1:], b.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _axis(b: Builder) -> str:
    name = f"axis{len(b.tensors)}"
    b.tensors.append(numpy_helper.from_array(np.array([1]), name))
    return name


BUILT: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet18": resnet18,
    "mobilenetv2": mobilenetv2,
    "densenet": densenet,
    "lstm": lstm,
}
