"""onnxslim_lab: exported ONNX models, smaller and faster, without getting worse."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim_lab.base import Change, Context, Outcome, Pass, Refusal
    from onnxslim_lab.compare import compare
    from onnxslim_lab.data import Dataset, load_data
    from onnxslim_lab.engine import Result, optimize
    from onnxslim_lab.errors import LabError
    from onnxslim_lab.graph import Graph
    from onnxslim_lab.inputs.random_data import random_data
    from onnxslim_lab.inspection import inspect
    from onnxslim_lab.recipe import Recipe
    from onnxslim_lab.report import Report
    from onnxslim_lab.sessions import Runner

# Where each public name lives: loaded when first asked for, so that `--help` and the child process that
# runs onnxruntime start without scikit-learn and the passes.
_HOMES = {
    "Change": "base",
    "Context": "base",
    "Dataset": "data",
    "Graph": "graph",
    "LabError": "errors",
    "Outcome": "base",
    "Pass": "base",
    "Recipe": "recipe",
    "Refusal": "base",
    "Report": "report",
    "Result": "engine",
    "Runner": "sessions",
    "compare": "compare",
    "inspect": "inspection",
    "load_data": "data",
    "optimize": "engine",
    "random_data": "inputs.random_data",
}

__all__ = [
    "Change",
    "Context",
    "Dataset",
    "Graph",
    "LabError",
    "Outcome",
    "Pass",
    "Recipe",
    "Refusal",
    "Report",
    "Result",
    "Runner",
    "compare",
    "inspect",
    "load_data",
    "optimize",
    "random_data",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxslim_lab' has no attribute {name!r}")
    found = getattr(import_module(f"onnxslim_lab.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
