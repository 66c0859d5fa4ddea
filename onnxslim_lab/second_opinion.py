"""Second opinion: the same model on onnxruntime and on the NumPy runtime, which share no code."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim_lab.divergence import first_divergence
from onnxslim_lab.errors import LabError
from onnxslim_lab.graph import Graph, domain_of
from onnxslim_lab.judging import judge
from onnxslim_lab.metrics import Feed, compare_outputs
from onnxslim_lab.report import Verdict
from onnxslim_lab.rewriting.signature import is_random
from onnxslim_lab.runtime import Interpreter, supports
from onnxslim_lab.sessions import Runner

FEEDS = 2  # compared on both engines; the NumPy runtime is the slower one


def second_opinion(
    graph: Graph, feeds: Sequence[Feed], results: Sequence[Feed], runner: Runner, tolerance: float
) -> Verdict:
    """Return whether the NumPy runtime gives what onnxruntime gave.

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
    try:
        interpreter = Interpreter(graph)
        mine = [interpreter.run(feed) for feed in used]
    except LabError as error:
        return Verdict(status="skipped", reason=f"the NumPy runtime could not run it: {error}")
    verdict = judge(compare_outputs(list(results)[:FEEDS], mine), tolerance)
    if verdict.status == "passed":
        return verdict.model_copy(update={"reason": "onnxruntime and the NumPy runtime agree"})
    try:
        found = first_divergence(graph, used, runner, tolerance)
    except LabError as error:
        found = None
        where = f"the node was not found: {error}"
    else:
        where = str(found) if found is not None else "no single node differs with optimizations off"
    return verdict.model_copy(update={"reason": f"the engines disagree, {verdict.reason}; {where}"})
