"""Replace each weight by the nearest of a few shared values."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from onnxslim_lab.base import Change, Context, Outcome, Pass
from onnxslim_lab.clustering import Init, scale_of
from onnxslim_lab.codebook import share_values, squares
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.floats import Array, blocks
from onnxslim_lab.graph import Graph
from onnxslim_lab.second_order.entropy import entropy, entropy_code
from onnxslim_lab.second_order.pruning import measurable, target_grams
from onnxslim_lab.second_order.sharing import input_masses, share_by_output
from onnxslim_lab.selection import Overrides, Patterns, Target, find_targets
from onnxslim_lab.statistics import Gram


class Share(Pass):
    """Replace each weight by the nearest of 2**bits shared values (k-means), biases untouched.

    before: W                         after: codebook[index], index of `bits` bits

    The values change and the tensor stays dense; `encode` then stores the indices. Zeros of a pruned
    weight stay zero and take one entry of its codebook; a small weight nearer to zero than to any other
    entry becomes zero too. `rows` gives every so many output rows of the weight's (out, in) matrix
    their own codebook (a row of a Conv is an output channel). The values keep the weight's dtype. Han et
    al., Deep Compression, 2016. With `weighting=activation` a weight counts as much as the energy of its
    input, on calibration data; `compensate` also lets the weights of a row make good each other's
    rounding errors. With `entropy` the assignment minimises error + multiplier * codeword length: seldom
    values fall away, and what compresses the file afterwards (Huffman, zip) finds shorter codes at the same
    error. Sources: onnxslim_lab.second_order.sharing and entropy.

    refuses: integer and other quantized weights; weights with NaN or infinities; weights without
    elements; weights that are outputs of the graph; weights with no more distinct values than the
    codebook; weights so small that codebook and indices would take more bytes than they do.

    >>> Share(bits=4, overrides="conv*:8").overrides
    {'conv*': 8}
    """

    exact: ClassVar[bool] = False
    level: ClassVar[Literal["graph", "model"]] = "model"

    bits: int = Field(4, ge=1, le=8, description="width of an index; the codebook has 2**bits values")
    init: Init = Field(
        "linear", description="start of k-means: even over the range, quantiles, random values"
    )
    rows: int | None = Field(
        None, ge=1, description="matrix rows per codebook; one for the whole weight if unset"
    )
    weighting: Literal["none", "activation"] = Field(
        "none", description="what an error counts: itself, or with the energy of the weight's input"
    )
    compensate: bool = Field(
        False, description="make rounding errors good at the layer's output (implies weighting=activation)"
    )
    entropy: float | None = Field(
        None,
        gt=0,
        le=8,
        description="bits that a weight takes once coded (its index may take `bits`); none: no limit",
    )
    reserve_zero: bool = Field(False, description="whether 0.0 is an entry even where no weight is zero")
    include: Patterns = Field((), description="glob patterns of node or weight names; empty means all layers")
    exclude: Patterns = Field((), description="glob patterns of node or weight names to leave alone")
    overrides: Overrides[Annotated[int, Field(ge=1, le=8)]] = Field(
        default_factory=dict, description="glob pattern -> bits of the layers it matches (first match)"
    )

    @model_validator(mode="after")
    def _check_measured(self) -> Self:
        if self.needs_calibration and (self.rows is not None or self.reserve_zero):
            raise ValueError("rows and reserve_zero go with weighting=none and compensate=false")
        if self.entropy is not None and (self.rows is not None or self.compensate):
            raise ValueError("entropy goes with one codebook and compensate=false")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures activations."""
        return self.compensate or self.weighting == "activation"

    def apply(self, graph: Graph, context: Context) -> Outcome:
        """Share the selected weights of the whole model in place, one weight and its copy in memory."""
        outcome = Outcome()
        targets = find_targets(
            graph,
            outcome,
            step=self.pass_name(),
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
        )
        grams = None
        if self.needs_calibration:
            if context.calibration is None:
                raise ParameterError("share: weighting=activation and compensate need calibration data")
            targets = measurable(targets, outcome)
            grams = target_grams(graph, targets, context.calibration)
        for number, target in enumerate(targets):
            result = self._share(target, context.seed, None if grams is None else next(grams))
            context.progress(number + 1, len(targets), f"share {target.where}")
            if isinstance(result, str):
                outcome.refuse(target.where, result)
            else:
                outcome.changes.append(result)
        return outcome

    def _share(self, target: Target, seed: int, gram: Gram | None = None) -> Change | str:
        """Share one weight; return what changed, or why nothing did."""
        values = target.read()
        bits = self.bits if target.override is None else int(target.override)
        if not all(np.isfinite(block).all() for block in blocks(values)):
            return "the weight has NaN or infinite values: they have no mean"
        matrix = values if self.rows is None else target.layer.matrix
        height = math.prod(matrix.shape[:-1]) if self.rows else 1
        rows = self.rows or 1
        books = math.ceil(height / rows)
        result: Array
        size = books * 2**bits * values.itemsize + math.ceil(values.size * bits / 8)
        if size >= values.nbytes:
            return f"codebook and indices would take {size} bytes, the weight takes {values.nbytes}"
        measured = gram is not None and gram.count > 0
        if self.entropy is not None:
            matrix = target.layer.matrix
            result, entries = self._coded(matrix, gram if measured else None, bits, seed)
        elif gram is not None and measured:
            matrix = target.layer.matrix
            found = share_by_output(
                matrix, gram, 2**bits, compensate=self.compensate, init=self.init, seed=seed
            )
            entries = 0 if found is None else int(np.unique(found).size)
            result = matrix if found is None else found
        else:
            result, entries = self._shared_rows(matrix, height, bits, seed)
        if not entries:
            return f"nothing to share: no more than {2**bits} distinct values already"
        error, power = squares(matrix, result)
        nonzeros = int(np.count_nonzero(values))
        by_layer = self.rows is not None or measured or self.entropy is not None
        target.write(target.layer.with_matrix(result) if by_layer else result)
        coded = (
            {} if self.entropy is None else {"entropy": entropy(np.unique(result, return_inverse=True)[1])}
        )
        return Change(
            where=target.where,
            what=f"shared {entries} values" + (f" for every {rows} rows" if self.rows else ""),
            weights=(target.weight,),
            bytes_before=values.nbytes,
            bytes_after=values.nbytes,
            nonzeros_before=nonzeros,
            nonzeros_after=int(np.count_nonzero(result)),
            detail={
                "bits": bits,
                "codebook": entries,
                "codebooks": books,
                "mse": error,
                "sqnr_db": 10 * (math.log10(power) - math.log10(error)),
                **coded,
            },
        )

    def _coded(self, matrix: Array, gram: Gram | None, bits: int, seed: int) -> tuple[Array, int]:
        """Return the values shared within the bits of `entropy`, and how many there are; 0: nothing to share."""
        assert self.entropy is not None
        weights = matrix.astype(np.float64)
        scale = scale_of(matrix)
        masses = np.ones(weights.shape) if gram is None else input_masses(gram, weights.shape)
        zero = self.reserve_zero or not weights.all()
        if (
            np.unique(weights).size <= 2**bits
            and entropy(np.unique(weights, return_inverse=True)[1]) <= self.entropy
        ):
            return matrix, 0
        code = entropy_code(
            scale * weights.reshape(-1),
            masses.reshape(-1),
            2**bits,
            self.entropy,
            zero=zero,
            init=self.init,
            seed=seed,
        )
        index = code.assign(scale * weights, masses)
        result = (code.values / scale).astype(matrix.dtype)[index]
        return result, int(np.unique(result).size)

    def _shared_rows(self, matrix: Array, height: int, bits: int, seed: int) -> tuple[Array, int]:
        """Return the values shared by every `rows` rows, and the entries of the largest codebook."""
        rows = self.rows or height
        result: Array = np.array(matrix, order="C").reshape(height, -1)
        entries = 0
        for start in range(0, height, rows):
            part = result[start : start + rows]
            shared = share_values(part, 2**bits, init=self.init, seed=seed, reserve_zero=self.reserve_zero)
            if shared is not None:
                part[...] = shared.values
                entries = max(entries, shared.codebook.size)
        return result.reshape(matrix.shape), entries
