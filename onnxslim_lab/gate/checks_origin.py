"""The budget on provenance: the candidate's file says how it was made, and from this baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from onnxslim_lab.bench import model_files
from onnxslim_lab.errors import ModelError
from onnxslim_lab.gate.result import BudgetResult, Status
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.graph import Graph
from onnxslim_lab.provenance import Provenance, content_sha256, weights_sha256

_BLOCK = 1 << 20  # bytes read at a time


def check_provenance(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether provenance is there, names this baseline as its source, and the weights are those it names."""
    if not subject.config.budgets.provenance:
        return
    problem = provenance_problem(subject.candidate, subject.baseline)
    status: Status = "fail" if problem else "pass"
    cause = (
        problem
        or "the file says how it was made, from this baseline, and its weights are those that were made"
    )
    yield BudgetResult(budget="provenance", kind="origin", status=status, cause=cause)


def provenance_problem(candidate: Graph, baseline: Graph) -> str:
    """Return what is wrong with what a candidate says of itself, "" when nothing is."""
    try:
        made = Provenance.read(candidate)
    except ModelError as error:
        return str(error)
    source = content_sha256(baseline)
    if made.source_sha256 != source:
        return (
            f"it was made from another model: its source is {made.source_sha256[:16]}..., "
            f"the baseline {source[:16]}..."
        )
    if made.weights_sha256 != weights_sha256(candidate):
        return "its weights were changed after it was made: they are not those that its provenance names"
    return ""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a model file and its external data, one after the other."""
    digest = hashlib.sha256()
    for part in model_files(path):
        with part.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
