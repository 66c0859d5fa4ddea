"""Helpers for the tests of the NumPy runtime."""

from onnxslim_lab.errors import SessionError
from onnxslim_lab.metrics import compare_outputs
from onnxslim_lab.runtime import Interpreter

HEAD = '<ir_version: 9, opset_import: ["": 17]>'


def agrees(graph, feeds, runner, optimization="off"):
    """Assert that both engines give the same; return whether onnxruntime could run the model."""
    try:
        theirs = runner.run(graph, [feeds], optimization=optimization)
    except SessionError:
        return False
    interpreter = Interpreter(graph)
    for _ in range(2):  # the second run has its constants at hand
        for error in compare_outputs(theirs, [interpreter.run(feeds)]):
            assert not error.structure, error
            assert not error.nonfinite, error
            assert error.relative < 1e-5, error
    return True
