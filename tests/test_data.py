"""data.py: every kind of data, and one clear line for what does not fit."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.data import load_data
from onnxslim_lab.errors import DataError, ParameterError
from onnxslim_lab.graph import Graph
from onnxslim_lab.inputs.model_inputs import check_feed, model_inputs

OPEN = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 3] x, int64[n] ids) => (float[n, 3] y) { y = Relu(x) }"""
FIXED = """<ir_version: 9, opset_import: ["" : 18]>
g (float[4, 3] x) => (float[4, 3] y) { y = Relu(x) }"""
STATE = """<ir_version: 9, opset_import: ["" : 18]>
g (float[1, t] x, float[2, 1, 8] state, int64 rate) => (float[1, t] y) { y = Relu(x) }"""
NAMES = '<ir_version: 9, opset_import: ["" : 18]> g (string[n] text) => (string[n] y) { y = Identity(text) }'


def x_and_ids(count):
    return {"x": np.arange(count * 3, dtype=np.float32).reshape(count, 3), "ids": np.arange(count)}


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def npz(tmp_path):
    return lambda **arrays: save(tmp_path / "data.npz", **arrays)


def test_npz_gives_one_sample_at_a_time_and_labels(npz):
    data = load_data(npz(**x_and_ids(5), labels=np.arange(5)), Graph.parse(OPEN))
    assert len(data) == 5
    assert [f["ids"].tolist() for f in data.feeds] == [[0], [1], [2], [3], [4]]
    assert data.feeds[4]["x"].shape == (1, 3)
    assert data.feeds[-1]["ids"].tolist() == [4]
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert not data.random
    with pytest.raises(IndexError):
        data.feeds[5]


def test_open_batches_keep_the_rest(npz):
    data = load_data(npz(**x_and_ids(5), labels=np.arange(5)), Graph.parse(OPEN), batch=2)
    assert [f["ids"].tolist() for f in data.feeds] == [[0, 1], [2, 3], [4]]
    limited = load_data(npz(**x_and_ids(5), labels=np.arange(5)), Graph.parse(OPEN), batch=2, limit=3)
    assert [f["ids"].tolist() for f in limited.feeds] == [[0, 1], [2]]
    assert limited.labels.tolist() == [0, 1, 2]


def test_fixed_batches_leave_the_rest_out_and_say_so(npz):
    data = load_data(npz(x=x_and_ids(11)["x"], labels=np.arange(11)), Graph.parse(FIXED))
    assert [len(f["x"]) for f in data.feeds] == [4, 4]
    assert data.labels.tolist() == list(range(8))
    assert data.notes == ["3 samples left out: the model takes exactly 4 at a time"]
    with pytest.raises(ParameterError, match="the model fixes 4 samples for each feed, not 2"):
        load_data(npz(x=x_and_ids(11)["x"]), Graph.parse(FIXED), batch=2)
    with pytest.raises(DataError, match="3 samples are fewer than the 4"):
        load_data(npz(x=x_and_ids(3)["x"]), Graph.parse(FIXED))


def test_whole_feeds_for_inputs_whose_batch_is_not_first(npz):
    arrays = {
        "x": np.zeros((6, 1, 20), np.float32),
        "state": np.zeros((6, 2, 1, 8), np.float32),
        "rate": np.full(6, 16000),
    }
    data = load_data(npz(**arrays), Graph.parse(STATE))
    assert len(data) == 6
    assert {k: v.shape for k, v in data.feeds[0].items()} == {"x": (1, 20), "state": (2, 1, 8), "rate": ()}
    mixed = load_data(npz(**{**arrays, "x": np.zeros((6, 20), np.float32)}), Graph.parse(STATE))
    assert mixed.feeds[0]["x"].shape == (1, 20)
    with pytest.raises(DataError, match="first dimensions differ"):
        load_data(
            npz(x=np.zeros((2, 5), np.float32), state=np.zeros((2, 1, 8), np.float32), rate=np.zeros(2, int)),
            Graph.parse(STATE),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xx": np.zeros(5)}, r"the model has no input 'xx'; did you mean 'x'\?"),
        ({"ids": None}, r"input 'ids' \(int64\[n\]\) is missing"),
        (
            {"ids": np.arange(5, dtype=np.int32)},
            r"input 'ids' takes int64, got int32; convert it with .astype",
        ),
        ({"x": np.zeros((5, 3))}, r"input 'x' takes float32, got float64"),
        (
            {"x": np.zeros((5, 4), np.float32)},
            r"takes float\[n, 3\], got samples of shape \[4\]: 4 must be 3",
        ),
        ({"x": np.zeros(5, np.float32)}, r"got shape \[5\]: expected rank 2 .* or 3"),
        ({"x": np.zeros((4, 3), np.float32)}, r"different numbers of samples .*x 4, ids 5"),
        ({"labels": np.arange(4)}, r"different numbers of samples .*labels 4"),
        ({"labels": np.array(4)}, "labels must have one entry for each sample"),
        ({"x": np.array([object()] * 5)}, "holds Python objects, which are not loaded"),
    ],
)
def test_npz_that_does_not_fit(npz, change, message):
    arrays = {k: v for k, v in {**x_and_ids(5), **change}.items() if v is not None}
    with pytest.raises(DataError, match=message) as caught:
        load_data(npz(**arrays), Graph.parse(OPEN))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_data(tmp_path):
    graph = Graph.parse(OPEN)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no zip")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled.npz").write_bytes(b"\x80\x04N.")
    for name, message in [
        ("bad.npz", "cannot read"),
        ("pickled.npz", "holds Python objects|cannot read"),
        ("one.npy", "one array, but the model has 2 inputs"),
        ("empty", "holds no data"),
        ("missing.npz", "no data at"),
    ]:
        with pytest.raises(DataError, match=message):
            load_data(tmp_path / name, graph)
    with pytest.raises(ParameterError, match="limit must be 1 or more"):
        load_data(tmp_path / "bad.npz", graph, limit=0)


