"""What one float layer between layers on codes costs, in the terms that `quantize` weighs it by.

    python benchmarks/float_islands.py [--runs 40]

Chains of three convolutions, or of a product behind two, are quantized with and without the middle layer and
timed in turn on one thread. The extra time is fitted (nonnegative least squares on relative times) to

    macs * a + parameters * b + converted elements * c + conversions * d

and printed in units of a, the time that one multiply-accumulate takes longer in float: the constants of
onnxslim_lab/quantization/float_cost.py. A depthwise middle layer is shown beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from quantization_metrics import session
from scipy.optimize import nnls

import onnxslim_lab as lab
from onnxslim_lab.data import Dataset
from onnxslim_lab.worker.messages import Value

CONVOLUTIONS = [  # channels, size, kernel, groups
    (32, 8, 1, 1),
    (128, 8, 1, 1),
    (512, 7, 1, 1),
    (16, 64, 1, 1),
    (64, 56, 1, 1),
    (256, 14, 1, 1),
    (32, 112, 1, 1),
    (96, 112, 1, 1),
    (16, 32, 3, 1),
    (64, 28, 3, 1),
    (64, 56, 3, 1),
    (128, 28, 3, 1),
    (512, 7, 3, 1),
]
DEPTHWISE = [(96, 112, 3, 96), (144, 56, 3, 144), (480, 14, 5, 480)]
PRODUCTS = [(512, 512), (1024, 1024), (1280, 1000), (2048, 2048), (4096, 1000)]  # inputs, outputs
TYPE = onnx.TensorProto.FLOAT
Floats = NDArray[np.float64]


def convolutions(channels: int, size: int, kernel: int, groups: int) -> tuple[onnx.ModelProto, str, int]:
    """Return three convolutions in a row, the name of the middle one and its multiply-accumulates."""
    rng = np.random.default_rng(0)
    shape = [1, channels, size, size]
    nodes, constants, value = [], [], "x"
    for number, count in enumerate((1, groups, 1)):
        width = kernel if number == 1 else 1
        weight = rng.standard_normal((channels, channels // count, width, width)).astype(np.float32)
        constants.append(onnx.numpy_helper.from_array(weight / weight[0].size ** 0.5, f"w{number}"))
        pads = [width // 2] * 4
        nodes.append(
            onnx.helper.make_node(
                "Conv", [value, f"w{number}"], [f"c{number}"], f"conv{number}", group=count, pads=pads
            )
        )
        value = f"c{number}"
    macs = channels * channels // groups * kernel * kernel * size * size
    return chain(nodes, constants, shape, value, shape), "conv1", macs


def product(inputs: int, outputs: int) -> tuple[onnx.ModelProto, str, int]:
    """Return a Gemm behind a Gemm, the name of the last and its multiply-accumulates."""
    rng = np.random.default_rng(0)
    sizes = (inputs, outputs)
    constants = [
        onnx.numpy_helper.from_array(rng.standard_normal((8, inputs)).astype(np.float32), "w0"),
        onnx.numpy_helper.from_array(rng.standard_normal(sizes).astype(np.float32), "w1"),
    ]
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w0"], ["g"], "gemm0"),
        onnx.helper.make_node("Gemm", ["g", "w1"], ["y"], "gemm1"),
    ]
    return chain(nodes, constants, [1, 8], "y", [1, outputs]), "gemm1", inputs * outputs


def chain(
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    shape: list[int],
    result: str,
    result_shape: list[int],
) -> onnx.ModelProto:
    """Return a model of one input x and one output."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "chain", [info("x", TYPE, shape)], [info(result, TYPE, result_shape)], constants
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def feeds_of(model: onnx.ModelProto) -> list[dict[str, Value]]:
    """Return two feeds of a model that `chain` made."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(2)]


def extra_time(model: onnx.ModelProto, name: str, runs: int, folder: Path) -> float:
    """Return the median of the seconds that a chain takes longer when one layer stays float."""
    source, feeds = folder / "chain.onnx", feeds_of(model)
    onnx.save(model, source)
    sessions = []
    for number, options in enumerate(("ranges=minmax", f"ranges=minmax,exclude={name}")):
        target = folder / f"{number}.onnx"
        lab.optimize(
            source,
            target,
            steps=[f"quantize:{options}"],
            data=Dataset(feeds, source="random"),
            allow_growth=True,
            cache=False,
        )
        sessions.append(session(str(target)))
    return difference(sessions, feeds[0], runs)


def difference(sessions: list[InferenceSession], feed: dict[str, Value], runs: int) -> float:
    """Return the median of the seconds that the second of two models takes longer."""
    differences = []
    flush = np.zeros(1 << 25, np.float32)  # models are larger than caches: neither finds its weights there
    for _ in range(runs):
        times = []
        for made in sessions:
            flush += 1
            start = time.perf_counter()
            made.run(None, feed)
            times.append(time.perf_counter() - start)
        differences.append(times[1] - times[0])
    return statistics.median(differences)


def fit(rows: list[list[float]], extra: list[float], least: float = 1e-5) -> Floats:
    """Return the factors of least relative error that are not negative; times below `least` count as that."""
    matrix, wanted = np.array(rows), np.array(extra)
    weight = 1 / np.maximum(np.abs(wanted), least)
    scale = np.abs(matrix * weight[:, None]).max(axis=0)
    found, _ = nnls(matrix * weight[:, None] / scale, wanted * weight)
    return np.asarray(found / scale)


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description="Measure what a float layer between layers on codes costs.")
    parser.add_argument("--runs", type=int, default=40, help="alternating runs of each pair")
    runs = parser.parse_args().runs
    rows: list[list[float]] = []
    extra, names = [], []
    print("| middle layer | MACs | extra time |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        for channels, size, kernel, groups in CONVOLUTIONS + DEPTHWISE:
            model, name, macs = convolutions(channels, size, kernel, groups)
            took = extra_time(model, name, runs, Path(temporary))
            label = (
                f"Conv {kernel}x{kernel}, {channels} at {size}x{size}{', depthwise' if groups > 1 else ''}"
            )
            print(f"| {label} | {macs} | {1e6 * took:.0f} us |", flush=True)
            if groups == 1:
                parameters = channels * channels * kernel * kernel
                rows.append([macs, parameters, 2 * channels * size * size, 2])
                extra.append(took)
                names.append(label)
        for inputs, outputs in PRODUCTS:
            model, name, macs = product(inputs, outputs)
            took = extra_time(model, name, runs, Path(temporary))
            print(f"| Gemm {inputs} to {outputs} | {macs} | {1e6 * took:.0f} us |", flush=True)
            rows.append([macs, macs, 0, 0])
            extra.append(took)
            names.append(f"Gemm {inputs} to {outputs}")
    found = fit(rows, extra)
    print(f"\nOne multiply-accumulate takes {1e9 * found[0]:.4f} ns longer in float. In units of that:")
    for what, value in zip(("a weight", "an element converted", "a conversion"), found[1:], strict=True):
        print(f"- {what}: {value / found[0]:.0f}")
    for label, predicted, seen in zip(names, np.array(rows) @ found, extra, strict=True):
        print(f"  {label}: {1e6 * predicted:.0f} us fitted, {1e6 * seen:.0f} us seen")


if __name__ == "__main__":
    main()
