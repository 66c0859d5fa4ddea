"""Budgets on how much there is: bytes, parameters, multiply-accumulates, quantized and pruned weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from onnxslim_lab.bench import file_bytes, model_files
from onnxslim_lab.errors import ModelError, quote
from onnxslim_lab.gate.result import BudgetResult, Cause, number
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.graph import Graph, attribute, is_op
from onnxslim_lab.layer_views.storage import FLOATS
from onnxslim_lab.layers import find_layers
from onnxslim_lab.macs import fed_sizes, model_macs, parameters

_SHOWN = 5  # names in a cause
_BLOCK = 1 << 20  # bytes read at a time
_WEIGHT_SLOTS = {
    "DequantizeLinear": 0,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulNBits": 1,
}
"""Where operators read integer weights."""


def check_size(subject: Subject) -> Iterator[BudgetResult]:
    """Yield verdicts on bytes, parameters and multiply-accumulates."""
    budgets, path = subject.config.budgets, subject.candidate_path
    size = file_bytes(path)
    if budgets.file_bytes is not None:
        yield _most("file_bytes", size, budgets.file_bytes, "bytes", "the file and its external data")
    if budgets.file_ratio is not None:
        before = file_bytes(subject.baseline_path)
        told = f"{size:,} bytes against the baseline's {before:,}"
        yield _most("file_ratio", size / max(1, before), budgets.file_ratio, "", told)
    if budgets.transfer_bytes is not None:
        packed = transfer_bytes(path)
        yield _most("transfer_bytes", packed, budgets.transfer_bytes, "bytes", "compressed by gzip -9")
    if budgets.parameters is not None:
        count = parameters(subject.candidate)
        yield _most("parameters", count, budgets.parameters, "", "real-valued constants")
    if budgets.macs is not None:
        yield _macs(subject, budgets.macs)


def transfer_bytes(path: Path) -> int:
    """Return the bytes of a model's files as a server sends them compressed by gzip at level 9."""
    total = 0
    for part in model_files(path):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        try:
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    total += len(packer.compress(block))
        except OSError as error:
            raise ModelError(f"cannot read {quote(str(part))}: {error.strerror}") from error
        total += len(packer.flush())
    return total


def _most(
    key: str, observed: float, limit: float, unit: str, told: str, kind: Cause = "size"
) -> BudgetResult:
    status: Literal["pass", "fail"] = "fail" if observed > limit else "pass"
    over = f", {number(observed - limit, unit)} over" if observed > limit else ""
    cause = f"{number(observed, unit)}, limit {number(limit, unit)}{over}: {told}"
    return BudgetResult(
        budget=key, kind=kind, status=status, cause=cause, observed=observed, limit=limit, unit=unit
    )


def _macs(subject: Subject, limit: int) -> BudgetResult:
    candidate = with_float_weights(subject.candidate)
    counted = model_macs(candidate, fed_sizes(candidate, subject.feeds[0]))
    hidden = [
        item.where
        for graph in candidate.walk()
        for item in find_layers(graph)[1]
        if "quantized" in item.reason or "computed" in item.reason
    ]
    unknown = counted.unknown + len(hidden)
    told = "open dimensions as in the data"
    result = _most("macs", counted.total, limit, "", told)
    if result.status == "pass" and unknown:
        cause = (
            f"{result.cause}; {unknown} layers could not be counted, their weights are quantized or computed"
        )
        return result.model_copy(
            update={"status": "undecided", "cause": cause, "where": tuple(hidden[:_SHOWN])}
        )
    return result


def with_float_weights(model: Graph) -> Graph:
    """Return a copy whose dequantized weights are float constants (zeros), so that their layers are counted."""
    copy = model.copy()
    for graph in copy.walk():
        for node in graph.nodes:
            kind = graph.constant_type(node.input[0]) if is_op(node, "DequantizeLinear") else None
            if kind is not None and len(kind[1]) > 1 and not graph.is_output(node.output[0]):
                name = node.output[0]
                graph.remove(node)
                graph.set_constant(name, np.zeros(kind[1], np.float32))
    return copy


def check_coverage(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether enough of the weights is stored as integers, or zero."""
    budget = subject.config.budgets.coverage
    if budget is None:
        return
    whole, zeros = _float_weights(subject.candidate)
    integers = _integer_weights(subject.candidate)
    if budget.quantized is not None:
        share = integers / max(1, integers + whole)
        told = f"{integers:,} of {integers + whole:,} weights of layers are integers"
        yield _least("coverage.quantized", share, budget.quantized, told)
    if budget.pruned is not None:
        share = zeros / max(1, whole)
        yield _least(
            "coverage.pruned", share, budget.pruned, f"{zeros:,} of {whole:,} float weights are zero"
        )


def _least(key: str, observed: float, limit: float, told: str) -> BudgetResult:
    status: Literal["pass", "fail"] = "pass" if observed >= limit else "fail"
    cause = f"{observed:.2%}, at least {limit:.2%} wanted: {told}"
    return BudgetResult(
        budget=key, kind="coverage", status=status, cause=cause, observed=observed, limit=limit, better="more"
    )


def _float_weights(model: Graph) -> tuple[int, int]:
    """Return how many weights the layers store as floats, and how many of them are zero; each once."""
    seen: dict[tuple[int, str], tuple[int, int]] = {}
    for graph in model.walk():
        for layer in find_layers(graph)[0]:
            array = layer.weight_graph.constant(layer.weight)
            if array is not None:
                key = (id(layer.weight_graph), layer.weight)
                seen.setdefault(key, (array.size, int(np.count_nonzero(array == 0))))
    return sum(size for size, _ in seen.values()), sum(zero for _, zero in seen.values())


def _integer_weights(model: Graph) -> int:
    """Return how many weights are stored as integers, those packed into bytes one by one."""
    seen: dict[tuple[int, str], int] = {}
    for graph in model.walk():
        for node in graph.nodes:
            slot = _WEIGHT_SLOTS.get(node.op_type)
            name = node.input[slot] if slot is not None and slot < len(node.input) else ""
            kind = graph.constant_type(name) if name else None
            if kind is not None and kind[0] not in FLOATS and len(kind[1]) > 1:
                packed = 8 // attribute(node, "bits", 4) if node.op_type == "MatMulNBits" else 1
                seen[id(graph.scope_of(name)), name] = int(np.prod(kind[1])) * packed
    return sum(seen.values())
