"""Read the JSON that `optimize --report`, `compare`, `gate`, `bench` and `sensitivity` write."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from onnxslim_lab.bench_report import BenchReport
from onnxslim_lab.compare import Comparison
from onnxslim_lab.errors import DataError, ModelError, ParameterError, quote
from onnxslim_lab.gate.result import GateReport
from onnxslim_lab.graph import Graph
from onnxslim_lab.provenance import KEY, Provenance
from onnxslim_lab.quantization.sensitivity import SensitivityReport
from onnxslim_lab.report import Report


@dataclass(frozen=True)
class Sources:
    """What a page is made from; None is a thing that was not measured."""

    run: Report | None = None
    comparison: Comparison | None = None
    gate: GateReport | None = None
    bench: BenchReport | None = None
    sensitivity: SensitivityReport | None = None
    provenance: Provenance | None = None


_KINDS: dict[str, tuple[type[BaseModel], frozenset[str]]] = {
    "run": (Report, frozenset({"steps", "final"})),
    "comparison": (Comparison, frozenset({"verdict", "divergence"})),
    "gate": (GateReport, frozenset({"budgets", "candidate"})),
    "bench": (BenchReport, frozenset({"pairs", "ratio"})),
    "sensitivity": (SensitivityReport, frozenset({"layers", "all_db"})),
}
"""By the field of Sources: the type of the JSON, and keys that tell it from the others."""

_WRITTEN_BY = {
    "run": "optimize --report",
    "comparison": "compare --json",
    "gate": "gate --output json=FILE",
    "bench": "bench --json",
    "sensitivity": "sensitivity --json",
}


def read_sources(
    first: Path,
    *,
    gate: Path | None = None,
    bench: Path | None = None,
    sensitivity: Path | None = None,
    model: Path | None = None,
) -> Sources:
    """Return what the files say.

    Args:
        first: JSON of any of the five commands, known by its keys.
        gate: JSON of that command.
        bench: JSON of that command.
        sensitivity: JSON of that command.
        model: The result as .onnx, for the provenance in its metadata.

    Raises:
        DataError: A file cannot be read or is not such JSON.
        ParameterError: Two files are of one kind.
        ModelError: The model cannot be read or its provenance is not what optimize writes.
    """
    sources = _with(Sources(), first, None)
    for path, kind in ((gate, "gate"), (bench, "bench"), (sensitivity, "sensitivity")):
        if path is not None:
            sources = _with(sources, path, kind)
    if model is not None:
        graph = Graph.load(model)
        if graph.metadata.get(KEY) is None:
            raise ModelError(
                f"{quote(str(model))} has no entry {quote(KEY)}: give the file that optimize wrote"
            )
        sources = replace(sources, provenance=Provenance.read(graph))
    return sources


def _with(sources: Sources, path: Path, wanted: str | None) -> Sources:
    """Return sources with one more file, of the wanted kind or any."""
    content = _json(path)
    kind = next((name for name, (_, keys) in _KINDS.items() if keys <= content.keys()), None)
    if kind is None or wanted not in (None, kind):
        expected = ", ".join(_WRITTEN_BY.values()) if wanted is None else _WRITTEN_BY[wanted]
        found = "" if kind is None else f", it is what {_WRITTEN_BY[kind]} writes"
        raise DataError(f"{quote(str(path))} is not JSON as written by {expected}{found}")
    if getattr(sources, kind) is not None:
        raise ParameterError(f"{quote(str(path))}: there is already a file of {_WRITTEN_BY[kind]}; give one")
    try:
        value: Any = _KINDS[kind][0].model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{quote(str(path))}: {quote(place)}: {problem['msg']}; was it written by another version?"
        ) from error
    return replace(sources, **{kind: value})


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {quote(str(path))}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{quote(str(path))} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{quote(str(path))} holds a JSON {type(content).__name__}, not a report")
    return content
