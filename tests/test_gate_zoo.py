"""What is wrong with a candidate is caught on larger real models too: a text encoder and an image classifier."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_gate_models import edited, judge, verdicts, weight

from onnxslim_lab import Dataset
from onnxslim_lab.engine import optimize
from onnxslim_lab.sessions import Runner

FEEDS = 32  # least samples are 30
ENCODER, CLASSIFIER = "vital_minilm_l3", "efficientnet_lite0"
MODELS = (ENCODER, CLASSIFIER)
OUTPUT = {ENCODER: "461", CLASSIFIER: "logits"}  # the sentence's embedding; the scores
LIMITS = {"output_error": [{"output": "*", "relative": 0.05}], "finite": True, "signature": True}
pytestmark = pytest.mark.zoo


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def fed(zoo_feeds):
    made = {}

    def feeds(name):
        if name not in made:
            made[name] = zoo_feeds(name, FEEDS, 5)
        return made[name]

    return feeds


def key(name, figure="relative"):
    return f"output_error.{OUTPUT[name]}.{figure}"


@pytest.mark.parametrize("name", MODELS)
def test_swapped_outputs(zoo, fed, runner, tmp_path, name):
    first = OUTPUT[name]
    ending = {"axis": 1, "p": 2} if name == ENCODER else {"axis": 1}
    operator = "LpNormalization" if name == ENCODER else "Softmax"

    def two(model):
        model.graph.node.append(helper.make_node(operator, [first], ["normal"], "normalize", **ending))
        value = next(output for output in model.graph.output if output.name == first)
        added = model.graph.output.add()
        added.CopyFrom(value)
        added.name = "normal"

    def swap(model):
        last = model.graph.node[-1]
        for node in model.graph.node:
            node.output[:] = ["raw" if value == first else value for value in node.output]
            node.input[:] = ["raw" if value == first else value for value in node.input]
        last.output[0] = first
        model.graph.node.append(helper.make_node("Identity", ["raw"], ["normal"], "tail"))

    baseline = edited(zoo(name), tmp_path / "two.onnx", two)
    report = judge(
        edited(baseline, tmp_path / "bad.onnx", swap), baseline, Dataset(fed(name)), runner, **LIMITS
    )
    wrong = verdicts(report)[key(name)]
    assert report.exit_code == 13
    assert f"outputs '{first}' and 'normal' are swapped" in wrong.cause
    assert wrong.where == (first, "normal")


@pytest.mark.parametrize("name", MODELS)
def test_changed_input_name(zoo, fed, runner, tmp_path, name):
    old = next(iter(fed(name)[0]))

    def rename(model):
        next(value for value in model.graph.input if value.name == old).name = "renamed"
        for node in model.graph.node:
            node.input[:] = ["renamed" if value == old else value for value in node.input]

    bad = edited(zoo(name), tmp_path / "bad.onnx", rename)
    report = judge(bad, zoo(name), Dataset(fed(name)), runner, **LIMITS)
    found = verdicts(report)
    assert report.exit_code == 10
    assert "the candidate's input 'renamed' is not the baseline's" in found["runs"].cause
    assert f"input '{old}' is gone (a new one is 'renamed')" in found["signature"].cause


POISONED = {ENCODER: ("onnx::MatMul_474", (7, 9)), CLASSIFIER: ("onnx::Conv_920", (5, 3, 0, 0))}


@pytest.mark.parametrize("value", [60.0, np.inf])
@pytest.mark.parametrize("name", MODELS)
def test_one_poisoned_weight(zoo, fed, runner, tmp_path, name, value):
    tensor_name, place = POISONED[name]

    def poison(model):
        tensor = weight(model, tensor_name)
        array = numpy_helper.to_array(tensor).copy()
        array[place] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    bad = edited(zoo(name), tmp_path / "bad.onnx", poison)
    report = judge(bad, zoo(name), Dataset(fed(name)), runner, **LIMITS)
    found = verdicts(report)
    if np.isinf(value):
        assert report.exit_code == 12
        assert (
            f"weight '{tensor_name}' " in found["finite"].cause
        )  # Clip hides it from the classifier's outputs
        assert "holds NaN or Inf" in found["finite"].cause
        return
    at = ", ".join(map(str, place))
    assert report.exit_code == 13
    assert f"weight '{tensor_name}' differs from the baseline's in 1 of " in found[key(name)].cause
    assert f"most at [{at}]" in found[key(name)].cause
    assert "became 60" in found[key(name)].cause


def test_float16_overflow_on_one_sample_of_an_image_classifier(zoo, fed, runner, tmp_path):
    feeds = [dict(feed) for feed in fed(CLASSIFIER)]
    half = halved(zoo(CLASSIFIER), feeds[:2], runner, tmp_path)
    assert judge(half, zoo(CLASSIFIER), Dataset(feeds), runner, finite=True).passed
    feeds[17]["x"] = feeds[17]["x"] * np.float32(3e4)
    overflows(judge(half, zoo(CLASSIFIER), Dataset(feeds), runner, finite=True))


def test_float16_overflow_of_one_rare_word(zoo, fed, runner, tmp_path):
    """A word's embedding is large, which float32 normalizes away: in float16 the one sample with it overflows."""
    table = "model.0.auto_model.embeddings.word_embeddings.weight"
    feeds = fed(ENCODER)
    common = {int(word) for index, feed in enumerate(feeds) if index != 17 for word in feed["input_ids"].flat}
    rare = next(int(word) for word in feeds[17]["input_ids"].flat if int(word) not in common)

    def enlarge(model):
        tensor = weight(model, table)
        array = numpy_helper.to_array(tensor).copy()
        array[rare] *= 3e6
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    def halve(model):
        place, node = next((i, node) for i, node in enumerate(model.graph.node) if table in node.input)
        end, node.output[0] = node.output[0], "wide"
        casts = [("wide", "half", TensorProto.FLOAT16), ("half", end, TensorProto.FLOAT)]
        for step, (old, new, to) in enumerate(casts, 1):
            model.graph.node.insert(place + step, helper.make_node("Cast", [old], [new], new, to=to))

    baseline = edited(zoo(ENCODER), tmp_path / "rare.onnx", enlarge)
    half = edited(baseline, tmp_path / "half.onnx", halve)
    overflows(judge(half, baseline, Dataset(feeds), runner, finite=True))


