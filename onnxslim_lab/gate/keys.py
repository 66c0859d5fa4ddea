"""What the verdicts on configured budgets are called, known before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator

from onnxslim_lab.gate.budgets import Budgets
from onnxslim_lab.gate.result import BudgetResult, Cause

_KINDS: dict[str, Cause] = {
    "metrics": "quality",
    "agreement": "quality",
    "output_error": "quality",
    "file_bytes": "size",
    "file_ratio": "size",
    "transfer_bytes": "size",
    "parameters": "size",
    "macs": "size",
    "latency": "speed",
    "peak_memory": "speed",
    "load_milliseconds": "speed",
    "operators": "target",
    "domains": "target",
    "opset": "target",
    "dtypes": "target",
    "target": "target",
    "signature": "interface",
    "dynamic_axes": "interface",
    "finite": "values",
    "engines_agree": "values",
    "coverage": "coverage",
    "provenance": "origin",
    "real_data": "origin",
}
"""Of every budget, the class of cause that its failure is."""


def budget_prefixes(budgets: Budgets) -> tuple[str, ...]:
    """Return what the keys of the verdicts on each configured budget begin with.

    >>> from onnxslim_lab.gate.budgets import Budgets
    >>> budget_prefixes(Budgets(file_bytes=10, metrics=({"name": "top1", "drop": 0.1},), finite=True))
    ('metrics.top1', 'file_bytes', 'finite')
    """
    found: dict[str, None] = {}
    defaults = type(budgets)()
    for key in type(budgets).model_fields:
        value = getattr(budgets, key)
        if value == getattr(defaults, key):
            continue
        if key == "metrics":
            found |= dict.fromkeys(f"metrics.{item.name}" for item in value)
        elif key == "output_error":
            found |= dict.fromkeys(
                "output_error" if item.output == "*" else f"output_error.{item.output}" for item in value
            )
        else:
            found[key] = None
    return tuple(found)


def not_judged(budgets: Budgets, reason: str) -> Iterator[BudgetResult]:
    """Yield that nothing was judged, once for each configured budget."""
    for key in budget_prefixes(budgets):
        yield BudgetResult(budget=key, kind=_KINDS[key.partition(".")[0]], status="undecided", cause=reason)
