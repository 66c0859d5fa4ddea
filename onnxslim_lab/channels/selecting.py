"""From a model to its groups and the multiply-accumulates they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim_lab.base import Progress, Refusal
from onnxslim_lab.channels.allocation import Ranking
from onnxslim_lab.channels.groups import Group, Part, find_groups
from onnxslim_lab.channels.scores import Criterion, below, by_activation, by_loss, by_magnitude
from onnxslim_lab.channels.sensitivity import by_sensitivity
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import Layer
from onnxslim_lab.macs import model_macs
from onnxslim_lab.selection import matches
from onnxslim_lab.statistics import Calibration, Gram, Want, gram_input, gram_source


@dataclass(frozen=True, eq=False)
class Candidates:
    """The groups of a model.

    Attributes:
        groups: Those that may lose channels.
        refusals: What may not, and why.
        macs: Multiply-accumulates of each layer of the groups by identity.
        outputs: Elements of their outputs and of what is computed from these place by place, likewise.
        total: Those of the whole model.
    """

    groups: list[Group]
    refusals: list[Refusal]
    macs: dict[int, int]
    outputs: dict[int, int]
    total: int


def layer_macs(model: Graph, calibration: Calibration | None) -> list[tuple[Layer, int]]:
    """Return the multiply-accumulates of each layer, open sizes as in the first feed.

    Where inference does not tell the sizes around a layer, the first feed is run; without data, and in
    bodies, such a layer counts as if it met one row.
    """
    found = model_macs(model, _sizes(model, calibration)).layers
    unknown = [layer for layer, count in found if count is None and layer.graph is model]
    shapes: dict[str, tuple[int, ...]] = {}
    if unknown and calibration is not None and len(calibration.data):
        values = {name for layer in unknown for name in (gram_input(layer), layer.node.output[0]) if name}
        computed = [name for name in sorted(values) if not model.is_constant(name)]
        for run in calibration.stream(model, computed, limit=1):
            shapes |= {name: value.shape for name, value in run.items() if isinstance(value, np.ndarray)}
    counted = []
    for layer, told in found:
        count = layer.macs(shapes) if told is None and shapes and layer.graph is model else told
        counted.append((layer, layer.parameters if count is None else count))
    return counted


def _sizes(model: Graph, calibration: Calibration | None) -> dict[str, int]:
    """Return the sizes that the first feed gives to open dimensions of the inputs."""
    found: dict[str, int] = {}
    if calibration is None or not len(calibration.data):
        return found
    feed = calibration.data.feeds[0]
    for name in model.inputs:
        value, shape = feed.get(name), model.shape_of(name)
        if isinstance(value, np.ndarray) and shape is not None and value.ndim == len(shape):
            for axis, size in enumerate(shape):
                if not isinstance(size, int):
                    found[size or f"{name}:{axis}"] = value.shape[axis]
    return found


def candidates(
    model: Graph,
    calibration: Calibration | None,
    *,
    widths: bool,
    include: Sequence[str],
    exclude: Sequence[str],
) -> Candidates:
    """Return the groups of the whole model that the patterns select."""
    counted = layer_macs(model, calibration)
    by_name = {(id(layer.graph), *names(layer)): count for layer, count in counted}
    groups, refusals, macs, outputs = [], [], {}, {}
    for graph in model.walk():
        found, refused = find_groups(graph, widths=widths)
        refusals += refused
        for group in found:
            held = {name for layer in group.layers for name in names(layer)}
            barred = next((pattern for pattern in exclude if matches(pattern, held)), None)
            if barred is not None:
                refusals.append(Refusal(group.name, f"excluded by pattern {barred!r}"))
            elif include and not any(matches(pattern, held) for pattern in include):
                refusals.append(Refusal(group.name, "no include pattern matches its layers"))
            else:
                groups.append(group)
    written: dict[int, int] = {}  # values for each layer that makes channels: itself and what follows it
    for group in groups:
        for side in group.makers:
            times = max(1, group.values // len(group.makers))
            written[id(side.layer)] = max(times, written.get(id(side.layer), 1))
    for part in {id(group.part): group.part for group in groups}.values():
        for layer, _ in part.layers:
            count = by_name.get((id(layer.graph), *names(layer)), 0)
            macs[id(layer)] = count
            outputs[id(layer)] = count // max(1, layer.shape[2]) * written.get(id(layer), 1)
    return Candidates(groups, refusals, macs, outputs, sum(count for _, count in counted))


def names(layer: Layer) -> tuple[str, str, str]:
    """Return the names that patterns may meet: the layer's, the node's, the weight's."""
    return layer.name, layer.node.name or layer.node.output[0], layer.weight


