"""JSON and models as the commands themselves write them, for the tests of the report page."""

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from onnxslim_lab.cli import app
from onnxslim_lab.report_page import read_sources

STEPS = ("-p", "simplify", "-p", "quantize:format=qdq")
BUDGETS = """budgets:
  metrics: [{name: top1, drop: 0.2}]
  agreement: {least: 0.99}
  file_ratio: 0.5
  operators: [Conv, Gemm]
  latency: {ratio: 100, pairs: 10}
  provenance: true
"""


def measure(folder: Path, model: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, Path]:
    """Run optimize, compare, sensitivity, bench and gate on LeNet-5; return what they wrote by its kind."""
    x = (images[:, None] / 255).astype(np.float32)
    np.savez(folder / "data.npz", x=x, labels=labels.astype(np.int64))
    (folder / "gate.yaml").write_text(BUDGETS)
    data, small = ("--data", str(folder / "data.npz")), str(folder / "small.onnx")
    paths = {name: folder / f"{name}.json" for name in ("run", "comparison", "gate", "bench", "sensitivity")}
    calls = {
        "run": (
            "optimize",
            str(model),
            "-o",
            small,
            *STEPS,
            *data,
            "--limit",
            "16",
            "-q",
            "--report",
            str(paths["run"]),
        ),
        "comparison": ("compare", str(model), small, *data, "--json"),
        "gate": ("gate", small, "-b", str(model), "-c", str(folder / "gate.yaml"), *data, "--json"),
        "bench": ("bench", str(model), small, *data, "--limit", "2", "--runs", "10", "--json"),
        "sensitivity": ("sensitivity", str(model), *data, "--limit", "4", "--json"),
    }
    for name, arguments in calls.items():
        done = CliRunner().invoke(app, [*arguments, "--no-cache"] if name == "run" else list(arguments))
        assert done.exit_code in ((0, 14) if name == "gate" else (0, 1)), done.output
        if not paths[name].exists():
            paths[name].write_text(done.stdout, encoding="utf-8")
    return paths | {"model": Path(small)}


def sources(paths: dict[str, Path]):
    """Return all of it but the comparison."""
    extra = {name: paths[name] for name in ("gate", "bench", "sensitivity", "model")}
    return read_sources(paths["run"], **extra)
