"""Exact passes on random graphs: same outputs, a second run changes nothing, the result is valid."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from passes_helper import assert_equal_outputs, assert_settled, random_feed, runner
from random_graphs import models

from onnxslim_lab.base import Pass
from onnxslim_lab.errors import SessionError
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.cancel_transposes import CancelTransposes
from onnxslim_lab.passes.deduplicate import Deduplicate
from onnxslim_lab.passes.eliminate_dead import EliminateDead
from onnxslim_lab.passes.eliminate_identity import EliminateIdentity
from onnxslim_lab.passes.inline_constant_if import InlineConstantIf

STEPS: tuple[Pass, ...] = (
    EliminateIdentity(),
    EliminateDead(),
    Deduplicate(),
    InlineConstantIf(),
    CancelTransposes(),
)
QUICK = settings(
    max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def count(graph: Graph) -> int:
    return sum(node.op_type != "Constant" for part in graph.walk() for node in part.nodes)


def runs(graph: Graph) -> bool:
    """Whether onnxruntime runs a model: 1.31 frees what a Cast to the same type hands to a body."""
    try:
        runner().run(graph, [random_feed(graph, seed, {}) for seed in (0, 1)], optimization="off")
    except SessionError as error:
        if "Missing Input" not in str(error) and "(null)" not in str(error):
            raise
        return False
    return True


def verify(original: Graph, step: Pass) -> Graph:
    graph = original.copy()
    before = graph.version
    outcome = step.run(graph)
    assert bool(outcome.changes) == (graph.version != before)
    onnx.checker.check_model(graph.to_model(), full_check=True)
    assert_settled(step, graph)
    assert (graph.inputs, graph.outputs) == (original.inputs, original.outputs)
    if runs(original):
        assert_equal_outputs(original, graph)
    return graph


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.pass_name())
@QUICK
@given(model=models())
def test_exact(step: Pass, model: onnx.ModelProto) -> None:
    original = Graph.load(model)
    graph = verify(original, step)
    if not isinstance(step, InlineConstantIf):
        assert count(graph) <= count(original)


@QUICK
@given(model=models(most=18), order=st.permutations(STEPS))
def test_any_order(model: onnx.ModelProto, order: list[Pass]) -> None:
    graph = Graph.load(model)
    for step in order:
        graph = verify(graph, step)
