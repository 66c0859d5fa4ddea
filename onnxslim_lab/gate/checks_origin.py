"""The budget on provenance: the candidate's file says how it was made, and from this baseline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from onnxslim_lab.bench import model_files
from onnxslim_lab.errors import one_line, quote
from onnxslim_lab.gate.result import BudgetResult, Status
from onnxslim_lab.gate.subject import Subject

KEY = "onnxslim_lab.provenance"
"""The entry of metadata_props: a JSON object with at least `source_sha256`."""
_BLOCK = 1 << 20  # bytes read at a time


def check_provenance(subject: Subject) -> Iterator[BudgetResult]:
    """Yield whether provenance is there and names this baseline as its source."""
    if not subject.config.budgets.provenance:
        return
    problem = provenance_problem(subject.candidate.metadata.get(KEY), file_sha256(subject.baseline_path))
    status: Status = "fail" if problem else "pass"
    cause = problem or "the file says how it was made, from this baseline"
    yield BudgetResult(budget="provenance", kind="origin", status=status, cause=cause)


def provenance_problem(text: str | None, baseline: str) -> str:
    """Return what is wrong with an entry of metadata_props, "" when nothing is.

    Args:
        text: The entry; None when there is none.
        baseline: SHA-256 of the baseline's files.
    """
    if text is None:
        return f"the file has no entry {quote(KEY)} in its metadata: optimize writes it"
    try:
        content = json.loads(text)
        source = content["source_sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"the entry {quote(KEY)} is not what optimize writes: it names no source_sha256"
    if source != baseline:
        return f"it was made from another model: its source is {one_line(str(source), 20)}, the baseline {baseline[:16]}..."
    return ""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a model file and its external data, one after the other."""
    digest = hashlib.sha256()
    for part in model_files(path):
        with part.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
