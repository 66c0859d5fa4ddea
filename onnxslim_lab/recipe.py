"""Recipe: which passes to run with which parameters, as a YAML file or command-line text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim_lab.base import Pass
from onnxslim_lab.errors import ParameterError, RecipeError, one_line, quote, suggest
from onnxslim_lab.passes import PASSES

VERSION = 1
_LARGEST_FILE = 1 << 20  # bytes; a recipe is a page, not a payload

BY_NAME: dict[str, type[Pass]] = {kind.pass_name(): kind for kind in PASSES}


def make_pass(name: str, parameters: dict[str, Any], where: str = "") -> Pass:
    """Return a pass by its name with these parameters.

    Args:
        name: The pass's name, such as "fuse-batchnorm".
        parameters: Values by parameter name; text is converted to the parameter's type.
        where: What the error says first, such as "steps[2] ".

    Raises:
        ParameterError: no such pass or parameter, or a value that is not allowed.

    >>> make_pass("prune", {"sparsity": "0.9"}).sparsity
    0.9
    """
    kind = BY_NAME.get(name)
    if kind is None:
        raise ParameterError(f"{where}unknown pass {quote(name)}{suggest(name, BY_NAME)}")
    try:
        return kind(**parameters)
    except ValidationError as error:
        raise ParameterError(f"{where}{name}: {explain(error, kind)}") from error


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return the first problem of a validation error in one line, with a suggestion for unknown names."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        return f"unknown parameter {quote(place)}{suggest(place, kind.model_fields)}"
    given = one_line(repr(problem["input"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"parameter {quote(place)}: {message}, not {given}" if place else message


def parse_step(text: str) -> Pass:
    """Return the pass that command-line text names: `name` or `name:key=value,key=value`.

    A comma inside a value is written by giving the parameter as `key=[a, b]` or `key={a: b}`.

    Raises:
        ParameterError: unknown pass or parameter, or text of another form.

    >>> parse_step("share:bits=3").bits
    3
    """
    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise ParameterError(f"--pass {quote(text)}: {quote(part)} must be key=value")
        key = key.strip()
        if key in parameters:
            raise ParameterError(f"--pass {quote(text)}: parameter {quote(key)} is given twice")
        value = value.strip()
        try:
            parameters[key] = yaml.safe_load(value) if value[:1] in ("[", "{") else value
        except yaml.YAMLError as error:
            raise ParameterError(f"--pass {quote(text)}: {quote(value)} is not valid YAML") from error
    return make_pass(name.strip(), parameters, "--pass ")


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def step_text(step: Pass) -> str:
    """Return the command-line text of a pass: its name and what differs from the defaults.

    >>> step_text(parse_step("prune:sparsity=0.9"))
    'prune:sparsity=0.9'
    """
    changed = step.model_dump(mode="json", exclude_defaults=True)
    shown = [f"{key}={_value_text(value)}" for key, value in changed.items()]
    return f"{step.pass_name()}:{','.join(shown)}" if shown else step.pass_name()


def _value_text(value: Any) -> str:
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()
    return str(value).lower() if isinstance(value, bool) else str(value)


class Recipe(BaseModel):
    """The steps of an optimization and how to check them."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    steps: tuple[Pass, ...] = Field(description="passes in the order they run")
    verify: Literal["each", "end", "off"] = Field(
        "each", description="compare outputs after each step, after the last one, or not at all"
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    memory: int = Field(1 << 30, ge=1 << 20, description="working memory in bytes")
    allow_opset_raise: bool = Field(False, description="let passes raise the opset of the model")

    @classmethod
    def of(cls, steps: Iterable[str | Pass], **options: Any) -> Recipe:
        """Return a recipe from passes or their command-line texts."""
        return cls(
            steps=tuple(parse_step(step) if isinstance(step, str) else step for step in steps), **options
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: not readable, not YAML, or keys, passes or parameters that do not exist.
        """
        try:
            if Path(path).stat().st_size > _LARGEST_FILE:
                raise RecipeError(f"recipe {quote(str(path))} is larger than {_LARGEST_FILE} bytes")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise RecipeError(f"cannot read recipe {quote(str(path))}: {reason}") from error
        return cls.parse(text, f"recipe {quote(str(path))}: ")

    @classmethod
    def parse(cls, text: str, where: str = "recipe: ") -> Recipe:
        """Read a recipe from YAML text; raises RecipeError.

        >>> Recipe.parse("steps: [simplify, {prune: {sparsity: 0.5}}]").steps[1].sparsity
        0.5
        """
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            problem = getattr(error, "problem", None) or "it nests too deep"
            mark = getattr(error, "problem_mark", None)
            line = f" at line {mark.line + 1}" if mark else ""
            raise RecipeError(f"{where}not valid YAML{line}: {problem}") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{where}must be a mapping with the key 'steps'")
        keys = {*cls.model_fields, "version"}
        for key in content:
            if key not in keys:
                raise RecipeError(f"{where}unknown key {quote(str(key))}{suggest(str(key), keys)}")
        if content.pop("version", VERSION) != VERSION:
            raise RecipeError(f"{where}version must be {VERSION}")
        steps = content.pop("steps", None)
        if not isinstance(steps, list) or not steps:
            raise RecipeError(f"{where}'steps' must be a list of passes")
        passes = [_read_step(step, f"{where}steps[{index}] ") for index, step in enumerate(steps)]
        try:
            return cls(steps=tuple(passes), **content)
        except ValidationError as error:
            raise RecipeError(f"{where}{explain(error, cls)}") from error

    def to_yaml(self) -> str:
        """Return the recipe as YAML text that `parse` reads back."""
        steps = []
        for step in self.steps:
            changed = step.model_dump(mode="json", exclude_defaults=True)
            steps.append({step.pass_name(): changed} if changed else step.pass_name())
        options = self.model_dump(mode="json", exclude={"steps"}, exclude_defaults=True)
        return yaml.safe_dump({"version": VERSION, "steps": steps, **options}, sort_keys=False)


def _read_step(step: object, where: str) -> Pass:
    name: object
    parameters: object
    if isinstance(step, str):
        name, parameters = step, {}
    elif isinstance(step, dict) and len(step) == 1:
        name, given = next(iter(step.items()))
        parameters = {} if given is None else given
    else:
        raise RecipeError(f"{where}must be a pass name or {{name: {{parameter: value}}}}")
    if not isinstance(parameters, dict) or not all(isinstance(key, str) for key in parameters):
        raise RecipeError(f"{where}{quote(str(name))}: parameters must be a mapping")
    try:
        return make_pass(str(name), parameters, where)
    except ParameterError as error:
        raise RecipeError(str(error)) from error


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of recipe files, for editors."""
    definitions: dict[str, Any] = {}
    choices: list[dict[str, Any]] = []
    for name, kind in BY_NAME.items():
        schema = kind.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        schema.pop("title", None)
        summary = (kind.__doc__ or "").strip().partition("\n")[0]
        definitions[name] = {**schema, "description": summary}
        choices += [
            {"const": name, "description": summary},
            {
                "type": "object",
                "properties": {name: {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            },
        ]
    options: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name != "steps":
            options[name] = {"description": field.description, "default": field.default}
    options["verify"]["enum"] = ["each", "end", "off"]
    options["seed"] |= {"type": "integer", "minimum": 0}
    options["memory"] |= {"type": "integer", "minimum": 1 << 20}
    options["allow_opset_raise"] |= {"type": "boolean"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "onnxslim_lab recipe",
        "type": "object",
        "properties": {
            "version": {"const": VERSION},
            "steps": {
                "type": "array",
                "minItems": 1,
                "items": {"oneOf": choices},
                "description": "passes in the order they run",
            },
            **options,
        },
        "required": ["steps"],
        "additionalProperties": False,
        "$defs": definitions,
    }
