"""Budgets on how much there is: bytes, parameters, multiply-accumulates, quantized and pruned weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from onnxslim_lab.bench import file_bytes, model_files
from onnxslim_lab.errors import LabError, ModelError, quote
from onnxslim_lab.gate.result import BudgetResult, Cause, number
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.gate.weights import fed_macs

_SHOWN = 5  # names in a cause
_BLOCK = 1 << 20  # bytes read at a time


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
        told = "real-valued constants, with those stored as integers or codes"
        yield _counted(subject, _most("parameters", subject.weights.parameters, budgets.parameters, "", told))
    if budgets.macs is not None:
        try:
            total, unknown = fed_macs(subject.weights.model, subject.feeds[0])
        except LabError as error:
            yield BudgetResult.unmeasured("macs", "size", error)
            return
        result = _most("macs", total, budgets.macs, "", "open dimensions as in the data's first sample")
        yield _counted(subject, result, unknown)


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


def _counted(subject: Subject, result: BudgetResult, unknown: int = 0) -> BudgetResult:
    """Return a verdict that something is few enough; undecided where layers could not be counted."""
    hidden = subject.weights.hidden
    if result.status == "fail" or not (unknown or hidden):
        return result
    cause = f"{result.cause}; {unknown + len(hidden)} layers could not be counted: their sizes are not known"
    return result.model_copy(update={"status": "undecided", "cause": cause, "where": hidden[:_SHOWN]})


def check_coverage(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether enough of the layers' weights is stored as integers, or zero."""
    budget = subject.config.budgets.coverage
    if budget is None:
        return
    weights = subject.weights
    integers = sum(item.size for item in weights.found if item.integer)
    zeros = sum(item.zeros for item in weights.found)
    for key, least, count, told in (
        ("coverage.quantized", budget.quantized, integers, "stored as integers or codes"),
        ("coverage.pruned", budget.pruned, zeros, "zero"),
    ):
        if least is not None:
            text = f"{count:,} of {weights.size:,} weights of layers are {told}"
            if weights.hidden:
                text += f"; those of {len(weights.hidden)} layers could not be decoded and are not among them"
            yield _least(key, count / max(1, weights.size), least, text)


def _least(key: str, observed: float, limit: float, told: str) -> BudgetResult:
    status: Literal["pass", "fail"] = "pass" if observed >= limit else "fail"
    cause = f"{observed:.2%}, at least {limit:.2%} wanted: {told}"
    return BudgetResult(
        budget=key, kind="coverage", status=status, cause=cause, observed=observed, limit=limit, better="more"
    )
