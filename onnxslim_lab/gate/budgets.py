"""The budgets of the gate, all optional: what a candidate must keep to."""

from __future__ import annotations

from typing import Any, Self

import onnx
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from onnxslim_lab.accuracy import find_metric
from onnxslim_lab.errors import quote, suggest
from onnxslim_lab.profiles import find_profile

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}


class Part(BaseModel):
    """A part of a configuration: strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Limits(Part):
    """Several limits of one thing, the fields that default to None; at least one is given."""

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        names = [name for name, field in type(self).model_fields.items() if field.default is None]
        if all(getattr(self, name) is None for name in names):
            raise ValueError(f"give at least one of {', '.join(names[:-1])} and {names[-1]}")
        return self


class MetricBudget(Part):
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


class AgreementBudget(Part):
    """How often candidate and baseline must prefer the same class."""

    least: float = Field(gt=0, lt=1, description="least share of decisions")
    output: str | None = Field(
        None, description="the output with the scores; by default the first that has any"
    )


class OutputErrorBudget(_Limits):
    """How far outputs may be from the baseline's, over all samples; `output` "*" is every output."""

    output: str = Field("*", description="name of an output, or * for each")
    relative: float | None = Field(None, ge=0, description="largest max|a-b| / max|a| of a sample")
    max_abs: float | None = Field(None, ge=0, description="largest absolute difference")
    sqnr_db: float | None = Field(None, description="least signal to noise in dB")
    cosine: float | None = Field(None, ge=-1, le=1, description="least cosine")


class LatencyBudget(_Limits):
    """Time of one run, candidate and baseline in turn on this machine."""

    ratio: float | None = Field(None, gt=0, description="largest median of candidate / baseline")
    milliseconds: float | None = Field(None, gt=0, description="largest median of the candidate")
    pairs: int = Field(60, ge=10, description="timed pairs")
    threads: int = Field(1, ge=0, description="threads of onnxruntime; 0 lets it choose")


class CoverageBudget(_Limits):
    """How much of the weights must be compressed."""

    quantized: float | None = Field(
        None, gt=0, le=1, description="least share of the layers' weights stored as integers or codes"
    )
    pruned: float | None = Field(
        None, gt=0, le=1, description="least share of the layers' weights that are zero"
    )


class OpsetBudget(Part):
    """Which opsets of ONNX's own operators are allowed."""

    least: int | None = Field(None, ge=1)
    most: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least is self.most is None or (self.least or 1) > (self.most or self.least or 1):
            raise ValueError("give least, most, or both in this order")
        return self


class Budgets(Part):
    """What a candidate must keep to; all optional."""

    metrics: tuple[MetricBudget, ...] = Field((), strict=False, description="drops of metrics")
    agreement: AgreementBudget | None = Field(None, description="same decisions as the baseline")
    output_error: tuple[OutputErrorBudget, ...] = Field((), strict=False, description="errors of outputs")
    file_bytes: int | None = Field(None, ge=1, description="largest file with its external data; 5MB works")
    file_ratio: float | None = Field(None, gt=0, description="largest file bytes / baseline's")
    transfer_bytes: int | None = Field(None, ge=1, description="largest bytes compressed by gzip")
    parameters: int | None = Field(None, ge=0, description="most real-valued parameters, however stored")
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

    @field_validator("operators")
    @classmethod
    def _known_operators(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
        for name in value or ():
            bare = name.removeprefix("ai.onnx.")
            if "." not in bare and bare not in known:
                raise ValueError(f"no operator {quote(name)}{suggest(name, known)}")
        return value

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        if value is not None:
            find_profile(value)
        return value


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
