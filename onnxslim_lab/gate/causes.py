"""Why outputs went wrong: swapped outputs, overflow, a changed weight, a saturating layer, else where it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxslim_lab.compare import first_divergence
from onnxslim_lab.errors import LabError, quote
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.graph import Graph
from onnxslim_lab.layers import find_layers
from onnxslim_lab.metrics import Feed, OutputError, compare_outputs, flatten

LARGE = 0.1  # relative difference at which an error has plainly begun
_CHUNK = 32  # values asked for at a time
_FEEDS = 4  # looked into
_SATURATED = 0.02  # share of codes at an end of their range, where zero is not
_WEIGHT = 1e-2  # relative change of a single weight that rounding does not explain


@dataclass(frozen=True)
class Found:
    """A cause in words, and the nodes, values or weights it names."""

    what: str
    where: tuple[str, ...] = ()


def explain(subject: Subject) -> Found | None:
    """Return the cause of wrong outputs; None when nothing stands out.

    The candidate must have run. It is looked for once.
    """
    if not subject.explained:
        subject.explained.append(_explain(subject))
    found: Found | None = subject.explained[0]
    return found


def _explain(subject: Subject) -> Found | None:
    overflow = first_nonfinite(subject)
    if overflow is not None:
        return overflow
    swapped = find_swapped(subject.reference, subject.result, subject.errors)
    if swapped is not None:
        return swapped
    saturated = find_saturated(subject)
    if saturated is not None:
        return saturated
    return first_departure(subject)


def nonfinite(outputs: Sequence[Feed]) -> tuple[str, int, int, int] | None:
    """Return output, first sample (feed), such samples, and values of the first output with NaN or Inf."""
    found: dict[str, list[tuple[int, int]]] = {}
    for index, feed in enumerate(outputs):
        for name, value in feed.items():
            bad = sum(_bad(array) for _, _, array in flatten(value) if array is not None)
            if bad:
                found.setdefault(name, []).append((index, bad))
    for name, places in found.items():
        return name, places[0][0], len(places), sum(count for _, count in places)
    return None


def _bad(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    """Count values that are NaN or infinite."""
    if array.dtype.kind not in "fcV" or "int" in array.dtype.name:
        return 0
    wide = array if array.dtype.kind in "fc" else array.astype(np.float32)
    return int(np.count_nonzero(~np.isfinite(wide)))


def first_nonfinite(subject: Subject) -> Found | None:
    """Return where the candidate's first NaN or Inf arises, where the baseline has none."""
    bad = nonfinite(subject.result)
    if bad is None or nonfinite(subject.reference) is not None:
        return None
    output, sample, samples, values = bad
    weights = [
        name
        for graph in subject.candidate.walk()
        for name in graph.initializers
        if (array := graph.constant(name)) is not None and _bad(array)
    ]
    start = f"output {quote(output)} has {values} NaN or Inf in {samples} of {len(subject.result)} samples"
    start += f", first in sample {sample}"
    if weights:
        return Found(f"{start}; weight {quote(weights[0])} holds NaN or Inf", tuple(weights[:4]))
    for node, name, found in _values(subject.candidate, subject, [subject.feeds[sample]]):
        if _bad(found):
            kind = "NaN" if np.isnan(found.astype(np.float64)).any() else "Inf"
            cause = f"{start}; it arises as {kind} in value {quote(name)}, made by {_named(node)}"
            if found.dtype == np.float16:
                cause += ": float16 ends at 65504"
            return Found(cause, (node.name or name,))
    return Found(start, (output,))


def poisoned_weight(subject: Subject) -> Found | None:
    """Return the candidate's first layer whose weight holds NaN or Inf, where no layer of the baseline does."""
    if next(_poisoned(subject.baseline), None) is not None:
        return None
    return next(_poisoned(subject.candidate), None)


def _poisoned(model: Graph) -> Iterator[Found]:
    for graph in model.walk():
        for layer in find_layers(graph)[0]:
            array = layer.weight_graph.constant(layer.weight)
            if array is not None and (count := _bad(array)):
                what = (
                    f"weight {quote(layer.weight)} of {_named(layer.node)} holds NaN or Inf in {count} values"
                )
                yield Found(what, (layer.weight,))


def _values(
    graph: Graph, subject: Subject, feeds: Sequence[Feed]
) -> Iterator[tuple[NodeProto, str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]]:
    """Yield the arrays of the main graph's values in topological order, for the first feed."""
    made = [(node, name) for node in graph.nodes for name in node.output if name]
    for start in range(0, len(made), _CHUNK):
        part = made[start : start + _CHUNK]
        try:
            outputs = subject.runner.run(graph, feeds, outputs=[name for _, name in part], optimization="off")
        except LabError:  # a value that cannot be an output, such as one of unknown type
            continue
        for node, name in part:
            array = outputs[0].get(name)
            if isinstance(array, np.ndarray):
                yield node, name, array


