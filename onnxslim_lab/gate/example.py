"""A gate.yaml to start from, with every budget, and the JSON schema of such files."""

from __future__ import annotations

import json

from pydantic import BaseModel

from onnxslim_lab.gate.budgets import Budgets
from onnxslim_lab.gate.config import GateConfig, sub_models

_VALUES = {
    "metrics": "[{name: top1, drop: 0.01}, {name: top5, relative_drop: 0.005}]",
    "agreement": "{least: 0.98}",
    "output_error": '[{output: "*", relative: 0.1, sqnr_db: 20}]',
    "file_bytes": "5MB",
    "file_ratio": "0.5",
    "transfer_bytes": "4MB",
    "parameters": "1000000",
    "macs": "50000000",
    "latency": "{ratio: 1.0, milliseconds: 20, pairs: 60}",
    "peak_memory": "500MB",
    "load_milliseconds": "500",
    "operators": "[Conv, Gemm, Relu, QuantizeLinear, DequantizeLinear]",
    "domains": "[com.microsoft]",
    "opset": "{least: 13, most: 21}",
    "dtypes": "[float32, int8, uint8]",
    "target": "onnxruntime-x86",
    "signature": "true",
    "dynamic_axes": "true",
    "finite": "true",
    "engines_agree": "true",
    "coverage": "{quantized: 0.9, pruned: 0.5}",
    "provenance": "true",
    "real_data": "true",
}


def example_config() -> str:
    """Return a configuration with every key explained.

    >>> print(example_config().splitlines()[1])
    version: 1  # of this format
    """
    lines = ["# Budgets of `onnxslim-lab gate`, all optional: keep what you need."]
    for name, field in GateConfig.model_fields.items():
        if name != "budgets":
            lines.append(f"{name}: {field.default}  # {field.description}")
    lines.append("budgets:")
    for name, field in Budgets.model_fields.items():
        lines.append(f"  # {field.description}")
        for model in sub_models(field.annotation):
            lines += _explained(model)
        lines.append(f"  {name}: {_VALUES[name]}")
    return "\n".join(lines) + "\n"


def _explained(model: type[BaseModel]) -> list[str]:
    """Return a comment for each key of a part that says more than its name."""
    return [
        f"  #   {name}: {field.description}"
        for name, field in model.model_fields.items()
        if field.description
    ]


def schema() -> str:
    """Return the JSON schema of configurations, for editors."""
    return json.dumps(GateConfig.model_json_schema(), indent=2)
