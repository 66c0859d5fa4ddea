"""Bench: latency, memory, load time and bytes of two models on this machine, honestly compared."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.bench_report import BenchReport, ModelTimes, NodeTime, OperatorTimes
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError, ModelError, ParameterError, one_line, quote
from onnxslim_lab.pairing import measure_pairs, ratio_of
from onnxslim_lab.report import data_report
from onnxslim_lab.timed_model import TimedModel

__all__ = ["BenchReport", "bench"]

_TOP = 5  # nodes named
_INTEGER_FORMS = {
    "QGemm": "Gemm",
    "MatMulIntegerToFloat": "MatMul",
    "MatMulInteger": "MatMul",
    "MatMulNBits": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "FusedMatMul": "MatMul",
    "FusedGemm": "Gemm",
    "ConvInteger": "Conv",
    "FusedConv": "Conv",
    "NhwcConv": "Conv",
}


def bench(
    first: Path,
    second: Path,
    data: Dataset,
    *,
    runs: int = 40,
    warmup: int = 3,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    progress: Progress = silent,
) -> BenchReport:
    """Time two models in turn, each in a process of its own.

    Args:
        first: The original.
        second: The result.
        data: Inputs of both.
        runs: Timed pairs.
        warmup: Runs of each feed before.
        threads: Intra-op threads; 0 lets onnxruntime choose. With one, figures of machines compare.
        provider: The execution provider.
        progress: Told how many pairs are done.

    Raises:
        ParameterError: Too few runs, or the provider is not there.
        DataError: There are no feeds, or they do not fit a model.
        SessionError: A model does not run.
        ModelError: A file cannot be read.
    """
    if runs < 5:
        raise ParameterError(f"runs must be 5 or more for an interval, not {runs}")
    if not len(data):
        raise DataError("there is no data to run: the data set has no feeds")
    sizes = [file_bytes(path) for path in (first, second)]
    with (
        TimedModel(first, threads=threads, provider=provider) as a,
        TimedModel(second, threads=threads, provider=provider) as b,
    ):
        for model in (a, b):
            model.take(data.feeds)
        pairs = measure_pairs(
            a.timed,
            b.timed,
            pairs=runs,
            warmup=warmup,
            feeds=len(data),
            progress=progress,
        )
        memory = [model.memory() for model in (a, b)]  # before further sessions add to it
        loads = [model.load_seconds() for model in (a, b)]
        profiles = [model.profile() for model in (a, b)]
    ratio = ratio_of(pairs)
    return BenchReport(
        machine=machine(),
        onnxruntime=a.version,
        provider=provider,
        threads=threads,
        data=data_report(data),
        pairs=runs,
        block=pairs.block,
        first=_times(first, sizes[0], loads[0], memory[0], pairs.first, profiles[0]),
        second=_times(second, sizes[1], loads[1], memory[1], pairs.second, profiles[1]),
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
        verdict=ratio.verdict,
        operators=by_operator(*profiles),
    )


def _times(
    path: Path,
    size: int,
    load: float,
    memory: tuple[int | None, int | None],
    seconds: Any,
    profile: Sequence[NodeTime],
) -> ModelTimes:
    low, median, high = (float(value) for value in np.quantile(seconds, [0.05, 0.5, 0.95]))
    return ModelTimes(
        path=str(path),
        file_bytes=size,
        load_seconds=load,
        peak_bytes=memory[0],
        model_bytes=memory[1],
        median_seconds=median,
        low_seconds=low,
        high_seconds=high,
        slowest=list(profile[:_TOP]),
        seconds=tuple(float(value) for value in seconds),
    )


def by_operator(first: Sequence[NodeTime], second: Sequence[NodeTime]) -> list[OperatorTimes]:
    """Return the time of each operator in both profiles, what the second takes most more first."""
    sums: dict[str, list[float]] = {}
    for column, nodes in enumerate((first, second)):
        for node in nodes:
            sums.setdefault(plain(node.op_type), [0.0, 0.0])[column] += node.seconds
    found = [OperatorTimes(op_type=name, first=a, second=b) for name, (a, b) in sums.items()]
    return sorted(found, key=lambda item: -item.difference)


def plain(op_type: str) -> str:
    """Return the operator that an integer or fused form stands for.

    >>> plain("QLinearConv"), plain("QGemm"), plain("Relu")
    ('Conv', 'Gemm', 'Relu')
    """
    return _INTEGER_FORMS.get(op_type, op_type.removeprefix("QLinear"))


def file_bytes(path: Path) -> int:
    """Return the bytes of a model file and the external data it names.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        return sum(part.stat().st_size for part in model_files(path))
    except OSError as error:
        raise ModelError(f"cannot read {quote(str(path))}: {error.strerror}") from error


def model_files(path: Path) -> list[Path]:
    """Return a model file and the files of external data that it names.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot read {quote(str(path))}: {error.strerror}") from error
    except Exception as error:  # protobuf has no error class of its own in every version
        raise ModelError(f"{quote(str(path))} is not an ONNX model: {one_line(str(error))}") from error
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *(path.parent / place for place in sorted(places))]


def machine() -> str:
    """Return what this machine is called: its processor and system."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found[1].strip() if found else name
    except OSError:
        pass
    return f"{name}, {platform.system()}"