def rankings(
    model: Graph,
    groups: Sequence[Group],
    criterion: Criterion,
    calibration: Calibration | None,
    *,
    threshold: float | None,
    least: float,
    damping: float,
    folder: Path,
    progress: Progress,
) -> list[Ranking]:
    """Return the order in which each group loses channels.

    Args:
        model: The main graph.
        groups: The groups.
        criterion: What matters.
        calibration: The data; not needed for l1 and l2.
        threshold: With "activation": only channels below it are named.
        least: Part of a group's channels that stays.
        damping: See `by_loss`.
        folder: Where Gram matrices are kept meanwhile, so that one layer's at a time is in memory.
        progress: Called for each group.
    """
    if criterion in ("l1", "l2"):
        return [by_magnitude(group, criterion) for group in groups]
    assert calibration is not None
    if criterion == "activation":
        return _by_activation(model, groups, calibration, threshold)
    if criterion == "sensitivity":
        alone = _by_activation(model, groups, calibration, None)
        return by_sensitivity(model, groups, alone, calibration, progress)
    readers = {id(side.layer): side.layer for group in groups for side in group.readers}
    measured = [layer for layer in readers.values() if gram_source(layer)]
    stored = {}
    for number, (layer, gram) in enumerate(calibration.grams(model, measured)):
        np.save(folder / f"{number}.npy", gram.matrix)
        stored[id(layer)] = (folder / f"{number}.npy", gram.total, gram.count)
        progress(number, len(measured), f"Gram matrix of {layer.name}")

    def gram_of(layer: Layer) -> Gram:
        held = stored.get(id(layer))
        return _even(layer) if held is None else Gram(np.load(held[0]), *held[1:])

    found = []
    for number, group in enumerate(groups):
        progress(number, len(groups), f"losses of {group.name}")
        found.append(by_loss(group, gram_of, least=least, damping=damping, memory=calibration.memory))
    return found


def _even(layer: Layer) -> Gram:
    """Return what stands for the Gram matrix of hidden states of which nothing is known: all have one energy."""
    groups, _, size = layer.shape
    ones = np.ones((groups, size))
    return Gram(ones, 0 * ones, 1)


def _by_activation(
    model: Graph, groups: Sequence[Group], calibration: Calibration, threshold: float | None
) -> list[Ranking]:
    wants = {}
    for group in groups:
        for side in group.readers:
            value, graph = gram_input(side.layer), side.layer.graph
            axis = _axis(group.part, value, group) if value else None
            if axis is not None:
                wants[id(graph), value] = Want(graph, value, axis=axis)
    statistics = calibration.collect(model, wants.values())
    found = []
    for group in groups:
        energies = []
        for side in group.readers:
            want = wants.get((id(side.layer.graph), gram_input(side.layer)))
            held = statistics.get(want.graph, want.value) if want is not None else None
            if want is None or held is None or held.channels is None or want.axis is None:
                continue
            tensor = group.part.axes.values[want.value]
            atoms = tensor[want.axis] if tensor is not None else None
            if atoms is not None:
                energies.append((np.asarray(held.channels.mean_square), _numbers(group, atoms)))
        found.append(
            by_activation(group, energies) if threshold is None else below(group, energies, threshold)
        )
    return found


def _axis(part: Part, value: str, group: Group) -> int | None:
    for axis, atoms in enumerate(part.axes.values.get(value) or ()):
        if atoms is not None and (_numbers(group, atoms) >= 0).any():
            return axis
    return None


def _numbers(group: Group, atoms: NDArray[Any]) -> NDArray[np.int64]:
    """Return the channel of each place along an axis, -1 for those of other groups."""
    labels = group.part.closure.labels[atoms]
    order = np.argsort(group.classes)
    place = np.searchsorted(group.classes[order], labels).clip(max=group.size - 1)
    found = order[place]
    return np.where(group.classes[found] == labels, found, -1)
