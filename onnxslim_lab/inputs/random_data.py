"""Random data made from a model's input types and what the inputs feed; always labelled random."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.model_inputs import ModelInput, Shape, axis_key, model_inputs
from onnxslim_lab.inputs.random_values import ValueMaker, is_image

DEFAULT_SIZE = 16
IMAGE_SIZE = 224


def open_axes(inputs: Mapping[str, ModelInput]) -> dict[str, int]:
    """Return the axes that the model leaves open, by `axis_key`, with their default sizes."""
    found: dict[str, int] = {}
    for name, info in inputs.items():
        shape = info.shape or ()
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                found.setdefault(axis_key(name, axis, size), _default(shape, axis))
    return found


def _default(shape: Shape, axis: int) -> int:
    """Return a sensible size for an open axis."""
    label = str(shape[axis] or "").lower()
    if "batch" in label or label == "n":
        return 1
    if axis == 0 and not any(word in label for word in ("seq", "len", "time", "token")):
        return 1
    if is_image(shape):
        return IMAGE_SIZE
    if len(shape) == 3 and axis == 1 and isinstance(shape[0], int) and isinstance(shape[2], int):
        return 1  # the state of a recurrent layer: (layers, batch, units)
    return DEFAULT_SIZE


def _evaluate(symbol: str, sizes: Mapping[str, int]) -> int | None:
    """Return the size of a symbol like "past + sequence" or "2*batch" from known ones.

    >>> _evaluate("past + 1", {"past": 16})
    17
    """
    total = 0
    for term in symbol.split("+"):
        factors = [part.strip() for part in term.split("*")]
        known = [sizes.get(f, int(f) if f.isdigit() else None) for f in factors]
        if any(k is None for k in known):
            return None
        total += math.prod(k for k in known if k is not None)
    return total


def resolve_sizes(inputs: Mapping[str, ModelInput], dims: Mapping[str, int]) -> dict[str, int]:
    """Return the size of every open axis by `axis_key`: from `dims`, from sums of others, or by default.

    Raises:
        ParameterError: A name in `dims` is no open axis, or a size is less than 1.
    """
    defaults = open_axes(inputs)
    named = {
        f"{name}:{axis}": axis_key(name, axis, size)
        for name, info in inputs.items()
        for axis, size in enumerate(info.shape or ())
        if not isinstance(size, int)
    }
    given: dict[str, int] = {}
    for key, size in dims.items():
        if key not in defaults and key not in named:
            raise ParameterError(
                f"the model has no open dimension {quote(key)}{suggest(key, [*defaults, *named])}"
            )
        if size < 1:
            raise ParameterError(f"dimension {quote(key)} must be 1 or more, not {size}")
        given[named.get(key, key)] = size
    plain = {key: given.get(key, size) for key, size in defaults.items() if "+" not in key and "*" not in key}
    sizes = {**plain, **given}
    for key, size in defaults.items():
        if key not in sizes:
            sizes[key] = _evaluate(key, plain) or size
    return sizes


def random_data(
    graph: Graph, samples: int = 4, seed: int = 0, dims: Mapping[str, int] | None = None
) -> Dataset:
    """Return random feeds for a model, labelled random; the notes say how each input was made.

    Args:
        graph: The model.
        samples: Number of feeds.
        seed: Of the generator.
        dims: Sizes of open dimensions, by symbolic name or as "input:axis". Otherwise: 1 for batch-like
            first axes, 224 for the sides of images, sums of other symbols where the name is one, else 16.

    Raises:
        ParameterError: An unknown dimension, or a size or number less than 1.
        DataError: An input of a type that has no random values.
    """
    if samples < 1:
        raise ParameterError(f"samples must be 1 or more, not {samples}")
    inputs = {name: info for name, info in model_inputs(graph).items() if info.required}
    sizes = resolve_sizes(inputs, dims or {})
    makers = [ValueMaker(graph, info, sizes) for info in inputs.values()]
    generator = np.random.default_rng(seed)
    feeds = [{maker.info.name: maker.make(generator) for maker in makers} for _ in range(samples)]
    notes = [f"random data, seed {seed}"]
    notes += [
        f"input {quote(maker.info.name)} {maker.info}: {maker.note or 'made-up values'}" for maker in makers
    ]
    if sizes:
        notes.append("open dimensions: " + ", ".join(f"{key} = {size}" for key, size in sizes.items()))
    return Dataset(feeds, None, f"random (seed {seed})", random=True, notes=notes, dims=sizes)
