"""The gate's configuration: strict, from three kinds of file, and errors that name the key."""

import doctest
import importlib
import json
import pkgutil

import jsonschema
import pytest

import onnxslim_lab.gate
from onnxslim_lab.gate.budgets import Budgets, read_size
from onnxslim_lab.gate.config import GateConfig, GateConfigError, find_config
from onnxslim_lab.gate.example import example_config, schema

GOOD = {
    "confidence": 0.99,
    "undecided": "warning",
    "budgets": {
        "metrics": [{"name": "top1", "drop": 0.01}, {"name": "top5", "relative_drop": 0.02}],
        "agreement": {"least": 0.98},
        "output_error": [{"output": "*", "relative": 0.1}],
        "file_bytes": "5MB",
        "latency": {"ratio": 1.1},
        "operators": ["Conv", "Relu"],
        "opset": {"least": 13},
        "signature": True,
    },
}


def test_plain_data():
    config = GateConfig.parse(GOOD)
    assert config.alpha == pytest.approx(0.01)
    assert config.budgets.file_bytes == 5_000_000
    assert config.budgets.operators == ("Conv", "Relu")
    assert config.budgets.metrics[1].relative_drop == 0.02
    assert not config.budgets.finite


YAML = "budgets: {file_ratio: 0.5, finite: true}\n"
TOML = "[budgets]\nfile_ratio = 0.5\nfinite = true\n"
PROJECT = "[project]\nname = 'x'\n[tool.onnxslim_lab.gate.budgets]\nfile_ratio = 0.5\nfinite = true\n"


@pytest.mark.parametrize(
    ("name", "text"), [("gate.yaml", YAML), ("gate.toml", TOML), ("pyproject.toml", PROJECT)]
)
def test_files_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = GateConfig.load(tmp_path / name)
    assert config.budgets.file_ratio == 0.5
    assert config.budgets.finite
    assert find_config(tmp_path) == tmp_path / name


def test_no_file_is_found(tmp_path):
    assert find_config(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert find_config(tmp_path) is None
    with pytest.raises(GateConfigError, match=r"no table \[tool.onnxslim_lab.gate\]"):
        GateConfig.load(tmp_path / "pyproject.toml")


BAD = {
    "unknown key 'budget'; did you mean 'budgets'": {"budget": {}},
    "unknown key 'budgets.agrement'; did you mean 'agreement'": {"budgets": {"agrement": {"least": 0.9}}},
    "unknown key 'budgets.metrics.0.dorp'; did you mean 'drop'": {
        "budgets": {"metrics": [{"name": "top1", "dorp": 1}]}
    },
    "unknown key 'budgets.latency.ration'; did you mean 'ratio'": {"budgets": {"latency": {"ration": 1}}},
    "key 'confidence': Input should be less than 1, not 95": {"confidence": 95, "budgets": {"finite": True}},
    "key 'budgets.finite'": {"budgets": {"finite": "yes"}},
    "key 'budgets.metrics.0': give one of drop and relative_drop": {
        "budgets": {"metrics": [{"name": "top1"}]}
    },
    "key 'budgets.metrics.0.drop'": {"budgets": {"metrics": [{"name": "top1", "drop": 0}]}},
    "agreement has a budget of its own": {"budgets": {"metrics": [{"name": "agreement", "drop": 0.1}]}},
    "no metric 'top0'": {"budgets": {"metrics": [{"name": "top0", "drop": 0.1}]}},
    "key 'budgets.file_bytes': must be a number of bytes": {"budgets": {"file_bytes": "5 apples"}},
    "key 'budgets.output_error.0': give at least one": {"budgets": {"output_error": [{"output": "y"}]}},
    "key 'budgets.agreement.least'": {"budgets": {"agreement": {"least": float("nan")}}},
    "'budgets' names none": {"budgets": {}},
    "key 'version'": {"version": 2, "budgets": {"finite": True}},
    "must be a mapping": ["budgets"],
    "no type 'flaot'; did you mean 'float'": {"budgets": {"dtypes": ["flaot"]}},
    "no operator 'Konv'; did you mean 'Conv'": {"budgets": {"operators": ["Konv"]}},
    "key 'budgets.opset': give least, most, or both in this order": {
        "budgets": {"opset": {"least": 20, "most": 13}}
    },
    "key 'budgets.metrics': Input should be a list": {"budgets": {"metrics": {"name": "top1", "drop": 0.1}}},
    "onnxruntime-x68": {"budgets": {"target": "onnxruntime-x68"}},
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_key_in_one_line(message):
    with pytest.raises(GateConfigError) as caught:
        GateConfig.parse(BAD[message])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_files(tmp_path):
    path = tmp_path / "gate.yaml"
    with pytest.raises(GateConfigError, match="cannot read"):
        GateConfig.load(path)
    for content, message in (
        (b"a: [", "not valid YAML at line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "must be a mapping"),
    ):
        path.write_bytes(content)
        with pytest.raises(GateConfigError, match=message):
            GateConfig.load(path)
    path.write_text("x" * (2 << 20))
    with pytest.raises(GateConfigError, match="larger than"):
        GateConfig.load(path)
    other = tmp_path / "gate.toml"
    other.write_text("a = = 1")
    with pytest.raises(GateConfigError, match="not valid TOML"):
        GateConfig.load(other)


def test_the_example_has_every_budget_and_loads(tmp_path):
    (tmp_path / "gate.yaml").write_text(example_config())
    budgets = GateConfig.load(tmp_path / "gate.yaml").budgets
    assert [key for key in Budgets.model_fields if getattr(budgets, key) == getattr(Budgets(), key)] == []
    jsonschema.Draft202012Validator.check_schema(json.loads(schema()))


def test_sizes():
    assert read_size("2 GiB") == 2 << 30
    assert read_size("1000") == 1000
    for text in ("", "MB", "inf MB"):
        with pytest.raises(ValueError, match="bytes"):
            read_size(text)


@pytest.mark.parametrize(
    "name", [found.name for found in pkgutil.walk_packages(onnxslim_lab.gate.__path__, "onnxslim_lab.gate.")]
)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
