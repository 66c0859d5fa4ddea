"""Set the weights to zero that matter least: by magnitude, or by what they cost at the layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.floats import BLOCK, Array, blocks, kth_magnitude, magnitude_bits
from onnxslim_lab.graph import Graph
from onnxslim_lab.second_order.choose import Pattern
from onnxslim_lab.second_order.pruning import Plan as LossPlan
from onnxslim_lab.second_order.pruning import Refit, measurable, prune_by_loss
from onnxslim_lab.selection import Overrides, Patterns, Target, find_targets

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def zero_upto(values: Array, key: int, ties: int, *, wide: bool) -> tuple[Array, int]:
    """Return a copy with magnitudes below `key`, and the first `ties` equal to it, set to zero.

    Returns:
        The new array (same shape and dtype) and how many ties are left for the arrays that follow.
    """
    result = values.copy()
    for block in blocks(result):
        keys = magnitude_bits(block, wide=wide)
        block[keys < key] = 0
        if ties:
            equal = np.flatnonzero(keys == key)[:ties]
            block[equal] = 0
            ties -= equal.size
    return result, ties


def zero_smallest(values: Array, k: int) -> Array:
    """Return a copy with the k smallest magnitudes set to zero; among equals the first in storage order.

    >>> zero_smallest(np.float32([3, -1, 1, 2, 1]), 2)
    array([3., 0., 0., 2., 1.], dtype=float32)
    """
    if not k:
        return values.copy()
    wide = values.dtype.itemsize > 4
    key, ties = kth_magnitude(lambda: blocks(values), k, wide=wide)
    return zero_upto(values, key, ties, wide=wide)[0]


def zero_below(values: Array, threshold: float) -> Array:
    """Return a copy with every |value| < threshold set to zero, compared in float64."""
    result = values.copy()
    for block in blocks(result):
        block[np.abs(block.astype(np.float64)) < threshold] = 0
    return result


def smallest_in_rows(matrix: Array, k: int) -> Mask:
    """Return the mask of the k smallest magnitudes of each row; among equals the first columns.

    Args:
        matrix: Floats of shape (rows, columns).
        k: Elements to choose in each row, 0 to columns.
    """
    mask = np.zeros(matrix.shape, np.bool_)
    if k <= 0 or not matrix.size:
        return mask
    step = max(1, BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        keys = magnitude_bits(matrix[start : start + step], wide=matrix.dtype.itemsize > 4)
        kth = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]
        less, equal = keys < kth, keys == kth
        ties = k - less.sum(axis=1, keepdims=True)
        mask[start : start + step] = less | (equal & (np.cumsum(equal, axis=1) <= ties))
    return mask


def pattern_mask(matrix: Array, keep: int, group: int) -> Mask:
    """Return the mask of what an N:M pattern zeroes: all but the `keep` largest of each `group` columns.

    A last group that is not full keeps at most `keep` values too: it is an N:M group once the row is
    padded with zeros, which is what sparse hardware does. Mishra et al., Accelerating Sparse Deep
    Neural Networks, 2021.

    >>> pattern_mask(np.float32([[3, -1, 2, 4, 5]]), 2, 4).astype(int).tolist()
    [[0, 1, 1, 0, 0]]
    """
    rows, columns = matrix.shape
    full = columns - columns % group
    mask = np.zeros(matrix.shape, np.bool_)
    grouped = np.ascontiguousarray(matrix[:, :full]).reshape(-1, group)
    mask[:, :full] = smallest_in_rows(grouped, group - keep).reshape(rows, full)
    mask[:, full:] = smallest_in_rows(matrix[:, full:], columns - full - keep)
    return mask


def count_nonzeros(values: Array) -> int | None:
    """Return the number of nonzero elements, or None when there is a NaN."""
    nonzeros = 0
    for block in blocks(values):
        if np.isnan(block).any():
            return None
        nonzeros += int(np.count_nonzero(block))
    return nonzeros


def zeros_wanted(sparsity: float, elements: int) -> int:
    """Return how many of `elements` a sparsity zeroes: rounded half to even, as torch does.

    >>> zeros_wanted(0.5, 5), zeros_wanted(0.5, 7)
    (2, 4)
    """
    return round(sparsity * elements)


class Prune(Pass):
    """Set the weights that matter least to zero (unstructured, N:M or in blocks).

    before: W                         after: W * (|W| > the k-th smallest magnitude)

    `criterion` says what matters. "magnitude" needs no data and touches nothing else. "wanda" weighs each
    weight with the energy of its input. "obs" removes the weights of each row in the order that costs the
    output least, all others updated at each step (optimal brain surgeon; exact up to 1,200 inputs, above
    with one inverse Hessian for all rows); fractions are then taken of the loss relative to the output's
    variance, so that one threshold serves all layers. `refit` makes the loss good afterwards by least
    squares on the weights and biases that are left: of each layer by itself ("layer"), or layer after
    layer against the original model ("network"). Sources: onnxslim_lab.second_order.

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
            key, ties = kth_magnitude(lambda: _stream(pool), ties, wide=wide)
        for target in targets:
            values = target.read()
            fraction = self._fraction if target.override is None else target.override
            if self.pattern != "any":
                keep, group = map(int, self.pattern.split(":"))
                yield _zero_rows(target, partial(pattern_mask, keep=keep, group=group))
            elif self.threshold is not None and target.override is None:
                yield zero_below(values, self.threshold)
            elif self._is_global and target.override is None:
                result, ties = zero_upto(values, key, ties, wide=wide)
                yield result
                del result  # before the next weight is copied
            elif self.scope == "row":
                yield _zero_rows(target, partial(_fraction_of_rows, sparsity=fraction))
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


def _stream(targets: Iterable[Target]) -> Iterator[Array]:
    """Yield the elements of all targets in order, block by block."""
    for target in targets:
        yield from blocks(target.read())


def _fraction_of_rows(rows: Array, sparsity: float) -> Mask:
    return smallest_in_rows(rows, zeros_wanted(sparsity, rows.shape[1]))


def _zero_rows(target: Target, choose: Callable[[Array], Mask]) -> Array:
    """Return the weight with the elements zeroed that `choose` finds in the rows of its matrix."""
    matrix = target.layer.matrix
    rows = matrix.reshape(-1, matrix.shape[-1])
    return target.layer.with_matrix(np.where(choose(rows), matrix.dtype.type(0), rows).reshape(matrix.shape))
