"""Random data that a model really runs on: sizes of open dimensions found by trying."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import SessionError
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.model_inputs import model_inputs
from onnxslim_lab.inputs.random_data import open_axes, random_data, resolve_sizes
from onnxslim_lab.sessions import Runner

_SIZES = (32, 64, 48, 128, 224, 256, 512, 576, 320, 640, 8, 4, 2, 1, 1024, 1600, 3200, 16000)
_PAIRS = (1, 16, 32, 48, 64, 128, 224, 320, 512)
_OTHERS = {1: (2, 3)}  # a second size for what has this one; else half as much again, twice, 32 more ...
_MOST = 200  # sizes tried


def runnable_data(
    runner: Runner,
    graph: Graph,
    samples: int = 4,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    *,
    seconds: float = 60.0,
) -> Dataset:
    """Return random data that onnxruntime runs the model on.

    The default sizes of `random_data` first; where the model refuses them, other sizes of the dimensions
    that `dims` does not fix, all alike, then in pairs. Notes say so when sizes were found by trying.

    Raises:
        SessionError: The model does not load, or refuses all sizes tried; the message is that of the
            first try.
    """
    runner.load_seconds(graph)  # a model that does not load is not the data's fault
    fixed = dict(dims or {})
    first = random_data(graph, samples, seed, fixed)
    try:
        runner.run(graph, first.feeds[:1])
    except SessionError as error:
        start = time.monotonic()
        for tries, sizes in enumerate(_candidates(graph, fixed)):
            if tries >= _MOST or time.monotonic() - start > seconds:
                break
            found = _try(runner, graph, samples, seed, {**sizes, **fixed})
            if found is not None:
                found.notes.append(f"sizes found by trying: the model refused {_listed(first.dims)}")
                return found
        raise SessionError(
            f"{error}; random data did not run at any size tried: give data, or sizes of the open dimensions"
        ) from error
    return first


def data_at_two_shapes(
    runner: Runner,
    graph: Graph,
    samples: int = 2,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
) -> list[Dataset]:
    """Return random data at one shape, and at a second that changes every open dimension it can.

    Only one is returned when nothing is open, or when the model runs at no other size.
    """
    first = runnable_data(runner, graph, samples, seed, dims)
    sizes, second = dict(first.dims), None
    free = {key: size for key, size in first.dims.items() if key not in (dims or {})}
    together = {key: 2 for key, size in free.items() if size == 1}  # batch axes that must agree
    if together:
        second = _try(runner, graph, samples, seed + 1, {**sizes, **together})
        if second is not None:
            sizes = second.dims
            free = {key: size for key, size in free.items() if size != 1}
    for key, size in free.items():
        for other in _OTHERS.get(size, (size + size // 2, size * 2, size + 32, size + 1)):
            found = _try(runner, graph, samples, seed + 1, {**sizes, key: other})
            if found is not None:
                sizes, second = found.dims, found
                break
    return [first] if second is None else [first, second]


def _try(runner: Runner, graph: Graph, samples: int, seed: int, sizes: Mapping[str, int]) -> Dataset | None:
    """Return random data at the sizes, None when the model refuses it."""
    found = random_data(graph, samples, seed, sizes)
    try:
        runner.run(graph, found.feeds[:1])
    except SessionError:
        return None
    return found


def _candidates(graph: Graph, fixed: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield sizes worth trying."""
    inputs = {name: info for name, info in model_inputs(graph).items() if info.required}
    defaults = open_axes(inputs)
    resolve_sizes(inputs, fixed)  # raises for unknown names
    free = [key for key in defaults if key not in fixed and "+" not in key and "*" not in key]
    large = [key for key in free if defaults[key] > 1]
    for keys in (large, free):
        for size in _SIZES if keys else ():
            yield dict.fromkeys(keys, size)
    for first, second in itertools.permutations(large or free, 2):
        for a, b in itertools.product(_PAIRS, repeat=2):
            if a != b:
                yield {first: a, second: b}


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{key} = {size}" for key, size in sizes.items())
