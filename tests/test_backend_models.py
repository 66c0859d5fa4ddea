"""Every official ONNX backend test model survives load, simplify and save, and computes the same."""

import functools
import glob
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnxslim_lab.base import Context
from onnxslim_lab.errors import LabError
from onnxslim_lab.graph import Graph
from onnxslim_lab.passes.simplify import Simplify

PARTS = 8
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
# Draws of random numbers cannot be compared, whatever the graph around them.
RANDOM = ("bernoulli", "training_dropout", "randomnormal", "randomuniform", "multinomial")


@functools.cache
def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [case for kind in KINDS for case in load_model_tests(kind=kind)]
    return sorted(found, key=lambda case: (case.kind, case.name))


def feeds_of(case, inputs):
    """Return the first data set's inputs by name; None for what is not a tensor."""
    if case.data_sets:
        values = case.data_sets[0][0]
    else:
        files = glob.glob(f"{case.model_dir}/test_data_set_0/input_*.pb")
        files.sort(key=lambda path: int(path[:-3].rpartition("_")[2]))
        values = [read(file, value.type) for file, value in zip(files, inputs, strict=False)]
    return {value.name: given for value, given in zip(inputs, values, strict=False)}


def read(path, kind):
    """Read one input; None for what is not a tensor."""
    data = Path(path).read_bytes()
    if kind.WhichOneof("value") != "tensor_type":
        return None
    try:
        return numpy_helper.to_array(onnx.TensorProto.FromString(data))
    except Exception:  # noqa: BLE001 - an odd file of the test suite is not our subject
        return None


def run(data, feeds):
    """Return the outputs, or None when onnxruntime cannot run the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)
    except Exception:  # noqa: BLE001 - not every operator exists in onnxruntime
        return None


def same(left, right):
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype.kind in "OSU":
        return bool((left == right).all())
    tolerance = 1e-4 if left.dtype.itemsize > 2 else 1e-2  # half precision
    return np.allclose(
        left.astype(np.float64), right.astype(np.float64), rtol=tolerance, atol=tolerance / 10, equal_nan=True
    )


def fed(graph):
    """Return what a caller feeds: up to IR 3 the initializers are listed as inputs too."""
    fixed = {tensor.name for tensor in graph.initializer}
    return [(value.name, value.type.SerializeToString()) for value in graph.input if value.name not in fixed]


def check(case):
    """Return (whether onnxruntime ran the original, what went wrong or "")."""
    data = (
        case.model.SerializeToString() if case.model else (Path(case.model_dir) / "model.onnx").read_bytes()
    )
    try:
        graph = Graph.load(data)
        Simplify().run(graph, Context())
        result = graph.to_model()
    except LabError as error:
        return False, f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - this is what the test looks for
        return False, f"raised {type(error).__name__}: {error}"
    before, after = onnx.load_model_from_string(data).graph, result.graph
    if [(v.name, v.type) for v in before.output] != [(v.name, v.type) for v in after.output]:
        return False, "outputs changed"
    if fed(before) != fed(after):
        return False, "inputs changed"
    if any(word in case.name for word in RANDOM):
        return False, ""
    inputs = [value for value in before.input if value.name in dict(fed(before))]
    feeds = feeds_of(case, inputs)
    if any(value is None for value in feeds.values()):
        return False, ""
    reference = run(data, feeds)
    if reference is None:
        return False, ""
    got = run(result.SerializeToString(), feeds)
    if got is None:
        return True, "no longer runs"
    return True, "" if same(reference, got) else "outputs differ"


@pytest.mark.parametrize("part", range(PARTS))
def test_official_models_survive(part):
    ran, wrong = 0, []
    for case in cases()[part::PARTS]:
        compared, problem = check(case)
        ran += compared
        if problem:
            wrong.append(f"{case.name}: {problem}")
    assert not wrong, "\n".join(wrong)
    assert ran > 100  # the comparison itself must take place
