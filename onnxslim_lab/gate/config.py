"""The gate's configuration: budgets, all optional, from gate.yaml, a TOML file or pyproject.toml."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onnxslim_lab.accuracy import find_metric
from onnxslim_lab.errors import ParameterError, one_line, quote, suggest
from onnxslim_lab.profiles import find_profile

TABLE = ("tool", "onnxslim_lab", "gate")
_LARGEST_FILE = 1 << 20  # bytes; a configuration is a page, not a payload
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}


class GateConfigError(ParameterError):
    """A gate configuration cannot be used."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MetricBudget(_Part):
    """How far a metric may drop on paired samples; one of `drop` and `relative_drop`."""

    name: str = Field(description="top1, top5, NAME@OUTPUT or module:function; more is better")
    drop: float | None = Field(None, gt=0, description="largest absolute drop: 0.01 is one point of accuracy")
    relative_drop: float | None = Field(
        None, gt=0, lt=1, description="largest drop as a share of the baseline's value"
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.drop is None) == (self.relative_drop is None):
            raise ValueError("give one of drop and relative_drop")
        metric = find_metric(self.name)
        if metric.paired:
            raise ValueError("agreement has a budget of its own: agreement: {least: 0.99}")
        return self


class AgreementBudget(_Part):
    """How often candidate and baseline must prefer the same class."""

    least: float = Field(gt=0, lt=1, description="least share of decisions")
    output: str | None = Field(
        None, description="the output with the scores; by default the first that has any"
    )


class OutputErrorBudget(_Part):
    """How far outputs may be from the baseline's, over all samples; `output` "*" is every output."""

    output: str = Field("*", description="name of an output, or * for each")
    relative: float | None = Field(None, ge=0, description="largest max|a-b| / max|a| of a sample")
    max_abs: float | None = Field(None, ge=0, description="largest absolute difference")
    sqnr_db: float | None = Field(None, description="least signal to noise in dB")
    cosine: float | None = Field(None, ge=-1, le=1, description="least cosine")

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.relative is self.max_abs is self.sqnr_db is self.cosine is None:
            raise ValueError("give at least one of relative, max_abs, sqnr_db and cosine")
        return self


class LatencyBudget(_Part):
    """Time of one run, candidate and baseline in turn on this machine."""

    ratio: float | None = Field(None, gt=0, description="largest median of candidate / baseline")
    milliseconds: float | None = Field(None, gt=0, description="largest median of the candidate")
    pairs: int = Field(60, ge=10, description="timed pairs")
    threads: int = Field(1, ge=0, description="threads of onnxruntime; 0 lets it choose")

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.ratio is self.milliseconds is None:
            raise ValueError("give at least one of ratio and milliseconds")
        return self


class CoverageBudget(_Part):
    """How much of the weights must be compressed."""

    quantized: float | None = Field(None, gt=0, le=1, description="least share of weights stored as integers")
    pruned: float | None = Field(None, gt=0, le=1, description="least share of float weights that are zero")

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.quantized is self.pruned is None:
            raise ValueError("give at least one of quantized and pruned")
        return self


class OpsetBudget(_Part):
    """Which opsets of ONNX's own operators are allowed."""

    least: int | None = Field(None, ge=1)
    most: int | None = Field(None, ge=1)


