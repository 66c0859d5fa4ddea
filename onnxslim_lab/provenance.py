"""Provenance: how a model was made, written into its own metadata so that it can be checked and made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import yaml
from onnx import ModelProto, TensorProto
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxslim_lab import modelfile
from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ModelError, quote
from onnxslim_lab.graph import Graph
from onnxslim_lab.recipe import Recipe
from onnxslim_lab.statistics.cache import data_digest
from onnxslim_lab.weights import stub_location

KEY = "onnxslim_lab.provenance"
"""The entry of metadata_props: `Provenance` as compact JSON."""

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_LONGEST = 1 << 20  # characters of an entry that are read; a recipe is a page
_HASH = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataOrigin(_Part):
    """The data that steps measured activations on."""

    sha256: str = Field(pattern=_HASH, description="of the feeds, in order")
    feeds: int = Field(ge=0, description="how many")
    random: bool = Field(False, description="made up from the seed")
    dims: dict[str, int] = Field(default_factory=dict, description="sizes chosen for open dimensions")


class Provenance(_Part):
    """What went into a model: nothing of when, where, or by whom, so that the same run writes the same bytes."""

    schema_version: Literal[1] = 1
    tool: str = Field(description="version of onnxslim_lab")
    onnx: str = Field(description="version")
    onnxruntime: str = Field(description="version")
    numpy: str = Field(description="version")
    recipe: dict[str, Any] = Field(
        description="steps with their parameters, and options that differ from the defaults"
    )
    seed: int = Field(ge=0, description="of everything random")
    source_sha256: str = Field(pattern=_HASH, description="of the source, see `content_sha256`")
    data: DataOrigin | None = Field(
        None, description="None: no step measured any, the result depends on none"
    )
    weights_sha256: str = Field(pattern=_HASH, description="of the result, see `weights_sha256`")

    @classmethod
    def read(cls, graph: Graph) -> Provenance:
        """Return what a model says of itself.

        Raises:
            ModelError: It says nothing, or what it says is not what `optimize` writes.
        """
        return cls.parse(graph.metadata.get(KEY))

    @classmethod
    def parse(cls, text: str | None) -> Provenance:
        """Return the content of an entry of metadata_props, None when there is none; raises ModelError."""
        if text is None:
            raise ModelError(f"the file has no entry {quote(KEY)} in its metadata: optimize writes it")
        what = f"the entry {quote(KEY)} of the metadata is not what optimize writes"
        if len(text) > _LONGEST:
            raise ModelError(f"{what}: it has {len(text):,} characters")
        try:
            return cls.model_validate_json(text)
        except (ValidationError, RecursionError) as error:
            if isinstance(error, RecursionError):
                raise ModelError(f"{what}: it nests too deep") from error
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise ModelError(f"{what}: {quote(place) + ': ' if place else ''}{problem['msg']}") from error

    def to_text(self) -> str:
        """Return compact JSON that `parse` reads back; equal for equal content."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), separators=(",", ":"))

    def to_recipe(self) -> Recipe:
        """Return the recipe; raises RecipeError when this version does not know it."""
        return Recipe.parse(yaml.safe_dump(self.recipe), "recipe of the provenance: ")

    def versions(self) -> dict[str, str]:
        """Return the recorded versions by the name of what they are of."""
        return {name: getattr(self, name) for name in ("tool", "onnx", "onnxruntime", "numpy")}


def current_versions() -> dict[str, str]:
    """Return the versions of this installation, as `Provenance.versions` names them.

    >>> sorted(current_versions())
    ['numpy', 'onnx', 'onnxruntime', 'tool']
    """
    return {
        "tool": _version("onnxslim-lab"),
        "onnx": _version("onnx"),
        "onnxruntime": _version(*_RUNTIMES),
        "numpy": _version("numpy"),
    }


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data without what cannot change the result: its version and how it was verified.

    >>> recipe_content(Recipe.of(["simplify", "prune:sparsity=0.5"], seed=3, verify="end"))
    {'steps': ['simplify', {'prune': {'sparsity': 0.5}}], 'seed': 3}
    """
    content: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    return {key: value for key, value in content.items() if key not in ("version", "verify")}


def data_origin(data: Dataset) -> DataOrigin:
    """Return what is recorded of the data; reads all feeds once."""
    return DataOrigin(
        sha256=data_digest(data.feeds, hashlib.sha256()).hex(),
        feeds=len(data.feeds),
        random=data.random,
        dims=dict(sorted(data.dims.items())),
    )


def content_sha256(graph: Graph) -> str:
    """Return the SHA-256 of a model as one file with all tensors inside.

    Where a tensor lies, in the model's file or in external data, makes no difference; anything else does.
    """
    light = graph.light_model()
    for tensor in modelfile.all_tensors(light):
        if not stub_location(tensor):
            tensor.ClearField("data_location")
    digest = hashlib.sha256()
    for chunk in modelfile.chunks(light, graph.store):
        digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(graph: Graph) -> str:
    """Return the SHA-256 of a model's tensors: names, types, shapes and stored bytes, whatever their order.

    Graph structure, documentation and metadata are not in it.
    """
    light = graph.light_model()
    digests = sorted(_tensor_digests(light, graph))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _tensor_digests(light: ModelProto, graph: Graph) -> Iterator[bytes]:
    for tensor in modelfile.all_tensors(light):
        digest = hashlib.sha256(repr((tensor.name, tensor.data_type, tuple(tensor.dims))).encode())
        location = stub_location(tensor)
        digest.update(graph.store.view(location) if location else _inline(tensor))
        yield digest.digest()


def _inline(tensor: TensorProto) -> bytes:
    """Return the stored bytes of a small tensor."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    bare = TensorProto()
    bare.CopyFrom(tensor)
    for name in ("name", "doc_string", "data_location", "metadata_props"):
        bare.ClearField(name)
    return bytes(bare.SerializeToString(deterministic=True))


def record(graph: Graph, recipe: Recipe, source: str, data: Dataset | None) -> int:
    """Write the provenance of a result into its metadata; return the bytes that its file grows by.

    Args:
        graph: The result.
        recipe: How it was made.
        source: `content_sha256` of what it was made from.
        data: What steps measured activations on; None when none did.
    """
    before = graph.file_bytes()
    made = Provenance(
        **current_versions(),
        recipe=recipe_content(recipe),
        seed=recipe.seed,
        source_sha256=source,
        data=None if data is None else data_origin(data),
        weights_sha256=weights_sha256(graph),
    )
    graph.set_metadata(KEY, made.to_text())
    return graph.file_bytes() - before