def test_one_npy_for_one_input(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 3), np.float32))
    assert load_data(tmp_path / "x.npy", Graph.parse(FIXED)).feeds[1]["x"].shape == (4, 3)


def test_strings_and_bfloat16_in_npz(npz):
    data = load_data(npz(text=np.array(["a", "bb"])), Graph.parse(NAMES))
    assert data.feeds[1]["text"].dtype == object
    assert data.feeds[1]["text"].tolist() == ["bb"]
    graph = Graph.parse(OPEN.replace("float[n, 3] x", "bfloat16[n, 3] x"))
    values = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    data = load_data(npz(x=values, ids=np.arange(2)), graph)
    assert data.feeds[1]["x"].dtype == ml_dtypes.bfloat16
    assert data.feeds[1]["x"].tolist() == [[3, 4, 5]]


def test_a_folder_of_npy(tmp_path):
    for name, array in {**x_and_ids(5), "labels": np.arange(5)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = load_data(tmp_path, Graph.parse(OPEN), batch=4)
    assert [f["ids"].tolist() for f in data.feeds] == [[0, 1, 2, 3], [4]]
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


def test_file_names_stand_for_inputs_that_files_cannot_be_called(tmp_path):
    value = helper.make_tensor_value_info("gpu_0/x:0", 1, ["n", 3])
    out = helper.make_tensor_value_info("y", 1, ["n", 3])
    made = helper.make_graph([helper.make_node("Relu", ["gpu_0/x:0"], ["y"])], "g", [value], [out])
    graph = Graph.load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    np.save(tmp_path / "gpu_0_x_0.npy", np.zeros((2, 3), np.float32))
    assert list(load_data(tmp_path, graph).feeds[0]) == ["gpu_0/x:0"]


def test_a_folder_of_folders_may_be_ragged(tmp_path):
    for number in (10, 9, 1):
        folder = tmp_path / f"sample{number}"
        folder.mkdir()
        np.save(folder / "x.npy", np.zeros((number, 3), np.float32))
        np.save(folder / "ids.npy", np.arange(number))
    data = load_data(tmp_path, Graph.parse(OPEN))
    assert [len(f["x"]) for f in data.feeds] == [1, 9, 10]
    np.save(tmp_path / "sample9" / "x.npy", np.zeros((9, 4), np.float32))
    with pytest.raises(DataError, match=r"sample9.*got shape \[9, 4\]: axis 1 must be 3"):
        load_data(tmp_path, Graph.parse(OPEN))


def write(path, message):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(message.SerializeToString())


def test_onnx_test_sets(tmp_path):
    for number in (0, 1, 10):
        folder = tmp_path / f"test_data_set_{number}"
        write(folder / "input_0.pb", numpy_helper.from_array(np.full((2, 3), number, np.float32)))
        write(folder / "input_1.pb", numpy_helper.from_array(np.arange(2)))
        write(folder / "output_0.pb", numpy_helper.from_array(np.zeros(1)))
    graph = Graph.parse(OPEN)
    assert [f["x"][0, 0] for f in load_data(tmp_path, graph).feeds] == [0, 1, 10]
    assert len(load_data(tmp_path / "test_data_set_1", graph)) == 1
    assert len(load_data(tmp_path, graph, limit=2)) == 2
    swapped = tmp_path / "test_data_set_1"
    write(swapped / "input_0.pb", numpy_helper.from_array(np.arange(2), "ids"))
    write(swapped / "input_1.pb", numpy_helper.from_array(np.zeros((2, 3), np.float32), "x"))
    assert load_data(swapped, graph).feeds[0]["x"].shape == (2, 3)


def test_onnx_test_sets_that_are_damaged_or_hostile(tmp_path):
    folder = tmp_path / "test_data_set_0"
    graph = Graph.parse(FIXED)
    (folder).mkdir()
    (folder / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="cannot read"):
        load_data(tmp_path, graph)
    outside = TensorProto(data_type=1, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../etc/passwd")
    write(folder / "input_0.pb", outside)
    with pytest.raises(DataError, match="not followed"):
        load_data(tmp_path, graph)
    write(folder / "input_0.pb", numpy_helper.from_array(np.zeros((4, 3), np.float32)))
    write(folder / "input_1.pb", numpy_helper.from_array(np.zeros((4, 3), np.float32)))
    with pytest.raises(DataError, match="2 input files; the model has 1 inputs"):
        load_data(tmp_path, graph)


def test_onnx_test_sets_of_sequences_and_optionals(tmp_path):
    tensor = helper.make_tensor_type_proto(1, None)
    sequence = helper.make_sequence_type_proto(tensor)
    inputs = [
        helper.make_value_info("s", sequence),
        helper.make_value_info("o", helper.make_optional_type_proto(tensor)),
    ]
    outputs = [helper.make_tensor_value_info("n", TensorProto.INT64, [])]
    made = helper.make_graph([helper.make_node("SequenceLength", ["s"], ["n"])], "g", inputs, outputs)
    graph = Graph.load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    folder = tmp_path / "test_data_set_0"
    one = np.ones(2, np.float32)
    write(folder / "input_0.pb", numpy_helper.from_list([one, one]))
    write(folder / "input_1.pb", numpy_helper.from_optional(one, dtype=onnx.OptionalProto.TENSOR))
    (feed,) = load_data(tmp_path, graph).feeds
    assert [v.tolist() for v in feed["s"]] == [[1, 1], [1, 1]]
    assert feed["o"].tolist() == [1, 1]
    (folder / "input_1.pb").unlink()
    assert load_data(tmp_path, graph).feeds[0]["o"] is None
    np.savez(tmp_path / "data.npz", s=np.zeros((2, 3)))
    with pytest.raises(DataError, match="input 's' takes sequence_type, which arrays cannot hold"):
        load_data(tmp_path / "data.npz", graph)


FUNCTIONS = """
import numpy as np
x, ids = np.zeros((2, 3), np.float32), np.arange(2)
def plain():
    return [{"x": x, "ids": ids}] * 3
def labelled(inputs):
    assert inputs["x"].shape == ("n", 3)
    while True:
        yield {"x": x, "ids": ids}, [0, 1]
def some():
    yield {"x": x, "ids": ids}, 1
    yield {"x": x, "ids": ids}
def wrong():
    yield {"x": x, "idds": ids}
def raises():
    raise RuntimeError("no disk")
def two(a, b): ...
def nothing(): return []
def number(): return [3]
value = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "data_functions_of_tests.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return lambda name, **options: load_data(f"data_functions_of_tests:{name}", Graph.parse(OPEN), **options)


def test_a_users_function(functions):
    assert len(functions("plain")) == 3
    assert functions("plain", limit=2).labels is None
    data = functions("labelled", limit=4)
    assert data.labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some", "labels for 1 of 2 items"),
        ("wrong", r"item 0: the model has no input 'idds'; did you mean 'ids'\?"),
        ("raises", "failed: RuntimeError: no disk"),
        ("two", "it takes 2"),
        ("nothing", "gave no data"),
        ("number", "item 0: expected a dict"),
        ("value", "is a int, not a function"),
        ("plian", r"has no 'plian'; did you mean 'plain'\?"),
    ],
)
def test_a_users_function_that_is_wrong(functions, name, message):
    with pytest.raises(DataError, match=message):
        functions(name)


def test_initializers_that_are_inputs_need_not_be_fed():
    x = helper.make_tensor_value_info("x", 1, [2])
    w = helper.make_tensor_value_info("w", 1, [2])
    y = helper.make_tensor_value_info("y", 1, [2])
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    made = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x, w], [y], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    inputs = model_inputs(Graph.load(model))
    assert {n: i.required for n, i in inputs.items()} == {"x": True, "w": False}
    assert list(check_feed({"x": np.zeros(2, np.float32)}, inputs, "feed")) == ["x"]
    model.ir_version = 3
    assert list(model_inputs(Graph.load(model))) == ["x"]
