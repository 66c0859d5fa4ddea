"""The gate on real models: what is wrong with a candidate is caught, and the cause is named."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxslim_lab import Dataset
from onnxslim_lab.engine import optimize
from onnxslim_lab.errors import DataError, ParameterError
from onnxslim_lab.gate.config import GateConfig
from onnxslim_lab.gate.lock import Lock, LockError
from onnxslim_lab.gate.run import run_gate
from onnxslim_lab.sessions import Runner

SAMPLES = 200


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def digits():
    import zoo as models
    from conftest import real

    _, _, images, labels = real(models.mnist)
    feeds = [{"x": (image[None, None] / 255).astype(np.float32)} for image in images[:SAMPLES]]
    return Dataset(feeds, labels[:SAMPLES].astype(np.int64), "mnist")


@pytest.fixture(scope="module")
def lenet(zoo, tmp_path_factory):
    """LeNet-5 with a second output, the probabilities."""
    model = onnx.load(zoo("lenet5"))
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], "softmax", axis=1))
    model.graph.output.append(helper.make_tensor_value_info("probabilities", 1, ["batch", 10]))
    return _saved(model, tmp_path_factory.mktemp("lenet") / "lenet.onnx")


def _saved(model, path):
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def judge(candidate, baseline, data, runner, **budgets):
    return run_gate(candidate, baseline, GateConfig.parse({"budgets": budgets}), data=data, runner=runner)


def verdicts(report):
    return {item.budget: item for item in report.budgets}


def edited(path, target, edit=None):
    model = onnx.load(path)
    if edit:
        edit(model)
    return _saved(model, target)


def weight(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


QUALITY = {
    "metrics": [{"name": "top1", "drop": 0.02}],
    "agreement": {"least": 0.97},
    "output_error": [{"output": "*", "relative": 0.05}],
    "finite": True,
    "signature": True,
    "dynamic_axes": True,
}


def test_a_good_candidate_passes(lenet, digits, runner, tmp_path):
    good = optimize(lenet, tmp_path / "good.onnx", steps=["simplify", "encode"], runner=runner).files.paths[0]
    report = judge(good, lenet, digits, runner, **QUALITY, engines_agree=True, file_ratio=1.0, real_data=True)
    assert report.passed, [item.cause for item in report.budgets if item.status != "pass"]
    found = verdicts(report)
    assert found["metrics.top1.drop"].observed == 0
    assert 0.01 < found["metrics.top1.drop"].bound <= 0.02
    assert found["agreement.least"].samples == SAMPLES


def test_swapped_outputs(lenet, digits, runner, tmp_path):
    def swap(model):
        for node in model.graph.node:
            if "logits" in node.output:
                node.output[0] = "scores"
        softmax = model.graph.node[-1]
        softmax.input[0], softmax.output[0] = "scores", "logits"
        model.graph.node.append(helper.make_node("Identity", ["scores"], ["probabilities"], "tail"))

    bad = edited(lenet, tmp_path / "bad.onnx", swap)
    report = judge(bad, lenet, digits, runner, **QUALITY)
    found = verdicts(report)
    assert found["agreement.least"].status == "pass", "the largest logit is the largest probability"
    wrong = found["output_error.logits.relative"]
    assert wrong.status == "fail"
    assert "outputs 'logits' and 'probabilities' are swapped" in wrong.cause
    assert wrong.where == ("logits", "probabilities")
    assert report.exit_code == 13


def test_swapped_order_of_outputs(lenet, digits, runner, tmp_path):
    def swap(model):
        outputs = list(model.graph.output)
        del model.graph.output[:]
        model.graph.output.extend(outputs[::-1])

    report = judge(edited(lenet, tmp_path / "bad.onnx", swap), lenet, digits, runner, signature=True)
    assert report.exit_code == 11
    assert "outputs changed their order" in verdicts(report)["signature"].cause


def test_changed_input_name(lenet, digits, runner, tmp_path):
    def rename(model):
        model.graph.input[0].name = "image"
        for node in model.graph.node:
            node.input[:] = ["image" if name == "x" else name for name in node.input]

    report = judge(edited(lenet, tmp_path / "bad.onnx", rename), lenet, digits, runner, **QUALITY)
    found = verdicts(report)
    assert report.exit_code == 10
    assert "the candidate's input 'image' is not the baseline's" in found["runs"].cause
    assert "input 'x' is gone (a new one is 'image')" in found["signature"].cause
    assert found["metrics.top1.drop"].status == "undecided"


def test_a_frozen_batch(lenet, digits, runner, tmp_path):
    def freeze(model):
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    report = judge(edited(lenet, tmp_path / "bad.onnx", freeze), lenet, digits, runner, dynamic_axes=True)
    assert "open dimensions of input 'x' were axes 0 and are none" in verdicts(report)["dynamic_axes"].cause


@pytest.mark.parametrize("value", [40.0, np.nan])
def test_one_poisoned_weight(lenet, digits, runner, tmp_path, value):
    def poison(model):
        tensor = weight(model, "conv2.weight")
        array = numpy_helper.to_array(tensor).copy()
        array[3, 2, 1, 1] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    report = judge(edited(lenet, tmp_path / "bad.onnx", poison), lenet, digits, runner, **QUALITY)
    found = verdicts(report)
    if np.isnan(value):
        assert report.exit_code == 12
        assert "weight 'conv2.weight' holds NaN or Inf" in found["finite"].cause
    else:
        cause = found["output_error.logits.relative"].cause
        assert report.exit_code == 13
        assert "made by '/conv2/Conv' (Conv)" in cause
        assert (
            "weight 'conv2.weight' differs from the baseline's in 1 of 25000 values, most at [3, 2, 1, 1]"
            in cause
        )
        assert "became 40" in cause


def test_float16_overflow_on_one_sample(lenet, digits, runner, tmp_path):
    half = optimize(
        lenet,
        tmp_path / "half.onnx",
        steps=["convert-precision:compute=half"],
        data=Dataset(digits.feeds[:4], None, "mnist"),
        runner=runner,
    ).files.paths[0]
    feeds = [dict(feed) for feed in digits.feeds]
    assert judge(half, lenet, Dataset(feeds), runner, finite=True).passed
    feeds[137]["x"] = feeds[137]["x"] * np.float32(2e4)
    report = judge(half, lenet, Dataset(feeds), runner, finite=True, output_error=[{"relative": 0.1}])
    wrong = verdicts(report)["finite"]
    assert report.exit_code == 12
    assert "in 1 of 200 samples, first in sample 137" in wrong.cause
    assert "float16 ends at 65504" in wrong.cause
    assert "'/conv2/Conv' (Conv)" in wrong.cause
    assert wrong.where[0] in {node.name or node.output[0] for node in onnx.load(half).graph.node}


def int8(baseline, digits, runner, folder, step):
    """Return the path of the model simplified and quantized on 32 digits."""
    steps, data = ["simplify", step], Dataset(digits.feeds[:32], None, "mnist")
    return optimize(baseline, folder / "int8.onnx", steps=steps, data=data, runner=runner).files.paths[0]


def test_a_saturating_int8_layer(zoo, digits, runner, tmp_path):
    baseline = zoo("lenet5")
    good = int8(baseline, digits, runner, tmp_path, "quantize:format=qdq")
    limits = {"agreement": {"least": 0.97}, "output_error": [{"relative": 0.1}]}
    assert judge(good, baseline, digits, runner, **limits).passed
    named = []

    def narrow(model):
        makers = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear" and makers.get(node.input[0], node).op_type == "Conv":
                tensor = weight(model, node.input[1])
                small = (numpy_helper.to_array(tensor) * 0.05).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(small, tensor.name))
                named.append(makers[node.input[0]].name)
                return

    bad = edited(good, tmp_path / "bad.onnx", narrow)
    wrong = verdicts(judge(bad, baseline, digits, runner, **limits))["output_error.logits.relative"]
    assert wrong.status == "fail"
    assert named
    assert f"it is the output of '{named[0]}' (Conv)" in wrong.cause
    assert "of its codes are at the end of their range" in wrong.cause


def test_a_layer_that_saturates_on_the_target(zoo, digits, runner, tmp_path):
    baseline = zoo("lenet5")
    wide = int8(baseline, digits, runner, tmp_path, "quantize:target=onnxruntime-x86-vnni")
    report = judge(wide, baseline, digits, runner, target="onnxruntime-x86")
    assert report.exit_code == 14
    assert "exceed int16 on this data" in verdicts(report)["target"].cause
    assert judge(wide, baseline, digits, runner, target="onnxruntime-x86-vnni").passed


def test_a_slower_graph(zoo, digits, runner, tmp_path):
    baseline = zoo("lenet5")

    def slow(model):
        last = next(node for node in model.graph.node if node.op_type == "Relu")
        end, value = last.output[0], "slow0"
        last.output[0] = value
        model.graph.initializer.append(numpy_helper.from_array(np.eye(500, dtype=np.float32), "eye"))
        place = list(model.graph.node).index(last) + 1
        for index in range(60):
            after = end if index == 59 else f"slow{index + 1}"
            model.graph.node.insert(
                place + index, helper.make_node("MatMul", [value, "eye"], [after], f"slow{index}")
            )
            value = after

    bad = edited(baseline, tmp_path / "bad.onnx", slow)
    budgets = {"agreement": {"least": 0.97}, "latency": {"ratio": 1.3, "pairs": 20}}
    report = judge(bad, baseline, digits, runner, **budgets)
    wrong = verdicts(report)["latency.ratio"]
    assert verdicts(report)["agreement.least"].status == "pass"
    assert report.exit_code == 16
    assert wrong.observed > wrong.bound > 1.3
    assert "MatMul: 0 ms became" in wrong.cause


def test_a_small_set_never_passes(lenet, digits, runner, tmp_path):
    same = edited(lenet, tmp_path / "same.onnx")
    few = Dataset(digits.feeds[:20], digits.labels[:20], "mnist")
    report = judge(same, lenet, few, runner, metrics=[{"name": "top1", "drop": 0.01}])
    found = verdicts(report)["metrics.top1.drop"]
    assert found.status == "undecided"
    assert found.needed >= 299
    assert f"{found.needed} would do" in found.cause
    assert report.exit_code == 20


def test_random_data_is_said(lenet, runner, tmp_path):
    same = edited(lenet, tmp_path / "same.onnx")
    report = judge(same, lenet, None, runner, real_data=True, agreement={"least": 0.5})
    found = verdicts(report)
    assert found["real_data"].status == "fail"
    assert found["agreement.least"].status == "undecided"
    assert "RANDOM" in found["agreement.least"].cause
    assert report.exit_code == 18


def test_budgets_of_the_file(lenet, digits, runner, tmp_path):
    same = edited(lenet, tmp_path / "same.onnx")
    size = same.stat().st_size
    budgets = {
        "file_bytes": size - 1,
        "transfer_bytes": size,
        "parameters": 431_080,
        "macs": 2_293_000,
        "operators": ["Conv", "MaxPool", "Gemm", "Relu", "Softmax"],
        "domains": [],
        "opset": {"least": 18},
        "dtypes": ["float16"],
        "coverage": {"quantized": 0.5, "pruned": 0.5},
        "provenance": True,
    }
    found = verdicts(judge(same, lenet, digits, runner, **budgets))
    expected = {
        "file_bytes": "fail",
        "transfer_bytes": "pass",
        "parameters": "pass",
        "macs": "pass",
        "operators": "fail",
        "domains": "pass",
        "opset": "fail",
        "dtypes": "fail",
        "coverage.quantized": "fail",
        "coverage.pruned": "fail",
        "provenance": "fail",
    }
    assert {key: found[key].status for key in expected} == expected
    assert "1 byte" in found["file_bytes"].cause
    assert "'/Flatten'" in found["operators"].cause


@pytest.mark.parametrize(
    ("steps", "quantized", "pruned"),
    [
        (["prune:sparsity=0.9", "share:bits=4", "encode"], (1.0, 1.0), (0.9, 0.92)),
        (["prune:sparsity=0.9", "encode"], (0.0, 0.0), (0.9, 0.9)),
        (["quantize:mode=weight-only,weights=uint4,granularity=block"], (1.0, 1.0), (0.05, 0.2)),
        (["quantize:format=qdq"], (1.0, 1.0), (0.0, 0.05)),
        (["quantize:format=qoperator"], (1.0, 1.0), (0.0, 0.05)),
    ],
)
def test_weights_count_however_the_file_stores_them(zoo, digits, runner, tmp_path, steps, quantized, pruned):
    data = Dataset(digits.feeds[:16], None, "mnist")
    made = optimize(
        zoo("lenet5"), tmp_path / "small.onnx", steps=["simplify", *steps], data=data, runner=runner
    )
    budgets = {
        "coverage": {"quantized": 0.5, "pruned": 0.5},
        "parameters": 431_080 + 600,  # LeNet-5's, and some scales
        "macs": 2_293_000,
    }
    found = verdicts(judge(made.files.paths[0], zoo("lenet5"), data, runner, **budgets))
    assert found["parameters"].status == found["macs"].status == "pass"
    assert found["parameters"].observed >= 430_500
    assert found["macs"].observed == 2_293_000
    assert quantized[0] <= found["coverage.quantized"].observed <= quantized[1]
    assert pruned[0] <= round(found["coverage.pruned"].observed, 4) <= pruned[1]


def test_a_candidate_that_does_not_load_leaves_no_budget_out(lenet, digits, runner, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(lenet.read_bytes()[:100_000])
    report = judge(
        tmp_path / "cut.onnx", lenet, digits, runner, **QUALITY, file_bytes=1, coverage={"pruned": 0.1}
    )
    found = verdicts(report)
    assert report.exit_code == 10
    assert "truncated" in found["runs"].cause
    expected = {"metrics.top1", "agreement", "output_error", "finite", "signature", "dynamic_axes"}
    assert set(found) == {"runs", "file_bytes", "coverage", *expected}
    assert {item.status for key, item in found.items() if key != "runs"} == {"undecided"}


def test_what_a_configuration_asks_of_the_baseline_must_be_there(lenet, runner, tmp_path):
    same = edited(lenet, tmp_path / "same.onnx")
    with pytest.raises(DataError, match="metric top1 needs labels, which random data has not: give --data"):
        judge(same, lenet, None, runner, metrics=[{"name": "top1", "drop": 0.1}])
    with pytest.raises(ParameterError, match="no output 'logit'; did you mean 'logits'"):
        judge(same, lenet, None, runner, output_error=[{"output": "logit", "relative": 0.1}])


def test_lock_file_flags_a_drift(lenet, digits, runner, tmp_path):
    same = edited(lenet, tmp_path / "same.onnx")
    budgets = {"file_bytes": "5MB", "agreement": {"least": 0.9}, "output_error": [{"relative": 1.0}]}
    config = GateConfig.parse({"budgets": budgets})
    first = run_gate(same, lenet, config, data=digits, runner=runner)
    Lock.of(first).save(tmp_path / "onnxslim-lab.lock")
    lock = Lock.load(tmp_path / "onnxslim-lab.lock")
    assert lock.figures["file_bytes"].observed == same.stat().st_size
    again = run_gate(same, lenet, config, data=digits, runner=runner, lock=lock)
    assert again.passed
    assert verdicts(again)["drift.agreement.least"].status == "pass"

    def change(model):
        model.doc_string = "x" * 1000
        tensor = weight(model, "fc2.weight")
        array = numpy_helper.to_array(tensor) + np.random.default_rng(0).normal(0, 0.1, (10, 500)).astype(
            np.float32
        )
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))

    later = edited(lenet, tmp_path / "later.onnx", change)
    drifted = run_gate(later, lenet, config, data=digits, runner=runner, lock=lock)
    found = verdicts(drifted)
    assert found["file_bytes"].status == "pass"
    assert found["drift.file_bytes"].status == "fail"
    assert found["drift.output_error.logits.relative"].status == "fail"
    assert drifted.exit_code == 19
    other = run_gate(same, later, config, data=digits, runner=runner, lock=lock)
    assert any("another baseline" in text for text in other.notices)


def test_broken_lock_files(tmp_path):
    path = tmp_path / "onnxslim-lab.lock"
    with pytest.raises(LockError, match="cannot read"):
        Lock.load(path)
    path.write_text("{}")
    with pytest.raises(LockError, match="--update-baseline"):
        Lock.load(path)


OWN = """
import numpy as np

