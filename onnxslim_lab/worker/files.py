"""Models as files for onnxruntime: saved to a private folder, with extra outputs and seeds on request."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from onnxslim_lab.errors import SaveError
from onnxslim_lab.graph import Graph

EXTERNAL_ABOVE = 16 << 20  # bytes of weights above which they are saved beside the model file
_VARIANTS = 4  # files with other outputs kept for each model
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def weight_bytes(graph: Graph) -> int:
    """Return the stored bytes of all weights of a model, bodies and functions included."""
    total = 0
    for part in graph.walk():
        constants = {name for node in part.nodes if node.op_type == "Constant" for name in node.output}
        for name in {*part.initializers, *constants}:
            kind = part.constant_type(name)
            total += kind[2] if kind else 0
    return total


def _seedless(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield the random nodes without a seed, in bodies too."""
    for node in nodes:
        if node.op_type in _RANDOM and not any(a.name == "seed" for a in node.attribute):
            yield node
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _seedless(body.node)


def set_seeds(model: ModelProto) -> int:
    """Give every random node without a seed one made from its output's name; return their number.

    onnxruntime otherwise draws seeds from the node's position, so that the same model with fewer nodes
    would give other numbers and nothing could be compared.
    """
    count = 0
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in _seedless(nodes):
            seed = float(zlib.crc32(node.output[0].encode()) % (1 << 24))  # exact as float32
            node.attribute.append(helper.make_attribute("seed", seed))
            count += 1
    return count


def add_outputs(graph: GraphProto, names: Sequence[str]) -> None:
    """Make the named values outputs; onnxruntime infers their types."""
    present = {output.name for output in graph.output}
    graph.output.extend(ValueInfoProto(name=name) for name in names if name not in present)


@dataclass
class ModelFile:
    """A model saved for onnxruntime.

    Attributes:
        path: The model file, in a folder of its own.
        title: What errors call the model.
        bytes: Stored bytes of its weights.
        values: Every value of the main graph that can be made an output.
        outputs: The model's outputs, in order.
        random: Whether it has random nodes, whose state advances with every run.
    """

    path: Path
    title: str
    bytes: int
    values: frozenset[str]
    outputs: tuple[str, ...]
    random: bool
    _variants: dict[tuple[Any, ...], Path] = field(default_factory=dict)
    _made: int = 0

    @classmethod
    def save(cls, graph: Graph, folder: Path, title: str, weights: int, *, seeds: bool) -> ModelFile:
        """Save a graph into a new folder; `seeds` makes its random nodes repeatable."""
        folder.mkdir()
        path = folder / "model.onnx"
        graph.save(path, external=True if weights > EXTERNAL_ABOVE else None)
        made = [name for node in graph.nodes for name in node.output if name]
        random = any(True for part in graph.walk() for _ in _random_nodes(part))
        if random and seeds:
            model = onnx.load(path, load_external_data=False)
            if set_seeds(model):
                path = folder / "seeded.onnx"
                _write(model, path)
        values = frozenset([*made, *graph.inputs, *graph.initializers])
        return cls(path, title, weights, values, tuple(graph.outputs), random)

    def with_outputs(self, names: Sequence[str], nodes: Sequence[NodeProto] = ()) -> Path:
        """Return the file that also has these nodes, and the named values as outputs; data is shared."""
        extra = tuple(sorted(set(names) - set(self.outputs)))
        if not extra:
            return self.path
        key = (*extra, *(node.SerializeToString(deterministic=True) for node in nodes))
        if key not in self._variants:
            model = onnx.load(self.path, load_external_data=False)
            model.graph.node.extend(nodes)
            add_outputs(model.graph, extra)
            self._made += 1
            path = self.path.with_name(f"outputs_{self._made}.onnx")
            _write(model, path)
            self._variants[key] = path
            if len(self._variants) > _VARIANTS:
                self._variants.pop(next(iter(self._variants))).unlink()
        return self._variants[key]


def _write(model: ModelProto, path: Path) -> None:
    """Write a light model beside its data."""
    try:
        path.write_bytes(model.SerializeToString())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise SaveError(f"cannot write a temporary model to {path.parent}: {error.strerror}") from error


def _random_nodes(part: Graph) -> Iterator[NodeProto]:
    return (node for node in part.nodes if node.op_type in _RANDOM)
