"""Second opinion: the same model on onnxruntime and on the NumPy runtime, which share no code."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim_lab.divergence import first_divergence
from onnxslim_lab.errors import LabError
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.judging import judge
from onnxslim_lab.metrics import Feed, compare_outputs
from onnxslim_lab.precision.rounding import rounding_explains
from onnxslim_lab.quantization.weight_opinion import rounded_inputs_explain
from onnxslim_lab.report import Verdict
from onnxslim_lab.rewriting.signature import is_random
from onnxslim_lab.runtime import Interpreter, supports
from onnxslim_lab.segments import Judgement, hidden, judge_segments, quantizes
from onnxslim_lab.sessions import Runner

FEEDS = 2  # compared on both engines; the NumPy runtime is the slower one


def second_opinion(
    graph: Graph, feeds: Sequence[Feed], results: Sequence[Feed], runner: Runner, tolerance: float
) -> Verdict:
    """Return whether the NumPy runtime gives what onnxruntime gave.

    The outputs of a quantized model need not be equal: then its segments are compared, see `segments`.

    Args:
        graph: The model that gave the results.
        feeds: Its inputs; the first few are used.
        results: What onnxruntime gave for them.
        runner: Asked for intermediate values when the engines differ.
        tolerance: Largest relative difference.

    Returns:
        Passed; failed, with the first node that departs; or skipped, with the reason: operators that the
        NumPy runtime lacks, random numbers, or a kernel that refuses its inputs.
    """
    missing = supports(graph)
    if missing:
        return Verdict(status="skipped", reason=f"the NumPy runtime lacks {missing[0]}")
    nodes = ((part, node) for part in graph.walk() for node in part.nodes)
    if any(domain_of(node.domain) == "" and is_random(part, node) for part, node in nodes):
        return Verdict(status="skipped", reason="the model draws random numbers")
    used = list(feeds)[:FEEDS]
    given = list(results)[:FEEDS]
    try:
        interpreter = Interpreter(graph)
        mine = [interpreter.run(feed) for feed in used]
    except LabError as error:
        return Verdict(status="skipped", reason=f"the NumPy runtime could not run it: {error}")
    verdict = judge(compare_outputs(given, mine), tolerance)
    if verdict.status == "passed":
        return verdict.model_copy(update={"reason": "onnxruntime and the NumPy runtime agree"})
    rounding = rounding_explains(graph, compare_outputs(given, mine))
    if rounding:
        return verdict.model_copy(update={"status": "passed", "reason": rounding})
    agreed = rounded_inputs_explain(graph, used, given, mine, runner, tolerance)
    if agreed is not None:
        return agreed
    try:
        judgement = judge_segments(graph, used, runner, interpreter, tolerance)
    except LabError as error:
        reason = f"{verdict.reason}; the quantized segments could not be compared: {error}"
        return verdict.model_copy(update={"status": "skipped", "reason": reason})
    if judgement is not None:
        return _of_segments(verdict, judgement, tolerance, cascade(graph, given, mine))
    if hidden(graph):
        reason = f"{verdict.reason}, but its quantized values are in bodies or functions, out of reach"
        return verdict.model_copy(update={"status": "skipped", "reason": reason})
    try:
        found = first_divergence(graph, used, runner, tolerance)
    except LabError as error:
        found = None
        where = f"the node was not found: {error}"
    else:
        where = str(found) if found is not None else "no single node differs with optimizations off"
    return verdict.model_copy(update={"reason": f"the engines disagree, {verdict.reason}; {where}"})


def _of_segments(verdict: Verdict, judgement: Judgement, tolerance: float, outputs: str) -> Verdict:
    """Return the verdict on a quantized model whose outputs differ."""
    departures = [item for item in judgement.departures if not item.hidden]
    if departures:
        more = f"; {len(departures) - 1} more segments depart" if len(departures) > 1 else ""
        reason = f"the engines disagree: {departures[0]}{more}"
        return verdict.model_copy(update={"reason": reason})
    if judgement.departures:
        reason = f"a segment with bodies or functions that cannot be looked into: {judgement.departures[0]}"
        return verdict.model_copy(update={"status": "skipped", "reason": reason})
    after = judge(judgement.outputs, tolerance)
    if after.status != "passed":
        reason = f"the engines disagree after the last quantized values, which agree: {after.reason}"
        return verdict.model_copy(update={"reason": reason})
    reason = (
        f"every quantized segment agrees within one step ({judgement.compared} values);"
        f" outputs differ by {outputs} through cascading"
    )
    return verdict.model_copy(update={"status": "passed", "reason": reason})


def cascade(graph: Graph, given: Sequence[Feed], mine: Sequence[Feed]) -> str:
    """Return how far the outputs are apart: "3 steps", or a relative difference where they have no steps."""
    steps, relative = 0, 0.0
    for error in compare_outputs(list(given), list(mine)):
        size = _step(graph, error.name)
        if size:
            steps = max(steps, round(error.max_abs / size))
        else:
            relative = max(relative, error.relative)
    texts = [f"{steps} step{'s' * (steps > 1)}"] * (steps > 0) + [f"{relative:.1e}"] * (relative > 0)
    return " and ".join(texts)


def _step(graph: Graph, output: str) -> float:
    """Return the step of an output: 1 of a quantized one, the scale of a dequantized one, 0 of others."""
    maker = graph.producer(output)
    if maker is not None and maker.op_type == "DequantizeLinear":
        scale = graph.constant(maker.input[1])
        return 0.0 if scale is None or scale.size != 1 else float(scale.reshape(()))
    return float(maker is not None and quantizes(maker))
