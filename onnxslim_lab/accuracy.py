"""Task metrics on lists of outputs: agreement, top-k, and functions of the user's own.

Each gives one number per sample where it can, so that results can be compared in pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from onnxslim_lab.errors import DataError, ParameterError, quote, suggest
from onnxslim_lab.metrics import Feed, flatten
from onnxslim_lab.user_code import is_function_spec, load_function
from onnxslim_lab.worker.messages import Array

Hits = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]

METRICS = ("agreement", "top1", "top5")
"""Built-in metrics; top1 to top999 all work. `name@output` picks an output."""


def scores(outputs: Sequence[Feed], output: str | None = None) -> Float64:
    """Return the class scores of one output as (decisions, classes), feeds one after the other.

    Scores lie along the last axis; a list of maps (ZipMap) gives one row for each map.

    Args:
        outputs: One dict for each feed.
        output: Which output; None for the first that has scores for more than one class.

    Raises:
        ParameterError: No such output, or none that has scores.
    """
    if not outputs:
        raise DataError("there are no outputs to judge")
    names = list(outputs[0])
    if output is not None and output not in names:
        raise ParameterError(f"no output {quote(output)}{suggest(output, names)}")
    for name in [output] if output is not None else names:
        rows = [_rows(feed.get(name)) for feed in outputs]
        if all(r is not None and r.shape[1] > 1 for r in rows):
            found = cast("list[Float64]", rows)
            if len({r.shape[1] for r in found}) == 1:
                return np.concatenate(found)
    where = f"output {quote(output)}" if output else "none of the outputs"
    raise ParameterError(
        f"{where} {'has no' if output else 'has'} scores for two or more classes along the last axis; "
        "name an output as metric@output or use your own metric as module:function"
    )


def _rows(value: Any) -> Float64 | None:
    """Return one value as rows of scores; None when it holds none."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        keys = sorted(value[0], key=str)
        if any(item.keys() != value[0].keys() for item in value):
            return None
        return np.array([[float(item[key]) for key in keys] for item in value])
    if not isinstance(value, np.ndarray) or value.dtype.kind in "OUSbiu" or value.ndim < 2:
        return None
    return value.reshape(-1, value.shape[-1]).astype(np.float64)


def agreement(reference: Sequence[Feed], result: Sequence[Feed], output: str | None = None) -> Hits:
    """Return, decision by decision, whether both results prefer the same class.

    A decision with a NaN on either side does not agree. Without class scores, integer or string
    outputs (labels of a scikit-learn model) must be equal.
    """
    try:
        a, b = scores(reference, output), scores(result, output)
    except ParameterError:
        left, right = _labels(reference, output), _labels(result, output)
        if left is None or right is None or left.shape != right.shape:
            raise
        return np.asarray(left == right, dtype=np.bool_)
    if a.shape != b.shape:
        raise DataError(f"scores of shape {a.shape} cannot agree with scores of shape {b.shape}")
    sound = ~(np.isnan(a).any(axis=1) | np.isnan(b).any(axis=1))
    return np.asarray((a.argmax(axis=1) == b.argmax(axis=1)) & sound, dtype=np.bool_)


def _labels(outputs: Sequence[Feed], output: str | None) -> Array | None:
    """Return the integer or string labels of the first output that is such, as one vector."""
    for name in outputs[0] if output is None else [output]:
        leaves = [array for feed in outputs for _, _, array in flatten(feed.get(name))]
        if leaves and all(a is not None and a.dtype.kind in "iuOU" for a in leaves):
            return np.concatenate([np.ravel(cast("Array", a)) for a in leaves])
    return None


def topk(outputs: Sequence[Feed], labels: Array, k: int = 1, output: str | None = None) -> Hits:
    """Return, sample by sample, whether the label is among the k best scores.

    Ties are broken as argmax does, by the lower index; NaN scores miss.

    Args:
        outputs: One dict for each feed, scores (batch, classes).
        labels: Class indices, one for each decision.
        k: How many classes may be named.
        output: Which output; None for the first with scores.
    """
    table = scores(outputs, output)
    wanted = np.asarray(labels).reshape(-1)
    if wanted.dtype.kind not in "iu":
        raise DataError(f"top-{k} needs class indices as labels, not {wanted.dtype}")
    if len(wanted) != len(table):
        raise DataError(f"there are {len(wanted)} labels for {len(table)} decisions")
    classes = table.shape[1]
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= classes):
        raise DataError(
            f"labels range from {wanted.min()} to {wanted.max()}; the model has {classes} classes"
        )
    own = np.take_along_axis(table, wanted[:, None].astype(np.int64), axis=1)
    earlier = np.arange(classes) < wanted[:, None]
    rank = ((table > own) | ((table == own) & earlier)).sum(axis=1)
    return np.asarray((rank < k) & ~np.isnan(table).any(axis=1), dtype=np.bool_)


@dataclass(frozen=True)
class Metric:
    """A metric by its name on the command line.

    Attributes:
        name: As given.
        paired: Whether it compares with a reference (agreement).
        measure: (outputs, labels, reference) -> one number, or one for each sample.
        proportion: Whether the samples are right or wrong.
    """

    name: str
    paired: bool
    proportion: bool
    measure: Callable[[Sequence[Feed], Array | None, Sequence[Feed] | None], Float64 | float]


def find_metric(name: str) -> Metric:
    """Return the metric of a name: agreement, top1, top5, name@output, or module:function.

    Raises:
        ParameterError: There is no such metric or function.
    """
    base, at, output = name.partition("@")
    target = output if at else None
    top = re.fullmatch(r"top-?([1-9]\d{0,2})", base)
    if top:
        k = int(top.group(1))

        def measure_top(outputs: Sequence[Feed], labels: Array | None, _: Any) -> Float64:
            if labels is None:
                raise DataError(f"metric {name} needs labels; the data has none")
            return topk(outputs, labels, k, target).astype(np.float64)

        return Metric(name, paired=False, proportion=True, measure=measure_top)
    if base == "agreement":

        def measure_agreement(outputs: Sequence[Feed], _: Any, reference: Sequence[Feed] | None) -> Float64:
            if reference is None:
                raise ParameterError("metric agreement compares two models; there is no reference here")
            return agreement(reference, outputs, target).astype(np.float64)

        return Metric(name, paired=True, proportion=True, measure=measure_agreement)
    if is_function_spec(name):
        function = load_function(name, ParameterError)

        def measure_own(outputs: Sequence[Feed], labels: Array | None, _: Any) -> Float64 | float:
            return _numbers(name, function(list(outputs), labels))

        return Metric(name, paired=False, proportion=False, measure=measure_own)
    raise ParameterError(f"no metric {quote(name)}{suggest(base, METRICS)} (or your own as module:function)")


def _numbers(name: str, value: Any) -> Float64 | float:
    """Check what a user's metric returned: one finite number, or a vector of them."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim > 1 or not array.size:
        raise DataError(
            f"metric {quote(name)} must return a number or one for each sample, not {value!r:.80}"
        )
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise DataError(f"metric {quote(name)} returned {bad} values that are NaN or infinite")
    return array if array.ndim else float(array)


def mean(values: Float64) -> float:
    """Return the exact mean of a vector."""
    return math.fsum(values.tolist()) / len(values)
