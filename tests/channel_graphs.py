"""Graphs as text whose inputs called w... become random weights, and the removal of channels nobody listens to."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from passes_helper import random_feed, runner

from onnxslim_lab.channels.cutting import cut
from onnxslim_lab.channels.groups import find_groups
from onnxslim_lab.graph import Graph

HEADER = '<ir_version: 9, opset_import: ["" : 17]>\n'


def made(text, dtype=np.float32, seed=0):
    """Return the model of a text; inputs called w... become initializers, those called b... positive vectors."""
    model = onnx.parser.parse_model(text if text.startswith("<") else HEADER + text)
    random = np.random.default_rng(seed)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for value in [value for value in model.graph.input if value.name[0] in "wb"]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = random.standard_normal(shape) * 0.5
        array = np.abs(array) + 0.5 if value.name[0] == "b" else array
        model.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), value.name))
        model.graph.input.remove(value)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return Graph.load(model)


def silence(groups_and_numbers):
    """Set to zero what the readers take from channels."""
    for group, numbers in groups_and_numbers:
        for side in group.readers:
            matrix = np.array(side.layer.matrix)
            matrix[:, :, np.isin(side.members, numbers)] = 0
            side.layer.set(side.layer.with_matrix(matrix))


def remove_silent(model, chosen, widths=False):
    """Silence channels, remove them, and return both models.

    `chosen(group)` gives the numbers of the channels of a group that go.
    """
    parts, found = [], []
    for graph in model.walk():
        groups, _ = find_groups(graph, widths=widths)
        found += groups
        parts += [group.part for group in groups[:1]]
    pairs = [(group, np.asarray(chosen(group), np.int64)) for group in found]
    silence(pairs)
    kept = model.copy()
    for part in parts:
        cut(part, [(group, numbers) for group, numbers in pairs if group.part is part and len(numbers)])
    return kept, model, pairs


def assert_equal(first, second, dims=None, relative=1e-5):
    """Run both models and compare."""
    feed = random_feed(first, 0, dims or {})
    before = runner().run(first, [feed])[0]
    after = runner().run(second, [feed])[0]
    for name, value in before.items():
        wide = np.asarray(value, np.float64)
        np.testing.assert_allclose(
            np.asarray(after[name], np.float64), wide, atol=relative * max(1.0, np.abs(wide).max()), rtol=0
        )


def half(group):
    """Choose every other channel."""
    return list(range(0, group.size - 1, 2))
