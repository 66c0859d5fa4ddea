"""random_data.py, value_ranges.py, probe.py: made-up data that models accept, and says how it was made."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.errors import ParameterError, SessionError
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.probe import data_at_two_shapes, runnable_data
from onnxslim_lab.inputs.random_data import random_data
from onnxslim_lab.inputs.value_ranges import find_range
from onnxslim_lab.sessions import Runner


def parse(signature, body, opset=18):
    return Graph.parse(f'<ir_version: 10, opset_import: ["" : {opset}]> g {signature} {{ {body} }}')


def with_table(count, body, signature="(int64[n, s] ids) => (float[n, s, 4] y)"):
    return parse(f"{signature} <float[{count}, 4] table = {{{', '.join(['0'] * count * 4)}}}>", body)


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        ("y = Gather(table, ids)", 0, 6),
        ("i = Cast <to = 6> (ids) j = Identity(i) y = Gather(table, j)", 0, 6),
        ("one = Constant <value = int64 {2}> () i = Add(ids, one) y = Gather(table, i)", 0, 4),
        ("one = Constant <value = int64 {2}> () i = Sub(ids, one) y = Gather(table, i)", 2, 8),
        (
            "u = Unsqueeze(ids, a) v = Squeeze(u, a) y = Gather(table, v) a = Constant <value = int64[1] {0}> ()",
            0,
            6,
        ),
    ],
)
def test_indices_stay_in_bounds(body, low, high):
    graph = with_table(7, body)
    found = find_range(graph, "ids")
    assert (found.low, found.high) == (low, high)
    data = random_data(graph, 50)
    values = np.concatenate([f["ids"].ravel() for f in data.feeds])
    assert (values.min(), values.max()) == (low, high)
    assert any("it indexes (Gather" in note for note in data.notes)


def test_indices_are_followed_into_bodies_and_functions():
    branch = parse(
        "(int64[n] ids, bool c) => (float[n, 4] y) <float[5, 4] table = {" + ", ".join(["0"] * 20) + "}>",
        """y = If(c) <then_branch = t () => (float[n, 4] a) { a = Gather(table, ids) },
                      else_branch = e () => (float[n, 4] b) { b = Gather(table, ids) }>""",
    )
    assert find_range(branch, "ids").high == 4
    assert find_range(branch, "c").mask
    called = Graph.parse(
        '<ir_version: 10, opset_import: ["" : 18, "local" : 1]> g (int64[n] ids) => (float[n, 4] y)'
        " <float[3, 4] table = {" + ", ".join(["0"] * 12) + "}> { y = local.look(ids, table) }"
        '<domain: "local", opset_import: ["" : 18]> look (i, t) => (o) { o = Gather(t, i) }'
    )
    assert find_range(called, "ids").high == 2


def test_one_hot_depth_and_comparisons():
    one_hot = parse(
        "(int32[n] x) => (float[n, 9] y)",
        "d = Constant <value = int64 {9}> () v = Constant <value = float[2] {0, 1}> () y = OneHot(x, d, v)",
    )
    assert find_range(one_hot, "x").high == 8
    rate = parse(
        "(int64 sr, float[n] x) => (bool y)",
        "k = Constant <value = int64 {16000}> () y = Equal(sr, k)",
    )
    (feed, *_) = random_data(rate).feeds
    assert feed["sr"] == 16000
    assert feed["sr"].shape == ()


def test_masks_have_a_one_in_every_row():
    graph = parse(
        "(int64[b, s] attention_mask) => (float[b, s] y)",
        "f = Cast <to = 1> (attention_mask) one = Constant <value = float {1}> () y = Sub(one, f)",
    )
    data = random_data(graph, 20, dims={"b": 3})
    for feed in data.feeds:
        mask = feed["attention_mask"]
        assert set(np.unique(mask)) <= {0, 1}
        assert (mask[:, 0] == 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()


def test_sequence_lengths_are_those_of_the_sequence():
    nodes = [helper.make_node("RNN", ["x", "w", "r", "", "lens"], ["y"], hidden_size=2)]
    inputs = [
        helper.make_tensor_value_info("x", 1, ["t", "b", 3]),
        helper.make_tensor_value_info("lens", TensorProto.INT32, ["b"]),
    ]
    weights = [
        numpy_helper.from_array(np.zeros((1, 2, k), np.float32), name) for name, k in (("w", 3), ("r", 2))
    ]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    made = helper.make_graph(nodes, "g", inputs, outputs, weights)
    graph = Graph.load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    (feed, *_) = random_data(graph, dims={"t": 5, "b": 2}).feeds
    assert feed["lens"].tolist() == [5, 5]
    assert feed["x"].shape == (5, 2, 3)


def test_other_types_and_no_bound():
    graph = parse(
        "(uint8[300] a, bool[64] b, string[2] c, seq(float[3]) d, optional(float[2]) e, float16[2] f, int4[64] h)"
        " => (uint8[300] y)",
        "y = Identity(a)",
        opset=21,
    )
    data = random_data(graph, 1)
    (feed,) = data.feeds
    assert feed["a"].max() > 200
    assert set(feed["b"].tolist()) == {True, False}
    assert feed["c"].dtype == object
    assert [v.shape for v in feed["d"]] == [(3,), (3,)]
    assert feed["e"].shape == (2,)
    assert feed["f"].dtype == np.float16
    assert feed["h"].astype(int).min() < 0
    assert any("'a' uint8[300]: 0..255: nothing bounds it" in note for note in data.notes)


def test_data_is_labelled_and_seeded():
    graph = parse("(float[n, 3] x) => (float[n, 3] y)", "y = Relu(x)")
    data = random_data(graph, 3, seed=5)
    assert data.random
    assert data.source == "random (seed 5)"
    assert len(data) == 3
    again = random_data(graph, 3, seed=5)
    assert all((a["x"] == b["x"]).all() for a, b in zip(data.feeds, again.feeds, strict=True))
    assert (data.feeds[0]["x"] != data.feeds[1]["x"]).any()


def test_sizes_of_open_dimensions():
    graph = parse(
        "(float[batch, 3, h, w] image, float[batch, s] a, float[batch, total] m, float[batch, past] p, float[2, n, 8] r)".replace(
            "past + s", "total"
        )
        + " => (float[batch, 3, h, w] y)",
        "y = Relu(image)",
    )
    data = random_data(graph, 1, dims={"s": 5, "image:3": 64})
    shapes = {name: value.shape for name, value in data.feeds[0].items()}
    assert shapes["image"] == (1, 3, 224, 64)
    assert shapes["a"] == (1, 5)
    assert shapes["r"] == (2, 1, 8)
    assert data.dims["w"] == 64
    with pytest.raises(ParameterError, match=r"no open dimension 'bacth'; did you mean 'batch'\?"):
        random_data(graph, dims={"bacth": 2})
    with pytest.raises(ParameterError, match="'s' must be 1 or more, not 0"):
        random_data(graph, dims={"s": 0})
    with pytest.raises(ParameterError, match="samples"):
        random_data(graph, 0)


def test_sums_of_symbols():
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"]),
        helper.make_tensor_value_info("mask", TensorProto.INT64, ["b", "past + s"]),
        helper.make_tensor_value_info("past", 1, ["2*b", "past"]),
    ]
    made = helper.make_graph(
        [helper.make_node("Identity", ["ids"], ["y"])],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["b", "s"])],
    )
    graph = Graph.load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    (feed,) = random_data(graph, 1, dims={"s": 3, "b": 2}).feeds
    assert {k: v.shape for k, v in feed.items()} == {"ids": (2, 3), "mask": (2, 19), "past": (4, 16)}


def test_negative_and_unnamed_dimensions_are_open():
    graph = parse("(float[n, 3] x) => (float[n, 3] y)", "y = Relu(x)").to_model()
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert random_data(Graph.load(graph), 1).feeds[0]["x"].shape == (1, 3)


NEEDS = """pads = Constant <value = int64[4] {0, 30, 0, 0}> () p = Pad <mode = "reflect"> (x, pads)
           shape = Constant <value = int64[2] {-1, 8}> () y = Reshape(p, shape)"""


def test_sizes_are_found_by_trying():
    graph = parse("(float[b, s] x) => (float[m, 8] y)", NEEDS)
    with Runner(threads=1) as runner:
        data = runnable_data(runner, graph, 1)
        assert any("found by trying: the model refused b = 1, s = 16" in note for note in data.notes)
        runner.run(graph, data.feeds)
        with pytest.raises(SessionError, match="did not run at any size tried"):
            runnable_data(runner, graph, 1, dims={"b": 1, "s": 7})


def test_two_shapes_change_what_can_change():
    with Runner(threads=1) as runner:
        graph = parse("(float[b, s] x, float[c, s] z) => (float[b, s] y)", "y = Add(x, z)")
        first, second = data_at_two_shapes(runner, graph)
        assert first.dims == {"b": 1, "s": 16, "c": 1}
        assert second.dims == {"b": 2, "s": 24, "c": 2}
        equal = parse("(float[b, 3] x, float[c, 3] z) => (float[b, 6] y)", "y = Concat <axis = 1> (x, z)")
        assert data_at_two_shapes(runner, equal)[1].dims == {"b": 2, "c": 2}
        (kept,) = data_at_two_shapes(runner, graph, dims={"b": 1, "s": 4, "c": 1})
        assert kept.dims == {"b": 1, "s": 4, "c": 1}
