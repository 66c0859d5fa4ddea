"""Describe: passes as tables, text and an example recipe, all from their definitions."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from onnxslim_lab.base import Pass
from onnxslim_lab.recipe import VERSION, Recipe


def summary(kind: type[Pass]) -> str:
    """Return the first line of a pass's docstring."""
    return inspect.getdoc(kind).partition("\n")[0] if kind.__doc__ else ""  # type: ignore[union-attr]


def parameters(kind: type[Pass]) -> list[dict[str, str]]:
    """Return name, type, default, range and description of each parameter, as text."""
    properties = kind.model_json_schema()["properties"] if kind.model_fields else {}
    return [
        {
            "name": name,
            "type": _type_text(properties[name], kind.model_json_schema().get("$defs", {})),
            "default": _default_text(field),
            "description": field.description or "",
        }
        for name, field in kind.model_fields.items()
    ]


def _type_text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return " or ".join(_type_text(choice, definitions) for choice in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    text = {"null": "none", "array": "list", "object": "mapping"}.get(
        schema.get("type", "any"), schema.get("type", "any")
    )
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    return f"{text} {', '.join(limits)}" if limits else text


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "(required)"
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def as_dict(kind: type[Pass]) -> dict[str, Any]:
    """Return everything about a pass, for JSON."""
    return {
        "name": kind.pass_name(),
        "exact": kind.exact,
        "summary": summary(kind),
        "description": inspect.getdoc(kind),
        "parameters": parameters(kind),
    }


def table(kinds: list[type[Pass]]) -> Table:
    """Return a table of passes."""
    shown = Table(title="passes (explain one with `passes NAME`)", title_justify="left")
    for heading in ("name", "kind", "what it does", "parameters"):
        shown.add_column(heading, overflow="fold")
    for kind in kinds:
        names = ", ".join(kind.model_fields)
        shown.add_row(kind.pass_name(), "exact" if kind.exact else "lossy", escape(summary(kind)), names)
    return shown


def explanation(kind: type[Pass]) -> Group:
    """Return a pass's docstring and the table of its parameters."""
    shown = Table(title="parameters" if kind.model_fields else "no parameters", title_justify="left")
    for heading in ("name", "type", "default", "description"):
        shown.add_column(heading, overflow="fold")
    for item in parameters(kind):
        shown.add_row(*(escape(item[key]) for key in ("name", "type", "default", "description")))
    promise = "exact: the outputs stay the same" if kind.exact else "lossy: the report says what was lost"
    text = escape(inspect.getdoc(kind) or "")
    return Group(f"{kind.pass_name()} ({promise})", "", text, "", shown)


def markdown(kinds: list[type[Pass]]) -> str:
    """Return the README's table of passes."""
    lines = ["| pass | kind | what it does | parameters (defaults) |", "|---|---|---|---|"]
    for kind in kinds:
        given = ", ".join(f"`{item['name']}` ({item['default']})" for item in parameters(kind))
        promise = "exact" if kind.exact else "lossy"
        lines.append(f"| `{kind.pass_name()}` | {promise} | {summary(kind)} | {given} |")
    return "\n".join(lines)


def example_recipe() -> str:
    """Return a recipe to start from, with every option as a comment.

    >>> len(Recipe.parse(example_recipe()).steps)
    4
    """
    options = "\n".join(
        f"# {name}: {str(field.default).lower()}  # {field.description}"
        for name, field in Recipe.model_fields.items()
        if name != "steps"
    )
    return f"""\
# An onnxslim_lab recipe: passes in the order they run. Explain one with `onnxslim-lab passes NAME`.
version: {VERSION}
steps:
  - simplify
  - prune: {{sparsity: 0.8, scope: layer}}
  - share: {{bits: 4}}
  - encode
{options}
"""
