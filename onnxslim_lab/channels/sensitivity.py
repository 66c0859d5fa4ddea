"""What a group's channels mean to the model's outputs: the outputs are measured without some of them.

Activations say which channels of one group matter least; only the outputs say which group does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.base import Progress
from onnxslim_lab.channels.allocation import Ranking
from onnxslim_lab.channels.groups import Group
from onnxslim_lab.graph import Graph
from onnxslim_lab.statistics import Calibration
from onnxslim_lab.worker.messages import Value

FEEDS = 8  # that the outputs are compared on: each group costs a run on them
PART = 4  # a group is tried without one channel of so many


def by_sensitivity(
    model: Graph,
    groups: Sequence[Group],
    rankings: Sequence[Ranking],
    calibration: Calibration,
    progress: Progress,
) -> list[Ranking]:
    """Scale rankings to the change of the model's outputs when the cheapest quarter of a group goes.

    The change is the energy of the outputs' difference over their variance, not less than nothing and not more than
    all of it (also where the outputs are no longer finite). The columns that read a channel are zero for
    the measurement, and put back.

    Args:
        model: The main graph.
        groups: The groups.
        rankings: A ranking of each by itself, by activations.
        calibration: The data; its first feeds are used.
        progress: Called for each group.
    """
    reference = calibration.outputs(model, limit=FEEDS)
    found = []
    for number, (group, ranking) in enumerate(zip(groups, rankings, strict=True)):
        progress(number, len(groups), f"sensitivity of {group.name}")
        tried = ranking.order[: max(1, group.size // PART)]
        told = float(ranking.losses[: tried.size].sum())
        if told <= 0:  # nothing reads them, or they are always zero
            found.append(ranking)
            continue
        with _without(group, tried):
            change = relative_change(reference, calibration.outputs(model, limit=FEEDS))
        found.append(Ranking(ranking.order, ranking.losses * (change / told)))
    return found


def relative_change(reference: Sequence[dict[str, Value]], result: Sequence[dict[str, Value]]) -> float:
    """Return the energy of the outputs' difference over their variance, averaged over outputs, at most 1.

    >>> relative_change([{"y": np.array([1.0, 3.0])}], [{"y": np.array([1.0, 2.0])}])
    0.5
    """
    shares = []
    for name in reference[0]:
        pairs = [(before[name], after[name]) for before, after in zip(reference, result, strict=True)]
        arrays = [(_floats(one), _floats(two)) for one, two in pairs]
        known = [(one, two) for one, two in arrays if one is not None and two is not None]
        if not known:
            continue
        if any(one.shape != two.shape for one, two in known):
            shares.append(1.0)
            continue
        one, two = (np.concatenate([pair[side].reshape(-1) for pair in known]) for side in (0, 1))
        variance = float(((one - one.mean()) ** 2).sum())
        difference = float(((one - two) ** 2).sum())
        share = difference / max(variance, np.finfo(np.float64).tiny)
        shares.append(min(share, 1.0) if np.isfinite(share) else 1.0)
    return float(np.mean(shares)) if shares else 0.0


def _floats(value: Any) -> NDArray[np.float64] | None:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OSUb":
        return value.astype(np.float64)
    return None


@contextmanager
def _without(group: Group, channels: NDArray[np.int64]) -> Iterator[None]:
    """Let the readers of a group ignore some channels for a while."""
    before = []
    try:
        for side in group.readers:
            layer = side.layer
            stored = layer.weight_graph.constant(layer.weight)
            assert stored is not None
            before.append((layer, stored))
            matrix = layer.matrix.copy()
            matrix[:, :, np.isin(side.members, channels)] = 0
            layer.set(layer.with_matrix(matrix))
        yield
    finally:
        for layer, stored in reversed(before):
            layer.set(stored)
