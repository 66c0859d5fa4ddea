"""What every pass promises, checked on every pass."""

import inspect

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from random_graphs import models, random_feeds

from onnxslim_lab.base import Context
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes import PASSES

NOTHING_TO_DO = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }"""
EXACT = [kind for kind in PASSES if kind.exact]
each = pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.pass_name())


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


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
    graph = Graph.load(model)
    before = graph.to_model().SerializeToString()
    outcome = kind().run(graph, Context())
    assert outcome.changes == []
    assert graph.to_model().SerializeToString() == before


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.pass_name())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=models())
def test_exact_passes_keep_outputs_and_settle(kind, model):
    source = model.SerializeToString()
    graph = Graph.load(model)
    kind().run(graph, Context())
    assert model.SerializeToString() == source, "the caller's model was changed"
    result = graph.to_model()
    onnx.checker.check_model(result, full_check=False)
    assert [v.name for v in result.graph.input] == [v.name for v in model.graph.input]
    assert [v.name for v in result.graph.output] == [v.name for v in model.graph.output]
    names = [node.name for node in result.graph.node if node.name]
    assert len(names) == len(set(names))
    feeds = random_feeds(model)
    for left, right in zip(run(model, feeds), run(result, feeds), strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    again = Graph.load(result)
    outcome = kind().run(again, Context())
    assert outcome.changes == [], outcome.changes