def find_swapped(
    reference: Sequence[Feed], result: Sequence[Feed], errors: dict[str, OutputError]
) -> Found | None:
    """Return two outputs that give what the other one should."""
    wrong = [name for name, error in errors.items() if error.structure or error.relative > LARGE]
    for index, first in enumerate(wrong):
        for second in wrong[index + 1 :]:
            if first not in result[0] or second not in result[0]:
                continue
            crossed = [{first: feed[second], second: feed[first]} for feed in result]
            straight = [{first: feed[first], second: feed[second]} for feed in reference]
            if all(e.relative <= LARGE and not e.structure for e in compare_outputs(straight, crossed)):
                names = f"{quote(first)} and {quote(second)}"
                return Found(
                    f"outputs {names} are swapped: each gives what the other should", (first, second)
                )
    return None


def find_saturated(subject: Subject) -> Found | None:
    """Return the quantized value with the largest share of codes at an end of their range."""
    worst: tuple[float, NodeProto, str] | None = None
    makers = ("QuantizeLinear", "QLinearConv", "QLinearMatMul", "QLinearAdd", "QGemm")
    if not any(node.op_type in makers for node in subject.candidate.nodes):
        return None
    for node, name, codes in _values(subject.candidate, subject, subject.feeds[:1]):
        if node.op_type not in makers or codes.dtype.name not in ("int8", "uint8") or not codes.size:
            continue
        limits = np.iinfo(np.int8 if codes.dtype == np.int8 else np.uint8)
        zero = _zero_point(subject.candidate, node, codes.dtype)
        ends = [end for end in (limits.min, limits.max) if end != zero]  # a Relu rests on its zero
        share = max((float(np.mean(codes == end)) for end in ends), default=0.0)
        if share > _SATURATED and (worst is None or share > worst[0]):
            worst = (share, node, name)
    if worst is None:
        return None
    share, node, name = worst
    layer = subject.candidate.producer(node.input[0]) if node.op_type == "QuantizeLinear" else node
    what = f"value {quote(name)} saturates: {share:.0%} of its codes are at the end of their range"
    return Found(f"{what}; it is the output of {_named(layer or node)}", ((layer or node).name or name,))


def _zero_point(graph: Graph, node: NodeProto, dtype: np.dtype[np.generic]) -> int:
    slots = {"QuantizeLinear": 2, "QLinearConv": 7, "QLinearMatMul": 7, "QLinearAdd": 7, "QGemm": 8}
    slot = slots[node.op_type]
    found = graph.constant(node.input[slot]) if len(node.input) > slot and node.input[slot] else None
    return int(found.reshape(-1)[0]) if found is not None and found.size and found.dtype == dtype else 0


def first_departure(subject: Subject) -> Found | None:
    """Return the first value with a plain error, and its weight where that was changed."""
    feeds = subject.feeds[:_FEEDS]
    try:
        found = first_divergence(subject.baseline, subject.candidate, feeds, subject.runner, LARGE)
    except LabError:
        return None
    if found is None:
        return None
    what = f"the error begins at value {quote(found.value)}, made by {quote(found.node)} ({found.op_type})"
    what += f": relative difference {found.relative:.2g}"
    node = subject.candidate.producer(found.value)
    weight = changed_weight(subject.baseline, subject.candidate, node) if node is not None else None
    if weight is None:
        return Found(what, (found.node or found.value,))
    return Found(f"{what}; {weight.what}", (found.node or found.value, *weight.where))


def changed_weight(baseline: Graph, candidate: Graph, node: NodeProto) -> Found | None:
    """Return the weight of a node that is not the baseline's of the same name, and by how much."""
    for name in node.input:
        new, old = candidate.constant(name), baseline.constant(name)
        if (
            new is None
            or old is None
            or new.shape != old.shape
            or new.dtype.kind != "f"
            or old.dtype.kind != "f"
        ):
            continue
        gap = np.abs(new.astype(np.float64) - old.astype(np.float64))
        peak = float(np.abs(old.astype(np.float64)).max(initial=0.0))
        far = gap > _WEIGHT * peak
        if far.any():
            place = np.unravel_index(int(gap.argmax()), gap.shape)
            at = ", ".join(str(int(i)) for i in place)
            what = (
                f"weight {quote(name)} differs from the baseline's in {int(far.sum())} of {gap.size} values, most "
                f"at [{at}]: {float(old[place]):.4g} became {float(new[place]):.4g}"
            )
            return Found(what, (name,))
    return None


def _named(node: NodeProto) -> str:
    return f"{quote(node.name or next(filter(None, node.output), ''))} ({node.op_type})"
