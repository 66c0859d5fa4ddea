"""Remove whole channels, neurons, attention heads and hidden units; the tensors in the file shrink."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.channels.allocation import Allocation
from onnxslim_lab.channels.behind import Key, key_of
from onnxslim_lab.channels.cutting import Kept, cut, kept_of
from onnxslim_lab.channels.groups import Group
from onnxslim_lab.channels.refit import refit
from onnxslim_lab.channels.selecting import candidates, layer_macs, rankings
from onnxslim_lab.channels.widths import width_multiple
from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.selection import Patterns, matches


class PruneChannels(Pass):
    """Remove the channels that matter least, with all that belongs to them.

    before: Conv 64 -> 128, BatchNormalization, Relu, Conv 128 -> 256
    after:  Conv 64 -> 96, BatchNormalization, Relu, Conv 96 -> 256

    A channel goes through the whole graph: out of the rows of the layers that make it and the columns of those
    that read it, out of biases and normalizations, through residual Adds, gates, Concat, Split, Slice, reshapes
    (whole attention heads), depthwise and grouped convolution, and the gates of LSTM, GRU and RNN; sizes that
    are written in the model (Reshape, Split, Slice, `group`, `hidden_size`) follow. Onnxruntime then has less
    to do: nothing is sparse.

    `macs` of all multiply-accumulates go, from where the work that is saved costs least (what is written to
    memory is work too). `criterion` says what a channel costs: "l1", "l2" its part of the weights, "activation"
    its part of the energy that layers read, "sensitivity" that part of what the model's outputs change when
    a quarter of its group goes (a run on a few feeds for each group), "obs" what it takes from the outputs of the
    layers that read it when their weights are refitted (the channel as a block of optimal brain surgeon). `refit`
    solves for the weights and biases that are left, layer after layer, the gates of LSTM, GRU and RNN too, so that
    each gives what it gave in the original model; every fourth feed is held back to choose how far to go.
    `threshold` removes instead every channel whose root mean square activation is smaller. `widths` also cuts
    the width of a transformer: the mean and variance that its normalizations take then change.

    Sources: onnxslim_lab.channels.

    refuses: channels that reach an input or output of the graph, an operator without a rule, or a size that is
    computed; channels that a normalization averages over, unless `widths`; the refit of layers whose sums do not
    fit the memory.

    >>> PruneChannels(macs=0.3, criterion="l2", refit="none").needs_calibration
    False
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    macs: float = Field(0.3, gt=0, lt=1, description="part of the multiply-accumulates to remove")
    criterion: Literal["l1", "l2", "activation", "sensitivity", "obs"] = Field(
        "obs", description="what a channel costs"
    )
    threshold: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="instead of macs: channels with smaller activations go"
    )
    refit: Literal["auto", "none", "network"] = Field(
        "auto", description="least squares on what is left; auto: network where data is used anyway"
    )
    multiple: int = Field(0, ge=0, description="widths become multiples of it; 0: what suits the target")
    target: str = Field("auto", description="the profile whose widths count")
    least: float = Field(0.25, ge=0, lt=1, description="part of the channels of a layer that stays at least")
    widths: bool = Field(False, description="whether the axes that normalizations average over are cut")
    damping: float = Field(1e-3, gt=0, lt=1, description="least pull towards the original weights")
    include: Patterns = Field((), description="glob patterns of node or weight names; empty means all layers")
    exclude: Patterns = Field((), description="glob patterns of node or weight names to leave alone")

    @model_validator(mode="after")
    def _check_threshold(self) -> Self:
        if self.threshold is not None and self.criterion != "activation":
            raise ValueError("threshold is of activations: it goes with criterion activation")
        return self

    @property
    def _refits(self) -> bool:
        return self.refit == "network" or (self.refit == "auto" and self.criterion not in ("l1", "l2"))

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations."""
        return self._refits or self.criterion not in ("l1", "l2")

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Remove channels from the whole model in place.

        Memory: the matrices of the readers of one group at a time, Gram matrices in a scratch folder.
        """
        calibration, outcome = context.calibration, Outcome()
        self._check_patterns(graph)
        graph.infer()  # what earlier passes made
        found = candidates(graph, calibration, widths=self.widths, include=self.include, exclude=self.exclude)
        outcome.refusals += found.refusals
        if not found.groups:
            return outcome
        if self.needs_calibration and calibration is None:
            raise ParameterError(
                f"prune-channels: criterion {self.criterion} with refit {self.refit} needs calibration data; "
                "criterion l2 with refit none needs none"
            )
        with tempfile.TemporaryDirectory(prefix="onnxslim_lab-") as folder:
            ranked = rankings(
                graph,
                found.groups,
                self.criterion,
                calibration,
                threshold=self.threshold,
                least=self.least,
                damping=self.damping,
                folder=Path(folder),
                progress=context.progress,
            )
        allocation = Allocation(
            found.groups, ranked, found.macs, found.outputs, multiple=self._multiple, least=self.least
        )
        if self.threshold is None:
            wanted = allocation.macs - self.macs * found.total
            if not allocation.reach(wanted):
                spared = 1 - (allocation.macs - wanted) / found.total
                outcome.refuse(
                    "model", f"no more can be removed: {spared:.0%} of what was asked for stays to go"
                )
        else:
            allocation.fit([ranking.order.size for ranking in ranked])
        gone = [
            (group, ranking.order[:count])
            for group, ranking, count in zip(found.groups, ranked, allocation.removed, strict=True)
        ]
        self._cut(graph, gone, context, outcome)
        if outcome.changes:
            left = sum(count for _, count in layer_macs(graph, calibration))
            outcome.changes[0].detail["multiply-accumulates left"] = round(left / max(1, found.total), 4)
        return outcome

    def _cut(
        self,
        graph: Graph,
        gone: list[tuple[Group, np.ndarray[tuple[int], np.dtype[np.int64]]]],
        context: Context,
        outcome: Outcome,
    ) -> None:
        original = graph.copy() if self._refits else graph
        kept: dict[Key, Kept] = {}
        for part in {id(group.part): group.part for group, _ in gone}.values():
            own = [(group, numbers) for group, numbers in gone if group.part is part and len(numbers)]
            if not own:
                continue
            classes = np.zeros(len(part.closure.reasons), np.bool_)
            for group, numbers in own:
                classes[group.classes[numbers]] = True
            for layer, _ in part.layers:
                left = kept_of(layer, part, classes)
                if not all(mask.all() for mask in (left.groups, left.rows, left.columns)):
                    kept[key_of(layer)] = left
            before = _stored(part.graph)
            cut(part, own)
            after = _stored(part.graph)
            for group, numbers in own:
                outcome.changes.append(_change(group, len(numbers), before, after))
        for group, numbers in gone:
            if not len(numbers):
                outcome.refuse(group.name, f"none of its {group.size} channels need go, or may")
        if self._refits and kept and context.calibration is not None:
            outcome.refusals += refit(
                graph, original, kept, context.calibration, damping=self.damping, progress=context.progress
            )

    @property
    def _multiple(self) -> int:
        return self.multiple or width_multiple(self.target)

    def _check_patterns(self, graph: Graph) -> None:
        known = {
            name
            for inner in graph.walk()
            for layer in find_layers(inner)[0]
            for name in (layer.name, layer.node.name, layer.weight)
            if name
        }
        for kind, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not matches(pattern, known):
                    raise ParameterError(
                        f"prune-channels: {kind} pattern {quote(pattern)} matches no layer or weight of the model"
                        + suggest(pattern, known)
                    )


def _stored(graph: Graph) -> dict[Key, int]:
    """Return the bytes of each layer's weight."""
    return {key_of(layer): _bytes(layer.weight_graph, layer.weight) for layer in find_layers(graph)[0]}


def _bytes(graph: Graph, name: str) -> int:
    kind = graph.constant_type(name)
    return kind[2] if kind else 0


def _change(group: Group, count: int, before: dict[Key, int], after: dict[Key, int]) -> Change:
    """Describe the removal of channels; bytes are those of the layers that make them."""
    keys = {key_of(side.layer) for side in group.makers}
    return Change(
        group.name,
        f"removed {count} of {group.size} channels",
        tuple(dict.fromkeys(layer.weight for layer in group.layers)),
        sum(before.get(key, 0) for key in keys),
        sum(after.get(key, 0) for key in keys),
        detail={"channels": group.size - count},
    )