def true_score(outputs, labels):
    return np.array([feed["probabilities"][0, label] for feed, label in zip(outputs, labels)])

def best(outputs, labels):
    return float(np.mean([feed["logits"].argmax() == label for feed, label in zip(outputs, labels)]))
"""


def test_metrics_of_ones_own(lenet, digits, runner, tmp_path, monkeypatch):
    (tmp_path / "own_gate_metric.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)

    def soften(model):
        tensor = weight(model, "fc2.weight")
        array = (numpy_helper.to_array(tensor) * 0.2).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    soft = edited(lenet, tmp_path / "soft.onnx", soften)
    metrics = [
        {"name": "own_gate_metric:true_score", "drop": 0.02},
        {"name": "own_gate_metric:best", "drop": 0.02},
        {"name": "top1", "relative_drop": 0.03},
    ]
    found = verdicts(judge(soft, lenet, digits, runner, metrics=metrics))
    mean = found["metrics.own_gate_metric:true_score.drop"]
    assert mean.status == "fail"
    assert mean.observed > mean.bound > 0.02
    assert "BCa" in mean.method
    best = found["metrics.own_gate_metric:best.drop"]
    assert best.status == "pass"
    assert "resamples" in best.method
    assert found["metrics.top1.relative_drop"].status == "pass"
    with pytest.raises(DataError, match="needs labels"):
        judge(soft, lenet, Dataset(digits.feeds[:40]), runner, metrics=[{"name": "top1", "drop": 0.1}])


def test_an_output_of_another_size(lenet, digits, runner, tmp_path):
    def cut(model):
        for name, keep in (("fc2.weight", (slice(9), slice(None))), ("fc2.bias", (slice(9),))):
            tensor = weight(model, name)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[keep].copy(), name))
        for output in model.graph.output:
            output.type.tensor_type.shape.dim[1].dim_value = 9

    report = judge(edited(lenet, tmp_path / "bad.onnx", cut), lenet, digits, runner, **QUALITY)
    found = verdicts(report)
    assert report.exit_code == 11
    assert "was float [batch, 10] and is float [batch, 9]" in found["signature"].cause
    assert found["agreement.least"].status == "fail"
    assert "shape (1, 10) became (1, 9)" in found["output_error.logits.relative"].cause
