"""What is loaded is saved byte for byte, whatever the type, place or size of a tensor."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxslim_lab.errors import ExternalDataError, ModelError, SaveError
from onnxslim_lab.graph import Graph

BYTES = [
    kind for kind in TensorProto.DataType.values() if kind not in (TensorProto.UNDEFINED, TensorProto.STRING)
]


def model_with(tensors, **extra):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        tensors,
        doc_string="a graph",
    )
    return helper.make_model(graph, ir_version=12, opset_imports=[helper.make_opsetid("", 25)], **extra)


def raw_tensor(name, kind, count, seed=0):
    """A tensor of random bits, NaNs and all."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    packed = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
    packed |= {"float6_e2m3fn": 6, "float6_e3m2fn": 6}
    width = packed.get(dtype.name, dtype.itemsize * 8)
    size = -(-count * width // 8)
    data = np.random.default_rng(seed).integers(0, 2 if kind == TensorProto.BOOL else 256, size, np.uint8)
    return TensorProto(name=name, data_type=kind, dims=[count], raw_data=data.tobytes())


@pytest.mark.parametrize("kind", BYTES, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_every_dtype_keeps_its_bytes(kind, count, tmp_path):
    tensor = raw_tensor("w", kind, count)
    data = model_with([tensor]).SerializeToString()
    graph = Graph.load(data)
    saved = graph.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == data
    assert saved.total_bytes == len(data)
    again = graph.constant("w")
    assert again.shape == (count,)
    assert again.dtype == helper.tensor_dtype_to_np_dtype(kind)


@pytest.mark.parametrize("kind", BYTES, ids=TensorProto.DataType.Name)
def test_set_constant_writes_what_numpy_helper_reads(kind):
    tensor = raw_tensor("w", kind, 3000)
    values = numpy_helper.to_array(tensor)
    graph = Graph.load(model_with([]).SerializeToString())
    graph.set_constant("w", values)
    back = graph.to_model().graph.initializer[0]
    assert back.data_type == kind
    assert numpy_helper.to_array(back).tobytes() == values.tobytes()


def test_typed_fields_strings_and_everything_around_survive(tmp_path):
    floats = helper.make_tensor("f", TensorProto.FLOAT, [4000], np.arange(4000, dtype=np.float32))
    doubles = helper.make_tensor("d", TensorProto.DOUBLE, [4000], np.arange(4000.0))
    ints = helper.make_tensor("i", TensorProto.INT64, [4000], np.arange(4000))
    texts = helper.make_tensor("s", TensorProto.STRING, [3], [b"a", b"", b"\xff\x00"])
    assert floats.float_data
    model = model_with([floats, doubles, ints, texts], producer_name="p", doc_string="doc")
    model.metadata_props.add(key="alphabet", value="abc\n")
    model.opset_import.add(domain="my.domain", version=3)
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("sp", TensorProto.FLOAT, [2000], np.ones(2000, np.float32)))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [2000], np.arange(2000)))
    sparse.dims.append(9000)
    annotation = model.graph.quantization_annotation.add(tensor_name="f")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="f")
    training = model.training_info.add()
    training.algorithm.initializer.append(raw_tensor("t", TensorProto.FLOAT, 3000))
    node = helper.make_node("Custom", ["x"], ["z"], "c", domain="my.domain", blob=raw_tensor("a", 1, 999))
    model.graph.node.append(node)
    function = helper.make_function(
        "my.domain",
        "Fn",
        ["a"],
        ["b"],
        [helper.make_node("Identity", ["a"], ["b"])],
        [helper.make_opsetid("", 25)],
    )
    function.doc_string = "a function"
    model.functions.append(function)
    data = model.SerializeToString()
    Graph.load(data).save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == data


def test_bodies_and_constant_nodes_keep_their_tensors(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["out"])],
        "body",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [500])],
        [raw_tensor("inner", TensorProto.FLOAT, 500)],
    )
    nodes = [
        helper.make_node("Constant", [], ["big"], value=raw_tensor("", TensorProto.FLOAT, 500, 1)),
        helper.make_node("Add", ["x0", "big"], ["x"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x0", 1, [500]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("y", 1, [500])],
    )
    data = helper.make_model(graph, ir_version=10).SerializeToString()
    loaded = Graph.load(data)
    assert len(loaded.light_model().SerializeToString()) < 2000
    loaded.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == data


def test_external_data_there_and_back(tmp_path):
    model = model_with(
        [raw_tensor("w", TensorProto.FLOAT, 100_000), raw_tensor("small", TensorProto.INT64, 3)]
    )
    whole = model.SerializeToString()
    saved = Graph.load(whole).save(tmp_path / "a.onnx", external=True)
    assert len(saved.paths) == 2
    assert saved.total_bytes == sum(path.stat().st_size for path in saved.paths)
    onnx.checker.check_model(tmp_path / "a.onnx")
    back = Graph.load(tmp_path / "a.onnx")
    assert back.source.external
    back.save(tmp_path / "b.onnx", external=False)
    assert (tmp_path / "b.onnx").read_bytes() == whole


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5000))
def test_truncated_or_mangled_bytes_raise_only_model_errors(seed, cut):
    data = bytearray(model_with([raw_tensor("w", 1, 500)]).SerializeToString())
    rng = np.random.default_rng(seed)
    if seed % 2:
        data = data[: max(0, len(data) - cut)]
    else:
        for position in rng.integers(0, len(data), 3):
            data[position] = rng.integers(0, 256)
    try:
        Graph.load(bytes(data))
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - any outcome but another exception is right


EXTERNAL = [
    ("/etc/passwd", "0", "400"),
    ("../outside.bin", "0", "400"),
    ("a/../../outside.bin", "0", "400"),
    ("..\\outside.bin", "0", "400"),
    ("C:\\outside.bin", "0", "400"),
    ("link.bin", "0", "400"),
    ("missing.bin", "0", "400"),
    ("data.bin", "0", "399"),
    ("data.bin", "8", "400"),
    ("data.bin", "-1", "400"),
    ("data.bin", "x", "400"),
    ("", "0", "400"),
    ("a\0b", "0", "400"),
]


@pytest.mark.parametrize(("location", "offset", "length"), EXTERNAL)
def test_unsafe_external_data_is_refused(tmp_path, location, offset, length):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(400))
    (folder / "data.bin").write_bytes(bytes(404))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[100], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    (folder / "m.onnx").write_bytes(model_with([tensor]).SerializeToString())
    with pytest.raises(ExternalDataError, match="tensor 'w'"):
        Graph.load(folder / "m.onnx")


def test_a_stub_of_our_own_cannot_be_forged(tmp_path):
    tensor = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[400], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="onnxslim_lab:0")
    (tmp_path / "m.onnx").write_bytes(model_with([tensor]).SerializeToString())
    with pytest.raises(ExternalDataError):
        Graph.load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "dims",
    [[2**31, 2**31, 2**31], [-4], [3], [2**62, 4]],
    ids=["overflow", "negative", "too small", "overflow to zero"],
)
def test_sizes_that_do_not_match_are_refused(dims):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(400))
    with pytest.raises(ModelError, match="'w'"):
        Graph.load(model_with([tensor]).SerializeToString())


def test_saving_over_a_file_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"before")
    graph = Graph.load(model_with([raw_tensor("w", 1, 500)]).SerializeToString())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxslim_lab.modelfile.os.fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        graph.save(target)
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
