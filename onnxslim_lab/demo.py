"""Demo: train a classifier on scikit-learn's digits, compress it, check it on held-out digits."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Group
from rich.table import Table

from onnxslim_lab.base import Progress
from onnxslim_lab.data import Dataset
from onnxslim_lab.engine import Result, optimize
from onnxslim_lab.errors import SaveError, quote

STEPS = ("simplify", "prune:sparsity=0.8", "share:bits=3", "encode")
SMALLEST_RATIO = 15.0  # what the demo promises
HIDDEN = (512, 256)


@dataclass(frozen=True)
class Demo:
    """What the demo measured."""

    result: Result

    @property
    def passed(self) -> bool:
        """Whether the file is small enough and the accuracy's change may be zero."""
        metric = self.result.report.metrics[0]
        inside = metric.low is not None and metric.high is not None and metric.low <= 0 <= metric.high
        return inside and self.result.report.ratio >= SMALLEST_RATIO

    def table(self) -> Group:
        """Return before and after, and the report."""
        report = self.result.report
        metric = report.metrics[0]
        table = Table(title="digits classifier, before and after", title_justify="left")
        for heading in ("", "file", "top-1 on held-out digits"):
            table.add_column(heading)
        table.add_row("original", f"{report.bytes_before:,} bytes", f"{metric.original:.2%}")
        table.add_row(
            "compressed",
            f"{report.bytes_after:,} bytes ({report.ratio:.1f}x smaller)",
            f"{metric.result:.2%}",
        )
        said = "passed" if self.passed else "FAILED"
        return Group(report.table(), table, f"demo {said}")


def train() -> tuple[onnx.ModelProto, Any, Any]:
    """Return a trained classifier as ONNX, with held-out digits and their labels."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - heavy, and only the demo needs it
    from sklearn.model_selection import train_test_split  # noqa: PLC0415
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

    digits, labels = load_digits(return_X_y=True)
    digits = (digits / 16).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        digits, labels, test_size=0.3, random_state=0, stratify=labels
    )
    network = MLPClassifier(HIDDEN, alpha=1.0, learning_rate_init=0.003, max_iter=25, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge to be compressed
        network.fit(train_x, train_y)
    return to_onnx(network), test_x, test_y


def to_onnx(network: Any) -> onnx.ModelProto:
    """Return a scikit-learn MLPClassifier as ONNX: Gemm, Relu, ..., Softmax."""
    nodes, initializers, value = [], [], "digits"
    last = len(network.coefs_) - 1
    for index, (weight, bias) in enumerate(zip(network.coefs_, network.intercepts_, strict=True)):
        initializers += [
            numpy_helper.from_array(weight.astype(np.float32), f"dense{index}.weight"),
            numpy_helper.from_array(bias.astype(np.float32), f"dense{index}.bias"),
        ]
        inputs = [value, f"dense{index}.weight", f"dense{index}.bias"]
        nodes.append(helper.make_node("Gemm", inputs, [f"dense{index}.out"], f"dense{index}"))
        value = f"dense{index}.out" if index == last else f"relu{index}.out"
        if index < last:
            nodes.append(helper.make_node("Relu", [f"dense{index}.out"], [value], f"relu{index}"))
    nodes.append(helper.make_node("Softmax", [value], ["probabilities"], "softmax", axis=1))
    features, classes = network.coefs_[0].shape[0], network.coefs_[-1].shape[1]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("digits", TensorProto.FLOAT, ["batch", features])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="onnxslim_lab demo")


def run(folder: Path | None, progress: Progress) -> Demo:
    """Train, compress, check; keep both models in `folder` when it is given."""
    if folder is not None and not folder.is_dir():
        raise SaveError(f"no folder {quote(str(folder))}; make it first")
    progress(0, 1, "training")
    model, digits, labels = train()
    data = Dataset([{"digits": digits}], labels, source="held-out digits")
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        source = place / "digits.onnx"
        onnx.save(model, source)
        result = optimize(
            source, place / "digits-small.onnx", steps=STEPS, data=data, metrics=["top1"], progress=progress
        )
    return Demo(result)
