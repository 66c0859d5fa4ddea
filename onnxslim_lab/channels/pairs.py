"""Values of an edited model beside those of the original, run by run, in any graph of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.graph import Graph
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.statistics.hooked import Observer
from onnxslim_lab.worker.messages import Value

Array = NDArray[Any]
Values = list[Array | None]


Side = tuple[Graph, Sequence[str]]


def pairs(
    models: tuple[Graph, Graph], sides: tuple[Side, Side], calibration: Calibration
) -> Iterator[tuple[Values, Values]]:
    """Yield the values of both models, feed by feed; in a body each time that it runs, on NumPy.

    A feed on which the body runs a different number of times in the two is left out.

    Args:
        models: The main graphs: of the edited model, of the original.
        sides: The graph and the names of its values, likewise; None stands for the name "".
        calibration: The data.

    Raises:
        LookupError: The interpreter cannot see one of the values; the reason is its text.
    """
    runs = [_stream(model, *side, calibration) for model, side in zip(models, sides, strict=True)]
    for one, other in zip(*runs, strict=True):
        if len(one) == len(other):
            yield from zip(one, other, strict=True)


def _stream(
    model: Graph, graph: Graph, values: Sequence[str], calibration: Calibration
) -> Iterator[list[Values]]:
    """Yield for each feed the values each time that the graph runs."""
    fixed = {name: graph.constant(name) for name in values if name and graph.is_constant(name)}
    wanted = list(dict.fromkeys(name for name in values if name and name not in fixed))
    if graph is model:
        for run in calibration.stream(graph, wanted):
            yield [[_array(run.get(name, fixed.get(name))) for name in values]]
        return
    observer = Observer(model, calibration.memory // 2)
    seen: dict[str, list[Array]] = {name: [] for name in wanted}
    for name in wanted:
        home = graph.scope_of(name)
        reason = observer.watch(home or graph, name, seen[name].append)
        if reason:
            raise LookupError(reason)
    for feed in calibration.data.feeds:
        for held in seen.values():
            held.clear()
        observer.run(feed)
        runs = max((len(held) for held in seen.values()), default=0)
        known = {name: held * runs if len(held) == 1 else held for name, held in seen.items()}
        if any(len(held) != runs for held in known.values()):
            yield []
            continue
        yield [[known[n][run] if n in known else fixed.get(n) for n in values] for run in range(runs)]


def _array(value: Value) -> Array | None:
    return value if isinstance(value, np.ndarray) else None
