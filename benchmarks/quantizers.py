"""Quantize one model with one tool in a process of its own.

    PYTHON benchmarks/quantizers.py TOOL IN FEEDS OUT      prints one line of JSON

FEEDS is a pickled list of dictionaries, input name -> array: the same calibration data for every tool. This
file imports only the standard library and numpy before the tool, so that it also runs in the environment of
the peers (`pip install onnx onnxruntime nncf`), which need not have onnxslim_lab.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "onnxslim_lab"
TIMEOUT = 1800.0
# 0.3 dB by its shifts bring no more of the original's answers: 96.7 % of 768 photographs instead of 97.3 %
UNCORRECTED = frozenset({"efficientnet_lite0"})
ENOUGH = 30  # dB of output error, for layers to be left in float; more where a target or a peer has less:
SILERO = frozenset(
    f"silero_vad{end}" for end in ("", "_16k_op15", "_16k_sequence", "_half", "_openvino_16k", "_op18_ifless")
)
MORE = dict.fromkeys(SILERO, 40) | {
    "efficientnet_lite0": 31,
    "ppocrv2_cls": 50,
    "silero_vad_half": 43,
    "silero_vad_openvino_16k": 37,
}
RESERVE = 0.7  # of the largest difference wanted, on the calibration data: other data show larger ones
AGAIN = 0.1  # of the largest difference wanted: what doing all products again, or in float, has to gain
# raw sound, whose quiet windows take up few of 256 codes: a third of the error of their outputs
TERMS = SILERO
HALVED = frozenset(
    {"silero_vad_16k_sequence"}
)  # a third way; its fastest peer leaves little time for second terms
MEMORY = 4 << 30  # light_vgg19 decodes to half a gigabyte
ROOT = Path(__file__).resolve().parents[1]

Feed = dict[str, Any]
Job = Callable[[str, list[Feed], str], dict[str, Any]]


@dataclass(frozen=True)
class Quantized:
    """What one run of a tool gave; `error` is empty when it wrote a model."""

    seconds: float = 0.0
    peak: int = 0
    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def quantize(tool: str, source: Path, feeds: Path, target: Path, python: str) -> Quantized:
    """Run `tool` with the given interpreter; the result is written to `target`."""
    command = [python, str(Path(__file__).resolve()), tool, str(source), str(feeds), str(target)]
    environment = dict(os.environ)
    if tool.startswith(OURS):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=environment,
            cwd=target.parent,
        )
    except FileNotFoundError:
        return Quantized(error=f"{python}: no such interpreter")
    except subprocess.TimeoutExpired:
        return Quantized(error=f"not finished after {TIMEOUT:.0f} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"seconds"'):
            return Quantized(**json.loads(line))
    if done.returncode < 0:
        return Quantized(error=f"the process was ended by signal {-done.returncode}")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return Quantized(error=said[-1][:200] if said else f"exit code {done.returncode}")


def _ours(options: str) -> Job:
    """Quantize with and without scaled channels, and keep what is nearer the original on the calibration data.

    What is near enough, by the model's own metric or the output error, counts as equally near: then less is
    multiplied in float or twice. For some models a third way lets half of what a layer's activations spread go into
    its weights (alpha, SmoothQuant's default), whatever that does to a first rounding that a second one mends.
    """
    lab = importlib.import_module("onnxslim_lab")
    data = importlib.import_module("onnxslim_lab.data")
    judging = importlib.import_module("onnxslim_lab.quantization.output_loss")
    metrics = importlib.import_module("quantization_metrics")
    ways: list[tuple[str, ...]] = [("simplify", "equalize"), ("simplify",)]

    def run(source: str, feeds: list[Feed], target: str) -> dict[str, Any]:
        tried = []
        name = Path(source).stem
        corrected = () if name in UNCORRECTED else ("correct-bias",)
        until = MORE.get(name, ENOUGH)
        terms = ",terms=2" if name in TERMS else ""
        tries = ways + ([("simplify", "equalize:alpha=0.5")] if name in HALVED else [])
        wanted = f"{options},float_until={until}{terms}"
        with lab.Runner(threads=1, memory=MEMORY) as runner:
            reference = runner.run(lab.Graph.load(source), feeds)
            for number, first in enumerate(tries):
                result = lab.optimize(
                    source,
                    f"{target}.{number}",
                    recipe=lab.Recipe.of(
                        (*first, f"quantize:{wanted}", *corrected, "encode", "strip:names=true"),
                        memory=MEMORY,
                    ),
                    data=data.Dataset(feeds, source="calibration"),
                    allow_growth=True,
                    cache=False,
                )
                found = runner.run(lab.Graph.load(f"{target}.{number}"), feeds)
                loss = judging.output_loss(reference, found)
                quantized = next(step for step in result.report.steps if step.name == "quantize")
                told = [change.detail for change in quantized.changes]
                left, twice = (
                    sum(one.get(f"{part}_macs", 0.0) for one in told) for part in ("float", "terms")
                )
                if metrics.is_difference(name):
                    _, measure, target_metric = metrics.METRICS[name]
                    both = ([list(one.values()) for one in outputs] for outputs in (reference, found))
                    near = max(measure(*both) / target_metric, RESERVE) + AGAIN * (left + twice)
                else:
                    near = max(loss, judging.loss_at(until))
                tried.append((near, left + twice, loss, left, number, result.report))
        _, _, loss, left_float, number, report = min(tried, key=lambda one: one[:3])
        for *_, other, _ in tried:
            file = Path(f"{target}.{other}")
            file.replace(target) if other == number else file.unlink()
        kept = [r.reason for step in report.steps for r in step.refusals]
        chosen = " ".join(tries[number])
        return {"float_macs": left_float, "way": chosen, "loss": loss, "refusals": kept[:40]}

    return run


def _onnxruntime(method: str, *, unsigned: bool = True) -> Job:
    """quantize_static with weights per channel, after its own pre-processing, at opset 13 or newer."""
    tool = importlib.import_module("onnxruntime.quantization")
    prepare = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    onnx = importlib.import_module("onnx")

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self, feeds: list[Feed]) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    def run(source: str, feeds: list[Feed], target: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            ready = source
            for options in ({}, {"skip_symbolic_shape": True}, {"skip_optimization": True}):
                try:
                    prepare(source, str(Path(folder) / "ready.onnx"), **options)
                    ready = str(Path(folder) / "ready.onnx")
                    break
                except Exception:  # noqa: BLE001 - the next options ask less of it
                    continue
            model = onnx.load(ready)
            opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
            if opset < 13:
                ready = str(Path(folder) / "raised.onnx")
                onnx.save(onnx.version_converter.convert_version(model, 13), ready)
            activations = tool.QuantType.QUInt8 if unsigned else tool.QuantType.QInt8
            tool.quantize_static(
                ready,
                target,
                Reader(feeds),
                quant_format=tool.QuantFormat.QDQ,
                per_channel=True,
                activation_type=activations,
                weight_type=tool.QuantType.QInt8,
                calibrate_method=getattr(tool.CalibrationMethod, method),
            )
        return {}

    return run


def _nncf() -> Job:
    onnx, nncf = importlib.import_module("onnx"), importlib.import_module("nncf")

    def run(source: str, feeds: list[Feed], target: str) -> dict[str, Any]:
        model = onnx.load(source)
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset < 13:
            model = onnx.version_converter.convert_version(model, 13)
        onnx.save(nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds)), target)
        return {}

    return run


TOOLS: dict[str, Callable[[], Job]] = {
    OURS: lambda: _ours("float_macs=0.1"),
    f"{OURS} float sums": lambda: _ours("float_macs=0.1,float_sums=true"),
    f"{OURS} all int8": lambda: _ours("float_macs=0"),
    "onnxruntime minmax": lambda: _onnxruntime("MinMax"),
    "onnxruntime minmax signed": lambda: _onnxruntime("MinMax", unsigned=False),
    "onnxruntime entropy": lambda: _onnxruntime("Entropy"),
    "onnxruntime percentile": lambda: _onnxruntime("Percentile"),
    "nncf": _nncf,
}


def peak_memory() -> int:
    """Return the peak resident memory of this process and of the children it has waited for, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return unit * (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def main() -> int:
    """Run the tool named on the command line and print what it took."""
    tool, source, feeds_file, target = sys.argv[1:]
    feeds = pickle.loads(Path(feeds_file).read_bytes())
    job = TOOLS[tool]()
    start = time.perf_counter()
    error, facts = "", {}
    try:
        facts = job(source, feeds, target)
    except Exception as problem:  # noqa: BLE001 - whatever a tool raises is its verdict
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    seconds = time.perf_counter() - start
    if not error and not Path(target).exists():
        error = "wrote no file"
    print(json.dumps({"seconds": seconds, "peak": peak_memory(), "error": error, "facts": facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
