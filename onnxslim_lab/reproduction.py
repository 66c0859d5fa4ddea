"""Reproduction: run what a model's provenance says again, and compare the bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from onnxslim_lab.base import Progress, silent
from onnxslim_lab.bench import model_files
from onnxslim_lab.data import Dataset, load_data
from onnxslim_lab.engine import optimize
from onnxslim_lab.errors import ParameterError, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.probe import runnable_data
from onnxslim_lab.inputs.random_data import random_data
from onnxslim_lab.provenance import (
    Provenance,
    content_sha256,
    current_versions,
    data_origin,
    weights_sha256,
)
from onnxslim_lab.sessions import Runner, SessionTooLarge

_BLOCK = 1 << 20  # bytes compared at a time

Status = Literal["identical", "different", "other-versions", "other-inputs"]
EXIT_CODES: dict[Status, int] = {"identical": 0, "different": 1, "other-inputs": 10, "other-versions": 11}


class Reproduction(BaseModel):
    """What came of running a recipe again.

    Attributes:
        status: "identical"; "different": the bytes differ and nothing explains it; "other-versions": they differ,
            and so do versions; "other-inputs": source, data or the model's own weights are not those recorded, and
            nothing was run.
        differences: What is not as recorded, one line each.
        versions: Those recorded.
        recipe: Its steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    status: Status
    differences: tuple[str, ...]
    versions: dict[str, str]
    recipe: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """What the command returns."""
        return EXIT_CODES[self.status]


def reproduce(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | Dataset | None = None,
    limit: int | None = None,
    dims: Mapping[str, int] | None = None,
    output: str | os.PathLike[str] | None = None,
    threads: int = 0,
    cache: bool = False,
    progress: Progress = silent,
) -> Reproduction:
    """Make a model again from its source, and say whether the bytes are the same.

    Args:
        model: The file that `optimize` wrote.
        source: What it was made from.
        data: The data it was made with, where steps measured activations; random data is made again.
        limit: Use at most so many samples; by default as many as were used.
        dims: Sizes of open dimensions of random data; by default those recorded.
        output: Where to keep what was made; None: nowhere.
        threads: Of onnxruntime; the bytes do not depend on them.
        cache: Whether what calibration measured before may be used instead of measuring it again.
        progress: Told what is done.

    Raises:
        ModelError: A file cannot be read, or the model has no provenance.
        RecipeError: This version does not know the recipe.
        ParameterError: Data is needed.
        LabError: The recipe does not run.
    """
    made, original = Graph.load(model), Graph.load(source)
    said = Provenance.read(made)
    recipe = said.to_recipe()
    steps = tuple(str(step) if isinstance(step, str) else next(iter(step)) for step in said.recipe["steps"])
    versions = current_versions()
    others = [
        f"{name} is {versions[name]}, recorded {recorded}"
        for name, recorded in said.versions().items()
        if versions[name] != recorded
    ]
    wrong = []
    for what, found, recorded in (
        ("source", content_sha256(original), said.source_sha256),
        ("model's weights", weights_sha256(made), said.weights_sha256),
    ):
        if found != recorded:
            wrong.append(f"SHA-256 of the {what}: {found[:16]}..., recorded {recorded[:16]}...")
    with Runner(threads=threads, memory=recipe.memory) as runner:
        feeds = None
        if said.data is not None:
            feeds = _feeds(said, original, data, limit, dims, runner, recipe.seed)
            given = data_origin(feeds)
            if given.sha256 != said.data.sha256:
                count = f"{given.feeds} feeds with " if given.feeds != said.data.feeds else ""
                wrong.append(
                    f"the data has {count}SHA-256 {given.sha256[:16]}..., recorded {said.data.sha256[:16]}... "
                    f"of {said.data.feeds} feeds"
                )
        if wrong:
            status: Status = "other-inputs"
            return Reproduction(
                status=status, differences=(*wrong, *others), versions=said.versions(), recipe=steps
            )
        with tempfile.TemporaryDirectory(prefix="onnxslim_lab-") as folder:
            name = Path(model).name  # external data is named after it
            result = optimize(
                original,
                Path(folder) / name,
                recipe=recipe,
                data=feeds,
                runner=runner,
                external=made.source.external,
                allow_growth=True,
                provenance=True,
                cache=cache,
                progress=progress,
            )
            parts = _different(Path(model), Path(folder) / name)
            if output is not None:
                result.graph.save(output, external=made.source.external)
    if parts and weights_sha256(result.graph) == said.weights_sha256:
        parts.append("the weights are the same: graph, documentation or metadata differ")
    status = "identical" if not parts else "other-versions" if others else "different"
    return Reproduction(status=status, differences=(*parts, *others), versions=said.versions(), recipe=steps)


def _feeds(
    said: Provenance,
    original: Graph,
    data: str | os.PathLike[str] | Dataset | None,
    limit: int | None,
    dims: Mapping[str, int] | None,
    runner: Runner,
    seed: int,
) -> Dataset:
    """Return the data, as many feeds as were used."""
    recorded = said.data
    assert recorded is not None
    if isinstance(data, Dataset):
        return data
    if data is None:
        if not recorded.random:
            raise ParameterError(
                f"the recipe measured activations on {recorded.feeds} feeds of real data: give --data"
            )
        sizes = dict(dims or recorded.dims)
        try:
            return runnable_data(runner, original, recorded.feeds, seed, sizes)
        except SessionTooLarge:  # as the engine does
            return random_data(original, recorded.feeds, seed, sizes)
    found = load_data(data, original, limit=limit)
    if limit is None and len(found.feeds) > recorded.feeds:
        found = Dataset([found.feeds[at] for at in range(recorded.feeds)], None, found.source)
    return found


def _different(first: Path, second: Path) -> list[str]:
    """Return how the files of two models differ, one line each; nothing when all bytes are the same."""
    pairs = model_files(first), model_files(second)
    names = [[file.name for file in files] for files in pairs]
    if names[0] != names[1]:
        return [f"the files are {', '.join(map(quote, names[1]))}, not {', '.join(map(quote, names[0]))}"]
    found = []
    for one, other in zip(*pairs, strict=True):
        sizes = one.stat().st_size, other.stat().st_size
        at = _first_difference(one, other)
        if at is not None:
            length = f", {sizes[1]:,} bytes instead of {sizes[0]:,}" if sizes[0] != sizes[1] else ""
            found.append(f"{quote(one.name)} differs from byte {at:,}{length}")
    return found


def _first_difference(one: Path, other: Path) -> int | None:
    start = 0
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            a, b = first.read(_BLOCK), second.read(_BLOCK)
            if a != b:
                return start + next(
                    (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
                )
            if not a:
                return None
            start += len(a)
