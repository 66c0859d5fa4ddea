"""The gate's configuration: budgets, all optional, from gate.yaml, a TOML file or pyproject.toml."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from onnxslim_lab.errors import ParameterError, one_line, quote, suggest
from onnxslim_lab.gate.budgets import Budgets, Part

TABLE = ("tool", "onnxslim_lab", "gate")
_LARGEST_FILE = 1 << 20  # bytes; a configuration is a page, not a payload


class GateConfigError(ParameterError):
    """A gate configuration cannot be used."""


class GateConfig(Part):
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
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"key {quote(place)}: {message}, not {one_line(repr(problem['input']))}"


def _keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are known at a place."""
    kind: type[BaseModel] = GateConfig
    for step in path:
        if isinstance(step, int):
            continue
        schema = kind.model_fields[step].annotation
        kind = next(item for item in sub_models(schema))
    return list(kind.model_fields)


def sub_models(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in sub_models(part)]
