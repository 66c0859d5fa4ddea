"""Which weights a lossy pass works on: layers chosen by name pattern, each stored weight once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, TypeVar

from onnx import TensorProto
from pydantic import BeforeValidator

from onnxslim_lab.base import Outcome
from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.floats import Array
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer, find_layers

Setting = TypeVar("Setting")


def split_patterns(text: object) -> object:
    """Return the patterns of the command line's text form; anything else is left to pydantic.

    >>> split_patterns("conv*; fc1")
    ('conv*', 'fc1')
    """
    if not isinstance(text, str):
        return text
    return tuple(part.strip() for part in text.split(";") if part.strip())


def split_overrides(text: object) -> object:
    """Return the mapping of the text form `pattern:value;pattern:value`; the last colon separates.

    >>> split_overrides("conv1*:0.3;scope/fc:0:0.9")
    {'conv1*': '0.3', 'scope/fc:0': '0.9'}
    """
    if not isinstance(text, str):
        return text
    overrides = {}
    for part in text.split(";"):
        if not part.strip():
            continue
        pattern, colon, value = (piece.strip() for piece in part.rpartition(":"))
        if not colon or not pattern or not value:
            raise ValueError(f"{quote(part)} is not of the form pattern:value")
        if pattern in overrides:
            raise ValueError(f"pattern {quote(pattern)} is given twice")
        overrides[pattern] = value
    return overrides


Patterns = Annotated[tuple[str, ...], BeforeValidator(split_patterns)]
Overrides = Annotated[dict[str, Setting], BeforeValidator(split_overrides)]


@dataclass(frozen=True)
class Target:
    """One stored float weight, however many layers use it.

    Attributes:
        layers: The layers that use it; the matrix view of the first is the one that counts.
        override: The value of the first override pattern that matches, None without one.
    """

    layers: tuple[Layer, ...]
    override: float | int | None

    @property
    def layer(self) -> Layer:
        """The first layer that uses the weight."""
        return self.layers[0]

    @property
    def where(self) -> str:
        """The name under which this weight appears in reports."""
        return self.layer.name

    @property
    def weight(self) -> str:
        """The stored weight's name."""
        return self.layer.weight

    @property
    def is_lookup(self) -> bool:
        """Whether one of the layers looks rows up in it (Gather)."""
        return any(layer.op_type == "Gather" for layer in self.layers)

    @property
    def is_wide(self) -> bool:
        """Whether the weight is float64."""
        return self.layer.stored.data_type == TensorProto.DOUBLE

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.layer.parameters

    def read(self) -> Array:
        """Return the stored weight, read-only, in its own dtype and layout."""
        values = self.layer.weight_graph.constant(self.weight)
        assert values is not None
        return values

    def write(self, values: Array) -> None:
        """Replace the stored weight; every layer that uses it sees the new values."""
        self.layer.set(values)


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a glob pattern, or the plain name it spells, is one of the names.

    >>> matches("conv?", ["conv1"]), matches("layer[0]", ["layer[0]"]), matches("Conv*", ["conv1"])
    (True, True, False)
    """
    return any(pattern == name or fnmatchcase(name, pattern) for name in names)


def find_targets(
    model: Graph,
    outcome: Outcome,
    *,
    step: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, float | int] | None = None,
) -> list[Target]:
    """Return the weights of the whole model that the patterns select, each once, in graph order.

    Patterns are globs (`*`, `?`, `[...]`) on node names and weight names; a name spelt out matches
    itself whatever it contains. A weight used by several layers is selected
    when any of them is included and none is excluded. What is not selected, and what `find_layers`
    cannot show as a matrix, is recorded in `outcome` as refused.

    Args:
        model: The main graph; subgraph bodies and functions are walked.
        outcome: Receives the refusals.
        step: Name of the pass, for errors.
        include: Patterns of the layers to edit; empty means all.
        exclude: Patterns of the layers to leave alone.
        overrides: Pattern -> setting of the layers it matches; the first match counts.

    Raises:
        ParameterError: A pattern matches nothing in the model.
    """
    overrides = overrides or {}
    users: dict[tuple[int, str], list[Layer]] = {}
    refused = []
    for graph in model.walk():
        layers, refusals = find_layers(graph)
        refused += refusals
        for layer in layers:
            users.setdefault((id(layer.weight_graph), layer.weight), []).append(layer)
    names = {
        key: {name for layer in layers for name in (layer.name, layer.node.name, layer.weight) if name}
        for key, layers in users.items()
    }
    known = {name for group in names.values() for name in group} | {refusal.where for refusal in refused}
    for kind, patterns in (("include", include), ("exclude", exclude), ("overrides", overrides)):
        for pattern in patterns:
            if not matches(pattern, known):
                raise ParameterError(
                    f"{step}: {kind} pattern {quote(pattern)} matches no layer or weight of the model"
                    + suggest(pattern, known)
                )
    outcome.refusals += refused
    targets = []
    for key, group in users.items():
        override = next((value for pattern, value in overrides.items() if matches(pattern, names[key])), None)
        target = Target(tuple(group), override)
        barred = next((pattern for pattern in exclude if matches(pattern, names[key])), None)
        if barred is not None:
            outcome.refuse(target.where, f"excluded by pattern {quote(barred)}")
        elif include and not any(matches(pattern, names[key]) for pattern in include):
            outcome.refuse(target.where, "no include pattern matches it")
        else:
            targets.append(target)
    return targets
