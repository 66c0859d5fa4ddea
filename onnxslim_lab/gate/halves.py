"""Values of float16 that overflow where they are computed in float16, though onnxruntime's CPU computes wider.

On a CPU onnxruntime computes float16 operators in float32, and may drop the Casts between: outputs are finite
there that are Inf or NaN on a GPU. A value asked for as an output is rounded to float16, and shows it.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from onnxslim_lab.errors import LabError, quote
from onnxslim_lab.gate.causes import Found
from onnxslim_lab.gate.subject import Subject
from onnxslim_lab.graph import Graph
from onnxslim_lab.statistics import Calibration, Want


def half_overflow(subject: Subject) -> Found | None:
    """Return the first float16 value that is infinite on some sample and not so in the baseline.

    Raises:
        LabError: The values cannot be computed one by one.
    """
    candidate = subject.candidate
    made = [
        (node, name)
        for node in candidate.nodes
        for name in node.output
        if name and candidate.dtype_of(name) == TensorProto.FLOAT16
    ]
    if not made:
        return None
    calibration = Calibration(subject.runner, subject.data)
    found = calibration.collect(candidate, [Want(candidate, name) for _, name in made])
    for node, name in made:
        statistics = found.get(candidate, name)
        if (
            statistics is not None
            and statistics.nonfinite
            and not _infinite_before(subject, calibration, name)
        ):
            return _told(subject, node, name, statistics.nonfinite)
    return None


def _infinite_before(subject: Subject, calibration: Calibration, name: str) -> bool:
    """Whether the baseline's value of that name is infinite too: a mask, say."""
    baseline: Graph = subject.baseline
    if baseline.producer(name) is None:
        return False
    try:
        statistics = calibration.collect(baseline, [Want(baseline, name)]).get(baseline, name)
    except LabError:
        return False
    return statistics is not None and statistics.nonfinite > 0


def _told(subject: Subject, node: NodeProto, name: str, values: int) -> Found:
    samples = []
    for index, feed in enumerate(subject.feeds):
        outputs = subject.runner.run(subject.candidate, [feed], outputs=[name], optimization="off")
        array = outputs[0][name]
        if isinstance(array, np.ndarray) and not np.isfinite(array.astype(np.float32)).all():
            samples.append(index)
    place = (
        f" in {len(samples)} of {len(subject.feeds)} samples, first in sample {samples[0]}" if samples else ""
    )
    maker = f"{quote(node.name or name)} ({node.op_type})"
    what = (
        f"value {quote(name)}, made by {maker}, overflows{place}: {values} values are Inf or NaN, float16 ends at "
        "65504; onnxruntime's CPU hides it by computing in float32, a device with float16 does not"
    )
    return Found(what, (node.name or name,))
