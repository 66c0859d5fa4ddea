"""evaluate.py and intervals.py: intervals with known values, pairs, methods stated."""

import numpy as np
import pytest

from onnxslim_lab.data import Dataset
from onnxslim_lab.errors import DataError, ParameterError
from onnxslim_lab.evaluate import compare_metrics, evaluate, evaluate_outputs, evaluate_pair
from onnxslim_lab.graph import Graph
from onnxslim_lab.intervals import bootstrap_mean, mcnemar, newcombe, wilson
from onnxslim_lab.sessions import Runner

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 4] x) => (float[n, 4] y) { y = %s(x) }"""

OWN = """
import numpy as np
def error(outputs, labels):
    return np.concatenate([np.abs(o["y"]).max(axis=1) for o in outputs])
def score(outputs, labels):
    return float(np.concatenate([o["y"] for o in outputs]).argmax(axis=1).mean())
"""


@pytest.fixture(autouse=True)
def own_metric(tmp_path, monkeypatch):
    (tmp_path / "own_metric_of_tests.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def logits(hits, count):
    """Return outputs of which the first `hits` have label 0 right."""
    table = np.zeros((count, 3))
    table[:hits, 0] = 1
    table[hits:, 1] = 1
    return [{"y": row[None]} for row in table]


def test_wilson_known_values_and_edges():
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20)[1] == 1


@pytest.mark.parametrize(
    ("table", "interval"),
    # Newcombe, Statistics in Medicine 17 (1998) 2635, table III, method 10
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((0, 0, 0, 10), (-0.2775, 0.2775)),
    ],
)
def test_newcombe_known_values(table, interval):
    assert newcombe(*table) == pytest.approx(interval, abs=5e-4)


def test_newcombe_is_antisymmetric_and_covers():
    low, high = newcombe(50, 7, 3, 40)
    assert newcombe(50, 3, 7, 40) == pytest.approx((-high, -low))
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        both, first, second, neither = rng.multinomial(200, [0.8, 0.05, 0.08, 0.07])
        low, high = newcombe(both, first, second, neither)
        inside += low <= -0.03 <= high
    assert inside / 400 > 0.92


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert 0 < mcnemar(0, 3000) < 1e-300 or mcnemar(0, 3000) == 0
    assert mcnemar(4000, 4100) == pytest.approx(0.2714, abs=2e-3)


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(1).standard_normal(400)
    low, high = bootstrap_mean(values, 3)
    assert (low, high) == bootstrap_mean(values, 3)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_a_proportion_gets_wilson():
    (result,) = evaluate_outputs(logits(81, 263), np.zeros(263, int), ["top1"])
    assert (result.value, result.samples, result.method) == (81 / 263, 263, "Wilson score")
    assert (result.low, result.high) == wilson(81, 263)


def test_paired_proportions():
    reference, result = logits(90, 100), logits(80, 100)
    (paired,) = compare_metrics(reference, result, np.zeros(100, int), ["top1"])
    assert paired.difference == pytest.approx(-0.1)
    assert (paired.low, paired.high) == newcombe(80, 0, 10, 10)
    assert paired.p_value == mcnemar(0, 10)
    assert paired.significant
    assert "Newcombe" in paired.method
    (same,) = compare_metrics(reference, reference, np.zeros(100, int), ["top1"])
    assert not same.significant
    assert same.p_value == 1


def test_agreement_is_against_full_agreement():
    (paired,) = compare_metrics(logits(90, 100), logits(80, 100), None, ["agreement"])
    assert paired.reference is None
    assert paired.result.value == 0.9
    assert paired.difference == pytest.approx(-0.1)
    with pytest.raises(ParameterError, match="compares two models"):
        evaluate_outputs(logits(1, 2), None, ["agreement"])


def test_a_users_metric_with_a_number_for_each_sample():
    reference = [{"y": np.full((1, 2), v)} for v in np.linspace(0, 1, 50)]
    worse = [{"y": o["y"] + 0.5} for o in reference]
    (paired,) = compare_metrics(reference, worse, None, ["own_metric_of_tests:error"])
    assert paired.difference == pytest.approx(0.5)
    assert (paired.low, paired.high) == pytest.approx((0.5, 0.5))
    assert "paired bootstrap over samples" in paired.method
    assert paired.significant


def test_a_users_metric_with_one_number():
    (paired,) = compare_metrics(
        logits(90, 100), logits(60, 100), np.zeros(100), ["own_metric_of_tests:score"]
    )
    assert paired.difference == pytest.approx(0.3)
    assert paired.low == pytest.approx(0.21, abs=0.04)
    assert "over feeds" in paired.method
    (few,) = evaluate_outputs(logits(1, 2), None, ["own_metric_of_tests:score"])
    assert few.low is None
    assert "no interval" in few.method


def test_labels_are_needed_and_names_are_checked_before_the_run():
    with pytest.raises(DataError, match="top1 needs labels"):
        evaluate_outputs(logits(1, 2), None, ["top1"])
    with pytest.raises(ParameterError, match=r"no metric 'topp1'; did you mean 'top1'\?"):
        evaluate(None, None, None, ["topp1"])


def test_on_onnxruntime():
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((5, 4)).astype(np.float32)} for _ in range(20)]
    labels = np.concatenate([f["x"].argmax(axis=1) for f in feeds])
    dataset = Dataset(feeds, labels, random=True)
    plain, negated = Graph.parse(MODEL % "Identity"), Graph.parse(MODEL % "Neg")
    with Runner(threads=1) as runner:
        (result,) = evaluate(runner, plain, dataset, ["top1"])
        assert (result.value, result.samples, result.random) == (1, 100, True)
        top, agreed = evaluate_pair(runner, plain, negated, dataset, ["top1", "agreement"])
    assert top.difference == -1
    assert agreed.result.value == 0
