"""Remove 30 % of the multiply-accumulates by channels, and measure what that does to latency and agreement.

    python benchmarks/channels.py [--models a,b] [--macs 0.3] [--samples 32] [--unseen 64] [--pairs 15] [--json FILE]

For every model: multiply-accumulates left, whether the checker takes the result, the median ratio of latencies
(one thread, original and result in turn) and the relative output error; for EfficientNet-Lite0 also how often its
first choice is the original's, with the remaining weights refitted and without. ResNet-18, MobileNetV2, DenseNet and
the LSTM are built here, with random weights: they say something about latency only. Exits with 1 when a model
is less than 20 % faster, or refitting gains less than 10 points.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from zoo import path
from zoo_feeds import feeds

from onnxslim_lab.base import Context
from onnxslim_lab.bench import bench
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.prune_channels import PruneChannels
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.sessions import Runner
from onnxslim_lab.statistics import Calibration

MOST, GAIN = 0.8, 10.0
AGREED = "efficientnet_lite0"


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
STEPS: dict[
    str, tuple[dict[str, Any], ...]
] = {  # of which the parts add up to all; "macs" is a share of what is asked for
    "vital_minilm_l3": (
        {"include": ("*self/query*",), "macs": 0.45},
        {"exclude": ("*self/query*",), "macs": 0.55},
    ),
}
MODELS = (AGREED, "resnet18", "ppocrv4_det", "mobilenetv2", "densenet", "vital_minilm_l3", "lstm")


@dataclass
class Row:
    """One model."""

    model: str
    macs: float
    ratio: float
    low: float
    high: float
    error: float
    agreement: float
    agreement_without: float
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the model meets what must hold."""
        return self.ratio <= MOST and (
            self.model != AGREED or self.agreement >= self.agreement_without + GAIN
        )


def inputs(name: str, model: Graph, count: int, seed: int) -> list[dict[str, Any]]:
    """Return feeds of a model."""
    if name not in BUILT:
        return list(feeds(name, count, seed))
    random = np.random.default_rng(seed)
    shape = [size for size in model.shape_of("x") or () if isinstance(size, int)]
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def cut(
    model: Graph, name: str, macs: float, calibration: Calibration, **options: Any
) -> tuple[Graph, float]:
    """Return the model without so many multiply-accumulates, and the part that is left."""
    result, left = model.copy(), 1.0
    for step in STEPS.get(name, ({"macs": 1.0},)):
        settings = options | step | {"macs": step["macs"] * macs / left}
        outcome = PruneChannels(**settings).run(result, Context(calibration=calibration))
        assert outcome.changes, outcome.refusals
        left *= float(outcome.changes[0].detail["multiply-accumulates left"])
    onnx.checker.check_model(result.to_model(), full_check=True)
    return result, left


def measure(name: str, macs: float, samples: int, unseen: int, pairs: int) -> Row:
    """Measure one model."""
    model = Graph.load(BUILT[name]() if name in BUILT else path(name))
    Simplify().run(model)
    began = time.monotonic()
    with Runner(threads=1) as runner, tempfile.TemporaryDirectory() as folder:
        count = samples if name not in BUILT else 2
        calibration = Calibration(runner, Dataset(inputs(name, model, count, 1)))
        learned = {} if name not in BUILT else {"criterion": "l2", "refit": "none"}
        result, left = cut(model, name, macs, calibration, **learned)
        seconds = time.monotonic() - began
        tests = inputs(name, model, unseen if name == AGREED else 4, 99)
        wanted, found = runner.run(model, tests), runner.run(result, tests)
        last = model.outputs[-1]
        error = np.linalg.norm(_flat(found, last) - _flat(wanted, last)) / np.linalg.norm(_flat(wanted, last))
        agreement = without = float("nan")
        if name == AGREED:
            plain, _ = cut(model, name, macs, calibration, refit="none")
            choice = _flat(wanted, last).argmax(1)
            agreement = 100 * float((_flat(found, last).argmax(1) == choice).mean())
            without = 100 * float((_flat(runner.run(plain, tests), last).argmax(1) == choice).mean())
        files = [Path(folder) / "before.onnx", Path(folder) / "after.onnx"]
        for graph, file in zip((model, result), files, strict=True):
            graph.save(file)
        report = bench(files[0], files[1], Dataset(tests[:1]), runs=pairs, threads=1)
    return Row(name, left, report.ratio, report.low, report.high, float(error), agreement, without, seconds)


def _flat(runs: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(run[name], np.float64).reshape(-1) for run in runs])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--macs", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--unseen", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    print(
        "model                MACs left  latency (95 %)          output error  agreement: refit, none  seconds"
    )
    for name in given.models.split(","):
        row = measure(name, given.macs, given.samples, given.unseen, given.pairs)
        rows.append(row)
        interval = f"{row.ratio:.3f} ({row.low:.3f}-{row.high:.3f})"
        agreed = "" if np.isnan(row.agreement) else f"{row.agreement:.1f} %, {row.agreement_without:.1f} %"
        print(
            f"{name:20} {row.macs:9.3f}  {interval:22}  {row.error:12.3g}  {agreed:22}  {row.seconds:7.1f}"
            f"{'' if row.good else '  MISSED'}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