class Budgets(_Part):
    """What a candidate must keep to; all optional."""

    metrics: tuple[MetricBudget, ...] = Field((), strict=False, description="drops of metrics")
    agreement: AgreementBudget | None = Field(None, description="same decisions as the baseline")
    output_error: tuple[OutputErrorBudget, ...] = Field((), strict=False, description="errors of outputs")
    file_bytes: int | None = Field(None, ge=1, description="largest file with its external data; 5MB works")
    file_ratio: float | None = Field(None, gt=0, description="largest file bytes / baseline's")
    transfer_bytes: int | None = Field(None, ge=1, description="largest bytes compressed by gzip")
    parameters: int | None = Field(None, ge=0, description="most real-valued parameters")
    macs: int | None = Field(
        None, ge=0, description="most multiply-accumulates, open dimensions as the data's"
    )
    latency: LatencyBudget | None = Field(None, description="time of one run")
    peak_memory: int | None = Field(None, ge=1, description="most bytes of the process that runs it")
    load_milliseconds: float | None = Field(None, gt=0, description="longest time to create a session")
    operators: tuple[str, ...] | None = Field(
        None, strict=False, description="allowed operators of ONNX, or domain.Operator"
    )
    domains: tuple[str, ...] | None = Field(
        None, strict=False, description="allowed operator domains besides ai.onnx"
    )
    opset: OpsetBudget | None = Field(None, description="allowed opsets")
    dtypes: tuple[str, ...] | None = Field(
        None, strict=False, description="allowed types of weights: float, float16, int8 ..."
    )
    target: str | None = Field(None, description="a target's profile that must run it")
    signature: bool = Field(
        False, description="names, order, types and shapes of inputs and outputs unchanged"
    )
    dynamic_axes: bool = Field(False, description="open dimensions of inputs and outputs unchanged")
    finite: bool = Field(False, description="no NaN or Inf on the data")
    engines_agree: bool = Field(False, description="onnxruntime and the NumPy runtime agree on the candidate")
    coverage: CoverageBudget | None = Field(None, description="how much is quantized or pruned")
    provenance: bool = Field(False, description="the file says how it was made, from this baseline")
    real_data: bool = Field(False, description="random data is not accepted")

    @field_validator("file_bytes", "transfer_bytes", "peak_memory", mode="before")
    @classmethod
    def _read_bytes(cls, value: Any) -> Any:
        return read_size(value) if isinstance(value, str) else value

    @field_validator("dtypes")
    @classmethod
    def _known_types(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = {"float32", *map(str.lower, TensorProto.DataType.keys())} - {"undefined"}
        for name in value or ():
            if name not in known:
                raise ValueError(f"no type {quote(name)}{suggest(name, known)}")
        return value

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        if value is not None:
            find_profile(value)
        return value


class GateConfig(_Part):
    """Budgets, and how sure a verdict must be."""

    version: Literal[1] = Field(1, description="of this format")
    confidence: float = Field(0.95, ge=0.5, lt=1, description="of each one-sided bound")
    minimum_samples: int = Field(30, ge=1, description="fewer samples decide nothing statistical")
    undecided: Literal["failure", "warning"] = Field(
        "failure", description="what an undecided budget counts as"
    )
    seed: int = Field(0, ge=0, description="of the bootstrap and of random data")
    budgets: Budgets = Field(Budgets(), description="what the candidate must keep to")

    @property
    def alpha(self) -> float:
        """The error probability of each bound."""
        return 1.0 - self.confidence

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GateConfig:
        """Read a configuration: YAML, a TOML file, or the table tool.onnxslim_lab.gate of pyproject.toml.

        Raises:
            GateConfigError: Not readable, or keys or values that do not exist; names the key.
        """
        file = Path(path)
        where = f"gate configuration {quote(str(file))}: "
        try:
            if file.stat().st_size > _LARGEST_FILE:
                raise GateConfigError(f"{where}larger than {_LARGEST_FILE} bytes")
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise GateConfigError(f"cannot read gate configuration {quote(str(file))}: {reason}") from error
        if file.suffix != ".toml":
            return cls.parse(_yaml(text, where), where)
        content: Any = _toml(text, where)
        if file.name == "pyproject.toml":
            for key in TABLE:
                content = content.get(key) if isinstance(content, dict) else None
            if content is None:
                raise GateConfigError(f"{where}no table [{'.'.join(TABLE)}]")
        return cls.parse(content, where)

    @classmethod
    def parse(cls, content: Any, where: str = "gate configuration: ") -> GateConfig:
        """Return a configuration from plain data; raises GateConfigError.

        >>> GateConfig.parse({"budgets": {"agreement": {"least": 0.99}}}).budgets.agreement.least
        0.99
        """
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise GateConfigError(f"{where}must be a mapping with the key 'budgets'")
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            raise GateConfigError(f"{where}{_explain(error)}") from error
        except ParameterError as error:
            raise GateConfigError(f"{where}{error}") from error
        if config.budgets == Budgets():
            raise GateConfigError(f"{where}'budgets' names none{suggest('', Budgets.model_fields)}")
        return config


def find_config(folder: Path) -> Path | None:
    """Return the configuration of a folder: gate.yaml, else pyproject.toml when it has the table."""
    for name in ("gate.yaml", "gate.yml", "gate.toml"):
        if (folder / name).is_file():
            return folder / name
    project = folder / "pyproject.toml"
    if not project.is_file():
        return None
    content: Any = _toml(project.read_text(encoding="utf-8"), f"{quote(str(project))}: ")
    for key in TABLE:
        content = content.get(key) if isinstance(content, dict) else None
    return project if content is not None else None


def read_size(text: str) -> int:
    """Return bytes from text such as "5MB" or "1.5 GiB".

    >>> read_size("1.5 kB")
    1500
    """
    bare = text.strip().lower()
    unit = next((name for name in sorted(_UNITS, key=len, reverse=True) if bare.endswith(name)), "")
    try:
        return int(float(bare.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise ValueError("must be a number of bytes, or text such as 5MB") from None


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it nests too deep"
        raise GateConfigError(f"{where}not valid YAML{line}: {problem}") from error


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise GateConfigError(f"{where}not valid TOML: {error}") from error


def _explain(error: ValidationError) -> str:
    """Return the first problem in one line: the key, the rule, the value, and the key that was meant."""
    problem = next((p for p in error.errors() if p["type"] == "extra_forbidden"), error.errors()[0])
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = _keys(problem["loc"][:-1])
        return f"unknown key {quote(place)}{suggest(str(problem['loc'][-1]), known)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"key {quote(place)}: {message}, not {one_line(repr(problem['input']))}"


def _keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are known at a place."""
    kind: type[BaseModel] = GateConfig
    for step in path:
        if isinstance(step, int):
            continue
        schema = kind.model_fields[step].annotation
        kind = next(item for item in _models(schema))
    return list(kind.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models(part)]