def halved(baseline, feeds, runner, folder):
    steps = ["convert-precision:compute=half"]
    made = optimize(baseline, folder / "half.onnx", steps=steps, data=Dataset(feeds), runner=runner)
    return made.files.paths[0]


def overflows(report):
    wrong = verdicts(report)["finite"]
    assert report.exit_code == 12
    assert f"in 1 of {FEEDS} samples, first in sample 17" in wrong.cause
    assert "float16 ends at 65504" in wrong.cause


LAYER = {ENCODER: "*layer.1/intermediate/dense/MatMul", CLASSIFIER: "/_blocks.3/_project_conv/Conv"}


@pytest.mark.parametrize("name", MODELS)
def test_a_saturating_int8_layer(zoo, fed, runner, tmp_path, name):
    step = f'quantize:include=["{LAYER[name]}"],ranges=minmax,rounding=nearest,format=qdq'
    data = Dataset(fed(name)[:4])
    made = optimize(zoo(name), tmp_path / "int8.onnx", steps=[step], data=data, runner=runner)
    good = made.files.paths[0]
    limits = {"output_error": [{"output": OUTPUT[name], "sqnr_db": 12.0}]}
    assert judge(good, zoo(name), Dataset(fed(name)), runner, **limits).passed
    narrowed = []

    def narrow(model):
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                tensor = weight(model, node.input[1])
                array = np.asarray(numpy_helper.to_array(tensor) * 0.02).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
                narrowed.append(node)

    bad = edited(good, tmp_path / "bad.onnx", narrow)
    wrong = verdicts(judge(bad, zoo(name), Dataset(fed(name)), runner, **limits))[key(name, "sqnr_db")]
    assert narrowed
    assert wrong.status == "fail"
    assert "of its codes are at the end of their range" in wrong.cause
    makers = {value: node.name for node in onnx.load(good).graph.node for value in node.output}
    named = {makers.get(node.input[0], node.name) or node.output[0] for node in narrowed}
    assert named & set(wrong.where)


@pytest.mark.parametrize("name", MODELS)
def test_a_slower_graph(zoo, fed, runner, tmp_path, name):
    width = {ENCODER: 384, CLASSIFIER: 1000}[name]

    def slow(model):
        end = OUTPUT[name]
        for node in model.graph.node:
            node.output[:] = ["slow0" if value == end else value for value in node.output]
            node.input[:] = ["slow0" if value == end else value for value in node.input]
        model.graph.initializer.append(numpy_helper.from_array(np.eye(width, dtype=np.float32), "eye"))
        count = {ENCODER: 900, CLASSIFIER: 150}[name]
        for index in range(count):
            after = end if index == count - 1 else f"slow{index + 1}"
            model.graph.node.append(helper.make_node("MatMul", [f"slow{index}", "eye"], [after], f"s{index}"))

    bad = edited(zoo(name), tmp_path / "bad.onnx", slow)
    budgets = {"output_error": [{"relative": 1e-3}], "latency": {"ratio": 1.2, "pairs": 20}}
    report = judge(bad, zoo(name), Dataset(fed(name)), runner, **budgets)
    found = verdicts(report)
    wrong = found["latency.ratio"]
    assert found[key(name)].status == "pass"
    assert report.exit_code == 16, wrong.cause
    assert wrong.observed > wrong.bound > 1.2
    assert "MatMul: " in wrong.cause


@pytest.mark.parametrize(("name", "macs"), [(ENCODER, 84_934_656), (CLASSIFIER, 385_187_552)])
def test_multiply_accumulates_where_sizes_are_computed(zoo, fed, runner, tmp_path, name, macs):
    """Sequence lengths and paddings that the graph computes are those of the data."""
    same = edited(zoo(name), tmp_path / "same.onnx")
    found = verdicts(judge(same, zoo(name), Dataset(fed(name)[:1]), runner, macs=macs))["macs"]
    assert (found.status, found.observed) == ("pass", macs)
