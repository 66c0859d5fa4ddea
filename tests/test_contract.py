"""What every pass promises, checked on every pass."""

import inspect

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from passes_helper import assert_equal_outputs, assert_settled, runner
from random_graphs import models
from test_random_graphs import runs

from onnxslim_lab.base import Context
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.random_data import random_data
from onnxslim_lab.passes import PASSES
from onnxslim_lab.statistics import Calibration

NOTHING_TO_DO = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }"""
EXACT = [kind for kind in PASSES if kind.exact]
each = pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.pass_name())


@each
def test_names_agree(kind):
    assert kind.pass_name() == kind.__module__.rpartition(".")[2].replace("_", "-")
    assert PASSES.count(kind) == 1


@each
def test_docstring_says_before_after_and_refusals(kind):
    text = inspect.getdoc(kind)
    for word in ("before", "after", "refuses"):
        assert f"{word}:" in text.lower(), f"{kind.__name__} has no '{word}:'"
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.__name__}.{name} has no description"


@each
def test_nothing_to_do_changes_no_byte(kind):
    model = onnx.parser.parse_model(NOTHING_TO_DO)
    for node in model.graph.node:
        node.ClearField("domain")  # the parser writes it where it is empty, which is something to strip
    graph = Graph.load(model)
    before = graph.to_model().SerializeToString()
    outcome = kind().run(graph, Context())
    assert outcome.changes == []
    assert graph.to_model().SerializeToString() == before


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.pass_name())
@settings(
    max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(model=models(stepped=False))
def test_exact_passes_keep_outputs_and_settle(kind, model):
    source = model.SerializeToString()
    original = Graph.load(model)
    graph = original.copy()
    kind().run(graph, Context())
    assert model.SerializeToString() == source, "the caller's model was changed"
    result = graph.to_model()
    onnx.checker.check_model(result)
    assert result.graph.input == model.graph.input
    assert result.graph.output == model.graph.output
    names = [node.name for node in result.graph.node if node.name]
    assert len(names) == len(set(names))
    assert_settled(kind(), graph)
    if runs(original):
        assert_equal_outputs(original, graph, relative=1e-4)


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.pass_name())
@settings(
    max_examples=5, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(model=models())
def test_every_result_is_valid_and_loads(kind, model):
    graph = Graph.load(model)
    loads = runs(graph)
    step = kind()
    context = Context(original=graph.copy())
    if step.needs_calibration:
        if not loads:
            return  # there is nothing to measure
        context.calibration = Calibration(runner(), random_data(graph, samples=2))
    step.run(graph, context)
    onnx.checker.check_model(graph.to_model())
    if loads:
        runner().load_seconds(graph, optimization="off")
