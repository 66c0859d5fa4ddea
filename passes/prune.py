"""Set the weights to zero that matter least: by magnitude, or by what they cost at the layer's output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.floats import Array, kth_magnitude
from onnxslim_lab.graph import Graph
from onnxslim_lab.second_order.magnitude import (
    count_nonzeros,
    fraction_of_rows,
    pattern_mask,
    stream,
    zero_below,
    zero_rows,
    zero_smallest,
    zero_upto,
    zeros_wanted,
)
from onnxslim_lab.second_order.patterns import Pattern
from onnxslim_lab.second_order.pruning import Plan as LossPlan
from onnxslim_lab.second_order.pruning import Refit, measurable, prune_by_loss
from onnxslim_lab.selection import Overrides, Patterns, Target, find_targets

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Prune(Pass):
    """Set the weights that matter least to zero (unstructured, N:M or in blocks).

    before: W                         after: W * (|W| > the k-th smallest magnitude)

    `criterion` says what matters. "magnitude" needs no data and touches nothing else. "wanda" weighs each
    weight with the energy of its input. "obs" removes the weights of each row in the order that costs the
    output least, all others updated at each step (optimal brain surgeon; exact up to 1,200 inputs, above
    with one inverse Hessian for all rows); fractions are then taken of the loss relative to the output's
    variance, so that one threshold serves all layers. `refit` makes the loss good afterwards by least
    squares on the weights and biases that are left: of each layer by itself ("layer"), or layer after
    layer against the original model ("network"): what a residual stream beside a layer has lost, the
    layer makes good too. Sources: onnxslim_lab.second_order.

    `scope` says what the fraction is taken of: "global" all selected layers together, "layer" each
    weight, "row" each output row of its matrix. Exactly round(sparsity * n) weights are zero
    afterwards, or more where more were zero before; among equal magnitudes the first in graph and
    storage order go first. "global" is what torch.nn.utils.prune.global_unstructured does with
    L1Unstructured: the same mask, but for the order of ties, which torch leaves open.
    `pattern` "2:4" keeps the 2 best of every 4 consecutive columns of the (out, in) matrix; the
    columns of a Conv are (channel, *kernel) in storage order. An incomplete last group keeps at most
    as many. "block:8" removes 8 consecutive columns of a row together. Magnitude pruning: Han et al., Learning both Weights and Connections, 2015.

    refuses: integer and other quantized weights; weights with NaN; weights without elements; weights
    that are outputs of the graph; embeddings, tied ones included, unless `embeddings` is set; weights
    that already have the zeros asked for; with wanda and obs layers that no feed reaches.

    >>> Prune(sparsity=0.9, scope="layer", overrides="conv1*:0.3").overrides
    {'conv1*': 0.3}
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    criterion: Literal["magnitude", "wanda", "obs"] = Field(
        "magnitude", description="what matters: the weight itself, with its input, or the loss at the output"
    )
    sparsity: Fraction | None = Field(
        None, description="fraction of zeros to reach; 0.5 when nothing is given"
    )
    threshold: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="instead of a fraction: zero what is smaller than this"
    )
    scope: Literal["global", "layer", "row"] = Field("global", description="what the fraction is taken of")
    pattern: str = Field(
        "any",
        description='"any"; N:M such as 2:4: N of every M consecutive inputs stay; block:N: N go together',
    )
    refit: Literal["auto", "none", "layer", "network"] = Field(
        "auto", description="least squares on what is left; auto: network with obs, otherwise none"
    )
    damping: float = Field(
        1e-6, gt=0, lt=1, description="part of the mean input energy added to the Gram matrix"
    )
    include: Patterns = Field((), description="glob patterns of node or weight names; empty means all layers")
    exclude: Patterns = Field((), description="glob patterns of node or weight names to leave alone")
    overrides: Overrides[Fraction] = Field(
        default_factory=dict,
        description="glob pattern -> sparsity of the layers it matches (first match), apart from the others",
    )
    embeddings: bool = Field(False, description="whether lookup tables (Gather) are pruned as well")

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        Pattern.parse(pattern)
        return pattern

    @model_validator(mode="after")
    def _check_exclusive(self) -> Self:
        if self.sparsity is not None and self.threshold is not None:
            raise ValueError("sparsity and threshold exclude each other; give one")
        if Pattern.parse(self.pattern).group and (
            self.sparsity is not None
            or self.threshold is not None
            or self.overrides
            or self.scope != "global"
        ):
            raise ValueError(
                f"pattern {self.pattern} fixes the sparsity; leave sparsity, threshold, scope, overrides out"
            )
        if self.threshold is not None and self.scope != "global":
            raise ValueError("scope has no meaning with a threshold; leave it out")
        if self.threshold is not None and not self._is_plain:
            raise ValueError("threshold is of magnitudes: it goes with criterion magnitude and no pattern")
        return self

    @property
    def _is_plain(self) -> bool:
        """Whether weights are ranked by magnitude alone, which needs neither data nor a whole matrix."""
        blocked = Pattern.parse(self.pattern).block > 1
        return self.criterion == "magnitude" and self._refit == "none" and not blocked

    @property
    def _refit(self) -> Refit:
        if self.refit != "auto":
            return self.refit
        return "network" if self.criterion == "obs" else "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations."""
        return self.criterion != "magnitude" or self._refit != "none"

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Prune the selected weights of the whole model in place.

        Memory: one weight and its copy at a time, whatever the scope; "global" reads the weights four
        times (NaN check, two digits of the threshold, the edit; six times with float64 weights).
        """
        outcome = Outcome()
        sound: list[Target] = []
        before: list[int] = []
        for target in self._targets(graph, outcome):
            nonzeros = count_nonzeros(target.read())
            if nonzeros is None:
                outcome.refuse(target.where, "the weight has NaN values: their magnitudes cannot be ranked")
            else:
                before.append(nonzeros)
                sound.append(target)
        if not self._is_plain:
            self._prune_by_loss(graph, sound, before, context, outcome)
            return outcome
        pruned = self._pruned(sound)
        for number, (target, nonzeros) in enumerate(zip(sound, before, strict=True)):
            values = next(pruned)
            left = int(np.count_nonzero(values))
            if left == nonzeros:
                zeros = f"{target.size - left} of its {target.size} values"
                outcome.refuse(target.where, f"nothing to zero: {zeros} are zero, no more are asked for")
            else:
                target.write(values)
                outcome.changes.append(_change(target, values.nbytes, nonzeros, left))
            del values  # before the next weight is copied
            context.progress(number + 1, len(sound), f"prune {target.where}")
        return outcome

    def _prune_by_loss(
        self, graph: Graph, targets: list[Target], before: list[int], context: Context, outcome: Outcome
    ) -> None:
        """Prune by what weights cost at the outputs of their layers."""
        calibration = context.calibration
        if self.needs_calibration and calibration is None:
            raise ParameterError(f"prune: criterion {self.criterion} with refit {self._refit} needs data")
        plan = LossPlan(
            self.criterion, Pattern.parse(self.pattern), self.scope, self._fraction, self._refit, self.damping
        )
        counts = {id(target): nonzeros for target, nonzeros in zip(targets, before, strict=True)}
        usable = measurable(targets, outcome) if self.needs_calibration else targets
        for pruned in prune_by_loss(graph, usable, plan, calibration, context.progress):
            target, values = pruned.target, pruned.values
            left = int(np.count_nonzero(values))
            target.write(values)
            change = _change(target, values.nbytes, counts[id(target)], left)
            if not math.isnan(pruned.error):
                change.detail["output error"] = pruned.error
            outcome.changes.append(change)

    def _targets(self, graph: Graph, outcome: Outcome) -> Iterator[Target]:
        """Yield the selected weights; refuse embeddings unless they are asked for."""
        found = find_targets(
            graph,
            outcome,
            step=self.pass_name(),
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
        )
        for target in found:
            if target.is_lookup and not self.embeddings:
                outcome.refuse(target.where, "a lookup table; embeddings=true prunes it too")
            else:
                yield target

    def _pruned(self, targets: list[Target]) -> Iterator[Array]:
        """Yield the new values of each target, in order."""
        pool = [target for target in targets if target.override is None] if self._is_global else []
        wide = any(target.is_wide for target in pool)
        key, ties = 0, zeros_wanted(self._fraction, sum(target.size for target in pool))
        if ties:
            key, ties = kth_magnitude(lambda: stream(pool), ties, wide=wide)
        for target in targets:
            values = target.read()
            fraction = self._fraction if target.override is None else target.override
            if self.pattern != "any":
                keep, group = map(int, self.pattern.split(":"))
                yield zero_rows(target, partial(pattern_mask, keep=keep, group=group))
            elif self.threshold is not None and target.override is None:
                yield zero_below(values, self.threshold)
            elif self._is_global and target.override is None:
                result, ties = zero_upto(values, key, ties, wide=wide)
                yield result
                del result  # before the next weight is copied
            elif self.scope == "row":
                yield zero_rows(target, partial(fraction_of_rows, sparsity=fraction))
            else:
                yield zero_smallest(values, zeros_wanted(fraction, values.size))

    @property
    def _fraction(self) -> float:
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def _is_global(self) -> bool:
        return self.scope == "global" and self.threshold is None and self.pattern == "any"


def _change(target: Target, size: int, before: int, after: int) -> Change:
    return Change(
        where=target.where,
        what=f"zeroed {before - after} of {target.size} weights",
        weights=(target.weight,),
        bytes_before=size,
        bytes_after=size,
        nonzeros_before=before,
        nonzeros_after=after,
        detail={"sparsity": (target.size - after) / target.size, "layers": len(target.layers)},
    )
