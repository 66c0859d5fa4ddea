"""What float results of convolutions on codes cost, in the terms that `quantize` weighs them by.

    python benchmarks/float_results.py [--runs 40]

Residual blocks of two pointwise convolutions, whose sums stay float, are quantized with the results of the second ones
rounded (QLinearConv) and not (MatMulIntegerToFloat), and timed in turn on one thread. The extra time of one is fitted
(nonnegative least squares on relative times) to

    elements * a - macs * b

and printed in units of 0.016 ns, which float_islands.py finds: the constants of
onnxslim_lab/quantization/float_cost.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from float_islands import chain, difference, feeds_of, fit
from quantization_metrics import session

from onnxslim_lab import Runner
from onnxslim_lab.base import Context, Outcome
from onnxslim_lab.data import Dataset
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.quantization.planning import scheme_of
from onnxslim_lab.quantization.residuals import residual_sums
from onnxslim_lab.quantization.static import plan_static
from onnxslim_lab.statistics import Calibration

BLOCKS = [  # channels, channels inside, size
    (16, 96, 112),
    (24, 144, 56),
    (40, 240, 28),
    (80, 480, 14),
    (112, 672, 14),
    (192, 1152, 7),
    (64, 64, 56),
    (64, 256, 56),
    (128, 128, 28),
    (128, 512, 28),
    (256, 256, 14),
    (256, 1024, 14),
    (512, 512, 7),
]
DEPTH = 3
UNIT = 0.016e-9  # seconds
LEAST = 5e-5  # seconds; what is less does not show in a model's time


def blocks(channels: int, inside: int, size: int) -> onnx.ModelProto:
    """Return a convolution, residual blocks and a convolution."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def conv(value: str, given: int, made: int, name: str) -> str:
        weight = rng.standard_normal((made, given, 1, 1)) / given**0.5
        for key, array in ((f"{name}_w", weight), (f"{name}_b", rng.standard_normal(made))):
            constants.append(onnx.numpy_helper.from_array(array.astype(np.float32), key))
        nodes.append(onnx.helper.make_node("Conv", [value, f"{name}_w", f"{name}_b"], [name], name))
        return name

    value = conv("x", channels, channels, "first")
    for number in range(DEPTH):
        wide = conv(value, channels, inside, f"expand{number}")
        nodes.append(onnx.helper.make_node("Relu", [wide], [f"{wide}_relu"]))
        narrow = conv(f"{wide}_relu", inside, channels, f"project{number}")
        nodes.append(onnx.helper.make_node("Add", [value, narrow], [f"sum{number}"]))
        value = f"sum{number}"
    shape = [1, channels, size, size]
    return chain(nodes, constants, shape, conv(value, channels, channels, "last"), shape)


def extra_time(model: onnx.ModelProto, runner: Runner, runs: int, folder: Path) -> float:
    """Return the seconds that one convolution takes longer when its result stays float."""
    feeds = feeds_of(model)
    step = Quantize(target="onnxruntime-x86-vnni", rounding="nearest", ranges="minmax")
    context = Context(calibration=Calibration(runner, Dataset(feeds, None, "random", random=True)))
    planned = plan_static(Graph.load(model), step, scheme_of(step), context, Outcome())
    assert planned is not None
    plan = planned.plan
    plan.residuals = set().union(*residual_sums(plan))
    sessions = []
    for number, summed in enumerate((set[str](), {f"project{number}" for number in range(DEPTH)})):
        plan.summed, target = summed, folder / f"{number}.onnx"
        result = plan.model.copy()
        plan.write(result)
        result.save(target)
        sessions.append(session(str(target)))
    return difference(sessions, feeds[0], runs) / DEPTH


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description="Measure what float results of convolutions on codes cost.")
    parser.add_argument("--runs", type=int, default=40, help="alternating runs of each pair")
    runs = parser.parse_args().runs
    rows, extra = [], []
    print("| result | MACs | extra time |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary, Runner(threads=1) as runner:
        for channels, inside, size in BLOCKS:
            took = extra_time(blocks(channels, inside, size), runner, runs, Path(temporary))
            elements = channels * size * size
            print(
                f"| {channels} at {size}x{size} | {elements * inside} | {1e6 * took:.0f} us |",
                flush=True,
            )
            rows.append([float(elements), -float(elements * inside)])
            extra.append(took)
    element, product = fit(rows, extra, LEAST)
    print(f"\nAn element costs {element / UNIT:.0f}, a multiply-accumulate saves {product / UNIT:.3f}.")
    for (channels, _, size), row, seen in zip(BLOCKS, rows, extra, strict=True):
        predicted = row[0] * element + row[1] * product
        print(f"  {channels} at {size}x{size}: {1e6 * predicted:.0f} us fitted, {1e6 * seen:.0f} us seen")


if __name__ == "__main__":
    main()
